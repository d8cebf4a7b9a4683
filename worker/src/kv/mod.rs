//! The paged KV cache.
//!
//! * [`pool`]: the memory of the blocks, in a memfd that peers on this host can map.
//! * [`blocks`]: which block belongs to whom: reference counts, the prefix cache, LRU eviction.
//!   Plain data, no memory access.

pub mod blocks;
pub mod changes;
pub mod pool;

/// Index of a KV block in its pool.
pub type BlockId = u32;
