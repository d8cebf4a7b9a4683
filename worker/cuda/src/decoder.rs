//! The forward pass: a step in, its logits out.

mod pass;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;

use crate::blas::Blas;
use crate::driver::{Buffer, Event, Graph, Pinned, Stream};
use crate::kernels::{Kernels, NARROW_ROWS};
use crate::step::{Layout, Step, bucket};
use crate::weights::Weights;
use crate::{Device, Error, KvMemory, Limits, Shape, Slice};

/// A graph is made when a batch's size comes for the second time: the first run has the libraries load
/// what they load when it is first needed, which a capture does not allow.
enum Replay {
    Once,
    Graph(Graph),
}

/// Where a step lies on the device.
struct Scratch {
    /// The step's inputs; see [`Layout`].
    inputs: Buffer<u32>,
    /// The residual stream, `rows × hidden`.
    x: Buffer<f32>,
    /// The same after a norm.
    normed: Buffer<bf16>,
    qkv: Buffer<bf16>,
    attended: Buffer<bf16>,
    /// Gate and up by turns, where that is a product of its own.
    pairs: Buffer<bf16>,
    gated: Buffer<bf16>,
    logits: Buffer<f32>,
    /// Of decode attention: what the blocks of one sequence leave for the last of them.
    parts: Buffer<f32>,
    counters: Buffer<u32>,
    /// Cosine and sine of each pair, position by position.
    angles: Buffer<f32>,
}

/// A model on a device, with all that a step needs.
pub struct Decoder {
    // Before what they refer to: fields are dropped in order.
    graphs: HashMap<usize, Replay>,
    /// The KV memory that the graphs were captured with.
    graphs_of: u64,
    blas: Blas,
    stream: Stream,
    kernels: Kernels,
    shape: Shape,
    limits: Limits,
    weights: Weights,
    scratch: Scratch,
    inputs: Pinned<u32>,
    logits: Pinned<f32>,
    /// Of two layers by turns: when it is complete.
    pace: [Event; 2],
    clock: Option<[Event; 2]>,
    /// The last step, where it was one of decoding.
    last: Option<Layout>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// Passes of more rows look at the interrupt flag between layers.
const LONG: usize = 64;

impl Decoder {
    pub(crate) fn new(
        stream: Stream,
        shape: Shape,
        weights: Weights,
        rope_factors: Option<&[f32]>,
        mut limits: Limits,
    ) -> Result<Self, Error> {
        const WHAT: &str = "a step's activations";
        let device = stream.device().clone();
        limits.narrow_rows = limits.narrow_rows.min(NARROW_ROWS);
        limits.sequences = limits.sequences.clamp(1, limits.rows.max(1));
        let padded = bucket(limits.sequences);
        limits.logits = limits.logits.max(padded);
        let rows = limits.rows.max(padded);
        let mut kernels = Kernels::load(&device, shape.head_dim)?;
        if !limits.overlap {
            kernels.forbid_overlap();
        }
        let group = shape.heads / shape.kv_heads;
        let table = limits.context.div_ceil(shape.block_size);
        let words = Layout::most(rows, padded, group, padded * table);
        let parts = (1..=padded)
            .map(|entries| entries * kernels.splits(entries, shape.kv_heads))
            .max()
            .unwrap_or(0);
        let half = |len: usize| Buffer::<bf16>::new(&device, len, WHAT);
        let angles = angles(&shape, limits.context, rope_factors);
        let scratch = Scratch {
            inputs: Buffer::new(&device, words, WHAT)?,
            x: Buffer::new(&device, rows * shape.hidden, WHAT)?,
            normed: half(rows.max(limits.logits) * shape.hidden)?,
            qkv: half(rows * shape.qkv_width())?,
            attended: half(rows * shape.q_width())?,
            pairs: half(rows * 2 * shape.ffn)?,
            gated: half(rows * shape.ffn)?,
            logits: Buffer::new(&device, limits.logits * shape.vocab, WHAT)?,
            parts: Buffer::new(&device, parts * shape.heads * (shape.head_dim + 2), WHAT)?,
            counters: Buffer::new(&device, padded * shape.kv_heads, WHAT)?,
            angles: Buffer::of(&stream, &angles, WHAT)?,
        };
        scratch.counters.zero(&stream)?;
        Ok(Self {
            graphs: HashMap::new(),
            graphs_of: 0,
            blas: Blas::new(&stream)?,
            inputs: Pinned::new(&device, words)?,
            logits: Pinned::new(&device, limits.logits * shape.vocab)?,
            pace: [Event::new(&device)?, Event::new(&device)?],
            clock: None,
            last: None,
            stream,
            kernels,
            shape,
            limits,
            weights,
            scratch,
        })
    }

    /// The model's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Where it is.
    pub fn device(&self) -> &Arc<Device> {
        self.stream.device()
    }

    /// From now on the device's time of each pass is measured, for [`Self::device_seconds`].
    pub fn measure(&mut self) -> Result<(), Error> {
        self.clock = Some([Event::new(self.device())?, Event::new(self.device())?]);
        Ok(())
    }

