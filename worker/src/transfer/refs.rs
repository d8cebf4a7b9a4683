//! Events that tell where blocks are, of the transports that do not send them along.

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;

use super::TransferError;
use crate::kv::BlockId;

/// The event that tells where blocks are. `first` is the position of the first in the sequence.
pub(super) fn ready(first: usize, blocks: &[(BlockId, u64)]) -> Event {
    let reference = |(i, &(block, generation)): (usize, &(BlockId, u64))| v1::BlockRef {
        index: (first + i) as u32,
        block,
        generation,
    };
    Event::Ready(v1::BlocksReady { blocks: blocks.iter().enumerate().map(reference).collect() })
}

/// The blocks that such an event tells of.
pub(super) fn refs(event: Event) -> Result<Vec<v1::BlockRef>, TransferError> {
    match event {
        Event::Ready(ready) => Ok(ready.blocks),
        _ => Err(TransferError::Protocol("expected block references".into())),
    }
}
