//! Architectures of which no real small weights are at hand: untrained checkpoints in float16,
//! against `transformers`. See `tests/reference/make_small.py` at the top of the repository.

#![allow(clippy::unwrap_used)]

use baton_proto::v1::KvDtype;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, SequenceSlice, kv_layout, load};
use serde::Deserialize;

use crate::reference;

#[derive(Deserialize)]
struct Case {
    prompt_token_ids: Vec<u32>,
    output_token_ids: Vec<u32>,
    /// Of each step the first eight.
    logits: Vec<Vec<f32>>,
}

/// Greedy tokens equal, and logits by no more than keys and values of sixteen bits explain.
fn agrees(name: &str, file: &str) {
    let directory = reference("small");
    let mut model = load(&directory.join(file), 2, Precision::Sixteen).unwrap().model;
    let text = std::fs::read_to_string(directory.join(format!("{name}.json"))).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    let kv = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 20).unwrap();
    let blocks: Vec<u32> = (0..20).collect();
    let mut worst = 0f32;
    for Case { prompt_token_ids: prompt, output_token_ids, logits: expected } in cases {
        let (mut start, mut tokens, mut logits) = (0, prompt, Vec::new());
        for (token, expected) in output_token_ids.into_iter().zip(expected) {
            let slice = SequenceSlice {
                start,
                tokens: &tokens,
                blocks: &blocks,
                logits: 1,
                ..SequenceSlice::default()
            };
            model.forward(&[slice], &kv, &mut logits).unwrap();
            for (got, expected) in logits.iter().zip(expected) {
                worst = worst.max((got - expected).abs());
            }
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let got = logits.iter().position(|&logit| logit == largest).unwrap() as u32;
            assert_eq!(got, token, "{file} at position {start}");
            start += tokens.len();
            tokens = vec![token];
        }
    }
    println!("{file}: largest difference of logits {worst}");
    assert!(worst < 5e-3, "{file}: largest difference {worst}");
}

#[test]
fn mistral_is_as_in_transformers() {
    agrees("mistral", "mistral.gguf");
    agrees("mistral", "mistral");
}

#[test]
fn qwen2_is_as_in_transformers() {
    agrees("qwen2", "qwen2.gguf");
    agrees("qwen2", "qwen2");
}

#[test]
fn qwen3_is_as_in_transformers() {
    agrees("qwen3", "qwen3.gguf");
    agrees("qwen3", "qwen3");
}

#[test]
fn gemma3_in_safetensors_is_as_in_transformers() {
    agrees("gemma3", "gemma3");
}

#[test]
fn a_folder_that_lacks_something_says_what() {
    let small = reference("small");
    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join("model");
    let refused = |removed: &str, edit: &dyn Fn(String) -> String| {
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        for entry in std::fs::read_dir(small.join("qwen3")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != removed {
                std::fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
            }
        }
        if let Ok(config) = std::fs::read_to_string(path.join("config.json")) {
            std::fs::write(path.join("config.json"), edit(config)).unwrap();
        }
        load(&path, 1, Precision::Sixteen).map(drop).unwrap_err().to_string()
    };
    let same = |config: String| config;
    for needed in ["config.json", "tokenizer.json"] {
        let error = refused(needed, &same);
        assert!(error.contains(needed) && error.contains("does not have this file"), "{error}");
    }
    assert!(refused("model.safetensors", &same).contains("no *.safetensors"));
    let other = refused("", &|config| config.replace("\"qwen3\"", "\"qwen9\""));
    assert!(other.contains("qwen9") && other.contains("supported: llama"), "{other}");
    let wide = refused("", &|config| config.replace("\"vocab_size\": 256", "\"vocab_size\": 300"));
    assert!(wide.contains("expected [300, 64]"), "{wide}");
    let bytes = std::fs::read(small.join("qwen3/model.safetensors")).unwrap();
    std::fs::create_dir_all(&path).unwrap();
    for len in [4, 100, bytes.len() - 1] {
        std::fs::copy(small.join("qwen3/config.json"), path.join("config.json")).unwrap();
        std::fs::write(path.join("model.safetensors"), &bytes[..len]).unwrap();
        let error = load(&path, 1, Precision::Sixteen).map(drop).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{len} bytes: {error}");
    }
}
