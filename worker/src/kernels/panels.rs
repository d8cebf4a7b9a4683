//! Float weights, repacked once at load: sixteen outputs lie side by side, one input after the
//! other, so that a product is a broadcast of the input times a vector of weights.
//!
//! Nothing is rounded. Weights of sixteen bits stay sixteen bits: half the memory to read. Those of
//! bfloat16 lie in pairs of inputs, as the CPUs multiply them.

use candle_core::quantized::GgmlDType;
use parking_lot::Mutex;

use super::arena::{Arena, Line, Lines};
use super::lanes::LANES;
use super::pool::ThreadPool;

/// How sixteen outputs lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// Of one input, sixteen floats.
    Single,
    /// Of one input, sixteen half-precision floats.
    Half,
    /// Of two inputs, sixteen pairs of bfloat16.
    Pairs,
}

impl Element {
    /// `None` for types that are not floats.
    pub(super) fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::F32 => Some(Self::Single),
            GgmlDType::F16 => Some(Self::Half),
            GgmlDType::BF16 => Some(Self::Pairs),
            _ => None,
        }
    }

    /// Inputs that are side by side, and the bytes of a weight.
    fn shape(self) -> (usize, usize) {
        match self {
            Self::Single => (1, 4),
            Self::Half => (1, 2),
            Self::Pairs => (2, 2),
        }
    }
}

/// A repacked matrix.
pub(super) struct Panels {
    pub(super) element: Element,
    /// Tiles of sixteen outputs; the last is padded with zero weights.
    lines: Lines,
    tile_bytes: usize,
}

impl Panels {
    /// Repacks a matrix of `outputs × inputs`, `inputs` a multiple of 32; `None` when its elements
    /// are not floats.
    pub(super) fn new(
        pool: &mut ThreadPool,
        arena: &mut Arena,
        dtype: GgmlDType,
        bytes: &[u8],
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let element = Element::of(dtype)?;
        let (step, size) = element.shape();
        let tile_bytes = inputs * LANES * size;
        let tile_lines = tile_bytes / size_of::<Line>();
        let mut lines = arena.lines(outputs.div_ceil(LANES) * tile_lines);
        let tiles: Vec<_> = lines.as_mut_slice().chunks_mut(tile_lines).map(Mutex::new).collect();
        let (row, unit) = (inputs * size, step * size);
        pool.run(tiles.len(), |task| {
            let rows = bytes[task * LANES * row..].chunks_exact(row);
            let mut tile = tiles[task].lock();
            for (lane, row) in rows.take(LANES).enumerate() {
                for (i, from) in row.chunks_exact(unit).enumerate() {
                    let at = (i * LANES + lane) * unit;
                    tile[at / size_of::<Line>()].0[at % size_of::<Line>()..][..unit]
                        .copy_from_slice(from);
                }
            }
        });
        drop(tiles);
        Some(Self { element, lines, tile_bytes })
    }

    /// Bytes of a tile.
    pub(super) fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    /// A tile's first byte.
    pub(super) fn tile(&self, tile: usize) -> *const u8 {
        self.lines.as_ptr().cast::<u8>().wrapping_add(tile * self.tile_bytes)
    }
}
