//! The memory that KV blocks live in.

use std::sync::Arc;

use crate::{Device, Error, Shape};

/// Bytes of what another process opens a pool's memory by.
pub const IPC_HANDLE_BYTES: usize = 64;

/// The KV blocks of a worker: one range of device memory.
///
/// Does no synchronization beyond the calls' own: a call returns when its copy is complete. Who may
/// touch a block is the caller's to decide.
pub struct KvMemory {}

impl KvMemory {
    /// Allocates `blocks` blocks, zeroed, and one more that padding writes.
    pub fn new(_device: &Arc<Device>, _shape: &Shape, _blocks: usize) -> Result<Arc<Self>, Error> {
        Err(Error::Absent("not yet written".into()))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        0
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        0
    }

    /// Copies a block to `bytes`, which must be one block long.
    pub fn read(&self, _block: u32, _bytes: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    /// Fills a block with `bytes`, which must be one block long.
    pub fn write(&self, _block: u32, _bytes: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    /// What another process of this host opens the memory by: a CUDA IPC handle.
    pub fn export(&self) -> Result<[u8; IPC_HANDLE_BYTES], Error> {
        Err(Error::Absent("not yet written".into()))
    }

    /// Copies blocks `from[i]` of a peer to blocks `to[i]`.
    pub fn copy_in(&self, _peer: &PeerMemory, _from: &[u32], _to: &[u32]) -> Result<(), Error> {
        Ok(())
    }
}

/// The KV blocks of another process of this host. Closed on drop.
pub struct PeerMemory {}

impl PeerMemory {
    /// Opens what [`KvMemory::export`] of another process gave. `blocks` and `block_bytes` are the
    /// peer's. Fails where the peer's GPU cannot be reached from this one.
    pub fn open(
        _device: &Arc<Device>,
        _handle: &[u8; IPC_HANDLE_BYTES],
        _blocks: usize,
        _block_bytes: usize,
    ) -> Result<Self, Error> {
        Err(Error::Absent("not yet written".into()))
    }
}
