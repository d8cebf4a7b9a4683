//! The kernels of a pass, in their order.

use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;

use super::Decoder;
use crate::blas::Outcome;
use crate::driver::{Buffer, Event};
use crate::kernels::{Decode, Embed, Gated, Narrow, Norm, Out, Paged, Prefill};
use crate::step::Layout;
use crate::weights::Layer;
use crate::{Error, KvMemory};

/// The parts of a layer.
#[derive(Clone, Copy, Debug)]
enum Part {
    Projections,
    Attention,
    Output,
    Gate,
    Down,
}

impl Part {
    const ALL: [Self; 5] =
        [Self::Projections, Self::Attention, Self::Output, Self::Gate, Self::Down];

    fn name(self) -> &'static str {
        match self {
            Self::Projections => "projections",
            Self::Attention => "attention",
            Self::Output => "output",
            Self::Gate => "gate and up",
            Self::Down => "down",
        }
    }
}

impl Decoder {
    /// Seconds of the device for each part of the last decode step, over all layers, and for its head;
    /// the parts one after the other, so that a part's gaps are its own. What the passes compute is
    /// of no use.
    pub fn parts(&self, kv: &KvMemory) -> Result<Vec<(&'static str, f64)>, Error> {
        let Some(layout) = &self.last else {
            return Err(Error::Mismatch("the last step was not one of decoding".into()));
        };
        let time = |work: &dyn Fn() -> Result<(), Error>| {
            let graph = self.stream.capture(work)?;
            let [start, end] = [Event::new(self.device())?, Event::new(self.device())?];
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                start.record(&self.stream)?;
                self.stream.launch(&graph)?;
                end.record(&self.stream)?;
                self.stream.synchronize()?;
                best = best.min(end.since(&start)?);
            }
            Ok::<_, Error>(best)
        };
        let mut parts = Vec::new();
        for part in Part::ALL {
            let all = || {
                self.weights.layers.iter().enumerate().try_for_each(|(i, layer)| {
                    let paged = self.paged(layout, kv, i, layer);
                    self.part(part, layout.rows, layer, layout, &paged)
                })
            };
            parts.push((part.name(), time(&all)?));
        }
        parts.push(("head", time(&|| self.head(layout.rows, 0))?));
        Ok(parts)
    }

    /// Layers and head of a decode step.
    pub(super) fn whole(&self, layout: &Layout, kv: &KvMemory) -> Result<(), Error> {
        self.layers(layout, kv, None)?;
        self.head(layout.rows, 0)
    }

    /// Logits of the rows whose numbers are at `wanted`, or with 0 of as many rows in their order.
    pub(super) fn head(&self, rows: usize, wanted: u64) -> Result<(), Error> {
        let (scratch, shape, weights) = (&self.scratch, &self.shape, &self.weights);
        self.norm(rows, &weights.norm, wanted)?;
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        let (x, to) = (scratch.normed.address(0), scratch.logits.address(0));
        self.product(Out::Floats, rows, (x, shape.hidden), head, (to, shape.vocab))
    }

    /// Everything but the output projection. With a flag, no more than two layers are put on the stream
    /// ahead of the device, and the flag is looked at between them.
    pub(super) fn layers(
        &self,
        layout: &Layout,
        kv: &KvMemory,
        interrupt: Option<&AtomicBool>,
    ) -> Result<(), Error> {
        let (scratch, shape, stream) = (&self.scratch, &self.shape, &self.stream);
        let rows = layout.rows;
        let embed = Embed {
            tokens: scratch.inputs.address(0),
            table: self.weights.embedding.address(0),
            x: scratch.x.address(0),
            hidden: shape.hidden as u32,
        };
        self.kernels.embed(stream, rows, &embed)?;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            if let Some(interrupt) = interrupt {
                let pace = &self.pace[i % 2];
                if i >= 2 {
                    pace.synchronize()?;
                }
                if interrupt.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
            }
            self.layer(rows, layer, layout, &self.paged(layout, kv, i, layer))?;
            if interrupt.is_some() {
                self.pace[i % 2].record(stream)?;
            }
        }
        Ok(())
    }

    /// Where a layer finds and puts queries, keys and values.
    fn paged(&self, layout: &Layout, kv: &KvMemory, i: usize, layer: &Layer) -> Paged {
        let scratch = &self.scratch;
        let vector =
            |vector: &Option<Buffer<f32>>| vector.as_ref().map_or(0, |vector| vector.address(0));
        Paged {
            qkv: scratch.qkv.address(0),
            kv: kv.base(),
            positions: scratch.inputs.address(layout.positions()),
            tables: scratch.inputs.address(layout.tables()),
            blocks: scratch.inputs.address(layout.blocks_at()),
            angles: scratch.angles.address(0),
            layer: i as u32,
            bias: vector(&layer.bias),
            q_norm: vector(&layer.query_norm),
            k_norm: vector(&layer.key_norm),
            ..Paged::of(&self.shape)
        }
    }

    fn layer(
        &self,
        rows: usize,
        layer: &Layer,
        layout: &Layout,
        paged: &Paged,
    ) -> Result<(), Error> {
        Part::ALL.into_iter().try_for_each(|part| self.part(part, rows, layer, layout, paged))
    }

    fn part(
        &self,
        part: Part,
        rows: usize,
        layer: &Layer,
        layout: &Layout,
        paged: &Paged,
    ) -> Result<(), Error> {
        let (scratch, shape, stream) = (&self.scratch, &self.shape, &self.stream);
        let (x, hidden) = (scratch.x.address(0), shape.hidden);
        let (attended, gated) = (scratch.attended.address(0), scratch.gated.address(0));
        let pairs = (scratch.pairs.address(0), 2 * shape.ffn);
        match part {
            Part::Projections => {
                let to = (scratch.qkv.address(0), shape.qkv_width());
                self.normed_product(Out::Store, rows, &layer.attention_norm, &layer.qkv, to)
            }
            Part::Attention => self.attention(layout, paged, attended),
            Part::Output => {
                let from = (attended, shape.q_width());
                self.product(Out::Add, rows, from, &layer.output, (x, hidden))
            }
            Part::Gate if rows <= self.limits.narrow_rows => {
                let to = (gated, 2 * shape.ffn);
                self.normed_product(Out::Gated, rows, &layer.ffn_norm, &layer.gate_up, to)
            }
            Part::Gate => {
                self.normed_product(Out::Store, rows, &layer.ffn_norm, &layer.gate_up, pairs)?;
                let count = (rows * shape.ffn) as u64;
                self.kernels.gated(stream, &Gated { pairs: pairs.0, out: gated, count })
            }
            Part::Down => {
                self.product(Out::Add, rows, (gated, shape.ffn), &layer.down, (x, hidden))
            }
        }
    }

    /// Keys and values go into their blocks, and each row is attended to by the kernel for its kind.
    fn attention(&self, layout: &Layout, paged: &Paged, out: u64) -> Result<(), Error> {
        let (scratch, stream) = (&self.scratch, &self.stream);
        let fused = layout.uniform;
        if !fused {
            self.kernels.rotate(stream, layout.rows, paged)?;
        }
        if layout.entries > 0 {
            let rows = match layout.uniform {
                true => 0,
                false => scratch.inputs.address(layout.entries_at()),
            };
            let decode = Decode {
                paged: *paged,
                rows,
                out,
                parts: scratch.parts.address(0),
                counters: scratch.counters.address(0),
                splits: self.kernels.splits(layout.entries, self.shape.kv_heads) as u32,
                fused: u32::from(fused),
            };
            self.kernels.decode(stream, layout.entries, &decode)?;
        }
        if layout.tiles > 0 {
            let tiles = scratch.inputs.address(layout.tiles_at());
            self.kernels.prefill(stream, layout.tiles, &Prefill { paged: *paged, tiles, out })?;
        }
        Ok(())
    }

    fn norm(&self, rows: usize, weight: &Buffer<f32>, gather: u64) -> Result<(), Error> {
        let norm = Norm {
            x: self.scratch.x.address(0),
            weight: weight.address(0),
            gather,
            out: self.scratch.normed.address(0),
            hidden: self.shape.hidden as u32,
            eps: self.shape.rms_eps,
        };
        self.kernels.rms_norm(&self.stream, rows, &norm)
    }

    /// A product of the residual stream after a norm: in one kernel where the rows are few enough that
    /// doing the norm again in each block costs less than a launch.
    fn normed_product(
        &self,
        out: Out,
        rows: usize,
        norm: &Buffer<f32>,
        w: &Buffer<bf16>,
        to: (u64, usize),
    ) -> Result<(), Error> {
        if rows <= 2 && rows <= self.limits.narrow_rows {
            let narrow = Narrow {
                w: w.address(0),
                x: self.scratch.x.address(0),
                norm: norm.address(0),
                out: to.0,
                n: to.1 as u32,
                k: self.shape.hidden as u32,
                rows: rows as u32,
                eps: self.shape.rms_eps,
            };
            return self.kernels.narrow(&self.stream, out, &narrow);
        }
        self.norm(rows, norm, 0)?;
        self.product(out, rows, (self.scratch.normed.address(0), self.shape.hidden), w, to)
    }

    /// `x` is `rows × k`, `w` is `n × k`; each with its width.
    fn product(
        &self,
        out: Out,
        rows: usize,
        (x, k): (u64, usize),
        w: &Buffer<bf16>,
        (to, n): (u64, usize),
    ) -> Result<(), Error> {
        let w = w.address(0);
        if rows <= self.limits.narrow_rows {
            let (rows, n, k) = (rows as u32, n as u32, k as u32);
            let narrow = Narrow { w, x, norm: 0, out: to, n, k, rows, eps: 0.0 };
            return self.kernels.narrow(&self.stream, out, &narrow);
        }
        let outcome = match out {
            Out::Store => Outcome::Store,
            Out::Add => Outcome::Add,
            Out::Floats => Outcome::Floats,
            Out::Gated => return Err(Error::Mismatch(format!("a gated product of {rows} rows"))),
        };
        // SAFETY: the addresses are of buffers of this decoder, made for these widths and for at
        // least as many rows.
        unsafe { self.blas.multiply(x, w, to, rows, n, k, outcome) }
    }
}
