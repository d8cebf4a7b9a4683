//! Blocks copied straight out of the peer's KV pool, on one host.
//!
//! The peer's pool is a memfd. It is opened through `/proc/<pid>/fd/<fd>`, which the kernel allows
//! to processes of the same user in the same PID namespace, and recognized by the nonce in its
//! header, so that a recycled PID or descriptor is never taken for the pool. Where that does not
//! work, in another container say, the caller falls back to gRPC.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use memmap2::Mmap;

use super::{Source, TransferError, Transport};
use crate::engine::PullOrder;
use crate::kv::BlockId;
use crate::kv::pool::{HEADER_BYTES, KvPool, MAGIC, NONCE_BYTES, data_offset};

/// Shared memory.
pub struct SharedMemory;

impl Transport for SharedMemory {
    fn kind(&self) -> v1::Transport {
        v1::Transport::SharedMemory
    }

    fn accept(&self, pool: &KvPool) -> v1::PrefillAccepted {
        v1::PrefillAccepted {
            transport: self.kind().into(),
            region: Some(v1::SharedMemoryRegion {
                host_id: host_id(),
                pid: std::process::id(),
                fd: pool.raw_fd() as u32,
                nonce: pool.nonce().to_vec(),
                len: pool.len() as u64,
            }),
        }
    }

    fn publish(&self, _pool: &KvPool, first: usize, blocks: &[(BlockId, u64)]) -> Vec<Event> {
        let blocks = blocks
            .iter()
            .enumerate()
            .map(|(i, &(block, generation))| v1::BlockRef {
                index: (first + i) as u32,
                block,
                generation,
            })
            .collect();
        vec![Event::Ready(v1::BlocksReady { blocks })]
    }

    fn open(
        &self,
        accepted: &v1::PrefillAccepted,
        layout: &v1::KvLayout,
    ) -> Result<Box<dyn Source>, TransferError> {
        let region = accepted
            .region
            .as_ref()
            .ok_or_else(|| TransferError::Protocol("no region for shared memory".into()))?;
        Ok(Box::new(Region::open(region, layout.block_bytes as usize)?))
    }
}

/// Names the host and the PID namespace: equal for processes that see each other's `/proc`.
pub fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// A peer's pool, mapped for reading for the length of one hand-off.
struct Region {
    map: Mmap,
    blocks: usize,
    block_bytes: usize,
}

impl Region {
    fn open(region: &v1::SharedMemoryRegion, block_bytes: usize) -> Result<Self, TransferError> {
        let not_here =
            |reason: String| TransferError::NotHere { transport: "shared memory", reason };
        if region.host_id != host_id() {
            return Err(not_here("the peer is on another host or in another container".into()));
        }
        let path = format!("/proc/{}/fd/{}", region.pid, region.fd);
        let file = File::open(&path).map_err(|error| not_here(format!("{path}: {error}")))?;
        let len = file.metadata().map_err(|error| not_here(error.to_string()))?.len();
        if len != region.len || len < HEADER_BYTES as u64 {
            return Err(not_here(format!("{path} has {len} bytes, expected {}", region.len)));
        }
        // SAFETY: the peer has sealed the memfd against shrinking, so no access inside it faults.
        // It is written by the peer: data is only ever copied out of it, and a copy counts only
        // after its generation has been checked.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| not_here(error.to_string()))?;
        let (magic, nonce) = map[..MAGIC.len() + NONCE_BYTES].split_at(MAGIC.len());
        if magic != MAGIC || nonce != region.nonce {
            return Err(not_here(format!("{path} is not the peer's KV pool")));
        }
        // The number of blocks follows from the length: see `data_offset`.
        let each = block_bytes + size_of::<AtomicU64>();
        let mut blocks = (map.len() - HEADER_BYTES) / each;
        while blocks > 0 && data_offset(blocks) + blocks * block_bytes != map.len() {
            blocks -= 1;
        }
        if blocks == 0 {
            return Err(not_here("the peer's pool has another shape".into()));
        }
        Ok(Self { map, blocks, block_bytes })
    }

    fn generation(&self, block: u32) -> u64 {
        let offset = HEADER_BYTES + block as usize * size_of::<AtomicU64>();
        // SAFETY: inside the mapping (`take` checks the block), aligned, written atomically.
        unsafe { &*self.map.as_ptr().add(offset).cast::<AtomicU64>() }.load(Ordering::Acquire)
    }
}

impl Source for Region {
    fn take(&mut self, event: Event, order: &mut PullOrder) -> Result<u64, TransferError> {
        let Event::Ready(ready) = event else {
            return Err(TransferError::Protocol("expected block references".into()));
        };
        for block in &ready.blocks {
            if block.block as usize >= self.blocks {
                return Err(TransferError::Protocol(format!("no block {}", block.block)));
            }
            let start = data_offset(self.blocks) + block.block as usize * self.block_bytes;
            let bytes = &self.map[start..start + self.block_bytes];
            order.fill(block.index as usize, bytes).map_err(TransferError::Protocol)?;
            // The copy is whole if the block was not given away before its end.
            fence(Ordering::Acquire);
            if self.generation(block.block) != block.generation {
                order.discard();
                return Err(TransferError::Expired(block.block));
            }
        }
        Ok((ready.blocks.len() * self.block_bytes) as u64)
    }

    fn survives_peer(&self) -> bool {
        // Every block was checked after its copy.
        true
    }
}
