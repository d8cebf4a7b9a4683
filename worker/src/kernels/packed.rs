//! Quantized weights, repacked once at load for integer products.
//!
//! A tile is sixteen outputs. For each 32 inputs it holds the quants, byte `4 · output + input` of
//! each step of four inputs (two steps share a byte where a weight has four bits or fewer), and
//! the factors: the scales of the sixteen outputs, then, where the format has them, their minima.
//! A weight is `scale · q + minimum` with an unsigned `q`, as in the block formats of ggml
//! (`ggml-quants.c`) after moving the zero of the symmetric ones. Nothing is rounded: a repacked
//! weight is exactly the weight in the file.

use candle_core::quantized::GgmlDType;
use half::f16;
use parking_lot::Mutex;

use super::arena::{Arena, Line, Lines};
use super::dot::{BLOCK, STEP};
use super::lanes::LANES;
use super::pool::ThreadPool;

/// How the blocks of a type are repacked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Two weights share a byte.
    pub(super) nibbles: bool,
    /// Scales are kept in half precision, as in the file; else they are products, kept in single.
    pub(super) half: bool,
    /// The minimum of a weight is its scale times this; without, minima are kept.
    pub(super) offset: Option<f32>,
    /// Scales of 32 inputs: one, or two.
    pub(super) groups: usize,
    /// Weights that the file keeps in one piece, and its bytes.
    piece: (usize, usize),
}

impl Layout {
    /// `None` for types that are not block-quantized.
    pub(super) fn of(dtype: GgmlDType) -> Option<Self> {
        let piece = (dtype.block_size(), dtype.type_size());
        let simple = |nibbles, offset| Self { nibbles, half: true, offset, groups: 1, piece };
        let nested = |nibbles, offset, groups| Self { nibbles, half: false, offset, groups, piece };
        Some(match dtype {
            GgmlDType::Q4_0 => simple(true, Some(-8.0)),
            GgmlDType::Q4_1 => simple(true, None),
            GgmlDType::Q5_0 => simple(false, Some(-16.0)),
            GgmlDType::Q5_1 => simple(false, None),
            GgmlDType::Q8_0 => simple(false, Some(-128.0)),
            GgmlDType::Q2K => nested(true, None, 2),
            GgmlDType::Q3K => nested(true, Some(-4.0), 2),
            GgmlDType::Q4K => nested(true, None, 1),
            GgmlDType::Q5K => nested(false, None, 1),
            GgmlDType::Q6K => nested(false, Some(-32.0), 2),
            _ => return None,
        })
    }

    /// Bytes of the quants of 16 outputs × 32 inputs.
    pub(super) fn quant_bytes(&self) -> usize {
        if self.nibbles { LANES * BLOCK / 2 } else { LANES * BLOCK }
    }

    /// Bytes of the scales, or of the minima, of one group.
    pub(super) fn factor_bytes(&self) -> usize {
        LANES * if self.half { 2 } else { 4 }
    }

    /// Bytes of all factors of 16 outputs × 32 inputs.
    pub(super) fn factors_bytes(&self) -> usize {
        self.factor_bytes() * self.groups * if self.offset.is_none() { 2 } else { 1 }
    }
}

/// A repacked matrix.
pub(super) struct Packed {
    pub(super) layout: Layout,
    /// Blocks of 32 inputs.
    pub(super) blocks: usize,
    /// Tiles of sixteen outputs; the last is padded with zero weights.
    lines: Lines,
    tile_bytes: usize,
}

