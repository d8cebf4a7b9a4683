//! The engine's threads.
//!
//! A step runs some two hundred parallel regions of a few microseconds, so parking a thread for
//! each would cost more than the work. Threads spin for about the length of the gap between two
//! regions and park only when the step is over. A region does not wait for a thread that has not
//! come, woken a moment ago or without a core: the others do its share, and it finds the region closed.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::thread::JoinHandle;

/// Spins before a worker parks, and before a waiting caller yields its core.
const SPINS: u32 = 4000;

/// Rows of one task of a row-wise operation: fewer are not worth waking a thread for.
const ROWS: usize = 4;

type Job = *const (dyn Fn(usize) + Sync);

/// A fixed set of threads that run one parallel region at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The region in progress. Written by the caller while the gate is closed and nobody inside.
    job: UnsafeCell<Option<Job>>,
    /// Of each thread, the caller's last.
    shares: Box<[Share]>,
    /// The number of the region, see [`region`], whether it is [`OPEN`] or the pool [`RESTS`], and how
    /// many workers are inside. A new number wakes the workers.
    gate: AtomicU64,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// How many workers are parked.
    parked: AtomicUsize,
}

/// The tasks that a thread of a pool takes first.
pub(super) fn share(thread: usize, tasks: usize, threads: usize) -> Range<usize> {
    thread * tasks / threads..(thread + 1) * tasks / threads
}

/// The thread whose share, of some tasks, ends with this one.
pub(super) fn last_of(task: usize, tasks: usize, threads: usize) -> Option<usize> {
    let thread = ((task + 1) * threads).div_ceil(tasks) - 1;
    (share(thread, tasks, threads).end == task + 1).then_some(thread)
}

/// Of the gate: whether workers may enter.
const OPEN: u64 = 1 << 31;
/// Whether no region is expected soon. The bits below count who is inside.
const RESTS: u64 = 1 << 30;

/// The number of a gate's region.
fn region(gate: u64) -> u64 {
    gate >> 32
}

/// The tasks that a thread takes first: neighbours, whose memory is read in one run. A thread that
/// is done with its own takes from the others'. On a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
    /// Whether the thread is parked, or about to be. Who takes it back counts it out of all parked.
    parked: AtomicBool,
}

