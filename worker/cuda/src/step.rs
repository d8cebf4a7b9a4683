//! What a step asks of the kernels, as plain numbers: which rows there are, which kernel attends to
//! which of them, and where the kernels' inputs lie in the one array that goes to the device.

use crate::kernels::TILE_ROWS;
use crate::{Error, Shape, Slice};

/// Batches of so many sequences have graphs of their own; larger ones by steps of 32.
const BUCKETS: [usize; 8] = [1, 2, 4, 8, 16, 24, 32, 48];

/// The rows that a decode step of `sequences` is padded to.
pub(crate) fn bucket(sequences: usize) -> usize {
    let small = BUCKETS.into_iter().find(|bucket| sequences <= *bucket);
    small.unwrap_or_else(|| sequences.next_multiple_of(32))
}

/// Where each of the kernels' inputs begins, in words of 32 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Rows of the step. Tokens begin at 0, and each of the next three is as long.
    pub(crate) rows: usize,
    /// Rows that the decode kernel attends to.
    pub(crate) entries: usize,
    /// Tiles of the prefill kernel.
    pub(crate) tiles: usize,
    /// Rows whose logits are wanted.
    pub(crate) wanted: usize,
    /// Each sequence has one token and its logits are wanted: `entries` and `wanted` are all rows in
    /// their order and not listed, and the same graph does for every such step of as many rows.
    pub(crate) uniform: bool,
}

/// Words of one tile.
const TILE: usize = 4;

impl Layout {
    pub(crate) fn positions(&self) -> usize {
        self.rows
    }

    pub(crate) fn tables(&self) -> usize {
        2 * self.rows
    }

    pub(crate) fn tiles_at(&self) -> usize {
        // Tiles are read as 16 bytes.
        (3 * self.rows).next_multiple_of(TILE)
    }

    pub(crate) fn entries_at(&self) -> usize {
        self.tiles_at() + TILE * self.tiles
    }

    pub(crate) fn wanted_at(&self) -> usize {
        self.entries_at() + if self.uniform { 0 } else { self.entries }
    }

    pub(crate) fn blocks_at(&self) -> usize {
        self.wanted_at() + if self.uniform { 0 } else { self.wanted }
    }

    /// The most words that a step within these limits takes.
    pub(crate) fn most(rows: usize, sequences: usize, group: usize, blocks: usize) -> usize {
        // Each slice of more than one token has a last tile that may not be full.
        let tiles = (rows * group).div_ceil(TILE_ROWS) + sequences.min(rows);
        let layout =
            Self { rows, entries: sequences.min(rows), tiles, wanted: rows, uniform: false };
        layout.blocks_at() + 1 + blocks
    }
}

/// A step, ready to be written.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    batch: &'a [Slice<'a>],
    pub(crate) layout: Layout,
    /// Row, first of its tile's rows, and the positions it sees.
    tiles: Vec<[u32; TILE]>,
}

