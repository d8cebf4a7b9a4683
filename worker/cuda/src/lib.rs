//! The decoder on an NVIDIA GPU.
//!
//! Everything that talks to a GPU is in this crate, and all `unsafe` that this takes: the kernels
//! (`kernels/*.cu`), the forward pass ([`Decoder`]), the memory that KV blocks live in
//! ([`KvMemory`]), and the two ways in which a block leaves a device without the host
//! ([`PeerMemory`] for processes of one host, [`nccl`] between hosts).
//!
//! The driver, cuBLAS and NCCL are looked up when they are first called, so a program that has this
//! crate in it starts on a machine without them: ask [`present`] first.
//!
//! Without the feature `cuda` the crate is empty.
#![cfg(feature = "cuda")]

mod blas;
mod decoder;
mod device;
mod driver;
mod error;
mod kernels;
mod kv;
mod limits;
pub mod measure;
#[cfg(feature = "nccl")]
pub mod nccl;
mod shape;
pub mod single;
mod step;
mod weights;

pub use decoder::Decoder;
pub use device::{Device, present, visible};
pub use error::Error;
pub use kv::{IPC_HANDLE_BYTES, KvMemory, PeerMemory};
pub use limits::{Limits, Slice};
pub use shape::{HEAD_DIMS, Shape};
pub use weights::{LayerWeights, Loader, Projections};

pub use half::bf16;
