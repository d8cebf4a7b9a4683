//! How keys and values lie in a KV block, and the writing of them.
//!
//! A block is `[layer][keys, values][kv_head]`, each a page: a matrix of integers and a float32 scale
//! for each token. Keys are `[head_dim][token]`, so that one vector holds the same
//! dimension of sixteen keys and scores need no horizontal sums; values are `[token][head_dim]`.
//! Sixteen bits with a scale for each token and head take half the memory of float32, and the
//! bytes of float16 with an eighth of its rounding error. Eight bits take half of that again, at a
//! cost in perplexity that `worker/examples/perplexity.rs` measures.

use baton_proto::v1::KvDtype;

use super::lanes::Lanes;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// The integers of a page.
pub(super) trait Element: Copy {
    /// The largest magnitude.
    const LARGEST: f32;
    /// A float within ±`LARGEST`, to the nearest, ties to even.
    fn rounded(x: f32) -> Self;
    /// Sixteen elements as floats.
    ///
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<V: Lanes>(from: *const Self) -> V;
}

impl Element for i16 {
    const LARGEST: f32 = 32767.0;
    #[inline(always)]
    fn rounded(x: f32) -> Self {
        whole(x) as Self
    }
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_i16(from) }
    }
}

impl Element for i8 {
    const LARGEST: f32 = 127.0;
    #[inline(always)]
    fn rounded(x: f32) -> Self {
        whole(x) as Self
    }
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_i8(from) }
    }
}

/// To the nearest, ties to even.
#[inline(always)]
fn whole(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 rounds; there may be no instruction for it.
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

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
    /// How many bits an element has.
    pub dtype: KvDtype,
}

/// Which of a head's two pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrix {
    Keys,
    Values,
}

/// The keys or the values of one head in one block.
pub(super) struct Page<E> {
    pub(super) elements: *mut E,
    pub(super) scales: *mut f32,
}

impl Shape {
    /// Bytes of one head's keys or values in a block.
    fn page_bytes(&self) -> usize {
        let element = match self.dtype {
            KvDtype::I8 => size_of::<i8>(),
            _ => size_of::<i16>(),
        };
        self.block_size * (self.head_dim * element + size_of::<f32>())
    }

    /// Bytes of one layer in a block.
    pub fn layer_bytes(&self) -> usize {
        2 * self.kv_heads * self.page_bytes()
    }

    /// A page of a block.
    ///
    /// # Safety
    /// `block` points to a block with this layer and head, and elements of this type.
    #[inline(always)]
    pub(super) unsafe fn page<E: Element>(
        &self,
        block: *mut u8,
        layer: usize,
        matrix: Matrix,
        head: usize,
    ) -> Page<E> {
        let index = head + if matrix == Matrix::Values { self.kv_heads } else { 0 };
        // SAFETY: inside the block, by the layout; all parts are multiples of four bytes.
        unsafe {
            let page = block.add(layer * self.layer_bytes() + index * self.page_bytes());
            let elements = page.cast::<E>();
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
    // SAFETY: the asserts keep every offset inside the block; the token's place in it is the
    // caller's alone.
    unsafe {
        match shape.dtype {
            KvDtype::I8 => put::<i8>(shape, layer, block, slot, key, value),
            _ => put::<i16>(shape, layer, block, slot, key, value),
        }
    }
}

/// The first keys of one head, `keys.len() / head_dim` of them, one after the other.
///
/// # Panics
/// When the blocks hold fewer, or have no such layer or head.
pub fn read_keys(
    kv: &KvPool,
    shape: &Shape,
    layer: usize,
    blocks: &[BlockId],
    head: usize,
    keys: &mut [f32],
) {
    assert!(head < shape.kv_heads && (layer + 1) * shape.layer_bytes() <= kv.block_bytes());
    let (head_dim, size) = (shape.head_dim, shape.block_size);
    for (position, key) in keys.chunks_exact_mut(head_dim).enumerate() {
        let (block, slot) = (kv.block_ptr(blocks[position / size]), position % size);
        // SAFETY: inside the block by the assert; the caller of a pass owns what it reads.
        unsafe {
            match shape.dtype {
                KvDtype::I8 => {
                    let page = shape.page::<i8>(block, layer, Matrix::Keys, head);
                    let scale = *page.scales.add(slot);
                    for (d, x) in key.iter_mut().enumerate() {
                        *x = f32::from(*page.elements.add(d * size + slot)) * scale;
                    }
                }
                _ => {
                    let page = shape.page::<i16>(block, layer, Matrix::Keys, head);
                    let scale = *page.scales.add(slot);
                    for (d, x) in key.iter_mut().enumerate() {
                        *x = f32::from(*page.elements.add(d * size + slot)) * scale;
                    }
                }
            }
        }
    }
}

/// [`store`] for one type of elements.
unsafe fn put<E: Element>(
    shape: &Shape,
    layer: usize,
    block: *mut u8,
    slot: usize,
    key: &[f32],
    value: &[f32],
) {
    let heads = key.chunks_exact(shape.head_dim).zip(value.chunks_exact(shape.head_dim));
    for (head, (key, value)) in heads.enumerate() {
        // SAFETY: the block has this place in each of its pages, and it is the caller's.
        unsafe {
            let keys = shape.page::<E>(block, layer, Matrix::Keys, head);
            let inverse = put_scale::<E>(keys.scales.add(slot), key);
            for (d, x) in key.iter().enumerate() {
                *keys.elements.add(d * shape.block_size + slot) = E::rounded(x * inverse);
            }
            let values = shape.page::<E>(block, layer, Matrix::Values, head);
            let inverse = put_scale::<E>(values.scales.add(slot), value);
            for (d, x) in value.iter().enumerate() {
                *values.elements.add(slot * shape.head_dim + d) = E::rounded(x * inverse);
            }
        }
    }
}

/// Writes the scale of a vector and gives what its elements are to be multiplied by.
unsafe fn put_scale<E: Element>(to: *mut f32, x: &[f32]) -> f32 {
    // As integers, magnitudes have the same order, with infinity and NaN above all.
    let bits = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let magnitude = f32::from_bits(bits);
    // What is not finite must not be hidden; what vanishes beside everything else may be.
    let (scale, inverse) = match magnitude {
        _ if !magnitude.is_finite() => (f32::NAN, 0.0),
        _ if magnitude < 1e-30 => (0.0, 0.0),
        _ => (magnitude / E::LARGEST, E::LARGEST / magnitude),
    };
    // SAFETY: the caller's place in the page.
    unsafe { *to = scale };
    inverse
}
