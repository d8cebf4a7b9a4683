//! Architectures of which no real small weights are at hand: untrained checkpoints in float16,
//! against `transformers`. See `tests/reference/make_small.py` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use baton_worker::kv::pool::KvPool;
use baton_worker::model::{SequenceSlice, kv_layout, load};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    prompt_token_ids: Vec<u32>,
    output_token_ids: Vec<u32>,
    /// Of each step the first eight.
    logits: Vec<Vec<f32>>,
}

/// Greedy tokens equal, and logits by no more than keys and values of sixteen bits explain.
fn agrees(name: &str) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/small");
    let mut model = load(&directory.join(format!("{name}.gguf")), 2).unwrap().model;
    let text = std::fs::read_to_string(directory.join(format!("{name}.json"))).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    let kv = KvPool::new(kv_layout(model.config(), 16), 20).unwrap();
    let blocks: Vec<u32> = (0..20).collect();
    let mut worst = 0f32;
    for Case { prompt_token_ids: prompt, output_token_ids, logits: expected } in cases {
        let (mut start, mut tokens, mut logits) = (0, prompt, Vec::new());
        for (token, expected) in output_token_ids.into_iter().zip(expected) {
            let slice = SequenceSlice { start, tokens: &tokens, blocks: &blocks, logits: true };
            model.forward(&[slice], &kv, &mut logits).unwrap();
            for (got, expected) in logits.iter().zip(expected) {
                worst = worst.max((got - expected).abs());
            }
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let got = logits.iter().position(|&logit| logit == largest).unwrap() as u32;
            assert_eq!(got, token, "{name} at position {start}");
            start += tokens.len();
            tokens = vec![token];
        }
    }
    println!("{name}: largest difference of logits {worst}");
    assert!(worst < 5e-3, "{name}: largest difference {worst}");
}

#[test]
fn mistral_is_as_in_transformers() {
    agrees("mistral");
}

#[test]
fn qwen2_is_as_in_transformers() {
    agrees("qwen2");
}

#[test]
fn qwen3_is_as_in_transformers() {
    agrees("qwen3");
}
