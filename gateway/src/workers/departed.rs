//! Names whose workers have left. One that was served a moment ago is a model whose workers died or
//! start again, which passes, and no mistake of who asks for it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long workers are waited for.
const AWAITED: Duration = Duration::from_secs(3600);
/// Names remembered.
const MAX_NAMES: usize = 1024;

/// When the last worker of each left.
#[derive(Debug, Default)]
pub(super) struct Departed(Mutex<HashMap<String, Instant>>);

impl Departed {
    /// A worker that served `name` has left.
    pub(super) fn add(&self, name: String, now: Instant) {
        let mut names = self.0.lock();
        names.retain(|_, left| now.duration_since(*left) < AWAITED);
        names.insert(name, now);
        if names.len() > MAX_NAMES {
            let oldest = names.iter().min_by_key(|(_, left)| **left);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                names.remove(&oldest);
            }
        }
    }

    /// Workers that live serve it no more: it was taken away.
    pub(super) fn strike(&self, name: &str) {
        self.0.lock().remove(name);
    }

    /// Whether somebody may serve it again soon.
    pub(super) fn awaits(&self, name: &str, now: Instant) -> bool {
        let left = self.0.lock().get(name).copied();
        left.is_some_and(|left| now.duration_since(left) < AWAITED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_awaited_for_an_hour_after_its_last_worker_left() {
        let (departed, begin) = (Departed::default(), Instant::now());
        let at = |minutes: u64| begin + Duration::from_secs(60 * minutes);
        departed.add("m".to_owned(), at(0));
        departed.add("m".to_owned(), at(30));
        assert!(departed.awaits("m", at(89)) && !departed.awaits("m", at(90)));
        assert!(!departed.awaits("another", at(30)));
        departed.strike("m");
        assert!(!departed.awaits("m", at(30)));
    }

    #[test]
    fn names_are_bounded_and_the_oldest_go_first() {
        let (departed, begin) = (Departed::default(), Instant::now());
        let at = |second: usize| begin + Duration::from_secs(second as u64);
        for n in 0..MAX_NAMES + 10 {
            departed.add(n.to_string(), at(n));
        }
        assert_eq!(departed.0.lock().len(), MAX_NAMES);
        assert!(!departed.awaits("9", at(MAX_NAMES)) && departed.awaits("10", at(MAX_NAMES)));
        departed.add("late".to_owned(), at(10_000));
        assert_eq!(departed.0.lock().len(), 1);
    }
}
