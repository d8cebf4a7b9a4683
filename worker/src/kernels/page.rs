//! How keys and values lie in a KV block, and the writing of them.
//!
//! A block is `[layer][keys, values][kv_head]`, each a page: a matrix of sixteen-bit integers and a
//! float32 scale for each token. Keys are `[head_dim][token]`, so that one vector holds the same
//! dimension of sixteen keys and scores need no horizontal sums; values are `[token][head_dim]`.
//! Sixteen bits with a scale for each token and head take half the memory of float32, and the
//! bytes of float16 with an eighth of its rounding error.

use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// The largest magnitude of an element.
const LARGEST: f32 = 32767.0;

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, a multiple of sixteen.
    pub head_dim: usize,
    /// Tokens in a KV block, a multiple of sixteen.
    pub block_size: usize,
}

/// Which of a head's two pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrix {
    Keys,
    Values,
}

/// The keys or the values of one head in one block.
pub(super) struct Page {
    pub(super) elements: *mut i16,
    pub(super) scales: *mut f32,
}

impl Shape {
    /// Bytes of one head's keys or values in a block.
    fn page_bytes(&self) -> usize {
        self.block_size * (self.head_dim * size_of::<i16>() + size_of::<f32>())
    }

    /// Bytes of one layer in a block.
    pub fn layer_bytes(&self) -> usize {
        2 * self.kv_heads * self.page_bytes()
    }

    /// A page of a block.
    ///
    /// # Safety
    /// `block` points to a block with this layer and head.
    #[inline(always)]
    pub(super) unsafe fn page(
        &self,
        block: *mut u8,
        layer: usize,
        matrix: Matrix,
        head: usize,
    ) -> Page {
        let index = head + if matrix == Matrix::Values { self.kv_heads } else { 0 };
        // SAFETY: inside the block, by the layout; all parts are multiples of four bytes.
        unsafe {
            let page = block.add(layer * self.layer_bytes() + index * self.page_bytes());
            let elements = page.cast::<i16>();
            Page { elements, scales: elements.add(self.head_dim * self.block_size).cast() }
        }
    }
}

/// Writes one token's keys and values of a layer into its block.
///
/// # Safety
/// The caller owns the token's place in the block alone.
pub unsafe fn store(
    kv: &KvPool,
    shape: &Shape,
    layer: usize,
    blocks: &[BlockId],
    position: usize,
    key: &[f32],
    value: &[f32],
) {
    let (block, slot) = (blocks[position / shape.block_size], position % shape.block_size);
    assert!(key.len() == shape.kv_heads * shape.head_dim && key.len() == value.len());
    assert!((layer + 1) * shape.layer_bytes() <= kv.block_bytes());
    let block = kv.block_ptr(block);
    let heads = key.chunks_exact(shape.head_dim).zip(value.chunks_exact(shape.head_dim));
    for (head, (key, value)) in heads.enumerate() {
        // SAFETY: the asserts keep every offset inside the block; the token's place in it is the
        // caller's alone.
        unsafe {
            let keys = shape.page(block, layer, Matrix::Keys, head);
            let inverse = put_scale(keys.scales.add(slot), key);
            for (d, x) in key.iter().enumerate() {
                *keys.elements.add(d * shape.block_size + slot) = rounded(x * inverse);
            }
            let values = shape.page(block, layer, Matrix::Values, head);
            let inverse = put_scale(values.scales.add(slot), value);
            for (d, x) in value.iter().enumerate() {
                *values.elements.add(slot * shape.head_dim + d) = rounded(x * inverse);
            }
        }
    }
}

/// Writes the scale of a vector and gives what its elements are to be multiplied by.
unsafe fn put_scale(to: *mut f32, x: &[f32]) -> f32 {
    // As integers, magnitudes have the same order, with infinity and NaN above all.
    let bits = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let magnitude = f32::from_bits(bits);
    // What is not finite must not be hidden; what vanishes beside everything else may be.
    let (scale, inverse) = match magnitude {
        _ if !magnitude.is_finite() => (f32::NAN, 0.0),
        _ if magnitude < 1e-30 => (0.0, 0.0),
        _ => (magnitude / LARGEST, LARGEST / magnitude),
    };
    // SAFETY: the caller's place in the page.
    unsafe { *to = scale };
    inverse
}

/// To the nearest, ties to even.
#[inline(always)]
fn rounded(x: f32) -> i16 {
    // Adding and taking away 1.5 · 2^23 rounds; there may be no instruction for it.
    const SHIFT: f32 = 12_582_912.0;
    ((x + SHIFT) - SHIFT) as i16
}
