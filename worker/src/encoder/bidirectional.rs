//! The forward pass of a bidirectional encoder.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::config::{EncoderConfig, Positions};
use super::weights::Weights;
use super::{Encoder, Text};
use crate::kernels::activations::{Activations, Precision, Rows};
use crate::kernels::affine::LayerNorm;
use crate::kernels::bidirectional::{self, Span};
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::{Activation, add_to, gated};
use crate::kernels::floats::Floats;
use crate::kernels::linear::multiply_paired;
use crate::kernels::pool::ThreadPool;
use crate::kernels::rope::{Pairs, Rope};
use crate::kernels::strassen::Pairing;
use crate::model::ModelError;

/// An encoder where every token sees every other, or those around it.
pub struct Bidirectional {
    config: EncoderConfig,
    isa: Isa,
    threads: ThreadPool,
    weights: Arc<Weights>,
    /// Of layers that see everything, and of the others; absent when positions are learned.
    ropes: Option<[Rope; 2]>,
    scratch: Scratch,
    interrupt: Arc<AtomicBool>,
}

/// Where a token stands.
#[derive(Clone, Copy)]
struct Place {
    token: u32,
    segment: u32,
    position: u32,
}

/// Activations of one pass. Grown to the largest seen and kept.
#[derive(Default)]
struct Scratch {
    /// The residual stream, `rows × hidden`.
    x: Floats,
    query: Floats,
    key: Floats,
    value: Floats,
    attended: Floats,
    gate: Floats,
    up: Floats,
    /// What the next product multiplies.
    input: Activations,
    places: Vec<Place>,
    spans: Vec<Span>,
    pairing: Pairing,
    attention: bidirectional::Scratch,
}

impl Bidirectional {
    /// An encoder of these weights.
    pub(crate) fn new(
        config: EncoderConfig,
        weights: Weights,
        threads: ThreadPool,
        activations: Precision,
    ) -> Self {
        let rope = |theta| Rope::new(Pairs::Halves, config.head_dim(), theta, None);
        Self {
            isa: Isa::best(),
            threads,
            weights: Arc::new(weights),
            ropes: match config.positions {
                Positions::Learned { .. } => None,
                Positions::Rotary { theta, window_theta } => {
                    Some([rope(theta), rope(window_theta)])
                }
            },
            scratch: Scratch { input: Activations::new(activations), ..Scratch::default() },
            interrupt: Arc::default(),
            config,
        }
    }
}

