//! Blocks copied from GPU to GPU, on one host.
//!
//! The peer's blocks lie in one range of its GPU's memory, which is opened by its CUDA IPC handle for
//! the length of one hand-off. Not longer: memory that somebody has open stays allocated when its
//! process is killed, and the worker that is started in its place would find none.
//!
//! What says whether a copy is good is in the host's memory, as with shared memory: a generation for
//! each block. Where either is out of reach, in another container or on a GPU that this process does
//! not see, the caller falls back to another transport.

use std::sync::Arc;

use baton_cuda::{IPC_HANDLE_BYTES, PeerMemory};
use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use super::device::{blocks_of, in_place};
use super::refs::{ready, refs};
use super::region::{self, Region};
use super::{Opening, Outlet, Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::cuda::failed;
use crate::kv::pool::{DeviceError, KvPool};

/// CUDA IPC.
pub struct CudaIpc;

const KIND: v1::Transport = v1::Transport::CudaIpc;

impl Transport for CudaIpc {
    fn kind(&self) -> v1::Transport {
        KIND
    }

    fn offer(&self, pool: &Arc<KvPool>, _kept: u64) -> Result<Box<dyn Outlet>, DeviceError> {
        let blocks = blocks_of(pool)?;
        let device = v1::DeviceRegion {
            device_uuid: blocks.device().uuid().to_vec(),
            handle: in_place(|| blocks.memory().export()).map_err(failed)?.to_vec(),
            blocks: pool.blocks() as u32,
        };
        let accepted = v1::PrefillAccepted {
            transport: KIND.into(),
            region: Some(region::describe(pool)),
            device: Some(device),
            nccl: None,
        };
        Ok(Box::new(Offer(accepted)))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Box<dyn Source>, TransferError> {
        let v1::PrefillAccepted { region: Some(region), device: Some(device), .. } =
            opening.accepted
        else {
            return Err(TransferError::Protocol("no regions for CUDA IPC".into()));
        };
        let handle: &[u8; IPC_HANDLE_BYTES] = device.handle[..]
            .try_into()
            .map_err(|_| TransferError::Protocol("a CUDA IPC handle of another length".into()))?;
        let not_here = |reason: String| TransferError::NotHere { transport: KIND, reason };
        let generations = Region::open(region, 0).map_err(not_here)?;
        let blocks = device.blocks as usize;
        if blocks > generations.blocks() {
            return Err(TransferError::Protocol("more blocks than generations".into()));
        }
        let uuid: [u8; 16] = device.device_uuid[..]
            .try_into()
            .map_err(|_| TransferError::Protocol("a GPU's UUID of another length".into()))?;
        if !baton_cuda::visible(&uuid) {
            return Err(not_here(
                "the peer's GPU is not among those that this process sees".into(),
            ));
        }
        let here = blocks_of(opening.pool)?.device();
        let block_bytes = opening.layout.block_bytes as usize;
        let memory = in_place(|| PeerMemory::open(here, handle, blocks, block_bytes))
            .map_err(|error| not_here(error.to_string()))?;
        Ok(Box::new(Peer { generations, memory, blocks }))
    }
}

struct Offer(v1::PrefillAccepted);

impl Outlet for Offer {
    fn accepted(&self) -> v1::PrefillAccepted {
        self.0.clone()
    }

    fn publish(
        &mut self,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Result<Vec<Event>, DeviceError> {
        Ok(vec![ready(first, blocks)])
    }
}

/// A peer's blocks, and their generations.
struct Peer {
    generations: Region,
    memory: PeerMemory,
    blocks: usize,
}

impl Peer {
    fn copy(&self, event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        let refs = refs(event)?;
        let Some(first) = refs.first() else { return Ok(0) };
        let pool = order.pool().clone();
        if let Some(other) = refs.iter().find(|it| it.block as usize >= self.blocks) {
            return Err(TransferError::Protocol(format!("no block {}", other.block)));
        }
        if refs.iter().zip(first.index..).any(|(it, index)| it.index != index) {
            return Err(TransferError::Protocol("blocks came out of order".into()));
        }
        let from: Vec<u32> = refs.iter().map(|it| it.block).collect();
        let to = order.next(first.index as usize, refs.len())?;
        blocks_of(&pool)?.memory().copy_in(&self.memory, &from, to).map_err(failed)?;
        order.filled(refs.len());
        // A copy is whole if the block was not given away before its end.
        for v1::BlockRef { block, generation, .. } in refs {
            if !self.generations.still(block, generation) {
                order.discard();
                return Err(TransferError::Expired(block));
            }
        }
        Ok((from.len() * pool.block_bytes()) as u64)
    }
}

impl Source for Peer {
    fn take<'a>(
        &'a mut self,
        event: Event,
        order: &'a mut PullOrder,
    ) -> BoxFuture<'a, Result<u64, TransferError>> {
        Box::pin(std::future::ready(in_place(|| self.copy(event, order))))
    }

    fn survives_peer(&self) -> bool {
        // Every block was checked after its copy.
        true
    }
}