impl Packed {
    /// Repacks a matrix of `outputs × inputs`; `None` when its type is not block-quantized.
    pub(super) fn new(
        pool: &mut ThreadPool,
        arena: &mut Arena,
        dtype: GgmlDType,
        bytes: &[u8],
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let layout = Layout::of(dtype)?;
        let blocks = inputs / BLOCK;
        // All quants of a tile, then all its factors, padded to whole cache lines.
        let block_bytes = layout.quant_bytes() + layout.factors_bytes();
        let tile_bytes = (blocks * block_bytes).next_multiple_of(size_of::<Line>());
        let tile_lines = tile_bytes / size_of::<Line>();
        let mut lines = arena.lines(outputs.div_ceil(LANES) * tile_lines);
        let row_bytes = inputs / layout.piece.0 * layout.piece.1;
        let tiles: Vec<_> = lines.as_mut_slice().chunks_mut(tile_lines).map(Mutex::new).collect();
        pool.run(tiles.len(), |task| {
            let rows = bytes[task * LANES * row_bytes..].chunks_exact(row_bytes);
            let mut tile = tiles[task].lock();
            for (lane, row) in rows.take(LANES).enumerate() {
                put_row(&layout, dtype, lane, row, blocks, &mut tile);
            }
        });
        drop(tiles);
        Some(Self { layout, blocks, lines, tile_bytes })
    }

    /// Whether weights of a type are block-quantized.
    pub(super) fn knows(dtype: GgmlDType) -> bool {
        Layout::of(dtype).is_some()
    }

    /// Bytes of a tile.
    pub(super) fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    /// Where a tile's factors begin.
    pub(super) fn factors_offset(&self) -> usize {
        self.blocks * self.layout.quant_bytes()
    }

    /// A tile's first byte.
    pub(super) fn tile(&self, tile: usize) -> *const u8 {
        self.lines.as_ptr().cast::<u8>().wrapping_add(tile * self.tile_bytes)
    }
}

/// Writes one output's row of a file into its lane of a tile.
fn put_row(
    layout: &Layout,
    dtype: GgmlDType,
    lane: usize,
    row: &[u8],
    blocks: usize,
    tile: &mut [Line],
) {
    let (piece_len, piece_bytes) = layout.piece;
    // SAFETY: lines are plain bytes.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(tile.as_mut_ptr().cast::<u8>(), size_of_val(tile))
    };
    let (quants, factors) = bytes.split_at_mut(blocks * layout.quant_bytes());
    for block in 0..blocks {
        let piece = &row[block * BLOCK / piece_len * piece_bytes..][..piece_bytes];
        let group = Group::read(dtype, piece, block % (piece_len / BLOCK));
        group.put_quants(layout, lane, &mut quants[block * layout.quant_bytes()..]);
        group.put_factors(layout, lane, &mut factors[block * layout.factors_bytes()..]);
    }
}

/// 32 neighbouring weights of one output: `scale[i / 16] · q[i] + minimum[i / 16]`.
struct Group {
    q: [u8; BLOCK],
    scale: [f32; 2],
    minimum: [f32; 2],
}

impl Group {
    fn put_quants(&self, layout: &Layout, lane: usize, to: &mut [u8]) {
        for (step, quad) in self.q.as_chunks::<STEP>().0.iter().enumerate() {
            if layout.nibbles {
                let to = &mut to[step / 2 * 64 + lane * STEP..][..STEP];
                to.iter_mut().zip(quad).for_each(|(to, q)| *to |= q << (step % 2 * 4));
            } else {
                to[step * 64 + lane * STEP..][..STEP].copy_from_slice(quad);
            }
        }
    }

