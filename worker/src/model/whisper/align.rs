//! When each token of a transcript was said.
//!
//! As the reference implementation (`whisper/timing.py`): the attention of some heads to the sound,
//! normalized over the tokens, smoothed over time, averaged; then the cheapest monotonic path
//! through it (dynamic time warping, Sakoe and Chiba 1978).

use super::Context;
use super::mel::HOP;
use super::weights::Weights;
use crate::kernels::linear::multiply;
use crate::kernels::page;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// Width of the median filter.
const SMOOTHED: usize = 7;

/// Rows of logits that are kept at a time.
const ROWS: usize = 32;

/// What the heads of one sequence saw.
pub(super) struct Heads {
    /// The sequence's first row in the batch.
    pub(super) row: usize,
    rows: usize,
    heads: usize,
    /// The sum over heads, `rows × positions`.
    sum: Vec<f32>,
}

impl Heads {
    pub(super) fn new(row: usize, rows: usize, weights: Vec<f32>) -> Self {
        Self { row, rows, heads: 1, sum: weights }
    }

    pub(super) fn add(&mut self, weights: &[f32]) {
        self.sum.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
        self.heads += 1;
    }

    /// Where each token after the first `from`, and the end after the last, begins. The row of a
    /// token is that of the one before it, which looks for it.
    pub(super) fn starts(&self, from: usize) -> Vec<u32> {
        let positions = self.sum.len() / self.rows;
        let scale = 1.0 / self.heads as f32;
        let wanted = from.min(self.rows)..self.rows.saturating_sub(1).max(from.min(self.rows));
        let matrix: Vec<f64> = self.sum[wanted.start * positions..wanted.end * positions]
            .iter()
            .map(|sum| -f64::from(sum * scale))
            .collect();
        warp(&matrix, positions)
    }
}

/// One head's attention to the positions of sound that there are samples for, of all tokens:
/// softmax over positions, normalized over tokens, smoothed over positions.
pub(super) fn weights(
    context: &mut Context<'_>,
    kv: &KvPool,
    layer: usize,
    head: usize,
    blocks: &[BlockId],
    samples: usize,
    query: &[f32],
) -> Vec<f32> {
    let page::Shape { heads, head_dim, .. } = context.pages;
    let (hidden, rows) = (heads * head_dim, query.len() / (heads * head_dim));
    // A position is two frames.
    let positions = (samples / HOP / 2).clamp(1, context.shape.audio_positions);
    let mut keys = vec![0.0; positions * head_dim];
    page::read_keys(kv, &context.pages, layer, blocks, head, &mut keys);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut all = vec![0f32; rows * positions];
    context.each_row(&mut all, positions, |row, weights| {
        let query = &query[row * hidden + head * head_dim..][..head_dim];
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(head_dim)) {
            let products = query.iter().zip(key).map(|(q, k)| q * k);
            *weight = products.sum::<f32>() * scale;
        }
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - largest).exp());
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    });
    let mut mean = vec![0f64; positions];
    let mut squares = vec![0f64; positions];
    for row in all.chunks_exact(positions) {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x) / rows as f64);
    }
    for row in all.chunks_exact(positions) {
        for ((square, mean), x) in squares.iter_mut().zip(&mean).zip(row) {
            *square += (f64::from(*x) - mean).powi(2) / rows as f64;
        }
    }
    context.each_row(&mut all, positions, |_, row| {
        for ((x, mean), square) in row.iter_mut().zip(&mean).zip(&squares) {
            *x = ((f64::from(*x) - mean) / square.sqrt()) as f32;
        }
        smooth(row);
    });
    all
}

/// How likely each token after the first `from + 1` was, the last one being the end. As in the
/// reference implementation, among tokens of text, which come before the end, and the token itself.
pub(super) fn probabilities(
    context: &mut Context<'_>,
    weights: &Weights,
    x: &[f32],
    tokens: &[u32],
    from: usize,
) -> Vec<f32> {
    let (hidden, vocab) = (context.shape.hidden, context.shape.vocab);
    let Some(&end) = tokens.last() else { return Vec::new() };
    let mut found = Vec::new();
    let mut logits = Vec::new();
    let rows: Vec<usize> = (from..tokens.len() - 1).collect();
    for rows in rows.chunks(ROWS) {
        let x = &x[rows[0] * hidden..][..rows.len() * hidden];
        context.normed(&weights.norm, x, rows.len());
        logits.resize(rows.len() * vocab, 0.0);
        multiply(
            context.isa,
            context.threads,
            context.input.view(),
            [weights.embedding.set(&mut logits)],
        );
        for (row, logits) in rows.iter().zip(logits.chunks_exact(vocab)) {
            let token = tokens[row + 1];
            let text = &logits[..(end.max(token) as usize + usize::from(token >= end)).min(vocab)];
            let largest = text.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = text.iter().map(|logit| f64::from(logit - largest).exp()).sum();
            found.push((f64::from(logits[token as usize] - largest).exp() / sum) as f32);
        }
    }
    found
}

/// A median filter, reflected at the ends.
fn smooth(row: &mut [f32]) {
    const SIDE: usize = SMOOTHED / 2;
    let len = row.len();
    if len <= SIDE {
        return;
    }
    let at = |i: isize| {
        let i = i.unsigned_abs();
        if i < len { i } else { 2 * (len - 1) - i }
    };
    let before = row.to_vec();
    for (i, x) in row.iter_mut().enumerate() {
        let mut around: [f32; SMOOTHED] =
            std::array::from_fn(|k| before[at(i as isize + k as isize - SIDE as isize)]);
        around.sort_unstable_by(f32::total_cmp);
        *x = around[SIDE];
    }
}

/// The column at which the cheapest path through `costs`, row after row, comes to each row.
fn warp(costs: &[f64], columns: usize) -> Vec<u32> {
    let rows = costs.len() / columns;
    // Where the path came from: both, the row before, the column before.
    let mut from = vec![0u8; rows * columns];
    let mut above = vec![f32::INFINITY; columns + 1];
    above[0] = 0.0;
    for row in 0..rows {
        let mut current = vec![f32::INFINITY; columns + 1];
        for column in 0..columns {
            let (both, up, left) = (above[column], above[column + 1], current[column]);
            let (least, way) = match () {
                () if both < up && both < left => (both, 0),
                () if up < both && up < left => (up, 1),
                () => (left, 2),
            };
            from[row * columns + column] = way;
            current[column + 1] = (costs[row * columns + column] + f64::from(least)) as f32;
        }
        above = current;
    }
    let mut starts = vec![0; rows];
    let (mut row, mut column) = (rows, columns);
    while row > 0 && column > 0 {
        starts[row - 1] = column as u32 - 1;
        match from[(row - 1) * columns + column - 1] {
            0 => (row, column) = (row - 1, column - 1),
            1 => row -= 1,
            _ => column -= 1,
        }
    }
    starts
}
