//! The paged KV cache.
//!
//! * [`pool`]: the memory of the blocks, in a memfd that peers on this host can map, or in a GPU's
//!   memory.
//! * [`blocks`]: which block belongs to whom: reference counts, the prefix cache, LRU eviction.
//!   Plain data, no memory access.

pub mod blocks;
pub mod changes;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod pool;

/// Index of a KV block in its pool.
pub type BlockId = u32;
