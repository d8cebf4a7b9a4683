//! Moves KV blocks from the prefill worker that computed them to the decode worker that asked.
//!
//! The decode worker pulls: it calls `Prefill` on its peer and takes blocks as they are announced,
//! while the peer computes the next ones. The peer keeps a block until the response stream is
//! dropped, which is acknowledgement and cancellation in one.
//!
//! * [`Transport`]: how blocks cross. [`shm`] between processes of one host, [`grpc`] anywhere; between
//!   GPUs `cuda_ipc` on one host, `nccl` anywhere.
//! * [`region`]: a peer's pool as far as it is in the memory of this host.
//! * [`pull`]: one hand-off from the decode worker's side.

#[cfg(feature = "cuda")]
pub mod cuda_ipc;
#[cfg(feature = "cuda")]
mod device;
pub mod grpc;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod pull;
mod refs;
pub mod region;
pub mod shm;

use std::sync::Arc;
use std::time::Instant;

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use futures::future::BoxFuture;

use crate::engine::{FillError, PullOrder};
use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};

/// A way for blocks to cross from one worker to another.
pub trait Transport: Send + Sync {
    /// Its name in the contract.
    fn kind(&self) -> v1::Transport;

    /// Whether it takes one more hand-off now.
    fn available(&self) -> bool {
        true
    }

    /// Prefill side: begins a hand-off. `kept` is what the caller says that it has kept of an earlier
    /// one, or 0.
    fn offer(&self, pool: &Arc<KvPool>, kept: u64) -> Result<Box<dyn Outlet>, DeviceError>;

    /// Decode side: what an earlier hand-off from this peer left behind for the next one.
    fn kept(&self, _peer: &str) -> Option<Kept> {
        None
    }

    /// Decode side: opens what the peer accepted.
    fn open(&self, opening: Opening<'_>) -> Result<Box<dyn Source>, TransferError>;
}

/// Where blocks leave for the caller of one hand-off.
pub trait Outlet: Send {
    /// What the caller must know before the first block.
    fn accepted(&self) -> v1::PrefillAccepted;

    /// The events that give complete blocks to the caller. `first` is the position of the first in
    /// the sequence; the blocks are pinned and not written any more.
    fn publish(
        &mut self,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Result<Vec<Event>, DeviceError>;

    /// Waits until the blocks whose events were sent have left, where the events do not carry them.
    /// Dropping the outlet ends what is under way.
    fn flush(&mut self) -> BoxFuture<'_, Result<(), TransferError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Nothing more will be published. To be called before the caller is told so.
    fn finish(&mut self) {}
}

/// A hand-off that a peer has accepted.
pub struct Opening<'a> {
    /// What the peer said.
    pub accepted: &'a v1::PrefillAccepted,
    /// The layout that both have.
    pub layout: &'a v1::KvLayout,
    /// Where the blocks go.
    pub pool: &'a Arc<KvPool>,
    /// The peer's address.
    pub peer: &'a str,
    /// What was offered to it.
    pub kept: Option<Kept>,
    /// When to give up.
    pub deadline: Instant,
}

/// What is left of a hand-off for the next one with the same peer.
pub struct Kept {
    /// Names it at both ends; never 0.
    pub id: u64,
    /// NCCL's.
    #[cfg(feature = "nccl")]
    pub link: nccl::Link,
}

/// Where blocks come from.
pub trait Source: Send {
    /// Fills an order's next blocks from an event; gives the number of bytes. Where this is given up,
    /// no block is written any more.
    fn take<'a>(
        &'a mut self,
        event: Event,
        order: &'a mut PullOrder,
    ) -> BoxFuture<'a, Result<u64, TransferError>>;

    /// Whether blocks that came stay good when the peer fails afterwards.
    fn survives_peer(&self) -> bool;

    /// The peer has said that it was all, and all of it was taken. Without this, what the source
    /// holds is not used again.
    fn finish(&mut self) {}
}

/// Why blocks did not cross.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// This transport cannot be used with this peer; another may.
    #[error("{} cannot be used here: {reason}", name(.transport))]
    NotHere {
        /// The transport.
        transport: v1::Transport,
        /// Why.
        reason: String,
    },
    /// The peer said something that the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The peer answered with an error, or no more.
    #[error("the peer failed: {0}")]
    Peer(#[from] tonic::Status),
    /// The peer could not be reached, or did not say that it has the request.
    #[error("the peer does not answer: {0}")]
    NoAnswer(tonic::Status),
    /// The peer kept blocks no longer.
    #[error("the peer gave block {0} away before it was copied")]
    Expired(u32),
    /// The device that the blocks go to failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl TransferError {
    /// A word for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotHere { .. } => "transport_unavailable",
            Self::Protocol(_) => "protocol",
            Self::Peer(status) | Self::NoAnswer(status) => status.code().description(),
            Self::Expired(_) => "expired",
            Self::Device(_) => "device",
        }
    }
}

impl From<FillError> for TransferError {
    fn from(error: FillError) -> Self {
        match error {
            FillError::Order(reason) => Self::Protocol(reason),
            FillError::Device(error) => Self::Device(error),
        }
    }
}

/// A transport's name, for people.
fn name(kind: &v1::Transport) -> &'static str {
    match kind {
        v1::Transport::SharedMemory => "shared memory",
        v1::Transport::Grpc => "gRPC",
        v1::Transport::CudaIpc => "CUDA IPC",
        v1::Transport::Nccl => "NCCL",
        v1::Transport::Unspecified => "no transport",
    }
}

/// The transports that a worker has, best first.
#[derive(Clone)]
pub struct Transports(Vec<Arc<dyn Transport>>);

impl Transports {
    /// Those of these kinds that were built in and can be used.
    pub fn new(kinds: &[v1::Transport]) -> Self {
        let of = |kind: &v1::Transport| -> Option<Arc<dyn Transport>> {
            match kind {
                v1::Transport::SharedMemory => Some(Arc::new(shm::SharedMemory)),
                v1::Transport::Grpc => Some(Arc::new(grpc::Grpc)),
                #[cfg(feature = "cuda")]
                v1::Transport::CudaIpc => Some(Arc::new(cuda_ipc::CudaIpc)),
                #[cfg(feature = "nccl")]
                v1::Transport::Nccl if baton_cuda::nccl::present() => {
                    Some(Arc::new(nccl::Nccl::default()))
                }
                #[cfg(feature = "nccl")]
                v1::Transport::Nccl => {
                    tracing::info!("libnccl.so is not found: no hand-offs over NCCL");
                    None
                }
                _ => None,
            }
        };
        Self(kinds.iter().filter_map(of).collect())
    }

    /// Their names in the contract.
    pub fn kinds(&self) -> impl Iterator<Item = v1::Transport> {
        self.0.iter().map(|transport| transport.kind())
    }

    /// The one of a name.
    pub fn get(&self, kind: v1::Transport) -> Option<&Arc<dyn Transport>> {
        self.0.iter().find(|transport| transport.kind() == kind)
    }

    /// The first of the caller's that takes a hand-off now.
    pub fn first(
        &self,
        offered: impl Iterator<Item = v1::Transport>,
    ) -> Option<Arc<dyn Transport>> {
        let mut known = offered.filter_map(|kind| self.get(kind));
        known.find(|transport| transport.available()).cloned()
    }
}
