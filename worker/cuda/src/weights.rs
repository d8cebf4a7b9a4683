//! Weights on their way to the device, and there.

use std::sync::Arc;

use half::bf16;

use crate::driver::{Buffer, Stream};
use crate::{Decoder, Device, Error, Limits, Shape};

/// The three products that begin a layer, each `[outputs, inputs]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Projections<'a, T> {
    /// Of the queries.
    pub query: &'a [T],
    /// Of the keys.
    pub key: &'a [T],
    /// Of the values.
    pub value: &'a [T],
}

/// One layer's weights. Matrices are `[outputs, inputs]`, row-major.
#[derive(Clone, Copy, Debug)]
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

/// A layer on the device.
pub(crate) struct Layer {
    pub(crate) attention_norm: Buffer<f32>,
    /// Queries, keys and values, one below the other.
    pub(crate) qkv: Buffer<bf16>,
    pub(crate) bias: Option<Buffer<f32>>,
    pub(crate) query_norm: Option<Buffer<f32>>,
    pub(crate) key_norm: Option<Buffer<f32>>,
    pub(crate) output: Buffer<bf16>,
    pub(crate) ffn_norm: Buffer<f32>,
    /// Rows of gate and up by turns: a lane has both factors of an output.
    pub(crate) gate_up: Buffer<bf16>,
    pub(crate) down: Buffer<bf16>,
}

/// A model on the device.
pub(crate) struct Weights {
    pub(crate) embedding: Buffer<bf16>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Buffer<f32>,
    /// Absent when the embedding is also the output projection.
    pub(crate) head: Option<Buffer<bf16>>,
}

/// Takes a model's weights to the device, tensor by tensor.
pub struct Loader {
    stream: Stream,
    shape: Shape,
    embedding: Option<Buffer<bf16>>,
    layers: Vec<Layer>,
    norm: Option<Buffer<f32>>,
    head: Option<Buffer<bf16>>,
    rope_factors: Option<Vec<f32>>,
    /// Rows of gate and up by turns.
    turns: Vec<bf16>,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// What tensors are allocated for.
const WHAT: &str = "the model's weights";

impl Loader {
    /// Refuses shapes that the kernels do not compute.
    pub fn new(device: &Arc<Device>, shape: Shape) -> Result<Self, Error> {
        shape.check()?;
        Ok(Self {
            stream: Stream::new(device)?,
            shape,
            embedding: None,
            layers: Vec::new(),
            norm: None,
            head: None,
            rope_factors: None,
            turns: Vec::new(),
        })
    }

    /// `[vocab, hidden]`.
    pub fn embedding(&mut self, weights: &[bf16]) -> Result<(), Error> {
        expect("embedding", weights.len(), self.shape.vocab * self.shape.hidden)?;
        self.embedding = Some(Buffer::of(&self.stream, weights, WHAT)?);
        Ok(())
    }

    /// Layer `i`; layers are given in order.
    pub fn layer(&mut self, i: usize, weights: &LayerWeights<'_>) -> Result<(), Error> {
        expect("layers before this one", self.layers.len(), i)?;
        let shape = &self.shape;
        let (hidden, q, kv) = (shape.hidden, shape.q_width(), shape.kv_width());
        let stream = &self.stream;
        let vector = |name: &str, values: &[f32], len: usize| {
            expect(name, values.len(), len)?;
            Buffer::of(stream, values, WHAT)
        };
        let matrix = |name: &str, values: &[bf16], outputs: usize, inputs: usize| {
            expect(name, values.len(), outputs * inputs)?;
            Buffer::of(stream, values, WHAT)
        };
        let Projections { query, key, value } = weights.projections;
        for (name, tensor, outputs) in [("query", query, q), ("key", key, kv), ("value", value, kv)]
        {
            expect(name, tensor.len(), outputs * hidden)?;
        }
        let qkv = Buffer::new(stream.device(), shape.qkv_width() * hidden, WHAT)?;
        qkv.fill_from(stream, 0, query)?;
        qkv.fill_from(stream, q * hidden, key)?;
        qkv.fill_from(stream, (q + kv) * hidden, value)?;
        let bias = weights.biases.map(|of| {
            let all = [of.query, of.key, of.value].concat();
            expect("query bias", of.query.len(), q)?;
            expect("key bias", of.key.len(), kv)?;
            vector("biases", &all, shape.qkv_width())
        });
        expect("gate", weights.gate.len(), shape.ffn * hidden)?;
        expect("up", weights.up.len(), shape.ffn * hidden)?;
        self.turns.clear();
        let rows = weights.gate.chunks_exact(hidden).zip(weights.up.chunks_exact(hidden));
        rows.for_each(|(gate, up)| {
            self.turns.extend_from_slice(gate);
            self.turns.extend_from_slice(up);
        });
        let norm = |name: &str, values: Option<&[f32]>| {
            values.map(|values| vector(name, values, shape.head_dim)).transpose()
        };
        let layer = Layer {
            attention_norm: vector("attention norm", weights.attention_norm, hidden)?,
            qkv,
            bias: bias.transpose()?,
            query_norm: norm("query norm", weights.query_norm)?,
            key_norm: norm("key norm", weights.key_norm)?,
            output: matrix("output", weights.output, hidden, q)?,
            ffn_norm: vector("MLP norm", weights.ffn_norm, hidden)?,
            gate_up: matrix("gate and up", &self.turns, 2 * shape.ffn, hidden)?,
            down: matrix("down", weights.down, hidden, shape.ffn)?,
        };
        self.layers.push(layer);
        Ok(())
    }

    /// RMSNorm before the output projection, `[hidden]`.
    pub fn norm(&mut self, weights: &[f32]) -> Result<(), Error> {
        expect("norm", weights.len(), self.shape.hidden)?;
        self.norm = Some(Buffer::of(&self.stream, weights, WHAT)?);
        Ok(())
    }

    /// The output projection, `[vocab, hidden]`. Without it the embedding is used.
    pub fn head(&mut self, weights: &[bf16]) -> Result<(), Error> {
        expect("head", weights.len(), self.shape.vocab * self.shape.hidden)?;
        self.head = Some(Buffer::of(&self.stream, weights, WHAT)?);
        Ok(())
    }

    /// Divide the frequency of each pair of RoPE, `[head_dim / 2]`.
    pub fn rope_factors(&mut self, factors: &[f32]) -> Result<(), Error> {
        expect("RoPE factors", factors.len(), self.shape.head_dim / 2)?;
        self.rope_factors = Some(factors.to_vec());
        Ok(())
    }

    /// Allocates what a step needs within `limits`.
    pub fn finish(self, limits: Limits) -> Result<Decoder, Error> {
        expect("layers", self.layers.len(), self.shape.layers)?;
        let missing = |what: &str| Error::Mismatch(format!("the {what} was not given"));
        let weights = Weights {
            embedding: self.embedding.ok_or_else(|| missing("embedding"))?,
            layers: self.layers,
            norm: self.norm.ok_or_else(|| missing("norm"))?,
            head: self.head,
        };
        Decoder::new(self.stream, self.shape, weights, self.rope_factors.as_deref(), limits)
    }
}

fn expect(name: &str, got: usize, expected: usize) -> Result<(), Error> {
    match got == expected {
        true => Ok(()),
        false => Err(Error::Mismatch(format!("{name}: {got}, expected {expected}"))),
    }
}