impl<'a> Step<'a> {
    /// Refuses what is not within the limits or the blocks.
    pub(crate) fn plan(
        batch: &'a [Slice<'a>],
        shape: &Shape,
        limits: &crate::Limits,
        blocks: usize,
    ) -> Result<Self, Error> {
        let mut layout = Layout::default();
        let mut tiles = Vec::new();
        let group = shape.heads / shape.kv_heads;
        let mut uniform = !batch.is_empty();
        for slice in batch {
            let count = slice.tokens.len();
            let end = slice.start + count;
            if count == 0 || slice.logits > count || end > limits.context {
                return Err(Error::Mismatch(format!(
                    "a slice of {count} tokens from {}, {} logits of it, with a context of {}",
                    slice.start, slice.logits, limits.context
                )));
            }
            if slice.blocks.len() * shape.block_size < end {
                return Err(Error::Mismatch(format!(
                    "{} blocks for {end} positions",
                    slice.blocks.len()
                )));
            }
            let used = &slice.blocks[..end.div_ceil(shape.block_size)];
            if let Some(block) = used.iter().find(|block| **block as usize >= blocks) {
                return Err(Error::Mismatch(format!("block {block} of {blocks}")));
            }
            if let Some(&token) = slice.tokens.iter().find(|token| **token as usize >= shape.vocab)
            {
                return Err(Error::TokenOutOfRange(token));
            }
            if count == 1 {
                layout.entries += 1;
            } else {
                let firsts = (0..count * group).step_by(TILE_ROWS);
                tiles.extend(firsts.map(|first| {
                    [layout.rows as u32, slice.start as u32, count as u32, first as u32]
                }));
            }
            uniform &= count == 1 && slice.logits == 1;
            layout.rows += count;
            layout.wanted += slice.logits;
        }
        if layout.rows > limits.rows || batch.len() > limits.sequences {
            return Err(Error::Mismatch(format!(
                "a step of {} rows of {} sequences; at most {} of {}",
                layout.rows,
                batch.len(),
                limits.rows,
                limits.sequences
            )));
        }
        // The tiles that take longest begin first.
        tiles.sort_by_key(|[_, start, _, first]| {
            std::cmp::Reverse(*start as usize * group + *first as usize)
        });
        layout.tiles = tiles.len();
        layout.uniform = uniform;
        if uniform {
            layout.rows = bucket(batch.len());
            layout.entries = layout.rows;
            layout.wanted = layout.rows;
        }
        Ok(Self { batch, layout, tiles })
    }

    /// Writes the kernels' inputs, and says how many words they are. Rows of padding are at position 0
    /// of the block `spare`.
    pub(crate) fn write(&self, block_size: usize, spare: u32, to: &mut [u32]) -> usize {
        let layout = &self.layout;
        let rows = layout.rows;
        let (tokens, rest) = to.split_at_mut(rows);
        let (positions, rest) = rest.split_at_mut(rows);
        let (tables, _) = rest.split_at_mut(rows);
        // Padding reads the first of the blocks.
        tokens.fill(0);
        positions.fill(0);
        tables.fill(0);
        let (mut row, mut table) = (0, 1);
        for slice in self.batch {
            for (i, &token) in slice.tokens.iter().enumerate() {
                tokens[row] = token;
                positions[row] = (slice.start + i) as u32;
                tables[row] = table as u32;
                row += 1;
            }
            table += (slice.start + slice.tokens.len()).div_ceil(block_size);
        }
        let tiles = &mut to[layout.tiles_at()..layout.entries_at()];
        for (tile, to) in self.tiles.iter().zip(tiles.as_chunks_mut::<TILE>().0) {
            *to = *tile;
        }
        if !layout.uniform {
            let (mut entry, mut want) = (layout.entries_at(), layout.wanted_at());
            let mut row = 0;
            for slice in self.batch {
                let count = slice.tokens.len();
                if count == 1 {
                    to[entry] = row as u32;
                    entry += 1;
                }
                for i in count - slice.logits..count {
                    to[want] = (row + i) as u32;
                    want += 1;
                }
                row += count;
            }
        }
        let blocks_at = layout.blocks_at();
        to[blocks_at] = spare;
        let mut at = blocks_at + 1;
        for slice in self.batch {
            let used = (slice.start + slice.tokens.len()).div_ceil(block_size);
            to[at..at + used].copy_from_slice(&slice.blocks[..used]);
            at += used;
        }
        at
    }

    /// Rows of logits that the batch asked for: without those of padding.
    pub(crate) fn logits(&self) -> usize {
        self.batch.iter().map(|slice| slice.logits).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;

    fn shape() -> Shape {
        Shape {
            layers: 1,
            hidden: 32,
            heads: 6,
            kv_heads: 2,
            head_dim: 32,
            ffn: 32,
            vocab: 100,
            rope_theta: 1e4,
            interleaved: false,
            rms_eps: 1e-5,
            block_size: 4,
        }
    }

    #[test]
    fn a_decode_step_is_padded_to_its_bucket() {
        let slices = [
            Slice { start: 6, tokens: &[7], blocks: &[3, 1], logits: 1 },
            Slice { start: 0, tokens: &[8], blocks: &[5], logits: 1 },
            Slice { start: 3, tokens: &[9], blocks: &[4, 2], logits: 1 },
        ];
        let step = Step::plan(&slices, &shape(), &Limits::new(8, 8, 64), 6).unwrap();
        let layout = step.layout;
        assert!(layout.uniform);
        assert_eq!((layout.rows, layout.entries, layout.tiles), (4, 4, 0));
        let mut words = [77; 64];
        let len = step.write(4, 6, &mut words);
        assert_eq!(words[..4], [7, 8, 9, 0]);
        assert_eq!(words[layout.positions()..][..4], [6, 0, 3, 0]);
        assert_eq!(words[layout.tables()..][..4], [1, 3, 4, 0]);
        // The spare block, and of each sequence those that it has positions in.
        assert_eq!(words[layout.blocks_at()..len], [6, 3, 1, 5, 4]);
        assert_eq!(step.logits(), 3);
    }

    #[test]
    fn a_mixed_step_lists_what_each_kernel_takes() {
        let prompt: Vec<u32> = (0..30).collect();
        let slices = [
            Slice { start: 2, tokens: &prompt, blocks: &[0, 1, 2, 3, 4, 5, 6, 7], logits: 2 },
            Slice { start: 9, tokens: &[50], blocks: &[8, 9, 10], logits: 1 },
            Slice { start: 0, tokens: &[51, 52], blocks: &[11], logits: 0 },
            Slice { start: 5, tokens: &[53], blocks: &[12, 13], logits: 0 },
        ];
        let step = Step::plan(&slices, &shape(), &Limits::new(64, 8, 64), 14).unwrap();
        let layout = step.layout;
        assert!(!layout.uniform);
        // Three heads to a group: 90 rows of the first slice, 6 of the third.
        assert_eq!((layout.rows, layout.entries, layout.tiles, layout.wanted), (34, 2, 3, 3));
        let mut words = [77; 256];
        let len = step.write(4, 14, &mut words);
        assert_eq!(words[layout.entries_at()..][..2], [30, 33]);
        assert_eq!(words[layout.wanted_at()..][..3], [28, 29, 30]);
        // What sees most positions begins first.
        let tiles = &words[layout.tiles_at()..][..12];
        assert_eq!(tiles, [0, 2, 30, 64, 0, 2, 30, 0, 31, 0, 2, 0]);
        assert_eq!(words[layout.positions()..][..3], [2, 3, 4]);
        assert_eq!(words[layout.tables()..][29..34], [1, 9, 12, 12, 13]);
        assert_eq!(words[layout.blocks_at()..len].len(), 1 + 8 + 3 + 1 + 2);
        assert!(len <= Layout::most(64, 8, 3, 8 * 16));
    }

    #[test]
    fn buckets_hold_what_is_put_in_them() {
        for sequences in 1..300 {
            let rows = bucket(sequences);
            assert!(rows >= sequences && rows < 2 * sequences.max(32));
            assert_eq!(bucket(rows), rows);
        }
    }
}
