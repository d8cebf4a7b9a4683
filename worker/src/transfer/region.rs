//! A peer's KV pool, as far as it is in the memory of this host.
//!
//! The peer's pool is a memfd. It is opened through `/proc/<pid>/fd/<fd>`, which the kernel allows
//! to processes of the same user in the same PID namespace, and recognized by the nonce in its
//! header, so that a recycled PID or descriptor is never taken for the pool. It holds a generation
//! for each block, and the blocks themselves where they are not a GPU's.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use baton_proto::v1;
use memmap2::Mmap;

use crate::kv::pool::{HEADER_BYTES, KvPool, MAGIC, NONCE_BYTES, data_offset};

/// Names the host and the PID namespace: equal for processes that see each other's `/proc`.
pub fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// Where a peer finds a pool.
pub fn describe(pool: &KvPool) -> v1::SharedMemoryRegion {
    v1::SharedMemoryRegion {
        host_id: host_id(),
        pid: std::process::id(),
        fd: pool.raw_fd() as u32,
        nonce: pool.nonce().to_vec(),
        len: pool.len() as u64,
    }
}

/// A peer's pool, mapped for reading for the length of one hand-off.
pub struct Region {
    map: Mmap,
    blocks: usize,
    block_bytes: usize,
}

impl Region {
    /// Maps the pool; `block_bytes` of each block are in it. An error says why it is not within
    /// reach.
    pub fn open(region: &v1::SharedMemoryRegion, block_bytes: usize) -> Result<Self, String> {
        if region.host_id != host_id() {
            return Err("the peer is on another host or in another container".into());
        }
        let path = format!("/proc/{}/fd/{}", region.pid, region.fd);
        let file = File::open(&path).map_err(|error| format!("{path}: {error}"))?;
        let len = file.metadata().map_err(|error| error.to_string())?.len();
        if len != region.len || len < HEADER_BYTES as u64 {
            return Err(format!("{path} has {len} bytes, expected {}", region.len));
        }
        // SAFETY: the peer has sealed the memfd against shrinking, so no access inside it faults.
        // It is written by the peer: data is only ever copied out of it, and a copy counts only
        // after its generation has been checked.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        let (magic, nonce) = map[..MAGIC.len() + NONCE_BYTES].split_at(MAGIC.len());
        if magic != MAGIC || nonce != region.nonce {
            return Err(format!("{path} is not the peer's KV pool"));
        }
        // The number of blocks follows from the length: see `data_offset`.
        let each = block_bytes + size_of::<AtomicU64>();
        let mut blocks = (map.len() - HEADER_BYTES) / each;
        while blocks > 0 && data_offset(blocks) + blocks * block_bytes != map.len() {
            blocks -= 1;
        }
        if blocks == 0 {
            return Err("the peer's pool has another shape".into());
        }
        Ok(Self { map, blocks, block_bytes })
    }

    /// Blocks whose generation is in it: those of the pool, or some more where the blocks themselves
    /// are elsewhere.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The bytes of a block, which the peer may be writing.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block(&self, block: u32) -> &[u8] {
        let start = data_offset(self.blocks) + block as usize * self.block_bytes;
        &self.map[start..start + self.block_bytes]
    }

    /// Whether a copy of a block, made until now, is whole: the block has not been given away.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn still(&self, block: u32, generation: u64) -> bool {
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        fence(Ordering::Acquire);
        let offset = HEADER_BYTES + block as usize * size_of::<AtomicU64>();
        // SAFETY: inside the mapping by the assert, aligned, written atomically.
        let now = unsafe { &*self.map.as_ptr().add(offset).cast::<AtomicU64>() };
        now.load(Ordering::Acquire) == generation
    }
}
