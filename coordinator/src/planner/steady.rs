//! Up fast, down slowly, as the horizontal autoscaler of Kubernetes does with its `behavior`: up at
//! once, to twice the size or by four at a time; down to the largest size that was wanted within
//! the stabilization window, and then by a fifth at a time, with a pause after each change.

use std::collections::VecDeque;

/// A change of a large pool by less is not worth an operation.
const UP_TOLERANCE: f64 = 0.02;
const DOWN_TOLERANCE: f64 = 0.05;
/// Most of a pool that goes in one step.
const DOWN_STEP: f64 = 0.2;

/// What was wanted lately.
#[derive(Clone, Debug, Default)]
pub struct Steady {
    /// Times and sizes; each is larger than all after it, which is all that a maximum needs.
    wanted: VecDeque<(u64, u32)>,
    since: Option<u64>,
    changed: Option<(u64, u32)>,
}

impl Steady {
    /// The size to go to now, and why it is not the wanted one. It grows to `wanted` and shrinks to
    /// `comfortable`, which is not less.
    pub fn next(
        &mut self,
        now_ms: u64,
        size: u32,
        (wanted, comfortable): (u32, u32),
        (window_ms, cooldown_ms): (u64, u64),
    ) -> (u32, &'static str) {
        let since = *self.since.get_or_insert(now_ms);
        if self.changed.is_none_or(|(_, before)| before != size) {
            self.changed = Some((now_ms, size));
        }
        while self.wanted.back().is_some_and(|(_, other)| *other <= comfortable) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((now_ms, comfortable));
        while self.wanted.front().is_some_and(|(at, _)| at + window_ms < now_ms) {
            self.wanted.pop_front();
        }
        let highest = self.wanted.front().map_or(comfortable, |(_, highest)| *highest);
        let of_size = |part: f64| (f64::from(size) * part) as u32;
        if wanted > size {
            if wanted - size <= of_size(UP_TOLERANCE) {
                return (size, "within tolerance");
            }
            let most = (size * 2).max(size + 4);
            return match wanted > most {
                true => (most, "up by the largest step"),
                false => (wanted, "up"),
            };
        }
        if comfortable >= size {
            return (size, "as wanted");
        }
        if now_ms < since + window_ms || highest >= size {
            return (size, "more was wanted within the window");
        }
        if self.changed.is_some_and(|(at, _)| now_ms < at + cooldown_ms) {
            return (size, "cooling down");
        }
        if size - highest <= of_size(DOWN_TOLERANCE) {
            return (size, "within tolerance");
        }
        let least = size - of_size(DOWN_STEP).max(1);
        if highest < least { (least, "down by the largest step") } else { (highest, "down") }
    }

    /// The largest size that was comfortable since a time.
    pub fn highest_since(&self, since_ms: u64) -> u32 {
        // Each is larger than all after it.
        let wanted = self.wanted.iter().find(|(at, _)| *at >= since_ms);
        wanted.map_or(0, |(_, highest)| *highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: (u64, u64) = (100, 20);

    #[test]
    fn up_at_once_and_down_after_the_window_step_by_step() {
        let mut steady = Steady::default();
        assert_eq!(steady.next(0, 2, (20, 20), TIMES).0, 6);
        assert_eq!(steady.next(10, 6, (20, 20), TIMES).0, 12);
        assert_eq!(steady.next(20, 12, (20, 20), TIMES).0, 20);
        let mut size = 20;
        let mut sizes = vec![size];
        for now in 3..60 {
            let next = steady.next(now * 10, size, (1, 1), TIMES).0;
            if next != size {
                assert!(now * 10 > 120, "{now}");
                sizes.push(next);
            }
            size = next;
        }
        assert_eq!(sizes[..4], [20, 16, 13, 11]);
        assert_eq!(size, 1);
    }

    #[test]
    fn a_size_that_comes_and_goes_is_kept() {
        let mut steady = Steady::default();
        let mut size = 5;
        for now in 0..100 {
            let wanted = if now % 9 == 0 { 5 } else { 2 };
            size = steady.next(now * 10, size, (wanted, wanted), TIMES).0;
            assert_eq!(size, 5);
        }
    }
}
