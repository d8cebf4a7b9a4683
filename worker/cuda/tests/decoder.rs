//! The forward pass against a slow reference, and in its different forms against itself.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod reference;

use std::sync::atomic::AtomicBool;

use baton_cuda::{
    Decoder, Error, KvMemory, LayerWeights, Limits, Loader, Projections, Shape, Slice, bf16,
};
use reference::{Random, assert_close, device, multiply, rms_norm, rotated, rounded, silu};

/// A model in host memory.
struct Model {
    shape: Shape,
    embedding: Vec<bf16>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Option<Vec<bf16>>,
    factors: Option<Vec<f32>>,
}

struct Layer {
    attention_norm: Vec<f32>,
    qkv: [Vec<bf16>; 3],
    biases: Option<[Vec<f32>; 3]>,
    norms: Option<[Vec<f32>; 2]>,
    output: Vec<bf16>,
    ffn_norm: Vec<f32>,
    gate: Vec<bf16>,
    up: Vec<bf16>,
    down: Vec<bf16>,
}

impl Model {
    /// `extras`: biases, norms of heads, a head of its own and RoPE factors.
    fn new(random: &mut Random, shape: Shape, extras: bool) -> Self {
        let (hidden, ffn, d) = (shape.hidden, shape.ffn, shape.head_dim);
        let (q, kv) = (shape.heads * d, shape.kv_heads * d);
        let mut matrix = |outputs: usize, inputs: usize| {
            random.halves(outputs * inputs, 1.7 / (inputs as f32).sqrt())
        };
        let embedding = matrix(shape.vocab, hidden);
        let embedding = embedding.into_iter().map(|x| x * bf16::from_f32(8.0)).collect();
        let matrices: Vec<_> = (0..shape.layers)
            .map(|_| {
                let qkv = [matrix(q, hidden), matrix(kv, hidden), matrix(kv, hidden)];
                let mlp = [matrix(ffn, hidden), matrix(ffn, hidden), matrix(hidden, ffn)];
                (qkv, matrix(hidden, q), mlp)
            })
            .collect();
        let head = extras.then(|| matrix(shape.vocab, hidden));
        let mut norm =
            |len: usize| random.floats(len, 0.5).into_iter().map(|x| 1.0 + x).collect::<Vec<_>>();
        let layers = matrices
            .into_iter()
            .map(|(qkv, output, [gate, up, down])| Layer {
                attention_norm: norm(hidden),
                qkv,
                biases: extras.then(|| [norm(q), norm(kv), norm(kv)]),
                norms: extras.then(|| [norm(d), norm(d)]),
                output,
                ffn_norm: norm(hidden),
                gate,
                up,
                down,
            })
            .collect();
        let factors = extras.then(|| norm(d / 2));
        Self { embedding, layers, norm: norm(hidden), head, factors, shape }
    }

    fn load(&self, limits: Limits) -> Decoder {
        let mut loader = Loader::new(&device(), self.shape.clone()).unwrap();
        loader.embedding(&self.embedding).unwrap();
        for (i, layer) in self.layers.iter().enumerate() {
            let [query, key, value] = &layer.qkv;
            let weights = LayerWeights {
                attention_norm: &layer.attention_norm,
                projections: Projections { query, key, value },
                biases: layer.biases.as_ref().map(|[query, key, value]| Projections {
                    query,
                    key,
                    value,
                }),
                query_norm: layer.norms.as_ref().map(|norms| &norms[0][..]),
                key_norm: layer.norms.as_ref().map(|norms| &norms[1][..]),
                output: &layer.output,
                ffn_norm: &layer.ffn_norm,
                gate: &layer.gate,
                up: &layer.up,
                down: &layer.down,
            };
            loader.layer(i, &weights).unwrap();
        }
        loader.norm(&self.norm).unwrap();
        if let Some(head) = &self.head {
            loader.head(head).unwrap();
        }
        if let Some(factors) = &self.factors {
            loader.rope_factors(factors).unwrap();
        }
        loader.finish(limits).unwrap()
    }

    fn blocks(&self, blocks: usize) -> std::sync::Arc<KvMemory> {
        KvMemory::new(&device(), &self.shape, blocks).unwrap()
    }

