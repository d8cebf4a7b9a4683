//! The memory that KV blocks live in.
//!
//! One memfd holds a header page, a generation for each block, and the blocks. It has no name in any file system, so
//! nothing is left behind however the process ends; a peer on the same host opens it through
//! `/proc/<pid>/fd/<fd>` and checks the nonce in the header. Pages are allocated by the kernel on
//! first touch, so an idle pool costs no memory.
//!
//! A block's generation rises before the block is given to another sequence. A peer that was held
//! up while it copied, past the time that its blocks were kept for it, sees by the generation that
//! the copy is worthless.
//!
//! How a block is laid out is the business of `kernels::page`; here it is one range of bytes over all
//! layers, which moves with one copy.
//!
//! The blocks of a model that a GPU computes lie in the GPU's memory, behind [`DeviceMemory`]. Header
//! and generations stay in the memfd: what they are for is the same.

use std::any::Any;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_proto::v1::KvLayout;
use bytes::Bytes;
use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, SealFlags};

use super::BlockId;

/// Bytes before the generations.
pub const HEADER_BYTES: usize = 4096;
/// First bytes of the header; the nonce follows.
pub const MAGIC: [u8; 8] = *b"BATONKV1";
/// Length of the nonce.
pub const NONCE_BYTES: usize = 16;

/// Where the blocks of a pool of `blocks` begin: behind the header and the generations.
pub fn data_offset(blocks: usize) -> usize {
    (HEADER_BYTES + blocks * size_of::<AtomicU64>()).next_multiple_of(4096)
}

/// Blocks in memory that is not the host's.
///
/// A call has come to its end when it returns. As of a pool, who may read or write a block is not
/// its business.
pub trait DeviceMemory: Any + Send + Sync {
    /// Copies a block to the host. `bytes` is exactly one block long.
    fn read(&self, block: BlockId, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Fills a block from the host. `bytes` is exactly one block long.
    fn write(&self, block: BlockId, bytes: &[u8]) -> Result<(), DeviceError>;
}

/// A device did not do what it was told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the GPU failed: {0}")]
pub struct DeviceError(pub String);

/// The memory of all KV blocks of this worker.
///
/// The pool hands out pointers and does no synchronization: [`super::blocks`] decides who may
/// touch a block. A block is written by its one owner (the engine thread for a running sequence,
/// the transfer task for a sequence being pulled) and read by others only after it was published.
pub struct KvPool {
    map: MmapRaw,
    file: File,
    /// Where the blocks are that are not in `map`.
    device: Option<Arc<dyn DeviceMemory>>,
    layout: KvLayout,
    blocks: usize,
    nonce: [u8; NONCE_BYTES],
}

impl KvPool {
    /// Maps a pool of `blocks` blocks, zeroed.
    pub fn new(layout: KvLayout, blocks: usize) -> std::io::Result<Self> {
        Self::map(layout, blocks, None)
    }

    /// A pool whose blocks are in a device's memory, which has `blocks` of them.
    pub fn on_device(
        layout: KvLayout,
        blocks: usize,
        memory: Arc<dyn DeviceMemory>,
    ) -> std::io::Result<Self> {
        Self::map(layout, blocks, Some(memory))
    }

    fn map(
        layout: KvLayout,
        blocks: usize,
        device: Option<Arc<dyn DeviceMemory>>,
    ) -> std::io::Result<Self> {
        let fd: OwnedFd =
            rustix::fs::memfd_create("baton-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let here = if device.is_some() { 0 } else { blocks * layout.block_bytes as usize };
        let len = data_offset(blocks) + here;
        rustix::fs::ftruncate(&fd, len as u64)?;
        // A peer that maps the file must never fault because it shrank.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        let file = File::from(fd);
        let map = MmapRaw::map_raw(&file)?;
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let pool = Self { map, file, device, layout, blocks, nonce };
        // SAFETY: the header page is inside the mapping and nobody else knows of it yet.
        unsafe {
            let header = pool.map.as_mut_ptr();
            std::ptr::copy_nonoverlapping(MAGIC.as_ptr(), header, MAGIC.len());
            std::ptr::copy_nonoverlapping(nonce.as_ptr(), header.add(MAGIC.len()), NONCE_BYTES);
        }
        Ok(pool)
    }

    /// Shape and element type of a block.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// How many blocks the pool holds.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.layout.block_bytes as usize
    }

    /// Whether the blocks are in a device's memory.
    pub fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    /// The device's memory that the blocks are in, when it is of this type.
    pub fn device<T: DeviceMemory>(&self) -> Option<&T> {
        let memory: &dyn Any = self.device.as_deref()?;
        memory.downcast_ref()
    }

    /// Length of the mapping, header included.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the pool has no block.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The memfd, as a peer on this host names it.
    pub fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// The proof in the header that a mapping is of this pool.
    pub fn nonce(&self) -> [u8; NONCE_BYTES] {
        self.nonce
    }

