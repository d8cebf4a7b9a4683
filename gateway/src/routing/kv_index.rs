//! Which workers hold which KV blocks, as they say themselves.
//!
//! An address is a hash over everything up to its block's end, so the tree of all cached prefixes
//! needs no edges: a prompt's addresses are the path from the root, and a map from address to
//! holders is the tree. One walk down the path tells how much of the prompt each worker has,
//! whatever the number of workers.
//!
//! Bounded in the number of addresses. It may be behind what the workers hold by some milliseconds,
//! and lacks what was beyond the bound: the worker alone decides what is cached, and a wrong guess
//! costs a little time.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use baton_proto::BlockHash;
use parking_lot::RwLock;
use smallvec::SmallVec;

/// A worker's place in the index.
pub type Slot = u16;

/// Leading blocks of a prompt by worker, for those that hold any.
pub type Depths = SmallVec<[(Slot, usize); 8]>;

/// Blocks of a path that are passed at once.
const STRIDE: usize = 16;

/// Addresses are changed so many at a time; requests are routed in between.
const CHANGED_AT_ONCE: usize = 1024;

/// All addresses and their holders.
#[derive(Default)]
pub struct KvIndex {
    holders: HashMap<BlockHash, SmallVec<[Slot; 4]>, BuildHasherDefault<Leading>>,
    /// Which slots are taken.
    slots: Vec<bool>,
    capacity: usize,
}

/// Addresses are hashes already: their first bytes will do.
#[derive(Default)]
pub struct Leading(u64);

impl Hasher for Leading {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some((first, _)) = bytes.split_first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    // The length that comes before the bytes.
    fn write_usize(&mut self, _: usize) {}
}

impl KvIndex {
    /// An empty index of at most `capacity` addresses.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// How many addresses it knows.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// How many leading blocks each worker holds.
    ///
    /// Caches forget the end of a prefix before its beginning, so who holds a block further on is
    /// taken to hold those between.
    pub fn depths(&self, path: &[BlockHash]) -> Depths {
        let mut depths = Depths::new();
        let mut along: SmallVec<[Slot; 16]> = SmallVec::new();
        along.extend(path.first().into_iter().flat_map(|first| self.holders(first)).copied());
        let mut depth = 1;
        while depth < path.len() && !along.is_empty() {
            let end = path.len().min(depth + STRIDE);
            let last = self.holders(&path[end - 1]);
            if along.iter().all(|slot| last.contains(slot)) {
                depth = end;
                continue;
            }
            while depth < end {
                let holders = self.holders(&path[depth]);
                along.retain(|slot| {
                    let holds = holders.contains(slot);
                    if !holds {
                        depths.push((*slot, depth));
                    }
                    holds
                });
                depth += 1;
            }
        }
        depths.extend(along.into_iter().map(|slot| (slot, path.len())));
        depths
    }

    fn holders(&self, hash: &BlockHash) -> &[Slot] {
        self.holders.get(hash).map_or(&[], |holders| holders)
    }

    fn take_slot(&mut self) -> Option<Slot> {
        let at = self.slots.iter().position(|taken| !taken).unwrap_or(self.slots.len());
        let slot = Slot::try_from(at).ok()?;
        if at == self.slots.len() {
            self.slots.push(false);
        }
        self.slots[at] = true;
        Some(slot)
    }

    /// Whether there was room.
    fn store(&mut self, slot: Slot, hash: BlockHash) -> bool {
        let full = self.holders.len() >= self.capacity;
        if full && !self.holders.contains_key(&hash) {
            return false;
        }
        let holders = self.holders.entry(hash).or_default();
        if !holders.contains(&slot) {
            holders.push(slot);
        }
        true
    }

    fn remove(&mut self, slot: Slot, hash: &BlockHash) {
        let Some(holders) = self.holders.get_mut(hash) else { return };
        holders.retain(|holder| *holder != slot);
        if holders.is_empty() {
            self.holders.remove(hash);
        }
    }
}

/// A worker's part of the index. Dropping it takes the part out.
pub struct Share {
    index: Arc<RwLock<KvIndex>>,
    slot: Slot,
    held: HashSet<BlockHash, BuildHasherDefault<Leading>>,
}

