//! Blocks as messages of the `Prefill` stream itself: works between any two hosts.

use std::sync::Arc;

use baton_proto::MAX_MESSAGE_BYTES;
use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use super::{Opening, Outlet, Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};

/// The largest block that fits into a message; the rest is for what is around it.
const MAX_BLOCK_BYTES: u64 = MAX_MESSAGE_BYTES as u64 - 1024;

/// What is wrong with a layout whose blocks do not fit into a message, and which ones do.
pub fn check(layout: &v1::KvLayout) -> Result<(), String> {
    let &v1::KvLayout { block_size, block_bytes, .. } = layout;
    if block_bytes <= MAX_BLOCK_BYTES {
        return Ok(());
    }
    let token_bytes = block_bytes.div_ceil(u64::from(block_size.max(1)));
    // Block sizes are multiples of 16.
    let smaller = match MAX_BLOCK_BYTES / token_bytes / 16 * 16 {
        0 => String::new(),
        fits => format!("give at most --block-size {fits}, or "),
    };
    Err(format!(
        "--block-size {block_size}: a KV block of this model has {block_bytes} bytes, and gRPC \
         carries at most {MAX_BLOCK_BYTES}; {smaller}leave grpc out of --transports"
    ))
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_do_not_fit_into_a_message_are_refused_with_a_size_that_does() {
        let of = |block_size: u32, token_bytes: u64| {
            let block_bytes = u64::from(block_size) * token_bytes;
            check(&v1::KvLayout { block_size, block_bytes, ..v1::KvLayout::default() })
        };
        // Of 80 layers with 8 heads of 128 dimensions, in two bytes.
        let large = 80 * 8 * 128 * 2 * 2;
        assert_eq!(of(16, large), Ok(()));
        let error = of(64, large).unwrap_err();
        assert!(error.contains("--block-size 64") && error.contains("--block-size 48"), "{error}");
        assert_eq!(of(48, large), Ok(()));
        let error = of(16, 2 << 20).unwrap_err();
        assert!(
            !error.contains("at most --block-size") && error.contains("--transports"),
            "{error}"
        );
        // Exactly a message's size leaves nothing for what is around it.
        assert!(of(16, 1 << 20).is_err());
    }
}
