//! Blocks copied straight out of the peer's KV pool, on one host.
//!
//! Where the peer's memory is out of reach, in another container say, the caller falls back to gRPC.

use std::sync::Arc;

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use super::refs::{ready, refs};
use super::region::{self, Region};
use super::{Opening, Outlet, Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};

/// Shared memory.
pub struct SharedMemory;

impl Transport for SharedMemory {
    fn kind(&self) -> v1::Transport {
        v1::Transport::SharedMemory
    }

    fn offer(&self, pool: &Arc<KvPool>, _kept: u64) -> Result<Box<dyn Outlet>, DeviceError> {
        Ok(Box::new(Offer(pool.clone())))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Box<dyn Source>, TransferError> {
        let region = opening.accepted.region.as_ref();
        let region =
            region.ok_or_else(|| TransferError::Protocol("no region for shared memory".into()))?;
        let region = Region::open(region, opening.layout.block_bytes as usize)
            .map_err(|reason| TransferError::NotHere { transport: self.kind(), reason })?;
        Ok(Box::new(Peer(region)))
    }
}

struct Offer(Arc<KvPool>);

impl Outlet for Offer {
    fn accepted(&self) -> v1::PrefillAccepted {
        v1::PrefillAccepted {
            transport: v1::Transport::SharedMemory.into(),
            region: Some(region::describe(&self.0)),
            ..v1::PrefillAccepted::default()
        }
    }

    fn publish(
        &mut self,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Result<Vec<Event>, DeviceError> {
        Ok(vec![ready(first, blocks)])
    }
}

struct Peer(Region);

impl Peer {
    fn copy(&self, event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        let mut bytes = 0;
        for v1::BlockRef { index, block, generation } in refs(event)? {
            if block as usize >= self.0.blocks() {
                return Err(TransferError::Protocol(format!("no block {block}")));
            }
            order.fill(index as usize, self.0.block(block))?;
            bytes += self.0.block(block).len() as u64;
            // The copy is whole if the block was not given away before its end.
            if !self.0.still(block, generation) {
                order.discard();
                return Err(TransferError::Expired(block));
            }
        }
        Ok(bytes)
    }
}

impl Source for Peer {
    fn take<'a>(
        &'a mut self,
        event: Event,
        order: &'a mut PullOrder,
    ) -> BoxFuture<'a, Result<u64, TransferError>> {
        Box::pin(std::future::ready(self.copy(event, order)))
    }

    fn survives_peer(&self) -> bool {
        // Every block was checked after its copy.
        true
    }
}
