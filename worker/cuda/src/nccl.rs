//! A link to a process on another host, through NCCL.

use std::sync::Arc;

use crate::{Device, Error, KvMemory};

/// Bytes of what the two ends of a link meet by.
pub const ID_BYTES: usize = 128;

/// Whether NCCL can be loaded.
pub fn present() -> bool {
    false
}

/// A new meeting point. Made at one end, told to the other.
pub fn unique_id() -> Result<[u8; ID_BYTES], Error> {
    Err(Error::Library("libnccl.so"))
}

/// A link of two processes; carries one hand-off at a time, in either direction.
///
/// Every call that waits for the peer ends with an error when [`Link::abort`] is called from
/// another thread, or when `deadline` is over. After an error the link is of no use any more.
pub struct Link {}

impl Link {
    /// Meets the peer: one end has rank 0, the other 1.
    pub fn connect(
        _device: &Arc<Device>,
        _rank: usize,
        _id: &[u8; ID_BYTES],
        _deadline: std::time::Instant,
    ) -> Result<Self, Error> {
        Err(Error::Library("libnccl.so"))
    }

    /// Sends blocks; returns when they have left.
    pub fn send(
        &self,
        _kv: &KvMemory,
        _blocks: &[u32],
        _deadline: std::time::Instant,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Receives as many blocks as the peer sends, into these; returns when they are complete.
    pub fn receive(
        &self,
        _kv: &KvMemory,
        _blocks: &[u32],
        _deadline: std::time::Instant,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Makes the call in progress, and all later ones, fail. From any thread.
    pub fn abort(&self) {}
}
