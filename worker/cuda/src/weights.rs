//! Weights on their way to the device.

use std::sync::Arc;

use half::bf16;

use crate::{Decoder, Device, Error, Limits, Shape};

/// The three products that begin a layer, each `[outputs, inputs]`, row-major.
#[derive(Clone, Copy)]
pub struct Projections<'a, T> {
    /// Of the queries.
    pub query: &'a [T],
    /// Of the keys.
    pub key: &'a [T],
    /// Of the values.
    pub value: &'a [T],
}

/// One layer's weights. Matrices are `[outputs, inputs]`, row-major.
#[derive(Clone, Copy)]
pub struct LayerWeights<'a> {
    /// RMSNorm before attention, `[hidden]`.
    pub attention_norm: &'a [f32],
    /// `[heads × head_dim, hidden]`, and `[kv_heads × head_dim, hidden]` twice.
    pub projections: Projections<'a, bf16>,
    /// Added to what the projections give.
    pub biases: Option<Projections<'a, f32>>,
    /// RMSNorm of each query head, `[head_dim]`.
    pub query_norm: Option<&'a [f32]>,
    /// RMSNorm of each key head, `[head_dim]`.
    pub key_norm: Option<&'a [f32]>,
    /// `[hidden, heads × head_dim]`.
    pub output: &'a [bf16],
    /// RMSNorm before the MLP, `[hidden]`.
    pub ffn_norm: &'a [f32],
    /// `[ffn, hidden]`.
    pub gate: &'a [bf16],
    /// `[ffn, hidden]`.
    pub up: &'a [bf16],
    /// `[hidden, ffn]`.
    pub down: &'a [bf16],
}

/// Takes a model's weights to the device, tensor by tensor.
pub struct Loader {}

impl Loader {
    /// Refuses shapes that the kernels do not compute.
    pub fn new(_device: &Arc<Device>, shape: Shape) -> Result<Self, Error> {
        shape.check()?;
        Ok(Self {})
    }

    /// `[vocab, hidden]`.
    pub fn embedding(&mut self, _weights: &[bf16]) -> Result<(), Error> {
        Ok(())
    }

    /// Layer `i`; layers are given in order.
    pub fn layer(&mut self, _i: usize, _weights: &LayerWeights<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// RMSNorm before the output projection, `[hidden]`.
    pub fn norm(&mut self, _weights: &[f32]) -> Result<(), Error> {
        Ok(())
    }

    /// The output projection, `[vocab, hidden]`. Without it the embedding is used.
    pub fn head(&mut self, _weights: &[bf16]) -> Result<(), Error> {
        Ok(())
    }

    /// Divide the frequency of each pair of RoPE, `[head_dim / 2]`.
    pub fn rope_factors(&mut self, _factors: &[f32]) -> Result<(), Error> {
        Ok(())
    }

    /// Allocates what a step needs within `limits`.
    pub fn finish(self, _limits: Limits) -> Result<Decoder, Error> {
        Err(Error::Absent("not yet written".into()))
    }
}