    /// Logits after each token of a sequence.
    fn reference(&self, tokens: &[u32]) -> Vec<f32> {
        let shape = &self.shape;
        let (hidden, d, heads) = (shape.hidden, shape.head_dim, shape.heads);
        let angles = reference::angles(shape, tokens.len(), self.factors.as_deref());
        let row = |&token: &u32| &self.embedding[token as usize * hidden..][..hidden];
        let mut x: Vec<f32> = tokens.iter().flat_map(row).map(|x| x.to_f32()).collect();
        let norm = |x: &[f32], weight: &[f32]| -> Vec<f32> {
            x.chunks_exact(hidden).flat_map(|x| rms_norm(x, weight, shape.rms_eps)).collect()
        };
        let add = |x: &mut Vec<f32>, more: Vec<f32>| {
            x.iter_mut().zip(more).for_each(|(x, more)| *x += more);
        };
        for layer in &self.layers {
            let input = norm(&x, &layer.attention_norm);
            let [q, k, v] = [0, 1, 2].map(|i| {
                let product = multiply(&input, &layer.qkv[i], hidden);
                let width = layer.qkv[i].len() / hidden;
                let rows = product.chunks_exact(width).enumerate();
                rows.map(|(position, row)| {
                    let head = |(head, values): (usize, &[f32])| {
                        let bias = layer.biases.as_ref().map(|biases| &biases[i][head * d..][..d]);
                        let norm = layer.norms.as_ref().and_then(|norms| norms.get(i));
                        if i < 2 {
                            let norm = norm.map(|norm| &norm[..]);
                            return rotated(shape, values, bias, norm, &angles, position);
                        }
                        let bias = |at: usize| bias.map_or(0.0, |bias| bias[at]);
                        values.iter().enumerate().map(|(at, x)| x + bias(at)).collect()
                    };
                    let heads: Vec<Vec<f32>> = row.chunks_exact(d).enumerate().map(head).collect();
                    heads
                })
                .collect::<Vec<_>>()
            });
            let mut attended = Vec::new();
            for (position, q) in q.iter().enumerate() {
                for (head, query) in q.iter().enumerate() {
                    let kv = head / (heads / shape.kv_heads);
                    let (key, value) =
                        (|at: usize| k[at][kv].clone(), |at: usize| v[at][kv].clone());
                    attended.extend(reference::attend(shape, query, key, value, position + 1));
                }
            }
            add(&mut x, multiply(&attended, &layer.output, heads * d));
            let input = norm(&x, &layer.ffn_norm);
            let gate = multiply(&input, &layer.gate, hidden);
            let up = multiply(&input, &layer.up, hidden);
            let gated: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| silu(*gate) * up).collect();
            add(&mut x, multiply(&gated, &layer.down, shape.ffn));
        }
        let input: Vec<f32> = norm(&x, &self.norm).into_iter().map(rounded).collect();
        multiply(&input, self.head.as_ref().unwrap_or(&self.embedding), hidden)
    }
}

fn shape(head_dim: usize, kv_heads: usize, group: usize, block_size: usize) -> Shape {
    Shape {
        layers: 3,
        hidden: 96,
        heads: kv_heads * group,
        kv_heads,
        head_dim,
        ffn: 160,
        vocab: 67,
        rope_theta: 10_000.0,
        interleaved: group == 3,
        rms_eps: 1e-5,
        block_size,
    }
}

/// bf16 between the kernels, against single precision throughout.
const TOLERANCE: f32 = 0.04;

static GO_ON: AtomicBool = AtomicBool::new(false);

