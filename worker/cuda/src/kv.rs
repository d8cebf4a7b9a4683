//! The memory that KV blocks live in.
//!
//! One range of device memory holds all blocks, each `[layer][keys, values][kv_head][slot][head_dim]`
//! in bf16: a block is one range over all layers, so that it leaves the device with one copy. Copies
//! run on streams of their own, beside the forward pass.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;
use parking::Lanes;

use crate::driver::{Buffer, check};
use crate::{Device, Error, Shape};

/// Bytes of what another process opens a pool's memory by.
pub const IPC_HANDLE_BYTES: usize = 64;

/// The KV blocks of a worker.
///
/// Does no synchronization beyond the calls' own: a call returns when its copy is complete. Who may
/// touch a block is the caller's to decide. Not initialized: a slot is read only after it was written.
pub struct KvMemory {
    buffer: Buffer<u8>,
    blocks: usize,
    block_bytes: usize,
    lanes: Lanes,
}

impl std::fmt::Debug for KvMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvMemory").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

impl KvMemory {
    /// Allocates `blocks` blocks, and one more that padding writes.
    pub fn new(device: &Arc<Device>, shape: &Shape, blocks: usize) -> Result<Arc<Self>, Error> {
        shape.check()?;
        let block_bytes = shape.block_bytes();
        // The kernels count rows of one head in 32 bits.
        let rows = (blocks + 1) * (block_bytes / 2 / shape.head_dim);
        if rows > u32::MAX as usize {
            return Err(Error::Mismatch(format!("{blocks} KV blocks of {block_bytes} bytes")));
        }
        let buffer = Buffer::new(device, (blocks + 1) * block_bytes, "the KV cache")?;
        Ok(Arc::new(Self { buffer, blocks, block_bytes, lanes: Lanes::default() }))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Where it is.
    pub fn device(&self) -> &Arc<Device> {
        self.buffer.device()
    }

    /// Copies a block to `bytes`, which must be one block long.
    pub fn read(&self, block: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let range = self.range(block, bytes.len())?;
        self.lanes.with(self.device(), self.block_bytes, |stream, staging| {
            // SAFETY: waited for below, with the staging memory borrowed.
            unsafe { self.buffer.copy_to(stream, range.start, staging) }?;
            stream.synchronize()?;
            bytes.copy_from_slice(staging);
            Ok(())
        })
    }

    /// Fills a block with `bytes`, which must be one block long.
    pub fn write(&self, block: u32, bytes: &[u8]) -> Result<(), Error> {
        let range = self.range(block, bytes.len())?;
        self.lanes.with(self.device(), self.block_bytes, |stream, staging| {
            staging.copy_from_slice(bytes);
            self.buffer.fill_from(stream, range.start, staging)
        })
    }

    /// What another process of this host opens the memory by: a CUDA IPC handle.
    pub fn export(&self) -> Result<[u8; IPC_HANDLE_BYTES], Error> {
        self.device().bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; IPC_HANDLE_BYTES] };
        // SAFETY: the address is the start of an allocation; the driver writes the handle.
        check("cuIpcGetMemHandle", unsafe {
            sys::cuIpcGetMemHandle(&mut handle, self.buffer.address(0))
        })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Copies blocks `from[i]` of a peer to blocks `to[i]`.
    pub fn copy_in(&self, peer: &PeerMemory, from: &[u32], to: &[u32]) -> Result<(), Error> {
        self.copy((peer.at, peer.blocks, peer.block_bytes), from, to)
    }

    /// Copies blocks `from[i]` of other memory of this process to blocks `to[i]`.
    pub fn copy_from(&self, other: &Self, from: &[u32], to: &[u32]) -> Result<(), Error> {
        self.copy((other.base(), other.blocks, other.block_bytes), from, to)
    }

