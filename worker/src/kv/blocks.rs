//! Who owns which KV block.
//!
//! A block is referenced by any number of sequences. One that nobody references is free; when its
//! content has an address it can still be found by it, until its memory is needed. Free blocks are
//! handed out empty ones first, then in the order in which they were freed, so that the content
//! that was used last lives longest. Everything is O(1) a block, and plain data: the memory is in
//! [`super::pool`].

use std::collections::HashMap;

use baton_proto::BlockHash;

use super::BlockId;
use super::changes::Change;

/// What a reference to a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A sequence that this worker computes.
    Request,
    /// A hand-off: blocks being pulled, or held for a peer to fetch.
    Handoff,
}

/// How many blocks are whose. The four add up to the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Referenced by at least one request.
    pub requests: usize,
    /// Referenced by hand-offs only.
    pub handoff: usize,
    /// Free, with content that can be found.
    pub cached: usize,
    /// Free and empty.
    pub free: usize,
}

const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Copy)]
struct Block {
    /// References by [`Owner`].
    refs: [u32; 2],
    hash: Option<BlockHash>,
    /// Neighbours in the free list.
    prev: BlockId,
    next: BlockId,
}

/// Reference counts, the free list and the prefix cache.
pub struct BlockManager {
    blocks: Vec<Block>,
    /// First to be handed out.
    head: BlockId,
    /// Last to be handed out.
    tail: BlockId,
    by_hash: HashMap<BlockHash, BlockId>,
    usage: Usage,
    /// What became known by an address or unknown, since [`Self::changes`] was emptied.
    changes: Vec<Change>,
}

impl BlockManager {
    /// All blocks free and empty.
    pub fn new(blocks: usize) -> Self {
        let mut manager = Self {
            blocks: vec![Block { refs: [0, 0], hash: None, prev: NONE, next: NONE }; blocks],
            head: NONE,
            tail: NONE,
            // Room for removed entries too, so that it never grows in the middle of a step.
            by_hash: HashMap::with_capacity(2 * blocks),
            usage: Usage::default(),
            // Of a step there are at most a commit and an eviction for each block.
            changes: Vec::with_capacity(2 * blocks),
        };
        for id in 0..blocks as BlockId {
            manager.push_back(id);
            manager.usage.free += 1;
        }
        manager
    }

    /// How many blocks there are.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// How many [`Self::allocate`] calls would succeed now.
    pub fn available(&self) -> usize {
        self.usage.free + self.usage.cached
    }

    /// Counts by owner.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The changes of what can be found, in order, to be taken after each step.
    pub fn changes(&mut self) -> &mut Vec<Change> {
        &mut self.changes
    }

    /// Whether somebody references the block.
    pub fn in_use(&self, block: BlockId) -> bool {
        self.blocks[block as usize].refs != [0, 0]
    }

    /// Fills `found` with the blocks that hold the longest known prefix of `hashes`. Takes no
    /// reference: [`Self::share`] does.
    pub fn match_prefix(&self, hashes: &[BlockHash], found: &mut Vec<BlockId>) {
        found.clear();
        found.extend(hashes.iter().map_while(|hash| self.by_hash.get(hash)));
    }

    /// Hands out a block, evicting the content that was freed longest ago where no empty one is
    /// left. `None` when every block is referenced.
    pub fn allocate(&mut self, owner: Owner) -> Option<BlockId> {
        let id = self.head;
        if id == NONE {
            return None;
        }
        if let Some(hash) = self.blocks[id as usize].hash.take() {
            self.by_hash.remove(&hash);
            self.changes.push((hash, false));
            self.usage.cached -= 1;
            self.usage.free += 1;
        }
        self.share(id, owner);
        Some(id)
    }

    /// Adds a reference to a block, free or not.
    pub fn share(&mut self, block: BlockId, owner: Owner) {
        if !self.in_use(block) {
            self.unlink(block);
        }
        self.count(block, -1);
        self.blocks[block as usize].refs[owner as usize] += 1;
        self.count(block, 1);
    }

    /// Turns one reference into another's.
    ///
    /// # Panics
    /// When `from` has no reference.
    pub fn hand_over(&mut self, block: BlockId, from: Owner, to: Owner) {
        self.count(block, -1);
        let refs = &mut self.blocks[block as usize].refs;
        assert!(refs[from as usize] > 0, "block {block} is not {from:?}'s");
        refs[from as usize] -= 1;
        refs[to as usize] += 1;
        self.count(block, 1);
    }

