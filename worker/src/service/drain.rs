//! How a worker gets rid of what it computes.
//!
//! A worker that drains refuses new requests. Each sequence that can go waits for its turn, a few
//! at a time, and is released: its stream ends with `Released`, its blocks stay until the caller has
//! had it sent on, and the worker that goes on pulls them from here. A caller that finds no other
//! worker sends it back, and it is released again after a while. What is left when the time is up is
//! given up, and computed again elsewhere.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::Status;
use tracing::info;

use super::Computes;
use crate::engine::RequestHandle;
use crate::kv::BlockId;

/// Sequences that are on their way at a time: more would make each other's pause longer.
const AT_ONCE: usize = 4;
/// How long a sequence that came back stays before it is released again.
pub(super) const STAY: Duration = Duration::from_secs(2);
/// For how long a sequence keeps its turn whose caller does not read, or does not have it sent on.
pub(super) const MOVED_WITHIN: Duration = Duration::from_secs(3);

/// Whether a worker drains, until when, and what it has released.
pub struct Drain {
    computes: Arc<dyn Computes>,
    /// The time for a drain that names none.
    timeout: Duration,
    /// When what is left is given up; `None` while the worker serves. Its lock is held while
    /// `computes` is told, so that both always say the same.
    until: watch::Sender<Option<Instant>>,
    /// The process is about to end. Changes under the lock of `until`.
    closing: AtomicBool,
    turns: Arc<Semaphore>,
    held: Mutex<HashMap<String, Arc<Held>>>,
}

/// A sequence that was released: its blocks stay for as long as this does.
pub(super) struct Held {
    pub(super) positions: usize,
    pub(super) blocks: Vec<(BlockId, u64)>,
    /// Keeps the blocks.
    pub(super) _handle: RequestHandle,
}

impl Drain {
    pub(super) fn new(computes: Arc<dyn Computes>, timeout: Duration) -> Self {
        Self {
            computes,
            timeout,
            until: watch::Sender::new(None),
            closing: AtomicBool::new(false),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            held: Mutex::default(),
        }
    }

    /// Whether a worker fetches what is held, however long that takes.
    pub(super) fn fetched(&self, id: &str) -> bool {
        self.held.lock().get(id).is_some_and(|held| Arc::strong_count(held) > 1)
    }

    /// Begins to drain. When it drains already the end may come nearer, and is never put off.
    pub fn begin(&self, timeout: Option<Duration>) {
        let end = Instant::now() + timeout.unwrap_or(self.timeout);
        self.until.send_if_modified(|until| {
            self.computes.drain();
            let earlier = until.is_none_or(|until| end < until);
            if until.is_none() {
                info!("draining");
            }
            if earlier {
                *until = Some(end);
            }
            earlier
        });
    }

    /// Begins to drain, for good.
    pub fn close(&self) {
        self.until.send_if_modified(|_| {
            self.closing.store(true, Relaxed);
            false
        });
        self.begin(None);
    }

    /// Serves again. What was released stays where it went.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when the process is about to end.
    pub(super) fn end(&self) -> Result<(), Status> {
        let mut serves = Ok(());
        self.until.send_if_modified(|until| {
            if self.closing.load(Relaxed) {
                serves = Err(Status::failed_precondition("the worker is shutting down"));
                return false;
            }
            self.computes.undrain();
            until.take().is_some()
        });
        serves
    }

    /// Until when it drains, now and whenever that changes; `None` while the worker serves.
    pub(super) fn changes(&self) -> watch::Receiver<Option<Instant>> {
        self.until.subscribe()
    }

    /// Whether nothing is left to do.
    pub fn done(&self) -> bool {
        let status = self.computes.status();
        status.draining && status.running + status.waiting == 0
    }

