//! Everything that crosses a process in Baton.
//!
//! * [`v1`]: the gRPC contract, generated from `proto/baton/v1/*.proto`.
//! * [`prefix`]: how a prompt's KV blocks are addressed by content.
//! * [`adapter`]: LoRA adapters of a whole cluster, as etcd keeps them.
//! * [`instance`]: the records that processes keep in etcd.
//! * [`channel`]: how processes call each other.
//! * [`drain`]: how a worker that drains refuses.
//! * [`bundle`]: the tokenizer and chat template as a worker hands them out.
//!
//! Nothing here runs: no tasks, no files, no sockets. Gateway, worker and coordinator meet here and nowhere else.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod bundle;
pub mod channel;
pub mod drain;
pub mod instance;
pub mod prefix;

/// Messages, clients and servers of the `baton.v1` package.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("baton.v1");
}

pub use adapter::AdapterRecord;
pub use bundle::TokenizerBundle;
pub use channel::endpoint;
pub use instance::{InstanceRecord, InstanceRole};
pub use prefix::{BlockHash, block_hashes};

/// The bounds of `WorkerStatus.steps_by_tokens`, those of vLLM's `iteration_tokens_total`.
pub const STEP_TOKENS: [u32; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// The bounds of `WorkerStatus.ttft_by_us` and `itl_by_us`: half a millisecond times powers of √2, up
/// to 46 s.
pub const LATENCY_US: [u64; 34] = {
    let mut bounds = [0; 34];
    let mut i = 0;
    while i < bounds.len() {
        bounds[i] = (if i.is_multiple_of(2) { 500 } else { 707 }) << (i / 2);
        i += 1;
    }
    bounds
};

/// The largest gRPC message any Baton process sends or takes.
///
/// Sized for a prompt of a million tokens. What is larger is cut into several messages, but for a KV
/// block: a worker whose blocks are larger does not start with gRPC among its transports.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