fn forward(decoder: &mut Decoder, kv: &KvMemory, batch: &[Slice<'_>]) -> Vec<f32> {
    let mut logits = vec![f32::NAN; 3];
    decoder.forward(batch, kv, &mut logits, &GO_ON).unwrap();
    logits
}

/// Sequences of one model, each with blocks of its own.
struct Sequences {
    tokens: Vec<Vec<u32>>,
    blocks: Vec<Vec<u32>>,
    done: Vec<usize>,
}

impl Sequences {
    fn new(random: &mut Random, shape: &Shape, lengths: &[usize]) -> (Self, usize) {
        let needed: Vec<usize> = lengths.iter().map(|len| len.div_ceil(shape.block_size)).collect();
        let total = needed.iter().sum::<usize>();
        let mut all = random.blocks(total, total + 1);
        let blocks = needed.iter().map(|count| all.split_off(all.len() - count)).collect();
        let tokens = lengths
            .iter()
            .map(|len| (0..*len).map(|_| random.below(shape.vocab) as u32).collect())
            .collect();
        (Self { tokens, blocks, done: vec![0; lengths.len()] }, total + 1)
    }

    fn slice(&self, i: usize, count: usize, logits: usize) -> Slice<'_> {
        let start = self.done[i];
        Slice { start, tokens: &self.tokens[i][start..][..count], blocks: &self.blocks[i], logits }
    }
}

#[test]
fn prompts_in_chunks_and_decoding_match_the_reference() {
    let mut random = Random::new(1);
    for (shape, extras) in [
        (shape(64, 3, 3, 16), false),
        (shape(32, 2, 2, 5), true),
        (shape(128, 1, 8, 16), true),
        (shape(96, 2, 1, 16), false),
    ] {
        let model = Model::new(&mut random, shape.clone(), extras);
        let lengths = [90, 3, 41, 17];
        let (mut sequences, blocks) = Sequences::new(&mut random, &shape, &lengths);
        let expected: Vec<Vec<f32>> =
            sequences.tokens.iter().map(|tokens| model.reference(tokens)).collect();
        let mut decoder = model.load(Limits { logits: 4, ..Limits::new(96, 8, 128) });
        let kv = model.blocks(blocks);
        while sequences.done.iter().zip(lengths).any(|(done, len)| *done < len) {
            // Steps with one token each now and then, else chunks of any length.
            let decode = random.below(3) > 0;
            let mut batch = Vec::new();
            for (i, len) in lengths.into_iter().enumerate() {
                let left = len - sequences.done[i];
                if left == 0 || random.below(4) == 0 {
                    continue;
                }
                let count = if decode { 1 } else { 1 + random.below(left.min(23)) };
                let logits = if decode { 1 } else { random.below(count + 1) };
                batch.push((i, count, logits));
            }
            let slices: Vec<Slice<'_>> =
                batch.iter().map(|&(i, count, logits)| sequences.slice(i, count, logits)).collect();
            let got = forward(&mut decoder, &kv, &slices);
            let rows: Vec<f32> = batch
                .iter()
                .flat_map(|&(i, count, logits)| {
                    let end = (sequences.done[i] + count) * shape.vocab;
                    expected[i][end - logits * shape.vocab..end].iter().copied()
                })
                .collect();
            assert_close(&format!("{shape:?} {batch:?}"), &got, &rows, TOLERANCE);
            batch.iter().for_each(|&(i, count, _)| sequences.done[i] += count);
        }
    }
}

#[test]
fn graphs_and_overlap_change_nothing() {
    let mut random = Random::new(2);
    let shape = shape(64, 2, 4, 16);
    let model = Model::new(&mut random, shape.clone(), true);
    for count in [1, 3, 40] {
        let lengths = vec![24; count];
        let (sequences, blocks) = Sequences::new(&mut random, &shape, &lengths);
        let run = |graphs: bool, overlap: bool| {
            let limits = Limits { graphs, overlap, ..Limits::new(64, 40, 64) };
            let mut decoder = model.load(limits);
            let kv = model.blocks(blocks);
            let mut done = sequences.done.clone();
            let mut all = Vec::new();
            for _ in 0..5 {
                let slices: Vec<Slice<'_>> = (0..count)
                    .map(|i| Slice {
                        start: done[i],
                        tokens: &sequences.tokens[i][done[i]..][..1],
                        blocks: &sequences.blocks[i],
                        logits: 1,
                    })
                    .collect();
                all.push(forward(&mut decoder, &kv, &slices));
                done.iter_mut().for_each(|done| *done += 1);
            }
            all
        };
        let plain = run(false, false);
        for (graphs, overlap) in [(false, true), (true, false), (true, true)] {
            let what = format!("{count} sequences, graphs {graphs}, overlap {overlap}");
            assert!(run(graphs, overlap) == plain, "{what}");
        }
    }
}

