//! The encoder: half a minute of sound to what the decoder looks at, in its KV blocks.

use super::Context;
use super::mel::{self, Mel};
use super::weights::{DecoderLayer, Encoder, EncoderLayer, frame_inputs};
use crate::kernels::affine::Affine;
use crate::kernels::bidirectional::{self, Span};
use crate::kernels::elementwise::add_to;
use crate::kernels::page;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;
use crate::model::ModelError;

/// Activations of one window. Made at the first one and kept.
#[derive(Default)]
pub(super) struct Scratch {
    /// The spectrogram, with a frame of zeros before and after it.
    spectrogram: Vec<f32>,
    /// What the first convolution makes of it, likewise.
    frames: Vec<f32>,
    /// The residual stream, `audio_positions × hidden`.
    x: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    up: Vec<f32>,
    attention: bidirectional::Scratch,
    progress: Progress,
}

/// How far a window has come: what is there when a pass is interrupted is not computed again.
#[derive(Default)]
struct Progress {
    /// Its first block, and the generation of that.
    window: Option<(BlockId, u64)>,
    /// The convolutions, halves of layers, and layers of the decoder whose keys are there.
    done: usize,
}

impl Scratch {
    /// The pass is over: no later one goes on with it.
    pub(super) fn forget(&mut self) {
        self.progress = Progress::default();
    }
}

/// Hears a window of sound: keys and values of it, for each layer of the decoder, are in `blocks`
/// afterwards.
#[allow(clippy::too_many_arguments)]
pub(super) fn encode(
    context: &mut Context<'_>,
    mel: &Mel,
    weights: &Encoder,
    decoder: &[DecoderLayer],
    scratch: &mut Scratch,
    kv: &KvPool,
    blocks: &[BlockId],
    samples: &[u8],
) -> Result<(), ModelError> {
    let shape = context.shape;
    let (hidden, mels, positions) = (shape.hidden, shape.mels, shape.audio_positions);
    let Scratch { spectrogram, frames, x, query, key, value, attended, up, attention, progress } =
        scratch;
    spectrogram.resize((mel::FRAMES + 2) * mels, 0.0);
    frames.resize((mel::FRAMES + 2) * hidden, 0.0);
    for part in [&mut *x, query, key, value, attended] {
        part.resize(positions * hidden, 0.0);
    }
    up.resize(positions * shape.ffn, 0.0);

    // Where a pass over the same window was interrupted, this one goes on. A block's generation
    // changes whenever it is given to another sequence.
    let window = (blocks[0], kv.generation(blocks[0]));
    if progress.window != Some(window) {
        *progress = Progress { window: Some(window), done: 0 };
    }
    let (layers, isa, heads) = (weights.layers.len(), context.isa, shape.heads);
    let span = [Span { row: 0, count: positions }];
    while progress.done < 1 + 2 * layers {
        context.go_on()?;
        match progress.done.checked_sub(1).map(|at| (&weights.layers[at / 2], at % 2 == 0)) {
            None => {
                let inner = |width: usize| width..(mel::FRAMES + 1) * width;
                mel.frames(context.threads, samples, &mut spectrogram[inner(mels)]);
                let [first, second] = &weights.convolutions;
                convolve(context, first, spectrogram, 1, mels, &mut frames[inner(hidden)]);
                context.go_on()?;
                convolve(context, second, frames, 2, hidden, x);
                add_to(x, &weights.positions);
            }
            Some((EncoderLayer { attention: part, .. }, true)) => {
                context.normed(&part.norm, x, positions);
                let products =
                    [(&part.query, &mut query[..]), (&part.key, key), (&part.value, value)];
                context.set(products);
                context.go_on()?;
                let (threads, head_dim) = (&mut *context.threads, hidden / heads);
                bidirectional::attend(
                    isa, threads, heads, head_dim, None, &span, attention, query, key, value,
                    attended,
                );
                context.add(&part.output, attended, x);
            }
            Some((layer, false)) => context.mlp(&layer.mlp, x, up, positions),
        }
        progress.done += 1;
    }
    if progress.done < 1 + 2 * layers + decoder.len() {
        context.normed(&weights.norm, x, positions);
    }
    for (i, layer) in decoder.iter().enumerate().skip(progress.done - 1 - 2 * layers) {
        context.go_on()?;
        context.set([(&layer.cross.key, &mut key[..]), (&layer.cross.value, value)]);
        let pages = context.pages;
        // A block's positions by one thread: its keys lie side by side.
        let size = pages.block_size;
        let (key, value) = (&key[..], &value[..]);
        context.threads.run(positions.div_ceil(size), |block| {
            for position in block * size..positions.min((block + 1) * size) {
                let row = position * hidden..(position + 1) * hidden;
                let (key, value) = (&key[row.clone()], &value[row]);
                // SAFETY: the caller of `forward` owns the blocks that it writes, and each is
                // written by one task.
                unsafe { page::store(kv, &pages, i, blocks, position, key, value) };
            }
        });
        progress.done += 1;
    }
    Ok(())
}

/// A convolution over three frames at every `step`th of `frames`, which has one more at each end,
/// and what follows it.
fn convolve(
    context: &mut Context<'_>,
    weights: &Affine,
    frames: &[f32],
    step: usize,
    channels: usize,
    out: &mut [f32],
) {
    let hidden = context.shape.hidden;
    let rows = out.len() / hidden;
    context.input.fill(context.isa, context.threads, rows, frame_inputs(channels), |row, out| {
        let (taps, padding) = out.split_at_mut(3 * channels);
        taps.copy_from_slice(&frames[row * step * channels..][..3 * channels]);
        padding.fill(0.0);
    });
    context.set_active(weights, out);
}
