//! What the GPU's results are compared to: the same formulas, slow and plain, in single precision.
#![allow(dead_code)]

use std::sync::Arc;

use baton_cuda::single::{Attention, Span};
use baton_cuda::{Device, Shape, bf16};

/// The GPU, or the double.
pub(crate) fn device() -> Arc<Device> {
    Device::open(0).expect(
        "these tests need a GPU, or the double: make -C tests/gpu/double, and run with \
         LD_LIBRARY_PATH=tests/gpu/double/build",
    )
}

/// Numbers that a seed gives.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() >> 16) as usize % end
    }

    /// Between -1 and 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.float() * scale).collect()
    }

    pub(crate) fn halves(&mut self, len: usize, scale: f32) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.float() * scale)).collect()
    }

    /// So many different blocks, in no order.
    pub(crate) fn blocks(&mut self, count: usize, of: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..of as u32).collect();
        (0..count).map(|_| all.swap_remove(self.below(all.len()))).collect()
    }
}

pub(crate) fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let factor = (mean + eps).sqrt().recip();
    x.iter().zip(weight).map(|(x, weight)| x * factor * weight).collect()
}

/// `x wᵀ`, both with `k` to a row.
pub(crate) fn multiply(x: &[f32], w: &[bf16], k: usize) -> Vec<f32> {
    let w: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
    let row = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| row(x, w))).collect()
}

/// `[position][head_dim / 2]`: cosine and sine.
pub(crate) fn angles(shape: &Shape, positions: usize, factors: Option<&[f32]>) -> Vec<f32> {
    let half = shape.head_dim / 2;
    let mut angles = Vec::new();
    for position in 0..positions {
        for i in 0..half {
            let frequency = shape.rope_theta.powf(-(i as f32) / half as f32);
            let angle = position as f32 * frequency / factors.map_or(1.0, |factors| factors[i]);
            angles.extend([angle.cos(), angle.sin()]);
        }
    }
    angles
}

/// A head after bias, norm and rotation.
pub(crate) fn rotated(
    shape: &Shape,
    head: &[f32],
    bias: Option<&[f32]>,
    norm: Option<&[f32]>,
    angles: &[f32],
    position: usize,
) -> Vec<f32> {
    let half = shape.head_dim / 2;
    let mut head = head.to_vec();
    if let Some(bias) = bias {
        head.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
    if let Some(norm) = norm {
        head = rms_norm(&head, norm, shape.rms_eps);
    }
    for i in 0..half {
        let (a, b) = if shape.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (cos, sin) = (angles[(position * half + i) * 2], angles[(position * half + i) * 2 + 1]);
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
    }
    head
}

/// Where a key begins in the blocks, and its value.
pub(crate) fn places(
    shape: &Shape,
    layer: usize,
    head: usize,
    blocks: &[u32],
    at: usize,
) -> (usize, usize) {
    let (block, slot) = (blocks[at / shape.block_size] as usize, at % shape.block_size);
    let row = |which: usize| {
        let head = ((block * shape.layers + layer) * 2 + which) * shape.kv_heads + head;
        (head * shape.block_size + slot) * shape.head_dim
    };
    (row(0), row(1))
}

/// Softmax of a query's scores with `count` keys, times their values.
pub(crate) fn attend(
    shape: &Shape,
    query: &[f32],
    key: impl Fn(usize) -> Vec<f32>,
    value: impl Fn(usize) -> Vec<f32>,
    count: usize,
) -> Vec<f32> {
    let scale = (shape.head_dim as f32).sqrt().recip();
    let score = |at: usize| query.iter().zip(key(at)).map(|(q, k)| q * k).sum::<f32>() * scale;
    let scores: Vec<f32> = (0..count).map(score).collect();
    let most = scores.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
    let total: f32 = weights.iter().sum();
    let mut out = vec![0.0; shape.head_dim];
    for (at, weight) in weights.iter().enumerate() {
        out.iter_mut().zip(value(at)).for_each(|(out, value)| *out += weight / total * value);
    }
    out
}

/// As the kernels do it: with what is written to `a.kv`.
pub(crate) fn attention(a: &mut Attention<'_>) -> Vec<f32> {
    let shape = a.shape;
    let (d, heads, kv_heads) = (shape.head_dim, shape.heads, shape.kv_heads);
    let width = (heads + 2 * kv_heads) * d;
    let mut row = 0;
    let mut out = Vec::new();
    for Span { start, count, blocks } in a.spans {
        let rows = &a.qkv[row * width..][..count * width];
        row += count;
        let head = |i: usize, head: usize, rotates: Option<Option<&[f32]>>| {
            let floats: Vec<f32> =
                rows[i * width + head * d..][..d].iter().map(|x| x.to_f32()).collect();
            let bias = a.bias.map(|bias| &bias[head * d..][..d]);
            match rotates {
                Some(norm) => rotated(shape, &floats, bias, norm, a.angles, start + i),
                None => match bias {
                    Some(bias) => floats.iter().zip(bias).map(|(x, bias)| x + bias).collect(),
                    None => floats,
                },
            }
        };
        for i in 0..*count {
            for kv in 0..kv_heads {
                let (key, value) = places(shape, a.layer, kv, blocks, start + i);
                let norm = a.norms.map(|norms| norms.1);
                let pairs = [
                    (key, head(i, heads + kv, Some(norm))),
                    (value, head(i, heads + kv_heads + kv, None)),
                ];
                for (at, values) in pairs {
                    let to = a.kv[at..][..d].iter_mut();
                    to.zip(values).for_each(|(to, x)| *to = bf16::from_f32(x));
                }
            }
        }
        for i in 0..*count {
            for q in 0..heads {
                let query: Vec<f32> = head(i, q, Some(a.norms.map(|norms| norms.0)))
                    .into_iter()
                    .map(rounded)
                    .collect();
                let at = |at: usize| places(shape, a.layer, q / (heads / kv_heads), blocks, at);
                let read = |from: usize| a.kv[from..][..d].iter().map(|x| x.to_f32()).collect();
                let (key, value) = (|i: usize| read(at(i).0), |i: usize| read(at(i).1));
                out.extend(attend(shape, &query, key, value, start + i + 1));
            }
        }
    }
    out
}

/// Fails where two differ by more than `tolerance` of the largest.
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let most = expected.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        // Not a number is not close.
        let close = (got - expected).abs() <= tolerance * most;
        assert!(close, "{what}: at {i}: {got}, expected {expected} (largest {most})");
    }
}
