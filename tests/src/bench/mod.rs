//! What the benchmarks of whole clusters share.
//!
//! * [`direct`]: prompts asked of a worker itself, without a gateway.
//! * [`wire`]: a lean HTTP client, so that what is measured is the server.
//! * [`null`]: a cluster whose only worker computes nothing.
//! * [`procfs`]: memory, processor time and cores of a process.
//! * [`report`]: results against their targets, as JSON and Markdown.

pub mod direct;
pub mod null;
pub mod procfs;
pub mod report;
pub mod wire;
