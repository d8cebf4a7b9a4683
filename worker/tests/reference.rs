//! The model, the tokenizer and the chat template against independent implementations: see
//! `tests/reference/README.md` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::str::FromStr as _;

use baton_proto::v1::KvDtype;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{LoadedModel, Precision, SequenceSlice, kv_layout, load};
use serde_json::Value;

use crate::{reference, smollm2};

const BLOCK: usize = 16;

fn loaded(activations: Precision) -> LoadedModel {
    load(&smollm2(), 2, activations)
        .unwrap_or_else(|error| panic!("{error} (run `baton model fetch`)"))
}

fn fixture(name: &str) -> Value {
    let path = reference(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Runs tokens through the model in chunks and gives the last one's logits.
fn feed(
    model: &mut LoadedModel,
    kv: &KvPool,
    blocks: &[u32],
    start: usize,
    tokens: &[u32],
    chunk: usize,
    logits: &mut Vec<f32>,
) {
    let mut at = start;
    for tokens in tokens.chunks(chunk) {
        let slice =
            SequenceSlice { start: at, tokens, blocks, logits: 1, ..SequenceSlice::default() };
        model.model.forward(&[slice], kv, logits).unwrap();
        at += tokens.len();
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == largest).unwrap() as u32
}

/// Differences of logits to those of transformers under some settings: the largest, and the root of
/// the mean square.
fn logit_differences(activations: Precision, dtype: KvDtype) -> (f32, f32) {
    let mut model = loaded(activations);
    let kv = KvPool::new(kv_layout(model.model.config(), BLOCK, dtype), 100).unwrap();
    let blocks: Vec<u32> = (0..100).collect();
    let mut differences = Vec::new();
    for case in fixture("logits.json")["cases"].as_array().unwrap() {
        let prompt = ids(&case["prompt_token_ids"]);
        let mut logits = Vec::new();
        feed(&mut model, &kv, &blocks, 0, &prompt, 512, &mut logits);
        for pair in case["logits"].as_array().unwrap() {
            let (id, expected) = (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap() as f32);
            differences.push((logits[id as usize] - expected).abs());
        }
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expected = case["logsumexp"].as_f64().unwrap();
        differences.push((sum.ln() - expected).abs() as f32);
    }
    let squares: f32 = differences.iter().map(|difference| difference * difference).sum();
    let worst = differences.iter().copied().fold(0.0, f32::max);
    (worst, (squares / differences.len() as f32).sqrt())
}

#[test]
fn logits_are_those_of_transformers() {
    let (worst, _) = logit_differences(Precision::Sixteen, KvDtype::I16);
    assert!(worst < 1e-2, "largest difference {worst}");
}

#[test]
fn coarser_settings_stay_near_transformers() {
    for (activations, dtype, bound) in [
        (Precision::Sixteen, KvDtype::I8, 0.35),
        (Precision::Eight, KvDtype::I16, 1.0),
        (Precision::Eight, KvDtype::I8, 1.0),
    ] {
        let (_, typical) = logit_differences(activations, dtype);
        assert!(typical < bound, "{activations:?} {dtype:?}: typical difference {typical}");
        // A setting that changes nothing would not be one.
        assert!(typical > 1e-2, "{activations:?} {dtype:?}: typical difference {typical}");
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let mut model = loaded(Precision::Sixteen);
    let kv = KvPool::new(kv_layout(model.model.config(), BLOCK, KvDtype::I16), 100).unwrap();
    let blocks: Vec<u32> = (0..100).collect();
    let fixture = fixture("greedy.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let (prompt, expected) = (ids(&case["prompt_token_ids"]), ids(&case["output_token_ids"]));
        let mut logits = Vec::new();
        feed(&mut model, &kv, &blocks, 0, &prompt, 512, &mut logits);
        let mut output = vec![argmax(&logits)];
        while output.len() < expected.len() {
            let last = *output.last().unwrap();
            feed(
                &mut model,
                &kv,
                &blocks,
                prompt.len() + output.len() - 1,
                &[last],
                1,
                &mut logits,
            );
            output.push(argmax(&logits));
        }
        assert_eq!(output, expected, "{}", case["name"]);
    }
}

#[test]
fn logits_do_not_depend_on_chunks_batch_or_blocks() {
    let mut model = loaded(Precision::Sixteen);
    let kv = KvPool::new(kv_layout(model.model.config(), BLOCK, KvDtype::I16), 300).unwrap();
    let fixture = fixture("greedy.json");
    let prompts: Vec<Vec<u32>> = fixture["cases"].as_array().unwrap()[10..16]
        .iter()
        .map(|case| ids(&case["prompt_token_ids"]))
        .collect();
    let tables: Vec<Vec<u32>> =
        (0..prompts.len() as u32).map(|i| (i * 40..i * 40 + 40).rev().collect()).collect();
    let vocab = model.model.config().vocab;
    let mut together = Vec::new();
    let batch: Vec<_> = prompts
        .iter()
        .zip(&tables)
        .map(|(tokens, blocks)| SequenceSlice {
            start: 0,
            tokens,
            blocks,
            logits: 1,
            ..SequenceSlice::default()
        })
        .collect();
    model.model.forward(&batch, &kv, &mut together).unwrap();
    for (i, prompt) in prompts.iter().enumerate() {
        for chunk in [1, 7, 64] {
            let blocks: Vec<u32> = (250..290).collect();
            let mut alone = Vec::new();
            feed(&mut model, &kv, &blocks, 0, prompt, chunk, &mut alone);
            assert!(alone[..] == together[i * vocab..][..vocab], "prompt {i} in chunks of {chunk}");
        }
    }
}

#[test]
fn texts_tokenize_as_in_llama_cpp_and_back() {
    let bundle = loaded(Precision::Sixteen).tokenizer;
    let tokenizer = tokenizers::Tokenizer::from_str(&bundle.tokenizer_json).unwrap();
    let fixture = fixture("tokenize.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 200);
    let mut wrong = Vec::new();
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        let got = tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec();
        if got != expected {
            wrong.push((text, got, expected));
        } else if !got.is_empty() {
            let decoded = tokenizer.decode(&got, false).unwrap();
            assert_eq!(decoded, case["decoded"].as_str().unwrap_or(text));
        }
    }
    assert!(wrong.is_empty(), "{} differ: {wrong:?}", wrong.len());
    assert!(bundle.chat_template.unwrap().contains("<|im_start|>"));
    assert_eq!(bundle.bos_token.as_deref(), Some("<|im_start|>"));
    assert_eq!(bundle.eos_token.as_deref(), Some("<|im_end|>"));
}
