//! The decoder: text, one token after the other, with an eye on the sound.

use std::collections::VecDeque;

use super::Context;
use super::align::{self, Heads};
use super::weights::{DecoderLayer, Weights};
use crate::kernels::attention::{self, Queries, attend};
use crate::kernels::elementwise::add_to;
use crate::kernels::linear::multiply;
use crate::kernels::page;
use crate::kv::pool::KvPool;
use crate::model::{Aligned, ModelError, SequenceSlice};
use crate::recycle::recycle;

/// Tokens of a prompt that look at the sound together.
const TOGETHER: usize = 24;

/// Activations of one step. Grown to the largest step seen and kept.
#[derive(Default)]
pub(super) struct Scratch {
    /// The residual stream, `rows × hidden`.
    x: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    up: Vec<f32>,
    /// Of tokens that look at the sound together: head by head, all tokens of a head side by side.
    packed: Vec<f32>,
    seen: Vec<f32>,
    /// Of each row, its sequence in the batch and its position in the text.
    places: Vec<(u32, u32)>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
    /// Empty between steps.
    texts: Vec<Queries<'static>>,
    sounds: Vec<Queries<'static>>,
    attention: attention::Scratch,
}

/// Where what is found of the times of tokens goes.
pub(super) struct Aligning<'a> {
    pub(super) heads: &'a [(usize, usize)],
    pub(super) found: &'a mut VecDeque<Aligned>,
}

/// Computes the text of all slices.
pub(super) fn decode(
    context: &mut Context<'_>,
    weights: &Weights,
    scratch: &mut Scratch,
    batch: &[SequenceSlice<'_>],
    kv: &KvPool,
    aligning: Aligning<'_>,
    logits: &mut Vec<f32>,
) -> Result<(), ModelError> {
    let shape = context.shape;
    let (hidden, span) = (shape.hidden, context.sound_blocks * context.pages.block_size);
    let Scratch { x, query, key, value, attended, up, packed, seen, places, wanted, .. } = scratch;
    let mut texts: Vec<Queries<'_>> = recycle(std::mem::take(&mut scratch.texts));
    let mut sounds: Vec<Queries<'_>> = recycle(std::mem::take(&mut scratch.sounds));
    let buffers = &mut scratch.attention;
    places.clear();
    wanted.clear();
    let mut rows = 0;
    for (i, slice) in batch.iter().enumerate() {
        let first = slice.start.max(span);
        let count = (slice.start + slice.tokens.len()).saturating_sub(first);
        let (start, (sound, text)) = (first - span, slice.blocks.split_at(context.sound_blocks));
        texts.push(Queries { row: rows, count, start, blocks: text });
        // A token sees the whole sound.
        sounds.push(Queries { row: rows, count, start: shape.audio_positions - 1, blocks: sound });
        places.extend((start..start + count).map(|at| (i as u32, at as u32)));
        let end = rows + count;
        let before = first - slice.start;
        wanted.extend(slice.probe.and_then(|at| at.checked_sub(before)).map(|at| rows + at));
        wanted.extend(end - slice.logits..end);
        rows = end;
    }
    texts.retain(|text| text.count > 0);
    sounds.retain(|sound| sound.count > 0);
    for part in [&mut *x, query, key, value, attended] {
        part.resize(rows * hidden, 0.0);
    }
    up.resize(rows * shape.ffn, 0.0);

    for ((sequence, at), x) in places.iter().zip(x.chunks_exact_mut(hidden)) {
        let slice = &batch[*sequence as usize];
        let (token, at) = (slice.tokens[span + *at as usize - slice.start], *at as usize);
        if token as usize >= shape.vocab {
            return Err(ModelError::TokenOutOfRange(token));
        }
        weights.embedding.row(token as usize, x);
        add_to(x, &weights.positions[at * hidden..][..hidden]);
    }
    // Those whose tokens look at the sound one by one first.
    sounds.sort_unstable_by_key(|sound| (sound.count > 1, sound.row));
    let alone = sounds.partition_point(|sound| sound.count == 1);
    let mut heads: Vec<Heads> = Vec::new();
    for (i, layer) in weights.layers.iter().enumerate() {
        let DecoderLayer { attention: own, cross, mlp } = layer;
        context.go_on()?;
        context.normed(&own.norm, x, rows);
        let products = [(&own.query, &mut query[..]), (&own.key, key), (&own.value, value)];
        context.set(products);
        let pages = context.pages;
        let head = |row: usize, key: &mut [f32], value: &mut [f32]| {
            let (sequence, position) = places[row];
            let blocks = &batch[sequence as usize].blocks[span / pages.block_size..];
            // SAFETY: the caller of `forward` owns the blocks that it writes, and rows have places
            // of their own in them.
            unsafe { page::store(kv, &pages, i, blocks, position as usize, key, value) };
        };
        context.threads.for_rows((key, hidden), (value, hidden), head);
        let isa = context.isa;
        attend(isa, context.threads, kv, &pages, i, None, &texts, buffers, query, attended);
        context.add(&own.output, attended, x);

        context.go_on()?;
        context.normed(&cross.norm, x, rows);
        context.set([(&cross.query, &mut query[..])]);
        let (single, several) = sounds.split_at(alone);
        if !single.is_empty() {
            attend(isa, context.threads, kv, &pages, i, None, single, buffers, query, attended);
        }
        for sound in several {
            for first in (0..sound.count).step_by(TOGETHER) {
                let count = TOGETHER.min(sound.count - first);
                let rows = (sound.row + first) * hidden..(sound.row + first + count) * hidden;
                look(context, kv, i, sound, buffers, &query[rows.clone()], packed, seen);
                scatter(seen, count, pages.head_dim, &mut attended[rows]);
            }
        }
        for (slice, sound) in aligned_slices(batch, &sounds) {
            let query = &query[sound.row * hidden..][..sound.count * hidden];
            let samples = slice.audio.map_or(0, <[u8]>::len) / 2;
            let own = aligning.heads.iter().filter(|(layer, _)| *layer == i);
            for &(_, head) in own {
                let scores = align::weights(context, kv, i, head, sound.blocks, samples, query);
                match heads.iter_mut().find(|heads| heads.row == sound.row) {
                    Some(heads) => heads.add(&scores),
                    None => heads.push(Heads::new(sound.row, sound.count, scores)),
                }
            }
        }
        context.add(&cross.output, attended, x);
        context.go_on()?;
        context.mlp(mlp, x, up, rows);
    }
    for (slice, sound) in aligned_slices(batch, &sounds) {
        let Some(from) = slice.align else { continue };
        let x = &x[sound.row * hidden..][..sound.count * hidden];
        let own = heads.iter().find(|heads| heads.row == sound.row);
        let tokens = &slice.tokens[slice.tokens.len() - sound.count..];
        let probabilities = align::probabilities(context, weights, x, tokens, from);
        let starts = own.map(|heads| heads.starts(from)).unwrap_or_default();
        aligning.found.push_back(Aligned { starts, probabilities });
    }
    scratch.texts = recycle(texts);
    scratch.sounds = recycle(sounds);

    // Only the rows whose logits are wanted go through the output projection.
    packed.resize(packed.len().max(wanted.len() * hidden), 0.0);
    for (row, packed) in wanted.iter().zip(packed.chunks_exact_mut(hidden)) {
        packed.copy_from_slice(&x[row * hidden..][..hidden]);
    }
    context.normed(&weights.norm, packed, wanted.len());
    logits.resize(wanted.len() * shape.vocab, 0.0);
    multiply(context.isa, context.threads, context.input.view(), [weights.embedding.set(logits)]);
    Ok(())
}

/// The slices whose times are wanted, in the order of the batch, each with its rows.
fn aligned_slices<'a>(
    batch: &'a [SequenceSlice<'a>],
    sounds: &'a [Queries<'a>],
) -> impl Iterator<Item = (&'a SequenceSlice<'a>, &'a Queries<'a>)> {
    let wanted = batch.iter().filter(|slice| slice.align.is_some());
    wanted.filter_map(|slice| {
        let own = |sound: &&Queries<'_>| std::ptr::eq(sound.blocks.as_ptr(), slice.blocks.as_ptr());
        Some((slice, sounds.iter().find(own)?))
    })
}