    /// Gives references back, the last block first: the start of a prompt, which more requests
    /// share, is then evicted last.
    ///
    /// # Panics
    /// When `owner` has no reference to one of them.
    pub fn release(&mut self, blocks: &[BlockId], owner: Owner) {
        for &block in blocks.iter().rev() {
            let refs = self.blocks[block as usize].refs[owner as usize];
            assert!(refs > 0, "block {block} is not {owner:?}'s");
            self.count(block, -1);
            self.blocks[block as usize].refs[owner as usize] -= 1;
            self.count(block, 1);
            if !self.in_use(block) {
                match self.blocks[block as usize].hash {
                    Some(_) => self.push_back(block),
                    None => self.push_front(block),
                }
            }
        }
    }

    /// Makes the content of a full block known under its address. Where another block already
    /// holds the same content, this one stays private to its owners; returns whether it is known.
    ///
    /// # Panics
    /// When nobody references the block.
    pub fn commit(&mut self, block: BlockId, hash: BlockHash) -> bool {
        assert!(self.in_use(block), "block {block} is free");
        let known = *self.by_hash.entry(hash).or_insert(block);
        if known == block {
            self.blocks[block as usize].hash = Some(hash);
            self.changes.push((hash, true));
        }
        known == block
    }

    /// Adds or removes the block from the count of its present owner.
    fn count(&mut self, block: BlockId, by: isize) {
        let Block { refs, hash, .. } = self.blocks[block as usize];
        let usage = &mut self.usage;
        let count = match (refs, hash) {
            ([0, 0], None) => &mut usage.free,
            ([0, 0], Some(_)) => &mut usage.cached,
            ([0, _], _) => &mut usage.handoff,
            _ => &mut usage.requests,
        };
        *count = count.wrapping_add_signed(by);
    }

    fn push_back(&mut self, id: BlockId) {
        let tail = std::mem::replace(&mut self.tail, id);
        self.blocks[id as usize].prev = tail;
        match tail {
            NONE => self.head = id,
            tail => self.blocks[tail as usize].next = id,
        }
    }

