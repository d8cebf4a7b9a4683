//! Blocks sent from GPU to GPU through NCCL, between any hosts.
//!
//! The peer's answer names a link, an NCCL communicator of two. One hand-off uses it at a time; what
//! `BlocksReady` announces is sent next, in the same order, in groups of up to [`GROUP`]. To join a
//! link takes longer than most hand-offs, so both ends keep it afterwards, and the next request names
//! it. A link whose hand-off fails or is given up is aborted, which the other end sees as a failure.
//!
//! Whatever waits for a peer does so on a thread of its own. Blocks arrive in memory of the link and
//! are copied into the pool when they are whole: a hand-off that is given up writes nothing there.

mod links;

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_cuda::nccl::ID_BYTES;
use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use self::links::{End, Links};
use super::device::{blocks_of, in_place};
use super::refs::{ready, refs};
use super::{Kept, Opening, Outlet, Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::cuda::failed;
use crate::kv::pool::{DeviceError, KvPool};

pub use self::links::Link;

/// Blocks sent at a time.
const GROUP: usize = 16;
/// How long the two ends wait for each other. A host that cannot be reached is often silent.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long a group may take to leave. The caller goes before, when its own time is up.
const SEND_WITHIN: Duration = Duration::from_secs(60);
/// Hand-offs at a time; more take another transport. Each has a link, which takes memory of the GPU.
const AT_ONCE: usize = 16;

const KIND: v1::Transport = v1::Transport::Nccl;

/// NCCL.
#[derive(Default)]
pub struct Nccl(Arc<Links>);

impl Transport for Nccl {
    fn kind(&self) -> v1::Transport {
        KIND
    }

    fn available(&self) -> bool {
        self.0.in_use() < AT_ONCE
    }

    fn offer(&self, pool: &Arc<KvPool>, kept: u64) -> Result<Box<dyn Outlet>, DeviceError> {
        let links = self.0.clone();
        if let Some(link) = links.resume(kept) {
            let told = v1::NcclLink { link: kept, unique_id: Vec::new() };
            let end = End::of(links, Kept { id: kept, link });
            return Ok(Box::new(Sending { pool: pool.clone(), end, told, waiting: Vec::new() }));
        }
        let unique_id = in_place(baton_cuda::nccl::unique_id).map_err(failed)?;
        let id = rand::random::<u64>().max(1);
        let told = v1::NcclLink { link: id, unique_id: unique_id.to_vec() };
        // At once: the caller joins while the first blocks are computed.
        let device = blocks_of(pool)?.device().clone();
        let until = Instant::now() + JOIN_WITHIN;
        let join = move || Link::join(&device, 0, &unique_id, until);
        let end = End::join(links, id, until, join);
        Ok(Box::new(Sending { pool: pool.clone(), end, told, waiting: Vec::new() }))
    }

    fn kept(&self, peer: &str) -> Option<Kept> {
        self.0.kept_with(peer)
    }

    fn open(&self, opening: Opening<'_>) -> Result<Box<dyn Source>, TransferError> {
        let Opening { accepted, pool, peer, kept, deadline, .. } = opening;
        let told = accepted.nccl.as_ref();
        let told = told.ok_or_else(|| TransferError::Protocol("no link for NCCL".into()))?;
        let links = self.0.clone();
        let end = if told.unique_id.is_empty() {
            let kept = kept.filter(|kept| kept.id == told.link);
            let kept = kept.ok_or_else(|| TransferError::Protocol("a link of nobody's".into()))?;
            End::of(links, kept)
        } else {
            let unique_id: [u8; ID_BYTES] = told.unique_id[..]
                .try_into()
                .map_err(|_| TransferError::Protocol("an NCCL id of another length".into()))?;
            let (pool, until) = (pool.clone(), deadline.min(Instant::now() + JOIN_WITHIN));
            End::join(links, told.link, deadline, move || {
                let blocks = blocks_of(&pool)?;
                let link = Link::join(blocks.device(), 1, &unique_id, until)?;
                Ok(link.with_room(blocks.aside(GROUP).map_err(failed)?))
            })
        };
        Ok(Box::new(Receiving { end, peer: peer.to_owned(), deadline }))
    }
}

/// The prefill side of a hand-off.
struct Sending {
    pool: Arc<KvPool>,
    end: End,
    told: v1::NcclLink,
    /// Announced, and not yet sent.
    waiting: Vec<BlockId>,
}

impl Sending {
    async fn send(&mut self) -> Result<(), TransferError> {
        let waiting = std::mem::take(&mut self.waiting);
        for group in waiting.chunks(GROUP) {
            let (pool, group) = (self.pool.clone(), group.to_vec());
            let until = Instant::now() + SEND_WITHIN;
            let work = move |link: &Link| link.send(blocks_of(&pool)?.memory(), &group, until);
            self.end.run(work).await?;
        }
        Ok(())
    }
}

impl Outlet for Sending {
    fn accepted(&self) -> v1::PrefillAccepted {
        v1::PrefillAccepted {
            transport: KIND.into(),
            nccl: Some(self.told.clone()),
            ..v1::PrefillAccepted::default()
        }
    }

    fn publish(
        &mut self,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Result<Vec<Event>, DeviceError> {
        self.waiting.extend(blocks.iter().map(|(block, _)| *block));
        Ok(vec![ready(first, blocks)])
    }

    fn flush(&mut self) -> BoxFuture<'_, Result<(), TransferError>> {
        Box::pin(self.send())
    }

    fn finish(&mut self) {
        self.end.give_back(None);
    }
}

/// The decode side of a hand-off.
struct Receiving {
    end: End,
    peer: String,
    deadline: Instant,
}

impl Receiving {
    async fn receive(&mut self, event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        let refs = refs(event)?;
        let pool = order.pool().clone();
        for group in refs.chunks(GROUP) {
            if group.iter().zip(group[0].index..).any(|(it, index)| it.index != index) {
                return Err(TransferError::Protocol("blocks came out of order".into()));
            }
            let count = group.len();
            let until = self.deadline;
            let link = self.end.run(move |link| link.receive(count, until)).await?;
            let to = order.next(group[0].index as usize, count)?;
            in_place(|| link.put(blocks_of(&pool)?.memory(), to))?;
            order.filled(count);
        }
        Ok((refs.len() * pool.block_bytes()) as u64)
    }
}

impl Source for Receiving {
    fn take<'a>(
        &'a mut self,
        event: Event,
        order: &'a mut PullOrder,
    ) -> BoxFuture<'a, Result<u64, TransferError>> {
        Box::pin(async move {
            let taken = self.receive(event, order).await;
            if taken.is_err() {
                self.end.abort();
                order.discard();
            }
            taken
        })
    }

    fn survives_peer(&self) -> bool {
        // What it sent last may have been another sequence's already.
        false
    }

    fn finish(&mut self) {
        // Nothing is under way: only now can the link carry another hand-off's blocks.
        self.end.give_back(Some(&self.peer));
    }
}