#[test]
fn other_memory_is_not_the_graphs() {
    let mut random = Random::new(3);
    let shape = shape(32, 1, 2, 16);
    let model = Model::new(&mut random, shape.clone(), false);
    let (sequences, blocks) = Sequences::new(&mut random, &shape, &[4]);
    let mut decoder = model.load(Limits::new(8, 2, 16));
    let expected = model.reference(&sequences.tokens[0]);
    for _ in 0..3 {
        let kv = model.blocks(blocks);
        for at in 0..4 {
            let slice = Slice {
                start: at,
                tokens: &sequences.tokens[0][at..][..1],
                blocks: &sequences.blocks[0],
                logits: 1,
            };
            let got = forward(&mut decoder, &kv, &[slice]);
            assert_close("a step", &got, &expected[at * shape.vocab..][..shape.vocab], TOLERANCE);
        }
    }
}

#[test]
fn own_products_and_cublas_agree() {
    let mut random = Random::new(4);
    let shape = shape(64, 2, 2, 16);
    let model = Model::new(&mut random, shape.clone(), false);
    let (sequences, blocks) = Sequences::new(&mut random, &shape, &[30]);
    let run = |narrow_rows: usize| {
        let mut decoder = model.load(Limits { narrow_rows, ..Limits::new(32, 2, 32) });
        forward(&mut decoder, &model.blocks(blocks), &[sequences.slice(0, 30, 30)])
    };
    assert_close("logits", &run(0), &run(32), TOLERANCE);
}

#[test]
fn a_raised_flag_ends_a_long_pass_and_nothing_is_lost() {
    let mut random = Random::new(5);
    let shape = shape(32, 2, 2, 16);
    let model = Model::new(&mut random, shape.clone(), false);
    let (sequences, blocks) = Sequences::new(&mut random, &shape, &[100]);
    let mut decoder = model.load(Limits::new(128, 2, 128));
    let kv = model.blocks(blocks);
    let slice = sequences.slice(0, 100, 1);
    let mut logits = Vec::new();
    let stopped = decoder.forward(&[slice], &kv, &mut logits, &AtomicBool::new(true));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    let got = forward(&mut decoder, &kv, &[slice]);
    let expected = model.reference(&sequences.tokens[0]);
    assert_close("logits", &got, &expected[99 * shape.vocab..], TOLERANCE);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = Random::new(6);
    let shape = shape(32, 2, 2, 16);
    let model = Model::new(&mut random, shape.clone(), false);
    let mut decoder = model.load(Limits::new(16, 2, 32));
    let kv = model.blocks(3);
    let mut refused =
        |slices: &[Slice<'_>]| decoder.forward(slices, &kv, &mut Vec::new(), &GO_ON).unwrap_err();
    let slice = Slice { start: 0, tokens: &[1, 2], blocks: &[0], logits: 1 };
    assert!(matches!(refused(&[Slice { tokens: &[1, 67], ..slice }]), Error::TokenOutOfRange(67)));
    for wrong in [
        Slice { start: 15, ..slice },
        Slice { blocks: &[3], ..slice },
        Slice { tokens: &[], ..slice },
        Slice { logits: 3, ..slice },
        Slice { start: 31, blocks: &[0, 1, 2], ..slice },
        Slice { tokens: &[1; 17], blocks: &[0, 1], ..slice },
    ] {
        assert!(matches!(refused(&[wrong]), Error::Mismatch(_)), "{wrong:?}");
    }
    assert!(matches!(refused(&[slice; 3]), Error::Mismatch(_)));
    for wrong in [
        Shape { head_dim: 40, ..shape.clone() },
        Shape { kv_heads: 3, ..shape.clone() },
        Shape { hidden: 90, ..shape.clone() },
    ] {
        assert!(matches!(Loader::new(&device(), wrong), Err(Error::Unsupported(_))));
    }
}