    /// Waits until the time is up.
    pub(super) async fn over(&self) {
        let mut changes = self.until.subscribe();
        loop {
            let until = *changes.borrow_and_update();
            let up = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = up => return,
                // The sender is `self`'s.
                _ = changes.changed() => {}
            }
        }
    }

    /// Waits until the worker drains and a sequence may go, which is not before `from`. Who waits
    /// may be given the turn at any time, and must look for it or let go.
    pub(super) async fn turn(&self, from: Option<Instant>) -> OwnedSemaphorePermit {
        if let Some(from) = from {
            tokio::time::sleep_until(from.into()).await;
        }
        let mut changes = self.until.subscribe();
        loop {
            let _ = changes.wait_for(Option::is_some).await;
            let Ok(turn) = self.turns.clone().acquire_owned().await else {
                return std::future::pending().await;
            };
            if self.until.borrow().is_some() {
                return turn;
            }
        }
    }

    /// Keeps a released sequence for whoever names it, until the key is dropped.
    pub(super) fn hold(self: &Arc<Self>, held: Held) -> Key {
        let id = format!("{:032x}", rand::random::<u128>());
        self.held.lock().insert(id.clone(), Arc::new(held));
        Key { id, drain: self.clone() }
    }

    /// A sequence that is held.
    pub(super) fn held(&self, id: &str) -> Option<Arc<Held>> {
        self.held.lock().get(id).cloned()
    }
}

/// The name of a released sequence; dropping it forgets the sequence.
pub(super) struct Key {
    pub(super) id: String,
    drain: Arc<Drain>,
}

impl Drop for Key {
    fn drop(&mut self) {
        // Outside of the lock: this may free the blocks.
        let held = self.drain.held.lock().remove(&self.id);
        drop(held);
    }
}

/// What a request is told that the worker gives up.
pub(super) fn given_up() -> Status {
    baton_proto::drain::draining("the worker is shutting down")
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::WorkerStatus;

    use super::*;

    struct Nothing;

    impl Computes for Nothing {
        fn status(&self) -> WorkerStatus {
            WorkerStatus { draining: true, ..WorkerStatus::default() }
        }
        fn drain(&self) {}
        fn undrain(&self) {}
        fn stop(&self) {}
    }

    fn drain(seconds: u64) -> Drain {
        Drain::new(Arc::new(Nothing), Duration::from_secs(seconds))
    }

    async fn soon<T>(future: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(Duration::from_millis(20), future).await.ok()
    }

    #[tokio::test]
    async fn a_sequence_goes_only_while_the_worker_drains_and_a_few_at_a_time() {
        let drain = drain(60);
        assert!(soon(drain.turn(None)).await.is_none(), "the worker serves");
        drain.begin(None);
        let mut turns = Vec::new();
        for _ in 0..AT_ONCE {
            turns.push(soon(drain.turn(None)).await.expect("a turn"));
        }
        assert!(soon(drain.turn(None)).await.is_none(), "too many at once");
        turns.pop();
        assert!(soon(drain.turn(None)).await.is_some());
        let later = Instant::now() + STAY;
        assert!(soon(drain.turn(Some(later))).await.is_none(), "it just came back");
        drain.end().expect("it serves");
        assert!(soon(drain.turn(None)).await.is_none(), "the worker serves again");
    }

    #[tokio::test]
    async fn the_end_of_a_drain_comes_nearer_and_is_never_put_off() {
        let drain = drain(3600);
        assert!(soon(drain.over()).await.is_none(), "the worker serves");
        drain.begin(None);
        assert!(soon(drain.over()).await.is_none());
        drain.begin(Some(Duration::from_millis(1)));
        drain.begin(Some(Duration::from_secs(3600)));
        assert!(soon(drain.over()).await.is_some());
        drain.end().expect("it serves");
        assert!(soon(drain.over()).await.is_none(), "a drain that was taken back has no end");
        drain.close();
        assert!(drain.end().is_err(), "nobody keeps a process that ends");
        assert!(soon(drain.turn(None)).await.is_some());
    }
}