    fn copy(
        &self,
        (source, blocks, block_bytes): (u64, usize, usize),
        from: &[u32],
        to: &[u32],
    ) -> Result<(), Error> {
        if from.len() != to.len() || block_bytes != self.block_bytes {
            return Err(Error::Mismatch(format!(
                "{} blocks of {block_bytes} bytes for {} of {}",
                from.len(),
                to.len(),
                self.block_bytes
            )));
        }
        if let Some(block) = from.iter().find(|block| **block as usize >= blocks) {
            return Err(Error::Mismatch(format!("block {block} of another's {blocks}")));
        }
        to.iter().try_for_each(|block| self.range(*block, self.block_bytes).map(drop))?;
        let pairs: Vec<(u32, u32)> = from.iter().copied().zip(to.iter().copied()).collect();
        self.lanes.with(self.device(), self.block_bytes, |stream, _| {
            // Blocks that follow each other on both sides go with one copy.
            let mut runs = pairs.chunk_by(|a, b| (a.0 + 1, a.1 + 1) == (b.0, b.1));
            let copied = runs.try_for_each(|run| {
                let (from, to) = run[0];
                let source = source + u64::from(from) * block_bytes as u64;
                let bytes = run.len() * block_bytes;
                // SAFETY: both ranges are within their allocations, by the checks above, and live
                // until the stream is synchronized below.
                check("cuMemcpyDtoDAsync", unsafe {
                    sys::cuMemcpyDtoDAsync_v2(self.address(to)?, source, bytes, stream.raw)
                })
            });
            // Even after an error: earlier copies may be under way.
            stream.synchronize().and(copied)
        })
    }

    /// Where the first block is.
    pub(crate) fn base(&self) -> u64 {
        self.buffer.address(0)
    }

    /// Where a block is.
    pub(crate) fn address(&self, block: u32) -> Result<u64, Error> {
        let range = self.range(block, self.block_bytes)?;
        Ok(self.buffer.address(range.start))
    }

    /// The block that padding writes.
    pub(crate) fn spare(&self) -> u32 {
        self.blocks as u32
    }

    fn range(&self, block: u32, bytes: usize) -> Result<Range<usize>, Error> {
        let block = block as usize;
        if block >= self.blocks || bytes != self.block_bytes {
            return Err(Error::Mismatch(format!(
                "block {block} of {}, {bytes} bytes of {}",
                self.blocks, self.block_bytes
            )));
        }
        Ok(block * self.block_bytes..(block + 1) * self.block_bytes)
    }
}

/// The KV blocks of another process of this host. Closed on drop.
pub struct PeerMemory {
    device: Arc<Device>,
    at: sys::CUdeviceptr,
    blocks: usize,
    block_bytes: usize,
}

impl std::fmt::Debug for PeerMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerMemory").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

impl PeerMemory {
    /// Opens what [`KvMemory::export`] of another process gave. `blocks` and `block_bytes` are the
    /// peer's. Fails where the peer's GPU cannot be reached from this one, and in the process that
    /// exported it.
    pub fn open(
        device: &Arc<Device>,
        handle: &[u8; IPC_HANDLE_BYTES],
        blocks: usize,
        block_bytes: usize,
    ) -> Result<Self, Error> {
        device.bind()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut at = 0;
        // SAFETY: the driver checks the handle and writes the address.
        check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&mut at, handle, flags) })?;
        let peer = Self { device: device.clone(), at, blocks, block_bytes };
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: the address was just opened; the driver writes both.
        let range = check("cuMemGetAddressRange", unsafe {
            sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, at)
        });
        // A driver that does not know the range of another's memory finds what is beyond it by a fault.
        match blocks.checked_mul(block_bytes) {
            Some(needed) if range.is_err() || needed <= bytes => Ok(peer),
            _ => Err(Error::Mismatch(format!(
                "{blocks} blocks of {block_bytes} bytes in a peer's {bytes} bytes"
            ))),
        }
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened by `open`; every copy from it was waited for.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.at) };
        }
    }
}

/// Streams with staging memory, one for each copy in progress, made when they are needed.
mod parking {
    use std::sync::{Arc, Mutex, PoisonError};

    use crate::driver::{Pinned, Stream};
    use crate::{Device, Error};

    #[derive(Default)]
    pub(super) struct Lanes {
        idle: Mutex<Vec<(Stream, Pinned<u8>)>>,
    }

    impl Lanes {
        pub(super) fn with<T>(
            &self,
            device: &Arc<Device>,
            bytes: usize,
            work: impl FnOnce(&Stream, &mut [u8]) -> Result<T, Error>,
        ) -> Result<T, Error> {
            // The lane may have been made in another thread.
            device.bind()?;
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (stream, mut staging) = match idle {
                Some(lane) => lane,
                None => (Stream::new(device)?, Pinned::new(device, bytes)?),
            };
            let result = work(&stream, &mut staging);
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push((stream, staging));
            result
        }
    }
}
