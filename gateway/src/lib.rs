//! HTTP in, gRPC out.
//!
//! * [`adapters`]: LoRA adapters are loaded and unloaded on all workers of a model.
//! * [`http`]: routes, bodies, streams of events, clients that leave.
//! * [`api`]: what clients send and get, without I/O.
//! * [`generate`]: one sequence's life over the workers. [`pool`]: vectors, classes and scores of
//!   texts, likewise.
//! * [`workers`]: who is there, and how it does. [`routing`]: who gets a request.
//! * [`audio`]: from a file of sound to what models hear. [`speech`]: from that to a transcript.
//! * [`text`]: tokenizer, chat template, stop strings.
//! * [`output`]: what an answer's text means: reasoning, content, tool calls.
//! * [`coordinators`]: what operators ask of the cluster.
//! * [`auth`], [`quota`], [`tls`]: who may call, how much, and unheard by others.
//! * [`store`]: responses that are kept.
//! * [`metrics`]: what Prometheus reads. [`trace`]: what OpenTelemetry shows of a request.
//!
//! The gateway holds no tensors, and serves on what it last knew when etcd is away.

#![forbid(unsafe_code)]

pub mod adapters;
pub mod api;
pub mod audio;
pub mod auth;
pub mod config;
pub mod coordinators;
pub mod error;
pub mod generate;
pub mod http;
pub mod metrics;
pub mod output;
pub mod pool;
pub mod quota;
pub mod routing;
pub mod speech;
pub mod store;
pub mod text;
pub mod tls;
pub mod trace;
pub mod workers;
