//! Blocks in a GPU's memory, as the transports between GPUs need them.

use crate::kv::cuda::CudaBlocks;
use crate::kv::pool::{DeviceError, KvPool};

/// Waits for a GPU, a few milliseconds at most, while other threads take over what this one would do.
pub(super) fn in_place<T>(call: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(call)
}

/// The GPU's memory of a pool.
pub(super) fn blocks_of(pool: &KvPool) -> Result<&CudaBlocks, DeviceError> {
    pool.device().ok_or_else(|| DeviceError("the KV cache is not in a GPU's memory".into()))
}
