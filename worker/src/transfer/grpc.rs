//! Blocks as messages of the `Prefill` stream itself: works between any two hosts.

use std::sync::Arc;

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use super::{Opening, Outlet, Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};

/// The gRPC stream.
pub struct Grpc;

impl Transport for Grpc {
    fn kind(&self) -> v1::Transport {
        v1::Transport::Grpc
    }

    fn offer(&self, pool: &Arc<KvPool>, _kept: u64) -> Result<Box<dyn Outlet>, DeviceError> {
        Ok(Box::new(Sent(pool.clone())))
    }

    fn open(&self, _opening: Opening<'_>) -> Result<Box<dyn Source>, TransferError> {
        Ok(Box::new(Messages))
    }
}

/// Copies. What has to wait for a GPU lets other threads take over meanwhile.
fn in_place<T>(pool: &KvPool, copy: impl FnOnce() -> T) -> T {
    if pool.is_on_device() { tokio::task::block_in_place(copy) } else { copy() }
}

struct Sent(Arc<KvPool>);

impl Outlet for Sent {
    fn accepted(&self) -> v1::PrefillAccepted {
        v1::PrefillAccepted {
            transport: v1::Transport::Grpc.into(),
            ..v1::PrefillAccepted::default()
        }
    }

    fn publish(
        &mut self,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Result<Vec<Event>, DeviceError> {
        let event = |(i, &(block, generation)): (usize, &(BlockId, u64))| {
            // SAFETY: the block is complete and pinned by the request: nobody writes it.
            let payload = unsafe { self.0.read_block(block) }?;
            // And if it was not: what another request has written there must not leave.
            std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
            if self.0.generation(block) != generation {
                return Err(DeviceError("a block was freed before it was sent".into()));
            }
            Ok(Event::Block(v1::BlockData { index: (first + i) as u32, payload }))
        };
        in_place(&self.0, || blocks.iter().enumerate().map(event).collect())
    }
}

struct Messages;

impl Messages {
    fn copy(event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        match event {
            Event::Block(block) => {
                order.fill(block.index as usize, &block.payload)?;
                Ok(block.payload.len() as u64)
            }
            _ => Err(TransferError::Protocol("expected a block".into())),
        }
    }
}

impl Source for Messages {
    fn take<'a>(
        &'a mut self,
        event: Event,
        order: &'a mut PullOrder,
    ) -> BoxFuture<'a, Result<u64, TransferError>> {
        let pool = order.pool().clone();
        Box::pin(std::future::ready(in_place(&pool, || Self::copy(event, order))))
    }

    fn survives_peer(&self) -> bool {
        true
    }
}
