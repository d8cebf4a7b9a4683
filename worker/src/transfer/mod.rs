//! Moves KV blocks from the prefill worker that computed them to the decode worker that asked.
//!
//! The decode worker pulls: it calls `Prefill` on its peer and takes blocks as they are announced,
//! while the peer computes the next ones. The peer keeps a block until the response stream is
//! dropped, which is acknowledgement and cancellation in one.
//!
//! * [`Transport`]: how blocks cross. [`shm`] between processes of one host, [`grpc`] anywhere.
//! * [`pull`]: one hand-off from the decode worker's side.

pub mod grpc;
pub mod pull;
pub mod shm;

use baton_proto::v1;

use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// A way for blocks to cross from one worker to another.
pub trait Transport: Send + Sync {
    /// Its name in the contract.
    fn kind(&self) -> v1::Transport;

    /// Prefill side: what the caller must know before the first block.
    fn accept(&self, pool: &KvPool) -> v1::PrefillAccepted;

    /// Prefill side: the events that give complete blocks to the caller. `first` is the position
    /// of the first in the sequence; the blocks are pinned and not written any more.
    fn publish(
        &self,
        pool: &KvPool,
        first: usize,
        blocks: &[(BlockId, u64)],
    ) -> Vec<v1::prefill_event::Event>;

    /// Decode side: opens what the peer accepted.
    fn open(
        &self,
        accepted: &v1::PrefillAccepted,
        layout: &v1::KvLayout,
    ) -> Result<Box<dyn Source>, TransferError>;
}

/// Where blocks come from.
pub trait Source: Send {
    /// Fills an order's next blocks from an event; gives the number of bytes.
    fn take(
        &mut self,
        event: v1::prefill_event::Event,
        order: &mut PullOrder,
    ) -> Result<u64, TransferError>;

    /// Whether blocks that came stay good when the peer fails afterwards.
    fn survives_peer(&self) -> bool;
}

/// Why blocks did not cross.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// This transport cannot be used with this peer; another may.
    #[error("{transport} cannot be used here: {reason}")]
    NotHere {
        /// The transport.
        transport: &'static str,
        /// Why.
        reason: String,
    },
    /// The peer said something that the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The peer answered with an error, or not at all.
    #[error("the peer failed: {0}")]
    Peer(#[from] tonic::Status),
    /// The peer kept blocks no longer.
    #[error("the peer gave block {0} away before it was copied")]
    Expired(u32),
}

impl TransferError {
    /// A word for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotHere { .. } => "transport_unavailable",
            Self::Protocol(_) => "protocol",
            Self::Peer(status) => status.code().description(),
            Self::Expired(_) => "expired",
        }
    }
}

/// The transports of these names, best first.
pub fn transports(kinds: &[v1::Transport]) -> Vec<Box<dyn Transport>> {
    kinds
        .iter()
        .filter_map(|kind| match kind {
            v1::Transport::SharedMemory => Some(Box::new(shm::SharedMemory) as Box<dyn Transport>),
            v1::Transport::Grpc => Some(Box::new(grpc::Grpc)),
            v1::Transport::Unspecified => None,
        })
        .collect()
}
