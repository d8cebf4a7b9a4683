//! Links, in use and kept.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_cuda::nccl::{self, ID_BYTES};
use baton_cuda::{Device, KvMemory};
use parking_lot::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tonic::Status;
use tracing::info;

use super::KIND;
use crate::kv::cuda::failed;
use crate::kv::pool::DeviceError;
use crate::transfer::{Kept, TransferError};

/// Links kept in all, at either end.
const MAX_KEPT: usize = 32;
/// How long a link is kept that nobody uses.
const KEEP: Duration = Duration::from_secs(300);

/// One end of an NCCL communicator of two. Gone when its last owner is, at the other end too.
#[derive(Clone)]
pub struct Link {
    joined: Arc<Joined>,
    /// Where blocks arrive.
    room: Option<Arc<KvMemory>>,
}

impl Link {
    /// Waits for the peer. Blocks the thread.
    pub(super) fn join(
        device: &Arc<Device>,
        rank: usize,
        id: &[u8; ID_BYTES],
        until: Instant,
    ) -> Result<Self, DeviceError> {
        let link = nccl::Link::connect(device, rank, id, until).map_err(failed)?;
        info!(rank, "joined an NCCL link");
        Ok(Self { joined: Arc::new(Joined(Some(link))), room: None })
    }

    /// With memory for the blocks of a group.
    pub(super) fn with_room(self, room: Arc<KvMemory>) -> Self {
        Self { room: Some(room), ..self }
    }

    /// Sends blocks of a pool. Blocks the thread.
    pub(super) fn send(
        &self,
        memory: &KvMemory,
        blocks: &[u32],
        until: Instant,
    ) -> Result<(), DeviceError> {
        self.joined.link()?.send(memory, blocks, until).map_err(failed)
    }

    /// Receives so many blocks, which are to be put somewhere. Blocks the thread.
    pub(super) fn receive(&self, count: usize, until: Instant) -> Result<(), DeviceError> {
        let blocks: Vec<u32> = (0..count as u32).collect();
        self.joined.link()?.receive(self.room()?, &blocks, until).map_err(failed)
    }

    /// Puts what was received into blocks of a pool.
    pub(super) fn put(&self, memory: &KvMemory, blocks: &[u32]) -> Result<(), DeviceError> {
        let from: Vec<u32> = (0..blocks.len() as u32).collect();
        memory.copy_from(self.room()?, &from, blocks).map_err(failed)
    }

    fn room(&self) -> Result<&KvMemory, DeviceError> {
        self.room.as_deref().ok_or_else(|| DeviceError("a link that only sends".into()))
    }
}

struct Joined(Option<nccl::Link>);

impl Joined {
    fn link(&self) -> Result<&nccl::Link, DeviceError> {
        self.0.as_ref().ok_or_else(|| DeviceError("the link is gone".into()))
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        // NCCL may take its time to let go: not on a thread that others wait for.
        let link = self.0.take();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(link))),
            Err(_) => drop(link),
        }
    }
}

/// All links of this worker that no hand-off uses, and how many hand-offs use one.
#[derive(Default)]
pub(super) struct Links {
    in_use: AtomicUsize,
    kept: Mutex<HashMap<u64, Idle>>,
}

struct Idle {
    link: Link,
    /// The peer that is to be pulled from; `None` at the end that sends.
    from: Option<String>,
    since: Instant,
}

impl Links {
    pub(super) fn in_use(&self) -> usize {
        self.in_use.load(Relaxed)
    }

    /// The sending end of a link that was kept.
    pub(super) fn resume(&self, id: u64) -> Option<Link> {
        let mut kept = self.kept.lock();
        kept.get(&id).filter(|idle| idle.from.is_none())?;
        kept.remove(&id).map(|idle| idle.link)
    }

