//! Blocks that a transfer task fills.

use std::sync::Arc;

use baton_proto::v1::Token;

use super::inbox::{Command, Inbox};
use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};
use crate::scheduler::{Pulled, SequenceId};

/// Why a block of an order was not filled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FillError {
    /// It is not the next one, or none.
    #[error("{0}")]
    Order(String),
    /// The device that it lies in failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Blocks of a sequence, to be filled by whoever holds the order. The engine neither reads nor
/// frees them until the order is gone.
pub struct PullOrder {
    pub(super) id: SequenceId,
    /// All blocks of the sequence.
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that are filled already.
    pub(super) cached: usize,
    /// Blocks filled so far, in order, after the cached ones.
    pub(super) arrived: usize,
    /// The peer's first token, when every block is filled.
    pub(super) first: Option<Token>,
    /// Leading positions that are filled, where the peer had no more.
    pub(super) positions: Option<usize>,
    /// Whether the last block of the peer's is filled in part only. Which one that is, and how far,
    /// it tells at the end.
    pub(super) in_part: bool,
    pub(super) pool: Arc<KvPool>,
    pub(super) inbox: Arc<Inbox>,
}

impl PullOrder {
    /// Leading blocks that need not be sent.
    pub fn cached_blocks(&self) -> usize {
        self.cached
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.pool.block_bytes()
    }

    /// The pool that the blocks are in.
    pub fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    /// The next blocks to fill, which are the order's alone. `index` is the position of the first in
    /// the sequence: blocks come in order.
    pub fn next(&self, index: usize, count: usize) -> Result<&[BlockId], FillError> {
        let next = self.cached + self.arrived;
        let blocks = (index == next).then(|| self.blocks.get(next..next + count)).flatten();
        blocks.ok_or_else(|| FillError::Order(format!("block {index} came out of order")))
    }

    /// Counts the next blocks as filled.
    pub fn filled(&mut self, count: usize) {
        self.arrived += count;
    }

    /// Fills the next block, as [`Self::next`] gives it, from the host's memory.
    pub fn fill(&mut self, index: usize, bytes: &[u8]) -> Result<(), FillError> {
        let block = self.next(index, 1)?[0];
        if bytes.len() != self.pool.block_bytes() {
            return Err(FillError::Order(format!("block {index} has {} bytes", bytes.len())));
        }
        // SAFETY: the engine gave this block to the order and touches it only when that is gone.
        unsafe { self.pool.write_block(block, bytes) }?;
        self.filled(1);
        Ok(())
    }

    /// The peer sends a sequence that it was in the middle of.
    pub fn comes_in_part(&mut self) {
        self.in_part = true;
    }

    /// Forgets what has come: it may be wrong.
    pub fn discard(&mut self) {
        self.arrived = 0;
    }

    /// Ends the pull well. An error when blocks are missing.
    pub fn complete(mut self, first: Token) -> Result<(), String> {
        let missing = self.blocks.len() - self.cached - self.arrived;
        if missing > 0 {
            return Err(format!("{missing} blocks did not come"));
        }
        self.first = Some(first);
        Ok(())
    }

    /// Ends the pull of a peer's `positions` leading positions well. An error when blocks of them
    /// are missing.
    pub fn complete_part(mut self, positions: usize) -> Result<(), String> {
        let wanted = positions.div_ceil(self.block_size());
        let missing = wanted.saturating_sub(self.cached + self.arrived);
        if missing > 0 {
            return Err(format!("{missing} blocks did not come"));
        }
        self.positions = Some(positions);
        Ok(())
    }

    fn block_size(&self) -> usize {
        self.pool.layout().block_size as usize
    }
}

impl Drop for PullOrder {
    fn drop(&mut self) {
        let first = self.first.take();
        let pulled = match (&first, self.positions) {
            (Some(_), _) => Pulled::All,
            (None, Some(positions)) => Pulled::Positions(positions),
            // The last one may be that which is filled in part.
            (None, None) if self.in_part => Pulled::Blocks(self.arrived.saturating_sub(1)),
            (None, None) => Pulled::Blocks(self.arrived),
        };
        self.inbox.push(Command::PullEnded { id: self.id, pulled, first });
    }
}

impl std::fmt::Debug for PullOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullOrder").field("id", &self.id).field("arrived", &self.arrived).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_proto::v1::KvLayout;

    use super::*;
    use crate::scheduler::{Limits, Speculation};

    /// Some of four blocks come, and then no more.
    fn cut_short(came: usize, in_part: bool) -> Pulled {
        let limits = Limits {
            block_size: 16,
            blocks: 4,
            max_batch_tokens: 64,
            max_running: 1,
            max_waiting: 1,
            max_model_len: 64,
            leading: 0,
            speculation: Speculation::OFF,
            priority_aging: Duration::ZERO,
        };
        let inbox = Arc::new(Inbox::new(limits));
        let layout = KvLayout { block_size: 16, block_bytes: 64, ..KvLayout::default() };
        let mut order = PullOrder {
            id: 1,
            blocks: vec![0, 1, 2, 3],
            cached: 0,
            arrived: 0,
            first: None,
            positions: None,
            in_part: false,
            pool: Arc::new(KvPool::new(layout, 4).unwrap()),
            inbox: inbox.clone(),
        };
        if in_part {
            order.comes_in_part();
        }
        for block in 0..came {
            order.fill(block, &[7; 64]).unwrap();
        }
        drop(order);
        match inbox.take(None).commands.pop_front() {
            Some(Command::PullEnded { pulled, .. }) => pulled,
            _ => panic!("the pull has not ended"),
        }
    }

    #[test]
    fn the_last_block_of_a_sequence_that_was_cut_short_is_not_trusted() {
        assert_eq!(cut_short(3, false), Pulled::Blocks(3));
        // It may be filled in part: how far, the peer did not live to say.
        assert_eq!(cut_short(3, true), Pulled::Blocks(2));
        assert_eq!(cut_short(0, true), Pulled::Blocks(0));
    }
}
