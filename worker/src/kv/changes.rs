//! What the prefix cache has come to hold, and what it has lost, for those who route by it.
//!
//! The engine appends after each step and never waits; any number of watchers read at their own
//! pace. The log is bounded: who has read nothing for longer than it reaches back is told everything
//! again, so a lost change is never missed for good.

use std::collections::{HashMap, HashSet, VecDeque};

use baton_proto::BlockHash;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A block became known by its address (`true`), or is not any more.
pub type Change = (BlockHash, bool);

/// The last changes, and what they add up to.
pub struct ChangeLog {
    log: Mutex<Log>,
    wake: Notify,
    capacity: usize,
}

struct Log {
    /// Number of the first change in `changes`, counted from the start.
    first: u64,
    changes: VecDeque<Change>,
    held: HashSet<BlockHash>,
}

/// What a watcher has not heard yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Whether everything heard before is void.
    pub reset: bool,
    /// Addresses that can be found now.
    pub stored: Vec<BlockHash>,
    /// Those that cannot any more.
    pub removed: Vec<BlockHash>,
}

/// How far a watcher has read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Position(Option<u64>);

impl ChangeLog {
    /// A log for a pool of so many blocks: it reaches back as many changes.
    pub fn new(blocks: usize) -> Self {
        let capacity = blocks.max(1024);
        let log = Log {
            first: 0,
            // Room from the start: the engine allocates nothing in a step.
            changes: VecDeque::with_capacity(capacity),
            held: HashSet::with_capacity(2 * blocks),
        };
        Self { log: Mutex::new(log), wake: Notify::new(), capacity }
    }

    /// Takes the changes of a step, which are left empty.
    pub fn append(&self, changes: &mut Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let log = &mut *self.log.lock();
        for (hash, stored) in changes.drain(..) {
            match stored {
                true => log.held.insert(hash),
                false => log.held.remove(&hash),
            };
            if log.changes.len() == self.capacity {
                log.changes.pop_front();
                log.first += 1;
            }
            log.changes.push_back((hash, stored));
        }
        self.wake.notify_waiters();
    }

    /// Waits until there is something after `position`, and moves it on.
    pub async fn news(&self, position: &mut Position) -> News {
        loop {
            let woken = self.wake.notified();
            if let Some(news) = self.after(position) {
                return news;
            }
            woken.await;
        }
    }

    /// What comes after a position: `None` when nothing does.
    fn after(&self, position: &mut Position) -> Option<News> {
        let log = self.log.lock();
        let end = log.first + log.changes.len() as u64;
        let from = position.0.replace(end);
        let Some(skip) = from.and_then(|from| from.checked_sub(log.first)) else {
            let stored = log.held.iter().copied().collect();
            return Some(News { reset: true, stored, removed: Vec::new() });
        };
        let fresh = log.changes.range(skip as usize..);
        if fresh.len() == 0 {
            return None;
        }
        // The last word on each address counts.
        let last: HashMap<BlockHash, bool> = fresh.copied().collect();
        let (mut stored, mut removed) = (Vec::new(), Vec::new());
        for (hash, known) in last {
            if known { stored.push(hash) } else { removed.push(hash) }
        }
        Some(News { reset: false, stored, removed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(i: u32) -> BlockHash {
        BlockHash::root("").child(&[i])
    }

    proptest! {
        #[test]
        fn a_watcher_that_applies_all_news_knows_what_is_held(
            // Each step's changes, and whether the watcher reads after it.
            steps in prop::collection::vec((prop::collection::vec((0u32..40, any::<bool>()), 0..700), any::<bool>()), 1..20),
        ) {
            let log = ChangeLog::new(64);
            let (mut truth, mut known) = (HashSet::new(), HashSet::new());
            let mut position = Position::default();
            for (changes, reads) in steps {
                let mut changes: Vec<Change> = changes.into_iter().map(|(i, on)| (hash(i), on)).collect();
                for (hash, on) in &changes {
                    if *on { truth.insert(*hash) } else { truth.remove(hash) };
                }
                log.append(&mut changes);
                prop_assert!(changes.is_empty());
                prop_assert!(log.log.lock().changes.len() <= 1024);
                if !reads {
                    continue;
                }
                if let Some(news) = log.after(&mut position) {
                    if news.reset {
                        known.clear();
                    }
                    prop_assert!(news.removed.iter().all(|hash| !news.stored.contains(hash)));
                    known.extend(news.stored);
                    news.removed.iter().for_each(|hash| { known.remove(hash); });
                }
                prop_assert_eq!(&known, &truth);
                prop_assert_eq!(log.after(&mut position), None);
            }
        }
    }

    #[test]
    fn who_fell_too_far_behind_hears_everything_again() {
        let log = ChangeLog::new(1);
        let mut position = Position::default();
        let first = log.after(&mut position).unwrap();
        assert_eq!(first, News { reset: true, ..News::default() });
        log.append(&mut vec![(hash(0), true)]);
        assert!(!log.after(&mut position).unwrap().reset);
        log.append(&mut (0..1025).map(|i| (hash(i), true)).collect());
        let news = log.after(&mut position).unwrap();
        assert!(news.reset && news.stored.len() == 1025);
    }

    #[tokio::test]
    async fn a_watcher_is_woken() {
        let log = std::sync::Arc::new(ChangeLog::new(1));
        let mut position = Position::default();
        log.news(&mut position).await;
        let later = log.clone();
        let writer = tokio::spawn(async move {
            tokio::task::yield_now().await;
            later.append(&mut vec![(hash(7), true)]);
        });
        assert_eq!(log.news(&mut position).await.stored, [hash(7)]);
        writer.await.unwrap();
    }
}
