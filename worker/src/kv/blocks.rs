//! Which KV block belongs to whom. Plain data: nothing here touches a block's memory.
//!
//! A block is *held* by a number of sequences, or *free*. A free block may still be *cached*: its
//! content is addressed by a [`BlockHash`] and comes back to life when a prompt has the same
//! prefix. Free blocks wait in one list: those without content in front, cached ones behind in the
//! order in which they were let go, so that the least recently used content is lost first.

use std::collections::HashMap;

use baton_proto::BlockHash;

use super::BlockId;

const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Copy)]
struct Block {
    /// Sequences that hold the block.
    holders: u32,
    /// Address of its content, once the block is full.
    hash: Option<BlockHash>,
    /// Neighbours in the free list.
    previous: BlockId,
    next: BlockId,
}

/// The books of one KV pool. Every operation takes constant time.
pub struct BlockManager {
    blocks: Vec<Block>,
    /// Addresses of full blocks, held or free.
    cached: HashMap<BlockHash, BlockId>,
    /// Ends of the free list.
    first: BlockId,
    last: BlockId,
    free: usize,
    free_cached: usize,
}

impl BlockManager {
    /// A pool of `count` free blocks.
    pub fn new(count: usize) -> Self {
        let block = Block { holders: 0, hash: None, previous: NONE, next: NONE };
        let mut manager = Self {
            blocks: vec![block; count],
            cached: HashMap::new(),
            first: NONE,
            last: NONE,
            free: 0,
            free_cached: 0,
        };
        for block in (0..count as BlockId).rev() {
            manager.link_first(block);
        }
        manager
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`Self::allocate`] can still give, cached ones among them.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Free blocks whose content is still addressed.
    pub fn free_cached(&self) -> usize {
        self.free_cached
    }

    /// Takes a free block, losing the least recently used content if it has to.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.first;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        if let Some(hash) = self.blocks[block as usize].hash.take() {
            self.cached.remove(&hash);
        }
        self.blocks[block as usize].holders = 1;
        Some(block)
    }

    /// How many leading `hashes` are cached.
    pub fn cached_prefix(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.cached.contains_key(hash)).count()
    }

    /// Of the first blocks of `hashes`, which must be cached, those that nobody holds: holding
    /// them takes them from [`Self::free`].
    pub fn free_among(&self, hashes: &[BlockHash]) -> usize {
        let holders = |hash| self.cached.get(hash).map(|&block| self.blocks[block as usize].holders);
        hashes.iter().filter(|hash| holders(hash) == Some(0)).count()
    }

    /// Holds the block with this content, if there is one.
    pub fn hold(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let block = *self.cached.get(hash)?;
        if self.blocks[block as usize].holders == 0 {
            self.unlink(block);
        }
        self.blocks[block as usize].holders += 1;
        Some(block)
    }

    /// Makes a full block findable. When another block has the same content, that one stays.
    pub fn commit(&mut self, block: BlockId, hash: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.cached.entry(hash) {
            entry.insert(block);
            self.blocks[block as usize].hash = Some(hash);
        }
    }

    /// Lets a block go.
    ///
    /// # Panics
    /// When nobody holds it.
    pub fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block as usize];
        assert!(entry.holders > 0, "block {block} released twice");
        entry.holders -= 1;
        if entry.holders == 0 {
            if entry.hash.is_some() { self.link_last(block) } else { self.link_first(block) }
        }
    }

    fn link_first(&mut self, block: BlockId) {
        let next = self.first;
        self.link(block, NONE, next);
    }

    fn link_last(&mut self, block: BlockId) {
        let previous = self.last;
        self.link(block, previous, NONE);
    }

    fn link(&mut self, block: BlockId, previous: BlockId, next: BlockId) {
        let entry = &mut self.blocks[block as usize];
        (entry.previous, entry.next) = (previous, next);
        self.free += 1;
        self.free_cached += usize::from(entry.hash.is_some());
        *self.next_of(previous) = block;
        *self.previous_of(next) = block;
    }

    fn unlink(&mut self, block: BlockId) {
        let Block { previous, next, hash, .. } = self.blocks[block as usize];
        self.free -= 1;
        self.free_cached -= usize::from(hash.is_some());
        *self.next_of(previous) = next;
        *self.previous_of(next) = previous;
    }

    fn next_of(&mut self, block: BlockId) -> &mut BlockId {
        if block == NONE { &mut self.first } else { &mut self.blocks[block as usize].next }
    }

    fn previous_of(&mut self, block: BlockId) -> &mut BlockId {
        if block == NONE { &mut self.last } else { &mut self.blocks[block as usize].previous }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet, VecDeque};

    use baton_proto::block_hashes;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Allocate,
        Hold(u32),
        Commit(usize, u32),
        Release(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => Just(Op::Allocate),
            2 => (0u32..12).prop_map(Op::Hold),
            2 => (0usize..64, 0u32..12).prop_map(|(at, content)| Op::Commit(at, content)),
            3 => (0usize..64).prop_map(Op::Release),
        ]
    }

    proptest! {
        /// Against the plainest books possible.
        #[test]
        fn behaves_like_the_plain_model(ops in prop::collection::vec(op(), 0..200), count in 1usize..12) {
            let hash = |content: u32| block_hashes("", &[content], 1)[0];
            let mut manager = BlockManager::new(count);
            let mut held: Vec<BlockId> = Vec::new();
            let mut content: HashMap<BlockId, u32> = HashMap::new();
            let mut free: VecDeque<BlockId> = (0..count as BlockId).collect();
            for op in ops {
                match op {
                    Op::Allocate => {
                        let got = manager.allocate();
                        prop_assert_eq!(got, free.pop_front());
                        if let Some(block) = got {
                            content.remove(&block);
                            held.push(block);
                        }
                    }
                    Op::Hold(wanted) => {
                        let expected = content.iter().find(|(_, c)| **c == wanted).map(|(b, _)| *b);
                        prop_assert_eq!(manager.cached_prefix(&[hash(wanted)]), usize::from(expected.is_some()));
                        prop_assert_eq!(manager.hold(&hash(wanted)), expected);
                        if let Some(block) = expected {
                            free.retain(|free| *free != block);
                            held.push(block);
                        }
                    }
                    Op::Commit(at, wanted) => {
                        if held.is_empty() { continue }
                        let block = held[at % held.len()];
                        if content.contains_key(&block) { continue }
                        manager.commit(block, hash(wanted));
                        if !content.values().any(|c| *c == wanted) {
                            content.insert(block, wanted);
                        }
                    }
                    Op::Release(at) => {
                        if held.is_empty() { continue }
                        let block = held.swap_remove(at % held.len());
                        manager.release(block);
                        if !held.contains(&block) {
                            if content.contains_key(&block) { free.push_back(block) } else { free.push_front(block) }
                        }
                    }
                }
                prop_assert_eq!(manager.free(), free.len());
                prop_assert_eq!(manager.free_cached(), free.iter().filter(|b| content.contains_key(b)).count());
                let distinct: HashSet<_> = held.iter().collect();
                prop_assert_eq!(distinct.len() + free.len(), count);
            }
        }
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_a_bug() {
        let mut manager = BlockManager::new(1);
        let block = manager.allocate().unwrap();
        manager.release(block);
        manager.release(block);
    }
}