    /// A receiving end that was kept of a link with this peer.
    pub(super) fn kept_with(&self, peer: &str) -> Option<Kept> {
        let mut kept = self.kept.lock();
        let with = |idle: &Idle| idle.from.as_deref() == Some(peer);
        let id = *kept.iter().find(|(_, idle)| with(idle))?.0;
        kept.remove(&id).map(|Idle { link, .. }| Kept { id, link })
    }

    fn keep(&self, id: u64, link: Link, from: Option<&str>) {
        let mut kept = self.kept.lock();
        kept.retain(|_, idle| idle.since.elapsed() < KEEP);
        if kept.len() >= MAX_KEPT
            && let Some(oldest) = kept.iter().min_by_key(|(_, idle)| idle.since).map(|(id, _)| *id)
        {
            kept.remove(&oldest);
        }
        let from = from.map(str::to_owned);
        kept.insert(id, Idle { link, from, since: Instant::now() });
    }
}

/// A link in the hands of one hand-off.
pub(super) struct End {
    links: Arc<Links>,
    id: u64,
    /// The request's: a link that is not joined by then says nothing about the peer.
    deadline: Instant,
    state: State,
}

enum State {
    Joining(JoinHandle<Result<Link, DeviceError>>),
    Free(Link),
    /// A thread is sending or receiving.
    Busy(Link),
    Gone,
}

impl End {
    /// Of a link that was kept.
    pub(super) fn of(links: Arc<Links>, kept: Kept) -> Self {
        links.in_use.fetch_add(1, Relaxed);
        let deadline = Instant::now();
        Self { links, id: kept.id, deadline, state: State::Free(kept.link) }
    }

    /// Of a new link, which is joined from now on.
    pub(super) fn join(
        links: Arc<Links>,
        id: u64,
        deadline: Instant,
        join: impl FnOnce() -> Result<Link, DeviceError> + Send + 'static,
    ) -> Self {
        links.in_use.fetch_add(1, Relaxed);
        Self { links, id, deadline, state: State::Joining(spawn_blocking(join)) }
    }

    /// Has a thread do something with the link, which is joined first. Gives the link. When this
    /// future or the end is dropped meanwhile, the link is aborted.
    pub(super) async fn run(
        &mut self,
        work: impl FnOnce(&Link) -> Result<(), DeviceError> + Send + 'static,
    ) -> Result<Link, TransferError> {
        if let State::Joining(joining) = &mut self.state {
            let joined = joining.await.map_err(|error| DeviceError(error.to_string()));
            self.state = match joined.flatten() {
                Ok(link) => State::Free(link),
                Err(error) => {
                    self.state = State::Gone;
                    return Err(match self.deadline <= Instant::now() {
                        true => Status::deadline_exceeded(error.0).into(),
                        false => TransferError::NotHere { transport: KIND, reason: error.0 },
                    });
                }
            };
        }
        let State::Free(link) = std::mem::replace(&mut self.state, State::Gone) else {
            self.abort();
            return Err(DeviceError("the link is gone".into()).into());
        };
        self.state = State::Busy(link.clone());
        let (busy, thread) = (link.clone(), spawn_blocking(move || work(&link)));
        let worked = thread.await.map_err(|error| DeviceError(error.to_string()));
        match worked.flatten() {
            Ok(()) => {
                self.state = State::Free(busy.clone());
                Ok(busy)
            }
            Err(error) => {
                self.abort();
                Err(error.into())
            }
        }
    }

    /// Ends the link, and whatever is being done with it.
    pub(super) fn abort(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Gone);
        if let State::Free(link) | State::Busy(link) = state
            && let Ok(link) = link.joined.link()
        {
            link.abort();
        }
    }

    /// Keeps the link for another hand-off, if it is good for one.
    pub(super) fn give_back(&mut self, from: Option<&str>) {
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Free(link) => self.links.keep(self.id, link, from),
            other => self.state = other,
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.links.in_use.fetch_sub(1, Relaxed);
        self.abort();
    }
}
