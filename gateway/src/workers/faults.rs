//! Steps of a worker that failed: one that fails them all is passed over for a while, as Envoy's
//! outlier detection does it. It fails faster than others answer, so to the router it looks idle.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Failed steps without a good one between them, after which a worker is passed over.
const MAX_STEPS: usize = 3;
/// For how long; after that it gets one request at a time, until it has a good step.
const PASSED_OVER: Duration = Duration::from_secs(10);

/// What came of a worker's steps.
#[derive(Default)]
pub(super) struct Faults {
    /// Those that failed since the last good one.
    steps: AtomicUsize,
    /// When the last of all that failed did.
    last: Mutex<Option<Instant>>,
}

impl Faults {
    /// A request that was sent at `sent` was in a step that failed. True when it is the one too many.
    pub(super) fn failed(&self, sent: Instant, now: Instant) -> bool {
        let mut last = self.last.lock();
        // A step fails for all of its sequences: those that were under way then may have been in it.
        if last.is_some_and(|last| sent <= last) {
            return false;
        }
        *last = Some(now);
        self.steps.fetch_add(1, Relaxed) + 1 == MAX_STEPS
    }

    /// A step has brought a token.
    pub(super) fn good(&self) {
        // Read at every token, written seldom.
        if self.steps.load(Relaxed) > 0 {
            self.steps.store(0, Relaxed);
        }
    }

    /// Whether the worker is to be passed over; `busy` when it has a request.
    pub(super) fn too_many(&self, busy: bool, now: Instant) -> bool {
        let recent = || self.last.lock().is_some_and(|last| now < last + PASSED_OVER);
        self.steps.load(Relaxed) >= MAX_STEPS && (busy || recent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_one_step_after_the_other_is_passed_over_until_it_has_a_good_one() {
        let faults = Faults::default();
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        assert!(!faults.failed(at(0), at(1)));
        // Eight more of the same step, and one that was sent before the first was known to fail.
        assert!((0..9).all(|_| !faults.failed(at(0), at(2)) && !faults.failed(at(1), at(2))));
        assert!(!faults.failed(at(2), at(3)) && !faults.too_many(true, at(3)));
        assert!(faults.failed(at(4), at(5)));
        assert!(faults.too_many(false, at(5)) && faults.too_many(false, at(14)));
        // Then one request at a time.
        assert!(!faults.too_many(false, at(15)) && faults.too_many(true, at(15)));
        assert!(!faults.failed(at(15), at(16)) && faults.too_many(false, at(25)));
        faults.good();
        assert!(!faults.too_many(true, at(16)));
        // Now and then a step may fail.
        for step in (30..50).step_by(2) {
            assert!(!faults.failed(at(step), at(step + 1)) && !faults.too_many(true, at(step + 1)));
            faults.good();
        }
    }
}