    fn put_factors(&self, layout: &Layout, lane: usize, to: &mut [u8]) {
        let mut factors = to.chunks_exact_mut(layout.factor_bytes());
        let mut put = |value: f32| {
            let Some(to) = factors.next() else { return };
            if layout.half {
                to[lane * 2..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
            } else {
                to[lane * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        };
        for group in 0..layout.groups {
            put(self.scale[group]);
            if layout.offset.is_none() {
                put(self.minimum[group]);
            }
        }
    }

    /// Reads the `index`-th 32 weights of a piece of a file.
    fn read(dtype: GgmlDType, piece: &[u8], index: usize) -> Self {
        let half = |at: usize| f16::from_le_bytes([piece[at], piece[at + 1]]).to_f32();
        let low_high = |at: usize| -> [u8; BLOCK] {
            std::array::from_fn(|i| piece[at + i % 16] >> (i / 16 * 4) & 15)
        };
        let with_fifth = |q: [u8; BLOCK], at: usize| -> [u8; BLOCK] {
            std::array::from_fn(|i| q[i] | (piece[at + i / 8] >> (i % 8) & 1) << 4)
        };
        let one =
            |q, scale: f32, minimum: f32| Self { q, scale: [scale; 2], minimum: [minimum; 2] };
        match dtype {
            GgmlDType::Q4_0 => one(low_high(2), half(0), 0.0),
            GgmlDType::Q4_1 => one(low_high(4), half(0), half(2)),
            GgmlDType::Q5_0 => one(with_fifth(low_high(6), 2), half(0), 0.0),
            GgmlDType::Q5_1 => one(with_fifth(low_high(8), 4), half(0), half(2)),
            GgmlDType::Q8_0 => {
                one(std::array::from_fn(|i| piece[2 + i].wrapping_add(128)), half(0), 0.0)
            }
            GgmlDType::Q2K => {
                // scales[16], quants[64], d, dmin: 32 quants share bytes with 96 more.
                let q =
                    std::array::from_fn(|i| piece[16 + index / 4 * 32 + i] >> (index % 4 * 2) & 3);
                let (d, dmin) = (half(80), half(82));
                let scale = |i: usize| piece[index * 2 + i];
                Self {
                    q,
                    scale: std::array::from_fn(|i| d * f32::from(scale(i) & 15)),
                    minimum: std::array::from_fn(|i| -dmin * f32::from(scale(i) >> 4)),
                }
            }
            GgmlDType::Q3K => {
                // high bits[32], low two bits[64], scales[12], d.
                let q = std::array::from_fn(|i| {
                    let low = piece[32 + index / 4 * 32 + i] >> (index % 4 * 2) & 3;
                    low | (piece[i] >> index & 1) << 2
                });
                let d = half(108);
                let scale = |i: usize| {
                    let (at, i) = (96, index * 2 + i);
                    let low = piece[at + i % 8] >> (i / 8 * 4) & 15;
                    let high = piece[at + 8 + i % 4] >> (i / 4 * 2) & 3;
                    d * (f32::from(low | high << 4) - 32.0)
                };
                Self { q, scale: [scale(0), scale(1)], minimum: [0.0; 2] }
            }
            GgmlDType::Q4K | GgmlDType::Q5K => {
                // d, dmin, scales[12], for Q5_K the fifth bits[32], then quants[128].
                let five = dtype == GgmlDType::Q5K;
                let quants = if five { 48 } else { 16 };
                let q = std::array::from_fn(|i| {
                    let q = piece[quants + index / 2 * 32 + i] >> (index % 2 * 4) & 15;
                    if five { q | (piece[16 + i] >> index & 1) << 4 } else { q }
                });
                let (scale, minimum) = six_bit_pair(&piece[4..16], index);
                one(q, half(0) * f32::from(scale), -half(2) * f32::from(minimum))
            }
            _ => {
                // Q6_K: low four bits[128], high two bits[64], scales[16], d.
                let (part, index) = (index / 4, index % 4);
                let q = std::array::from_fn(|i| {
                    let low = piece[part * 64 + index % 2 * 32 + i] >> (index / 2 * 4) & 15;
                    low | (piece[128 + part * 32 + i] >> (index * 2) & 3) << 4
                });
                let d = half(208);
                let scale =
                    |i: usize| d * f32::from(piece[192 + part * 8 + index * 2 + i].cast_signed());
                Self { q, scale: [scale(0), scale(1)], minimum: [0.0; 2] }
            }
        }
    }
}

/// The `index`-th of eight pairs of six-bit scale and minimum in twelve bytes.
fn six_bit_pair(packed: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let high = |at: usize| packed[at] >> 6 << 4;
        (packed[index + 4] & 15 | high(index - 4), packed[index + 4] >> 4 | high(index))
    }
}