    /// Offset of a block in the file and the mapping.
    ///
    /// # Panics
    /// When `block` is not in the pool.
    pub fn offset(&self, block: BlockId) -> usize {
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        data_offset(self.blocks) + block as usize * self.block_bytes()
    }

    fn generation_of(&self, block: BlockId) -> &AtomicU64 {
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        let offset = HEADER_BYTES + block as usize * size_of::<AtomicU64>();
        // SAFETY: inside the mapping by the assert, aligned, and only ever accessed atomically.
        unsafe { &*self.map.as_mut_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// How often the block was given out.
    pub fn generation(&self, block: BlockId) -> u64 {
        self.generation_of(block).load(Ordering::Acquire)
    }

    /// Makes what peers may still copy of the block worthless. To be called before a block that
    /// was allocated is written.
    pub fn renew(&self, block: BlockId) {
        self.generation_of(block).fetch_add(1, Ordering::SeqCst);
    }

    /// The first byte of a block. Reading or writing through it is the caller's duty; see the
    /// type's documentation for who may.
    ///
    /// # Panics
    /// When the blocks are in a device's memory.
    pub fn block_ptr(&self, block: BlockId) -> *mut u8 {
        assert!(self.device.is_none(), "the blocks are not in the host's memory");
        // SAFETY: `offset` checked that the block is inside the mapping.
        unsafe { self.map.as_mut_ptr().add(self.offset(block)) }
    }

    /// Fills a block with a peer's bytes.
    ///
    /// # Safety
    /// The caller owns `block` alone: no other thread reads or writes it during the call.
    ///
    /// # Panics
    /// When `bytes` is not exactly one block long.
    pub unsafe fn write_block(&self, block: BlockId, bytes: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(bytes.len(), self.block_bytes(), "a block's bytes");
        if let Some(memory) = &self.device {
            return memory.write(block, bytes);
        }
        // SAFETY: both ranges are one block long; the destination is the caller's alone.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.block_ptr(block), bytes.len()) }
        Ok(())
    }

    /// A copy of a block's bytes.
    ///
    /// # Safety
    /// Nobody writes `block` during the call.
    pub unsafe fn read_block(&self, block: BlockId) -> Result<Bytes, DeviceError> {
        if let Some(memory) = &self.device {
            let mut bytes = vec![0; self.block_bytes()];
            memory.read(block, &mut bytes)?;
            return Ok(bytes.into());
        }
        // SAFETY: the range is inside the mapping, initialized (zeroed by the kernel), and by the
        // caller's promise not written meanwhile.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.block_ptr(block), self.block_bytes()) };
        Ok(Bytes::copy_from_slice(bytes))
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    /// A device of this test's own.
    struct Elsewhere(Mutex<Vec<Vec<u8>>>);

    impl DeviceMemory for Elsewhere {
        fn read(&self, block: BlockId, bytes: &mut [u8]) -> Result<(), DeviceError> {
            bytes.copy_from_slice(&self.0.lock()[block as usize]);
            Ok(())
        }

        fn write(&self, block: BlockId, bytes: &[u8]) -> Result<(), DeviceError> {
            match bytes[0] {
                0 => Err(DeviceError("broken".into())),
                _ => {
                    self.0.lock()[block as usize].copy_from_slice(bytes);
                    Ok(())
                }
            }
        }
    }

    #[test]
    fn blocks_of_a_device_are_read_and_written_there_and_their_generations_here() {
        let layout = KvLayout { block_bytes: 4, ..KvLayout::default() };
        let memory = Elsewhere(Mutex::new(vec![vec![9; 4]; 3]));
        let pool = KvPool::on_device(layout, 3, Arc::new(memory)).unwrap();
        assert_eq!(pool.len(), data_offset(3), "no blocks in the mapping");
        assert!(pool.device::<Elsewhere>().is_some());
        // SAFETY: there is no other thread.
        unsafe {
            pool.write_block(1, &[1, 2, 3, 4]).unwrap();
            assert_eq!(pool.read_block(1).unwrap()[..], [1, 2, 3, 4]);
            assert_eq!(pool.read_block(2).unwrap()[..], [9; 4]);
            let error = pool.write_block(2, &[0; 4]).unwrap_err();
            assert_eq!(error.to_string(), "the GPU failed: broken");
        }
        pool.renew(2);
        assert_eq!((pool.generation(1), pool.generation(2)), (0, 1));
    }

    #[test]
    #[should_panic(expected = "not in the host's memory")]
    fn a_block_of_a_device_has_no_address_here() {
        let layout = KvLayout { block_bytes: 4, ..KvLayout::default() };
        let memory = Elsewhere(Mutex::default());
        KvPool::on_device(layout, 3, Arc::new(memory)).unwrap().block_ptr(0);
    }
}