/// Some tokens of one sequence look at its sound. Each key and value is read once for all of them:
/// to the kernel they are query heads that share a key/value head.
#[allow(clippy::too_many_arguments)]
fn look(
    context: &mut Context<'_>,
    kv: &KvPool,
    layer: usize,
    sound: &Queries<'_>,
    buffers: &mut attention::Scratch,
    query: &[f32],
    packed: &mut Vec<f32>,
    seen: &mut Vec<f32>,
) {
    let page::Shape { heads, head_dim, .. } = context.pages;
    let count = query.len() / (heads * head_dim);
    packed.resize(query.len(), 0.0);
    seen.resize(query.len(), 0.0);
    for (i, to) in packed.chunks_exact_mut(head_dim).enumerate() {
        let (head, token) = (i / count, i % count);
        to.copy_from_slice(&query[(token * heads + head) * head_dim..][..head_dim]);
    }
    let shape = page::Shape { heads: heads * count, ..context.pages };
    let together = [Queries { row: 0, count: 1, ..*sound }];
    attend(context.isa, context.threads, kv, &shape, layer, None, &together, buffers, packed, seen);
}

/// Puts what [`look`] found into the tokens' rows.
fn scatter(seen: &[f32], count: usize, head_dim: usize, rows: &mut [f32]) {
    let heads = rows.len() / (count * head_dim);
    for (i, from) in seen.chunks_exact(head_dim).enumerate() {
        let (head, token) = (i / count, i % count);
        rows[(token * heads + head) * head_dim..][..head_dim].copy_from_slice(from);
    }
}
