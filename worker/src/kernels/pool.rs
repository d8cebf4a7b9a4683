//! The engine's threads.
//!
//! A step runs some two hundred parallel regions of a few microseconds, so parking a thread for
//! each would cost more than the work. Threads spin for about the length of the gap between two
//! regions and park only when the step is over.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

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
    /// The region in progress. Written by the caller while no worker is inside one.
    job: UnsafeCell<Option<Job>>,
    /// Of each thread, the caller's last.
    shares: Box<[Share]>,
    /// Workers that have not yet left the current region.
    inside: AtomicUsize,
    /// Counts regions; a change wakes the workers.
    region: AtomicU32,
    panicked: AtomicBool,
    stop: AtomicBool,
    parked: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// The tasks that a thread takes first: neighbours, whose memory is read in one run. A thread that
/// is done with its own takes from the others'. On a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

// SAFETY: `job` is written only between regions (`inside` is zero, see `run`) and read only inside
// one; the pointer's target is `Sync` and outlives the region because `run` waits for its end.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool that computes with `threads` threads, the caller's among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            inside: AtomicUsize::new(0),
            region: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let threads = (1..threads)
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("kernel-{i}"))
                    .spawn(move || shared.work_until_stopped(i - 1))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { shared, threads })
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
        // SAFETY: `&mut self`, and no worker is inside a region, so nobody else looks at it.
        unsafe { *shared.job.get() = Some(erased) };
        let threads = shared.shares.len();
        for (i, share) in shared.shares.iter().enumerate() {
            share.next.store(i * tasks / threads, Relaxed);
            share.end.store((i + 1) * tasks / threads, Relaxed);
        }
        shared.inside.store(self.threads.len(), Relaxed);
        // SeqCst pairs with `park`: either the worker sees the new region or we see it parked.
        shared.region.fetch_add(1, SeqCst);
        if shared.parked.load(SeqCst) > 0 {
            let _guard = shared.lock.lock();
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.claim(threads - 1, job)));
        let mut spins = 0;
        while shared.inside.load(Acquire) > 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Relaxed), "a kernel task panicked on a pool thread");
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
        {
            let _guard = self.shared.lock.lock();
            self.shared.wake.notify_all();
        }
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
        while self.wait_for_region(&mut seen) {
            // SAFETY: a region is on, so the caller of `run` has written the job, which lives
            // until `inside` is zero, and does not write it meanwhile.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(|| self.claim(own, job))).is_err() {
                    self.panicked.store(true, Relaxed);
                }
            }
            self.inside.fetch_sub(1, AcqRel);
        }
    }

    /// Waits for a region later than `seen`; false when the pool stops.
    fn wait_for_region(&self, seen: &mut u32) -> bool {
        for spin in 0.. {
            if self.stop.load(Relaxed) {
                return false;
            }
            let region = self.region.load(Acquire);
            if region != *seen {
                *seen = region;
                return true;
            }
            if spin < SPINS {
                std::hint::spin_loop();
            } else {
                self.park(*seen);
            }
        }
        false
    }

    fn park(&self, seen: u32) {
        let mut guard = self.lock.lock();
        self.parked.fetch_add(1, SeqCst);
        while self.region.load(SeqCst) == seen && !self.stop.load(SeqCst) {
            self.wake.wait(&mut guard);
        }
        self.parked.fetch_sub(1, SeqCst);
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
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = ThreadPool::new(2).unwrap();
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