impl Share {
    /// A part of its own, empty; `None` when there are more workers than slots.
    pub fn new(index: &Arc<RwLock<KvIndex>>) -> Option<Self> {
        let slot = index.write().take_slot()?;
        Some(Self { index: index.clone(), slot, held: HashSet::default() })
    }

    /// Whose it is.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Notes that the worker holds these.
    pub fn store(&mut self, hashes: impl IntoIterator<Item = BlockHash>) {
        let mut hashes = hashes.into_iter().peekable();
        while hashes.peek().is_some() {
            let mut index = self.index.write();
            for hash in hashes.by_ref().take(CHANGED_AT_ONCE) {
                if index.store(self.slot, hash) {
                    self.held.insert(hash);
                }
            }
        }
    }

    /// Notes that the worker does not hold these any more.
    pub fn remove(&mut self, hashes: impl IntoIterator<Item = BlockHash>) {
        let mut hashes = hashes.into_iter().peekable();
        while hashes.peek().is_some() {
            let mut index = self.index.write();
            for hash in hashes.by_ref().take(CHANGED_AT_ONCE) {
                self.held.remove(&hash);
                index.remove(self.slot, &hash);
            }
        }
    }

    /// Notes that the worker holds nothing.
    pub fn clear(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.remove(held);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.clear();
        self.index.write().slots[self.slot as usize] = false;
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::block_hashes;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a set for each worker that is searched.
        #[test]
        fn depths_are_those_of_the_workers_own_sets(
            // A worker, a prompt of that seed and length; whether it is stored, or everything from
            // that length on is forgotten.
            changes in prop::collection::vec((0usize..6, 0u32..4, 1usize..60, any::<bool>()), 0..80),
            (seed, blocks) in (0u32..4, 0usize..70), gone in prop::option::of(0usize..6),
        ) {
            let path = |seed: u32, blocks: usize| {
                let tokens: Vec<u32> = (0..blocks as u32).map(|i| if i < 3 { i } else { seed * 100 + i }).collect();
                block_hashes("", &tokens, 1)
            };
            let index = Arc::new(RwLock::new(KvIndex::new(1000)));
            let mut shares: Vec<Option<Share>> = (0..6).map(|_| Share::new(&index)).collect();
            let mut sets = vec![HashSet::new(); 6];
            for (worker, seed, blocks, stored) in changes {
                let share = shares[worker].as_mut().unwrap();
                let hashes = path(seed, blocks);
                if stored {
                    sets[worker].extend(hashes.clone());
                    share.store(hashes);
                } else {
                    let ends = (0..4).flat_map(|seed| path(seed, 60).split_off(blocks));
                    let ends: Vec<BlockHash> = ends.collect();
                    ends.iter().for_each(|hash| { sets[worker].remove(hash); });
                    share.remove(ends);
                }
            }
            if let Some(gone) = gone {
                shares[gone] = None;
                sets[gone].clear();
            }
            let all: HashSet<_> = sets.iter().flatten().collect();
            prop_assert_eq!(index.read().len(), all.len());
            let path = path(seed, blocks);
            let mut depths = index.read().depths(&path).to_vec();
            depths.sort_unstable();
            let expected: Vec<_> = sets
                .iter()
                .enumerate()
                .map(|(worker, set)| (worker as Slot, path.iter().take_while(|hash| set.contains(hash)).count()))
                .filter(|(_, depth)| *depth > 0)
                .collect();
            prop_assert_eq!(depths, expected);
            drop(shares);
            prop_assert!(index.read().is_empty());
        }
    }

    #[test]
    fn it_is_bounded_and_slots_are_used_again() {
        let index = Arc::new(RwLock::new(KvIndex::new(10)));
        let mut one = Share::new(&index).unwrap();
        let hashes = block_hashes("", &(0..30).collect::<Vec<_>>(), 1);
        one.store(hashes.clone());
        assert_eq!(index.read().len(), 10);
        let mut two = Share::new(&index).unwrap();
        two.store(hashes[..5].to_vec());
        assert_eq!(index.read().depths(&hashes).to_vec(), [(1, 5), (0, 10)]);
        drop(one);
        assert_eq!(index.read().depths(&hashes).to_vec(), [(1, 5)]);
        assert_eq!(Share::new(&index).unwrap().slot(), 0);
    }
}