// SAFETY: `job` is written only between regions (the gate is closed and counts nobody, see `run`) and
// read only by who has entered one; the pointer's target is `Sync` and outlives the region, because
// `run` closes it and waits until all have left.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool that computes with `threads` threads, the caller's among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self::of_shares(threads.max(1));
        for i in 1..threads {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("kernel-{i}"))
                .spawn(move || shared.work_until_stopped(i - 1))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// A pool of the caller's thread alone: all runs there.
    pub fn alone() -> Self {
        Self::of_shares(1)
    }

    /// Without its threads.
    fn of_shares(shares: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            shares: (0..shares).map(|_| Share::default()).collect(),
            gate: AtomicU64::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
        });
        Self { shared, threads: Vec::new() }
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job(0)` to `job(tasks - 1)`, in any order and on any thread, and waits for all.
    ///
    /// # Panics
    /// When a task panicked, after all threads have left the region.
    pub fn run(&mut self, tasks: usize, job: impl Fn(usize) + Sync) {
        if self.threads.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(job);
        }
        let shared = &*self.shared;
        let job: &(dyn Fn(usize) + Sync) = &job;
        // SAFETY: only the lifetime is erased. The region ends before this function returns or
        // unwinds, so the workers never use the pointer after `job` is gone.
        let erased: Job = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(std::ptr::from_ref(job))
        };
        // SAFETY: `&mut self`, and the last region is closed and left, so nobody else looks at it.
        unsafe { *shared.job.get() = Some(erased) };
        let threads = shared.shares.len();
        for (i, of_thread) in shared.shares.iter().enumerate() {
            let tasks = share(i, tasks, threads);
            of_thread.next.store(tasks.start, Relaxed);
            of_thread.end.store(tasks.end, Relaxed);
        }
        let number = (region(shared.gate.load(Relaxed)) + 1) & u64::from(u32::MAX);
        // SeqCst pairs with `park`: either the worker sees the new region or we see it parked.
        shared.gate.store(number << 32 | OPEN, SeqCst);
        if shared.parked.load(SeqCst) > 0 {
            for (share, thread) in shared.shares.iter().zip(&self.threads) {
                if share.parked.swap(false, SeqCst) {
                    shared.parked.fetch_sub(1, SeqCst);
                    thread.thread().unpark();
                }
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.claim(threads - 1, job)));
        // All tasks are taken, or there was a panic: who enters now finds nothing.
        let mut inside = shared.gate.fetch_and(!OPEN, AcqRel) & (RESTS - 1);
        let mut spins = 0;
        while inside > 0 {
            inside = shared.gate.load(Acquire) & (RESTS - 1);
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panicked = shared.panicked.swap(false, Relaxed);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a kernel task panicked on a pool thread");
    }

    /// Says that no region follows soon: threads that wait for one leave their cores to others at
    /// once.
    pub fn rest(&mut self) {
        self.shared.gate.fetch_or(RESTS, Relaxed);
    }

    /// Runs `job(row, a's row, b's row)` for every row of two matrices, some rows to a task.
    pub fn for_rows<A: Send, B: Send>(
        &mut self,
        (a, a_width): (&mut [A], usize),
        (b, b_width): (&mut [B], usize),
        job: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        let rows = a.len() / a_width;
        assert!(rows * a_width == a.len() && rows * b_width == b.len(), "rows");
        let (a, b) = (Disjoint(a.as_mut_ptr()), Disjoint(b.as_mut_ptr()));
        self.run(rows.div_ceil(ROWS), |task| {
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                // SAFETY: both hold `rows` rows, each row belongs to one task, and the borrows
                // outlive the region.
                unsafe {
                    job(
                        row,
                        std::slice::from_raw_parts_mut(a.at(row * a_width), a_width),
                        std::slice::from_raw_parts_mut(b.at(row * b_width), b_width),
                    );
                }
            }
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.threads.iter().for_each(|thread| thread.thread().unpark());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Runs the tasks of one's own share, then what the other threads have left.
    fn claim(&self, own: usize, job: &(dyn Fn(usize) + Sync)) {
        for i in 0..self.shares.len() {
            let share = &self.shares[(own + i) % self.shares.len()];
            let end = share.end.load(Relaxed);
            loop {
                let task = share.next.fetch_add(1, Relaxed);
                if task >= end {
                    break;
                }
                job(task);
            }
        }
    }

    fn work_until_stopped(&self, own: usize) {
        let mut seen = 0;
        while self.enter_region(own, &mut seen) {
            // SAFETY: entered, so the caller of `run` has written the job, which lives until the
            // gate counts nobody, and does not write it meanwhile.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(|| self.claim(own, job))).is_err() {
                    self.panicked.store(true, Relaxed);
                }
            }
            self.gate.fetch_sub(1, AcqRel);
        }
    }

    /// Waits for a region later than `seen` and enters it; false when the pool stops.
    fn enter_region(&self, own: usize, seen: &mut u64) -> bool {
        let mut spins = 0;
        while !self.stop.load(Relaxed) {
            let gate = self.gate.load(Acquire);
            if region(gate) == *seen {
                spins += 1;
                match spins < SPINS && gate & RESTS == 0 {
                    true => std::hint::spin_loop(),
                    false => self.park(own, *seen),
                }
            } else if gate & OPEN == 0 {
                // Too late for this one; the next is near.
                (*seen, spins) = (region(gate), 0);
            } else if self.gate.compare_exchange_weak(gate, gate + 1, AcqRel, Relaxed).is_ok() {
                *seen = region(gate);
                return true;
            }
        }
        false
    }

    /// Parks the thread once, unless there is a region later than `seen`. It may come back without
    /// one, woken late for that which it has seen: then it must say again that it is parked.
    fn park(&self, own: usize, seen: u64) {
        let parked = &self.shares[own].parked;
        self.parked.fetch_add(1, SeqCst);
        parked.store(true, SeqCst);
        if region(self.gate.load(SeqCst)) == seen && !self.stop.load(SeqCst) {
            std::thread::park();
        }
        if parked.swap(false, SeqCst) {
            self.parked.fetch_sub(1, SeqCst);
        }
    }
}

/// A pointer that tasks may share because they write disjoint parts.
pub(super) struct Disjoint<T>(pub(super) *mut T);
// SAFETY: see the type; every user states why its parts are disjoint.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    /// # Safety
    /// `offset` is inside the allocation.
    #[inline(always)]
    pub(super) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_sizes() {
        for threads in [1, 2, 3, 8] {
            let mut pool = ThreadPool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100, 3, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Relaxed) == 1));
            }
        }
    }

    #[test]
    fn parked_threads_wake_up() {
        let mut pool = ThreadPool::new(3).unwrap();
        for _ in 0..5 {
            while pool.shared.parked.load(SeqCst) < 2 {
                std::thread::yield_now();
            }
            let sum = AtomicUsize::new(0);
            pool.run(50, |i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 49 * 50 / 2);
        }
    }

    #[test]
    fn threads_that_rest_park_at_once_and_wake_up_again() {
        let mut pool = ThreadPool::new(3).unwrap();
        for _ in 0..5 {
            let ran = AtomicUsize::new(0);
            pool.run(50, |_| {
                ran.fetch_add(1, Relaxed);
            });
            assert_eq!(ran.load(Relaxed), 50);
            pool.rest();
            while pool.shared.parked.load(SeqCst) < 2 {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_region_does_not_wait_for_a_thread_that_does_not_come() {
        let mut pool = ThreadPool::of_shares(2);
        pool.threads.push(std::thread::spawn(|| {}));
        for _ in 0..3 {
            let ran = AtomicUsize::new(0);
            pool.run(4, |_| {
                ran.fetch_add(1, Relaxed);
            });
            assert_eq!(ran.load(Relaxed), 4);
        }
    }

    #[test]
    fn a_thread_that_was_woken_late_parks_again_and_wakes_up() {
        let mut pool = ThreadPool::new(2).unwrap();
        let until_parked = |pool: &ThreadPool| {
            while !pool.shared.shares[0].parked.load(SeqCst) {
                std::thread::yield_now();
            }
        };
        for _ in 0..100 {
            pool.rest();
            // As a caller does that lost its core after opening a region that the thread has left.
            while !pool.shared.shares[0].parked.swap(false, SeqCst) {
                std::thread::yield_now();
            }
            pool.shared.parked.fetch_sub(1, SeqCst);
            pool.threads[0].thread().unpark();
            until_parked(&pool);
            let came = AtomicBool::new(false);
            pool.run(2, |task| {
                // The caller's share is the last.
                match task {
                    0 => came.store(true, SeqCst),
                    _ => {
                        while !came.load(SeqCst) {
                            std::thread::yield_now();
                        }
                    }
                }
            });
        }
    }

    #[test]
    fn a_share_ends_with_its_last_task() {
        for threads in 1..9 {
            for tasks in 1..40 {
                let ends =
                    (0..threads).map(|i| share(i, tasks, threads)).filter(|it| !it.is_empty());
                let expected: Vec<usize> = ends.map(|tasks| tasks.end - 1).collect();
                let got: Vec<usize> =
                    (0..tasks).filter(|&task| last_of(task, tasks, threads).is_some()).collect();
                assert_eq!(got, expected, "{tasks} tasks of {threads} threads");
                for task in got {
                    let thread = last_of(task, tasks, threads).unwrap();
                    assert!(share(thread, tasks, threads).contains(&task), "{task} of {tasks}");
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = ThreadPool::new(2).unwrap();
        // Of both threads at once: each waits for the other, and nothing is left behind.
        let inside = AtomicUsize::new(0);
        let both = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, |_| {
                inside.fetch_add(1, SeqCst);
                while inside.load(SeqCst) < 2 {
                    std::thread::yield_now();
                }
                panic!("all");
            });
        }));
        assert!(both.is_err());
        pool.run(16, |_| {});
        for _ in 0..20 {
            let run = catch_unwind(AssertUnwindSafe(|| {
                pool.run(16, |i| assert!(i != 7, "task seven"));
            }));
            assert!(run.is_err());
        }
        let ran = AtomicUsize::new(0);
        pool.run(16, |_| {
            ran.fetch_add(1, Relaxed);
        });
        assert_eq!(ran.load(Relaxed), 16);
    }
}
