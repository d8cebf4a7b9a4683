//! The worker: one engine, its role chosen at start.
//!
//! Data flows down: [`service`] takes gRPC calls, [`engine`] schedules and samples, under a
//! [`constraint`] where there is one, [`model`] computes what a [`checkpoint`] holds, with or without
//! an adapter of [`lora`], [`kernels`] do the arithmetic. [`kv`] owns the cache that all of them share,
//! [`transfer`] moves it between workers. Where the [`device`] is a GPU, the package `baton-cuda` is
//! model and kernels. A worker of role `pooling` has no engine: [`pooling`] batches
//! texts and makes vectors and classes of what an [`encoder`] computes.

pub mod checkpoint;
pub mod config;
pub mod constraint;
pub mod device;
pub mod encoder;
pub mod engine;
pub mod kernels;
pub mod kv;
pub mod lora;
pub mod model;
pub mod pooling;
mod recycle;
pub mod sampler;
pub mod scheduler;
pub mod service;
pub mod transfer;
