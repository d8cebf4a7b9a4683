//! Blocks as messages of the `Prefill` stream itself: works between any two hosts.

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;

use super::{Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// The gRPC stream.
pub struct Grpc;

impl Transport for Grpc {
    fn kind(&self) -> v1::Transport {
        v1::Transport::Grpc
    }

    fn accept(&self, _pool: &KvPool) -> v1::PrefillAccepted {
        v1::PrefillAccepted { transport: self.kind().into(), region: None }
    }

    fn publish(&self, pool: &KvPool, first: usize, blocks: &[(BlockId, u64)]) -> Vec<Event> {
        blocks
            .iter()
            .enumerate()
            .map(|(i, &(block, _))| {
                // SAFETY: the block is complete and pinned by the request: nobody writes it.
                let payload = unsafe { pool.read_block(block) };
                Event::Block(v1::BlockData { index: (first + i) as u32, payload })
            })
            .collect()
    }

    fn open(
        &self,
        _accepted: &v1::PrefillAccepted,
        _layout: &v1::KvLayout,
    ) -> Result<Box<dyn Source>, TransferError> {
        Ok(Box::new(Messages))
    }
}

struct Messages;

impl Source for Messages {
    fn take(&mut self, event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        match event {
            Event::Block(block) => {
                order
                    .fill(block.index as usize, &block.payload)
                    .map_err(TransferError::Protocol)?;
                Ok(block.payload.len() as u64)
            }
            _ => Err(TransferError::Protocol("expected a block".into())),
        }
    }

    fn survives_peer(&self) -> bool {
        true
    }
}
