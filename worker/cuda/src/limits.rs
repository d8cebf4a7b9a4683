//! What a decoder is asked for, and how it is to compute it.

/// The new tokens of one sequence in one step.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    /// Position of `tokens[0]`; KV for all positions before it is in `blocks`.
    pub start: usize,
    /// At least one.
    pub tokens: &'a [u32],
    /// The sequence's KV blocks in order, covering at least `start + tokens.len()` positions.
    pub blocks: &'a [u32],
    /// Of how many of the last tokens the logits are wanted.
    pub logits: usize,
}

/// The largest step there will be, and how steps are run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of one step.
    pub rows: usize,
    /// Sequences of one step.
    pub sequences: usize,
    /// Positions of one sequence.
    pub context: usize,
    /// Rows of logits that are computed at once; where a step wants more, there are several turns.
    pub logits: usize,
    /// Whether decode steps run as CUDA graphs.
    pub graphs: bool,
    /// Whether kernels start while the one before them ends, where the GPU can do that.
    pub overlap: bool,
    /// Products of up to so many rows are our own kernel's, up to 32; larger ones are cuBLAS's. 16 is
    /// where a block's columns still take more bytes than the rows that they are multiplied by.
    pub narrow_rows: usize,
}

impl Limits {
    /// The limits of a step, run as is best.
    pub fn new(rows: usize, sequences: usize, context: usize) -> Self {
        let (graphs, overlap) = (true, true);
        Self { rows, sequences, context, logits: 64, graphs, overlap, narrow_rows: 16 }
    }
}