    fn push_front(&mut self, id: BlockId) {
        let head = std::mem::replace(&mut self.head, id);
        self.blocks[id as usize].next = head;
        match head {
            NONE => self.tail = id,
            head => self.blocks[head as usize].prev = id,
        }
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { prev, next, .. } = self.blocks[id as usize];
        match prev {
            NONE => self.head = next,
            prev => self.blocks[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => self.blocks[next as usize].prev = prev,
        }
        let block = &mut self.blocks[id as usize];
        (block.prev, block.next) = (NONE, NONE);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn hash(i: u32) -> BlockHash {
        BlockHash::root("").child(&[i])
    }

    /// The same rules, written down slowly: lists that are searched.
    #[derive(Default)]
    struct Naive {
        /// One entry a reference.
        refs: Vec<(BlockId, Owner)>,
        content: Vec<(BlockHash, BlockId)>,
        free: VecDeque<BlockId>,
    }

    impl Naive {
        fn content_of(&self, block: BlockId) -> Option<usize> {
            self.content.iter().position(|(_, id)| *id == block)
        }

        fn owners(&self, block: BlockId) -> impl Iterator<Item = Owner> {
            self.refs.iter().filter(move |(id, _)| *id == block).map(|(_, owner)| *owner)
        }

        fn allocate(&mut self) -> Option<BlockId> {
            let block = self.free.pop_front()?;
            if let Some(at) = self.content_of(block) {
                self.content.remove(at);
            }
            Some(block)
        }

        fn release(&mut self, block: BlockId, owner: Owner) {
            let at = self.refs.iter().position(|entry| *entry == (block, owner)).unwrap();
            self.refs.swap_remove(at);
            if self.owners(block).next().is_none() {
                match self.content_of(block) {
                    Some(_) => self.free.push_back(block),
                    None => self.free.push_front(block),
                }
            }
        }

        fn usage(&self, total: usize) -> Usage {
            let mut usage = Usage::default();
            for block in 0..total as BlockId {
                let owners: Vec<Owner> = self.owners(block).collect();
                if owners.contains(&Owner::Request) {
                    usage.requests += 1;
                } else if owners.contains(&Owner::Handoff) {
                    usage.handoff += 1;
                } else if self.content_of(block).is_some() {
                    usage.cached += 1;
                } else {
                    usage.free += 1;
                }
            }
            usage
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Allocate(bool),
        Share(usize, bool),
        HandOver(usize),
        Release(usize),
        Commit(usize, u32),
        Find(Vec<u32>),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => any::<bool>().prop_map(Op::Allocate),
            2 => (any::<usize>(), any::<bool>()).prop_map(|(at, owner)| Op::Share(at, owner)),
            1 => any::<usize>().prop_map(Op::HandOver),
            5 => any::<usize>().prop_map(Op::Release),
            3 => (any::<usize>(), 0u32..12).prop_map(|(at, hash)| Op::Commit(at, hash)),
            2 => prop::collection::vec(0u32..12, 0..4).prop_map(Op::Find),
        ]
    }

    fn owner(handoff: bool) -> Owner {
        if handoff { Owner::Handoff } else { Owner::Request }
    }

    proptest! {
        #[test]
        fn it_does_what_the_naive_model_does(
            total in 1usize..9,
            ops in prop::collection::vec(op(), 0..200),
        ) {
            let mut manager = BlockManager::new(total);
            let mut naive =
                Naive { free: (0..total as BlockId).collect(), ..Naive::default() };
            for op in ops {
                match op {
                    Op::Allocate(handoff) => {
                        let got = manager.allocate(owner(handoff));
                        prop_assert_eq!(got, naive.allocate());
                        if let Some(block) = got {
                            prop_assert!(naive.owners(block).next().is_none(), "in use");
                            naive.refs.push((block, owner(handoff)));
                        }
                    }
                    // Any block with a reference or with content may be shared.
                    Op::Share(at, handoff) => {
                        let block = (at % total) as BlockId;
                        if manager.in_use(block) || naive.content_of(block).is_some() {
                            manager.share(block, owner(handoff));
                            naive.free.retain(|id| *id != block);
                            naive.refs.push((block, owner(handoff)));
                        }
                    }
                    Op::HandOver(at) if !naive.refs.is_empty() => {
                        let at = at % naive.refs.len();
                        let (block, from) = naive.refs[at];
                        let to = owner(from == Owner::Request);
                        manager.hand_over(block, from, to);
                        naive.refs[at] = (block, to);
                    }
                    Op::Release(at) if !naive.refs.is_empty() => {
                        let (block, owner) = naive.refs[at % naive.refs.len()];
                        manager.release(&[block], owner);
                        naive.release(block, owner);
                    }
                    Op::Commit(at, content) if !naive.refs.is_empty() => {
                        let (block, _) = naive.refs[at % naive.refs.len()];
                        // A block's content never changes while it is referenced.
                        if naive.content_of(block).is_none() {
                            let fresh = naive.content.iter().all(|(h, _)| *h != hash(content));
                            prop_assert_eq!(manager.commit(block, hash(content)), fresh);
                            if fresh {
                                naive.content.push((hash(content), block));
                            }
                        }
                    }
                    Op::Find(contents) => {
                        let hashes: Vec<BlockHash> = contents.into_iter().map(hash).collect();
                        let expected: Vec<BlockId> = hashes
                            .iter()
                            .map_while(|h| naive.content.iter().find(|(known, _)| known == h))
                            .map(|(_, block)| *block)
                            .collect();
                        let mut found = vec![7];
                        manager.match_prefix(&hashes, &mut found);
                        prop_assert_eq!(found, expected);
                    }
                    _ => {}
                }
                prop_assert_eq!(manager.usage(), naive.usage(total));
                prop_assert_eq!(manager.available(), naive.free.len());
                for block in 0..total as BlockId {
                    prop_assert_eq!(manager.in_use(block), naive.owners(block).next().is_some());
                }
            }
        }
    }

    #[test]
    fn the_end_of_a_prompt_is_evicted_before_its_start() {
        let mut manager = BlockManager::new(3);
        let blocks: Vec<BlockId> =
            (0..3).map(|_| manager.allocate(Owner::Request).unwrap()).collect();
        for (i, block) in blocks.iter().enumerate() {
            assert!(manager.commit(*block, hash(i as u32)));
        }
        manager.release(&blocks, Owner::Request);
        manager.allocate(Owner::Request).unwrap();
        let mut found = Vec::new();
        manager.match_prefix(&[hash(0), hash(1), hash(2)], &mut found);
        assert_eq!(found, blocks[..2]);
    }

    #[test]
    #[should_panic(expected = "is not Request's")]
    fn a_double_free_is_found() {
        let mut manager = BlockManager::new(1);
        let block = manager.allocate(Owner::Request).unwrap();
        manager.release(&[block], Owner::Request);
        manager.release(&[block], Owner::Request);
    }
}
