//! What a worker probably has in its prefix cache.
//!
//! Learned from what was routed to it; bounded, the oldest forgotten first, as in the worker. It
//! may be wrong: the worker alone decides what is cached, and a wrong guess costs a little time.

use std::collections::{HashMap, VecDeque};

use baton_proto::BlockHash;

/// A bounded set of block addresses, by last use.
#[derive(Debug)]
pub struct PrefixIndex {
    capacity: usize,
    /// When each was last used.
    used: HashMap<BlockHash, u64>,
    /// Uses in order; an entry is stale when the address was used again later.
    order: VecDeque<(BlockHash, u64)>,
    clock: u64,
}

impl PrefixIndex {
    /// An empty index of at most `capacity` blocks.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, used: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// How many leading blocks are believed cached.
    pub fn matching(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.used.contains_key(hash)).count()
    }

    /// Notes that a prompt went to the worker.
    pub fn insert(&mut self, hashes: &[BlockHash]) {
        // Last block first: a prefix is used after what follows it, so it is forgotten later.
        for hash in hashes.iter().rev() {
            self.clock += 1;
            self.used.insert(*hash, self.clock);
            self.order.push_back((*hash, self.clock));
        }
        // Stale entries go too, so the queue stays in proportion.
        while self.used.len() > self.capacity || self.order.len() > 2 * self.capacity {
            let Some((hash, at)) = self.order.pop_front() else { break };
            if self.used.get(&hash) == Some(&at) {
                self.used.remove(&hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::block_hashes;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_bounded_and_knows_the_latest(prompts in prop::collection::vec((0u32..20, 1usize..30), 1..60)) {
            let mut index = PrefixIndex::new(64);
            for (seed, blocks) in prompts {
                let tokens: Vec<u32> = (0..blocks as u32).map(|i| seed * 100 + i).collect();
                let hashes = block_hashes("", &tokens, 1);
                index.insert(&hashes);
                prop_assert_eq!(index.matching(&hashes), blocks);
                prop_assert!(index.used.len() <= 64 && index.order.len() <= 128);
            }
        }
    }

    #[test]
    fn what_was_used_last_stays() {
        let mut index = PrefixIndex::new(4);
        let (a, b, c) = (
            block_hashes("a", &[1, 2], 1),
            block_hashes("b", &[1, 2], 1),
            block_hashes("c", &[1, 2], 1),
        );
        index.insert(&a);
        index.insert(&b);
        index.insert(&a);
        index.insert(&c);
        assert_eq!([index.matching(&a), index.matching(&b), index.matching(&c)], [2, 0, 2]);
    }
}