impl Encoder for Bidirectional {
    fn hidden(&self) -> usize {
        self.config.hidden
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    fn threads(&mut self) -> &mut ThreadPool {
        &mut self.threads
    }

    fn alone(&self) -> Option<Box<dyn Encoder>> {
        let activations = self.scratch.input.precision();
        Some(Box::new(Self {
            config: self.config.clone(),
            isa: self.isa,
            threads: ThreadPool::alone(),
            weights: self.weights.clone(),
            ropes: self.ropes.clone(),
            scratch: Scratch { input: Activations::new(activations), ..Scratch::default() },
            interrupt: Arc::default(),
        }))
    }

    fn encode(&mut self, texts: &[Text<'_>]) -> Result<(&[f32], &mut ThreadPool), ModelError> {
        let Self { config, isa, threads, weights, ropes, scratch, interrupt } = self;
        let isa = *isa;
        let (hidden, ffn, head_dim) = (config.hidden, config.ffn, config.head_dim());
        let Scratch {
            x,
            query,
            key,
            value,
            attended,
            gate,
            up,
            input,
            places,
            spans,
            pairing,
            attention: buffers,
        } = scratch;
        let first = match config.positions {
            Positions::Learned { first } => first,
            Positions::Rotary { .. } => 0,
        };
        places.clear();
        spans.clear();
        pairing.clear();
        for text in texts {
            spans.push(Span { row: places.len(), count: text.tokens.len() });
            pairing.push(text.tokens.len());
            for (i, &token) in text.tokens.iter().enumerate() {
                if token as usize >= config.vocab {
                    return Err(ModelError::TokenOutOfRange(token));
                }
                let segment = text.types.get(i).copied().unwrap_or(0);
                places.push(Place { token, segment, position: (first + i) as u32 });
            }
        }
        let rows = places.len();
        for buffer in [&mut *x, query, key, value, attended] {
            buffer.resize(rows * hidden);
        }
        up.resize(rows * ffn);
        if weights.layers.iter().any(|layer| layer.gate.is_some()) {
            gate.resize(rows * ffn);
        }

        // What the second matrix holds does not matter yet.
        threads.for_rows((x, hidden), (query, hidden), |row, x, other| {
            let place = places[row];
            weights.tokens.row(place.token as usize, x);
            if let Some(types) = &weights.types {
                types.row(place.segment as usize, other);
                add_to(x, other);
            }
            if let Some(positions) = &weights.positions {
                positions.row(place.position as usize, other);
                add_to(x, other);
            }
            weights.embedding_norm.in_place(isa, x);
        });
        if let Some(ropes) = ropes {
            let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0);
            ropes.iter_mut().for_each(|rope| rope.reach(longest));
        }

        let go_on = || match interrupt.load(Ordering::Relaxed) {
            true => Err(ModelError::Interrupted),
            false => Ok(()),
        };
        for (i, (layer, &window)) in weights.layers.iter().zip(&config.windows).enumerate() {
            go_on()?;
            let seen = normed(isa, threads, input, layer.attention_norm.as_ref(), x, hidden);
            let products = [layer.query.set(query), layer.key.set(key), layer.value.set(value)];
            multiply_paired(isa, threads, seen, pairing, products, &[&layer.output.weight]);
            if let Some([all, near]) = ropes {
                let rope = if window.is_some() { near } else { all };
                threads.for_rows((query, hidden), (key, hidden), |row, query, key| {
                    let position = places[row].position as usize;
                    query.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                    key.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                });
            }
            go_on()?;
            bidirectional::attend(
                isa,
                threads,
                config.heads,
                head_dim,
                window,
                spans,
                buffers,
                query,
                key,
                value,
                attended,
            );
            let seen = input.of(isa, threads, attended, hidden);
            let next: &[_] = match &layer.gate {
                Some(gate) => &[&gate.weight, &layer.up.weight],
                None => &[&layer.up.weight],
            };
            multiply_paired(isa, threads, seen, pairing, [layer.output.add_to(x)], next);
            if let Some(norm) = &layer.attention_output_norm {
                threads.for_rows((x, hidden), (attended, hidden), |_, x, _| norm.in_place(isa, x));
            }

            go_on()?;
            let seen = normed(isa, threads, input, layer.ffn_norm.as_ref(), x, hidden);
            let seen = match &layer.gate {
                Some(gate_of) => {
                    multiply_paired(
                        isa,
                        threads,
                        seen,
                        pairing,
                        [gate_of.set(gate), layer.up.set(up)],
                        &[&layer.down.weight],
                    );
                    input.fill(isa, threads, rows, ffn, |row, out| {
                        let (gate, up) = (&gate[row * ffn..][..ffn], &up[row * ffn..][..ffn]);
                        gated(isa, Activation::Gelu, gate, up, out);
                    });
                    input.view()
                }
                None => {
                    let product = layer.up.set(up).activation(Activation::Gelu);
                    multiply_paired(isa, threads, seen, pairing, [product], &[&layer.down.weight]);
                    input.of(isa, threads, up, ffn)
                }
            };
            go_on()?;
            // The next pass begins with the first layer.
            let next = &weights.layers[(i + 1) % weights.layers.len()];
            let next = [&next.query.weight, &next.key.weight, &next.value.weight];
            multiply_paired(isa, threads, seen, pairing, [layer.down.add_to(x)], &next);
            if let Some(norm) = &layer.ffn_output_norm {
                threads.for_rows((x, hidden), (attended, hidden), |_, x, _| norm.in_place(isa, x));
            }
        }
        if let Some(norm) = &weights.final_norm {
            threads.for_rows((x, hidden), (attended, hidden), |_, x, _| norm.in_place(isa, x));
        }
        Ok((x, threads))
    }
}

/// The residual stream as the next product sees it: through a norm, where the model has it before.
fn normed<'a>(
    isa: Isa,
    threads: &mut ThreadPool,
    input: &'a mut Activations,
    norm: Option<&LayerNorm>,
    x: &'a [f32],
    hidden: usize,
) -> Rows<'a> {
    let Some(norm) = norm else { return input.of(isa, threads, x, hidden) };
    input.fill(isa, threads, x.len() / hidden, hidden, |row, out| {
        norm.apply(isa, &x[row * hidden..][..hidden], out);
    });
    input.view()
}
