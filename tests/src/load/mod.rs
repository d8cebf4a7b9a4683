//! Traffic: how long requests are, when they arrive, how they are sent, what came of them.
//!
//! * [`lengths`]: lengths of prompts and answers, by a distribution or from a trace.
//! * [`trace`]: published traces, as files.
//! * [`arrivals`]: when requests arrive.
//! * [`client`]: sends one streaming request and notes when each token came.
//! * [`outcome`]: what came of a run: latencies, throughput, goodput, errors.
//! * [`stats`]: medians and percentiles.

pub mod arrivals;
pub mod client;
pub mod lengths;
pub mod outcome;
pub mod stats;
pub mod trace;
