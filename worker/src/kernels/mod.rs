//! The arithmetic: vector kernels over plain memory.
//!
//! * [`lanes`]: sixteen float32 lanes, the one abstraction over instruction sets.
//! * [`cpu`]: which instruction set this machine has; the only place that dispatches.
//! * [`dot`]: integer dot products, the one abstraction over their instructions.
//! * [`quant`]: block formats of GGUF, decoded to floats.
//! * [`arena`]: memory of the repacked weights; [`floats`]: of activations.
//! * [`packed`]: quantized weights, repacked for integer products.
//! * [`panels`]: float weights, repacked for products with broadcast activations.
//! * [`activations`]: rows of activations, as floats and as sixteen-bit integers.
//! * [`linear`]: `y = x Wᵀ` for one row and for many; [`integer`] and [`float`] are its kernels.
//! * [`strassen`]: products of rows that come in pairs, with fewer multiplications.
//! * [`affine`]: a product with its bias, a layer norm with its scale.
//! * [`low_rank`]: `y += (x Aᵀ) Bᵀ` for the rows of each LoRA adapter.
//! * [`page`]: how keys and values lie in a KV block.
//! * [`attention`]: softmax attention that walks those pages.
//! * [`bidirectional`]: softmax attention over whole texts, without pages.
//! * [`rope`]: rotary position embedding.
//! * [`elementwise`]: norms, activations.
//! * [`pool`]: the threads.
//!
//! Every kernel gives a row the same bits whatever else is in the batch: sums run over the same
//! lanes in the same order for one row as for many. So a token does not depend on batching, chunked
//! prefill, prefix-cache hits or the worker that computed it. What [`strassen`] computes depends on
//! the rest of its text, and so not on the batch either.
//!
//! Tile loops index arrays of registers by constant bounds, which is what lets the compiler keep
//! them in registers; iterators over them read worse.
//!
//! A CUDA device has the same functions with device buffers in place of slices; the model above
//! does not change.

#![allow(clippy::needless_range_loop)]

pub mod activations;
pub mod affine;
pub mod arena;
pub mod attention;
pub mod bidirectional;
pub mod cpu;
pub(crate) mod dot;
pub mod elementwise;
mod float;
pub mod floats;
mod integer;
pub mod lanes;
pub mod linear;
pub mod low_rank;
mod packed;
pub mod page;
mod panels;
pub mod pool;
pub mod quant;
pub mod rope;
pub mod strassen;