    /// What the last pass took the device, from its inputs' copy to its last layer, or in a decode step
    /// to the logits: their way to the host is not in it.
    pub fn device_seconds(&self) -> Result<f64, Error> {
        match &self.clock {
            Some([start, end]) => end.since(start),
            None => Err(Error::Mismatch("the device's time is not measured".into())),
        }
    }

    /// Computes all slices in one pass, writes their keys and values into `kv`, and returns when all
    /// of it is complete.
    ///
    /// `logits` is resized to `n × vocab`, row-major, where `n` is the sum of the slices' `logits`.
    /// A raised `interrupt` ends a long pass after about two layers.
    pub fn forward(
        &mut self,
        batch: &[Slice<'_>],
        kv: &KvMemory,
        logits: &mut Vec<f32>,
        interrupt: &AtomicBool,
    ) -> Result<(), Error> {
        if batch.is_empty() {
            logits.clear();
            return Ok(());
        }
        if kv.block_bytes() != self.shape.block_bytes()
            || kv.device().uuid() != self.device().uuid()
        {
            return Err(Error::Mismatch("KV memory of another shape or device".into()));
        }
        let step = Step::plan(batch, &self.shape, &self.limits, kv.blocks())?;
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let done = self.run(&step, kv, logits, interrupt);
        if done.is_err() {
            // Whatever still runs must not write blocks that are no longer the batch's.
            self.stream.synchronize()?;
        }
        done
    }

    fn run(
        &mut self,
        step: &Step<'_>,
        kv: &KvMemory,
        logits: &mut Vec<f32>,
        interrupt: &AtomicBool,
    ) -> Result<(), Error> {
        let vocab = self.shape.vocab;
        let layout = step.layout;
        let words = step.write(self.shape.block_size, kv.spare(), &mut self.inputs);
        if let Some([start, _]) = &self.clock {
            start.record(&self.stream)?;
        }
        // SAFETY: the inputs are next written by the next step, after this one was waited for.
        unsafe { self.scratch.inputs.copy_from(&self.stream, 0, &self.inputs[..words]) }?;
        self.last = Some(layout).filter(|layout| layout.uniform);
        match (layout.uniform, self.limits.graphs) {
            (true, true) => self.replay(&layout, kv)?,
            (true, false) => self.whole(&layout, kv)?,
            (false, _) => {
                self.layers(&layout, kv, Some(interrupt).filter(|_| layout.rows > LONG))?;
            }
        }
        if let Some([_, end]) = &self.clock {
            end.record(&self.stream)?;
        }
        let count = step.logits();
        logits.resize(count * vocab, 0.0);
        if count == 0 {
            return self.stream.synchronize();
        }
        let turn = if layout.uniform { count } else { self.limits.logits };
        for first in (0..count).step_by(turn) {
            let rows = turn.min(count - first);
            if !layout.uniform {
                let wanted = self.scratch.inputs.address(layout.wanted_at() + first);
                self.head(rows, wanted)?;
            }
            let host = &mut self.logits[..rows * vocab];
            // SAFETY: waited for on the next line.
            unsafe { self.scratch.logits.copy_to(&self.stream, 0, host) }?;
            self.stream.synchronize()?;
            copy(host, &mut logits[first * vocab..][..rows * vocab]);
        }
        Ok(())
    }

    /// A decode step, as a graph once there is one.
    fn replay(&mut self, layout: &Layout, kv: &KvMemory) -> Result<(), Error> {
        if self.graphs_of != kv.base() {
            self.graphs.clear();
            self.graphs_of = kv.base();
        }
        match self.graphs.get(&layout.rows) {
            None => {
                self.whole(layout, kv)?;
                self.graphs.insert(layout.rows, Replay::Once);
                Ok(())
            }
            Some(Replay::Once) => {
                let graph = self.stream.capture(|| self.whole(layout, kv))?;
                self.stream.launch(&graph)?;
                self.graphs.insert(layout.rows, Replay::Graph(graph));
                Ok(())
            }
            Some(Replay::Graph(graph)) => self.stream.launch(graph),
        }
    }
}

/// Cosine and sine of each pair, position by position; the angle in single precision, as every other
/// implementation has it.
fn angles(shape: &Shape, context: usize, factors: Option<&[f32]>) -> Vec<f32> {
    let dims = shape.head_dim;
    let frequency = |i: usize| {
        let frequency = f64::from(shape.rope_theta).powf(-2.0 * i as f64 / dims as f64) as f32;
        frequency / factors.map_or(1.0, |factors| factors[i])
    };
    let frequencies: Vec<f32> = (0..dims / 2).map(frequency).collect();
    let mut angles = Vec::with_capacity(context * dims);
    for position in 0..context {
        angles.extend(frequencies.iter().flat_map(|frequency| {
            let angle = f64::from(position as f32 * frequency);
            [angle.cos() as f32, angle.sin() as f32]
        }));
    }
    angles
}

/// Copies logits out of pinned memory; with several threads where that is worth it: 64 rows of 128k
/// tokens are 32 MiB, and one thread takes longer for them than the device for a small model.
fn copy(from: &[f32], to: &mut [f32]) {
    const SHARE: usize = 1 << 20;
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
    if from.len() < 2 * SHARE || threads == 1 {
        return to.copy_from_slice(from);
    }
    let share = from.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}
