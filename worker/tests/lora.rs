//! LoRA adapters against PEFT, against merged weights, and against each other in one batch. See
//! `tests/reference/make_lora.py` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_proto::v1::{AdapterRef, KvDtype, LoadAdapterRequest, WorkerStatus};
use baton_worker::checkpoint;
use baton_worker::kernels::quant::decode_row;
use baton_worker::kv::pool::KvPool;
use baton_worker::lora::{Adapter, Adapters, Bounds, peft};
use baton_worker::model::{Model, ModelConfig, Precision, SequenceSlice, kv_layout, load};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{reference, smollm2};

fn small() -> PathBuf {
    reference("small")
}

fn model(file: &str) -> Box<dyn Model> {
    load(&small().join(file), 2, Precision::Sixteen).unwrap().model
}

fn adapter(name: &str, config: &ModelConfig) -> Adapter {
    peft::read(&small().join("lora").join(name), config, 64).unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == largest).unwrap() as u32
}

/// Greedy tokens and the logits of each step.
fn greedy(
    model: &mut dyn Model,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    steps: usize,
) -> (Vec<u32>, Vec<Vec<f32>>) {
    let kv = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 20).unwrap();
    let blocks: Vec<u32> = (0..20).collect();
    let (mut start, mut tokens) = (0, prompt.to_vec());
    let (mut output, mut all) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let slice = SequenceSlice {
            start,
            tokens: &tokens,
            blocks: &blocks,
            logits: 1,
            adapter,
            ..SequenceSlice::default()
        };
        let mut logits = Vec::new();
        model.forward(&[slice], &kv, &mut logits).unwrap();
        start += tokens.len();
        tokens = vec![argmax(&logits)];
        output.push(tokens[0]);
        all.push(logits);
    }
    (output, all)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[derive(Deserialize)]
struct Case {
    prompt_token_ids: Vec<u32>,
    output_token_ids: Vec<u32>,
    /// Of each step the first eight.
    logits: Vec<Vec<f32>>,
    /// How far the adapter moves them.
    moved: f32,
}

/// Greedy tokens as PEFT's, and logits by no more than keys and values of sixteen bits explain.
fn agrees(name: &str, files: &[&str]) {
    let text = fs::read_to_string(small().join("lora").join(format!("{name}.json"))).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    for file in files {
        let mut model = model(file);
        let adapter = adapter(name, model.config());
        let mut worst = 0f32;
        for case in &cases {
            let steps = case.output_token_ids.len();
            let (output, logits) =
                greedy(&mut *model, Some(&adapter), &case.prompt_token_ids, steps);
            assert_eq!(output, case.output_token_ids, "{name} on {file}");
            for (got, expected) in logits.iter().zip(&case.logits) {
                worst = worst.max(largest_difference(got, expected));
            }
            assert!(case.moved > 0.5, "an adapter that is seen");
        }
        println!("{name} on {file}: largest difference of logits {worst}");
        assert!(worst < 5e-3, "{name} on {file}: largest difference {worst}");
    }
}

#[test]
fn llama_adapters_are_as_in_peft_whatever_the_order_of_the_weights() {
    // GGUF has the rows of queries and keys in another order than the adapter.
    agrees("mistral-all", &["mistral", "mistral.gguf"]);
    agrees("mistral-attention", &["mistral", "mistral.gguf"]);
}

#[test]
fn adapters_of_other_architectures_are_as_in_peft() {
    agrees("qwen2-all", &["qwen2", "qwen2.gguf"]);
    agrees("qwen3-root", &["qwen3", "qwen3.gguf"]);
    agrees("gemma3-mlp", &["gemma3"]);
}

/// Sequences with this, that and no adapter in one batch, prompts and single tokens mixed: the same
/// bits as each alone.
#[test]
fn adapters_in_one_batch_do_not_touch_each_other() {
    let mut model = model("mistral.gguf");
    let config = model.config().clone();
    let [all, some] = ["mistral-all", "mistral-attention"].map(|name| adapter(name, &config));
    let adapters = [Some(&all), None, Some(&some), Some(&all), None, Some(&some)];
    let lengths = [9, 30, 1, 17, 1, 40];
    let prompts: Vec<Vec<u32>> = (1..)
        .zip(lengths)
        .map(|(i, len)| (0..len).map(|j| (i * 31 + j * 7) % 256).collect())
        .collect();
    let alone: Vec<_> = adapters
        .iter()
        .zip(&prompts)
        .map(|(adapter, prompt)| greedy(&mut *model, *adapter, prompt, 6))
        .collect();
    assert_ne!(alone[0].0, greedy(&mut *model, None, &prompts[0], 6).0, "an adapter that is seen");
    assert_ne!(alone[2].0, greedy(&mut *model, Some(&all), &prompts[2], 6).0);

    let kv = KvPool::new(kv_layout(&config, 16, KvDtype::I16), 100).unwrap();
    let blocks: Vec<Vec<u32>> = (0..6).map(|i| (i * 10..(i + 1) * 10).collect()).collect();
    let (mut starts, mut tokens) = ([0; 6], prompts.clone());
    let vocab = config.vocab;
    for step in 0..6 {
        let batch: Vec<_> = (0..6)
            .map(|i| SequenceSlice {
                start: starts[i],
                tokens: &tokens[i],
                blocks: &blocks[i],
                logits: 1,
                adapter: adapters[i],
                ..SequenceSlice::default()
            })
            .collect();
        let mut logits = Vec::new();
        model.forward(&batch, &kv, &mut logits).unwrap();
        for (i, row) in logits.chunks_exact(vocab).enumerate() {
            assert_eq!(row, &alone[i].1[step][..], "sequence {i}, step {step}");
            starts[i] += tokens[i].len();
            tokens[i] = vec![argmax(row)];
        }
    }
}

fn noise(seed: u64, i: usize) -> f32 {
    let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
}

type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

fn write_tensors(path: &Path, tensors: &Tensors) {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn an_adapter_of_the_real_model_equals_merged_weights() {
    equals_merged(&json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16}), |_, _| (8, 16.0 / 8.0));
}

/// As PEFT chooses: the first pattern that is the name or its end after a dot.
#[test]
fn modules_with_ranks_and_scales_of_their_own_equal_merged_weights() {
    let settings = json!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 16,
        "rank_pattern": {
            r"layers\.1[0-9]\.self_attn\.q_proj": 4,
            "q_proj": 12,
            "^model.layers.0.mlp.up_proj": 2,
            "^layers.1.mlp.up_proj": 3,
        },
        "alpha_pattern": {
            "_proj": 1000,
            "up_proj|down_proj": 24,
            "layers.3.self_attn.v_proj": 64,
            "q_proj": 6,
        },
    });
    equals_merged(&settings, |layer, module| {
        let rank = match (layer, module) {
            (10..20, "self_attn.q_proj") => 4,
            (_, "self_attn.q_proj") => 12,
            (0, "mlp.up_proj") => 2,
            _ => 8,
        };
        let alpha = match (layer, module) {
            (_, "mlp.up_proj" | "mlp.down_proj") => 24.0,
            (3, "self_attn.v_proj") => 64.0,
            (_, "self_attn.q_proj") => 6.0,
            _ => 16.0,
        };
        (rank, alpha / rank as f32)
    });
}

/// The real model: an adapter over its quantized GGUF against a float32 checkpoint of the same
/// weights with the adapter merged in. `of` says a module's rank and scale.
fn equals_merged(settings: &Value, of: impl Fn(usize, &str) -> (usize, f32)) {
    let path = smollm2();
    let gguf =
        checkpoint::open(&path).unwrap_or_else(|error| panic!("{error} (run `baton model fetch`)"));
    let config = gguf.config().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (merged, lora) = (dir.path().join("merged"), dir.path().join("lora"));
    fs::create_dir(&merged).unwrap();
    fs::create_dir(&lora).unwrap();

    let decoded = |name: &str| {
        let tensor = gguf.tensor(name).unwrap();
        let mut values = vec![0.0; tensor.dims.iter().product()];
        let inputs = *tensor.dims.last().unwrap();
        let row = inputs / tensor.dtype.block_size() * tensor.dtype.type_size();
        for (bytes, out) in tensor.bytes().chunks_exact(row).zip(values.chunks_exact_mut(inputs)) {
            decode_row(tensor.dtype, bytes, out);
        }
        (tensor.dims, values)
    };
    let modules = [
        ("attn_q", "self_attn.q_proj", config.heads),
        ("attn_k", "self_attn.k_proj", config.kv_heads),
        ("attn_v", "self_attn.v_proj", 0),
        ("attn_output", "self_attn.o_proj", 0),
        ("ffn_gate", "mlp.gate_proj", 0),
        ("ffn_up", "mlp.up_proj", 0),
        ("ffn_down", "mlp.down_proj", 0),
    ];
    let (mut weights, mut updates): (Tensors, Tensors) = Default::default();
    for layer in 0..config.layers {
        for (ours, theirs) in
            [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
        {
            let name = format!("model.layers.{layer}.{theirs}.weight");
            weights.insert(name, decoded(&format!("blk.{layer}.{ours}.weight")));
        }
        for (at, (ours, theirs, heads)) in modules.into_iter().enumerate() {
            let (dims, stored) = decoded(&format!("blk.{layer}.{ours}.weight"));
            let [outputs, inputs] = dims[..] else { panic!("{dims:?}") };
            let mut values = stored.clone();
            if let Some(rows) = outputs.checked_div(heads) {
                // As transformers has the rows: of each head those of even index, then the others.
                let half = rows / 2;
                for head in 0..heads {
                    for i in 0..half {
                        for side in 0..2 {
                            let (to, from) = (side * half + i, 2 * i + side);
                            let [to, from] = [to, from].map(|row| head * 2 * half + row);
                            values[to * inputs..][..inputs]
                                .copy_from_slice(&stored[from * inputs..][..inputs]);
                        }
                    }
                }
            }
            let seed = (layer * 16 + at) as u64;
            let (rank, scale) = of(layer, theirs);
            let a: Vec<f32> = (0..rank * inputs).map(|i| 0.1 * noise(2 * seed, i)).collect();
            let b: Vec<f32> = (0..outputs * rank).map(|i| 0.1 * noise(2 * seed + 1, i)).collect();
            for (row, values) in values.chunks_exact_mut(inputs).enumerate() {
                for (k, a) in a.chunks_exact(inputs).enumerate() {
                    let factor = b[row * rank + k] * scale;
                    values.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
                }
            }
            let stem = format!("layers.{layer}.{theirs}");
            weights.insert(format!("model.{stem}.weight"), (dims, values));
            let name = |which: &str| format!("base_model.model.model.{stem}.lora_{which}.weight");
            updates.insert(name("A"), (vec![rank, inputs], a));
            updates.insert(name("B"), (vec![outputs, rank], b));
        }
    }
    weights.insert("model.embed_tokens.weight".into(), decoded("token_embd.weight"));
    weights.insert("model.norm.weight".into(), decoded("output_norm.weight"));
    let tied = !gguf.has_tensor("output.weight");
    if !tied {
        weights.insert("lm_head.weight".into(), decoded("output.weight"));
    }
    write_tensors(&merged.join("model.safetensors"), &weights);
    drop(weights);
    let shape = json!({
        "model_type": "llama", "hidden_size": config.hidden, "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab, "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_eps, "hidden_act": "silu", "rope_theta": config.rope_theta,
        "tie_word_embeddings": tied,
    });
    fs::write(merged.join("config.json"), shape.to_string()).unwrap();
    fs::write(merged.join("tokenizer.json"), gguf.tokenizer().unwrap().tokenizer_json).unwrap();
    write_tensors(&lora.join("adapter_model.safetensors"), &updates);
    fs::write(lora.join("adapter_config.json"), settings.to_string()).unwrap();

    let mut expected = load(&merged, 2, Precision::Sixteen).unwrap().model;
    let mut got = load(&path, 2, Precision::Sixteen).unwrap().model;
    let adapter = peft::read(&lora, &config, 64).unwrap();
    let tokenizer: tokenizers::Tokenizer =
        gguf.tokenizer().unwrap().tokenizer_json.parse().unwrap();
    let mut worst = 0f32;
    for text in ["The capital of France is", "def add(a, b):", "Once upon a time, in a town"] {
        let prompt = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        let (tokens, logits) = greedy(&mut *got, Some(&adapter), &prompt, 12);
        let (expected_tokens, expected_logits) = greedy(&mut *expected, None, &prompt, 12);
        assert_eq!(tokens, expected_tokens, "{text}");
        assert_ne!(tokens, greedy(&mut *got, None, &prompt, 12).0, "an adapter that is seen");
        for (got, expected) in logits.iter().zip(&expected_logits) {
            worst = worst.max(largest_difference(got, expected));
        }
    }
    println!("largest difference of logits {worst}");
    assert!(worst < 2e-2, "largest difference {worst}");
}

/// A copy of an adapter with another config or other weights; why it is refused.
fn refused(edit: impl Fn(&mut Value), weights: impl Fn(&mut Tensors)) -> String {
    let folder = small().join("lora/mistral-all");
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let mut settings: Value = serde_json::from_str(&text).unwrap();
    edit(&mut settings);
    fs::write(dir.path().join("adapter_config.json"), settings.to_string()).unwrap();
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = read
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let values = tensor.data().chunks_exact(4);
            let values = values.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            (name, (tensor.shape().to_vec(), values.collect()))
        })
        .collect();
    weights(&mut tensors);
    write_tensors(&dir.path().join("adapter_model.safetensors"), &tensors);
    let model = model("mistral");
    peft::read(dir.path(), model.config(), 64).map(drop).unwrap_err().to_string()
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let keep = |_: &mut Tensors| {};
    for (field, value) in [
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"q_proj": 65})),
        ("rank_pattern", json!({"(q_proj": 4})),
        ("rank_pattern", json!(["q_proj"])),
        ("alpha_pattern", json!({"q_proj": "8"})),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("peft_type", json!("IA3")),
        ("r", json!(0)),
        ("r", json!(65)),
        ("r", json!("8")),
        ("lora_alpha", Value::Null),
    ] {
        let error = refused(|settings| settings[field] = value.clone(), keep);
        let names = if value == 65 { "--max-lora-rank" } else { field };
        assert!(error.contains(names), "{field}: {error}");
    }
    let same = |_: &mut Value| {};
    let (q, root) = ("model.layers.0.self_attn.q_proj", "base_model.model");
    let a = format!("{root}.{q}.lora_A.weight");
    let error = refused(same, |tensors| {
        tensors.insert(format!("{root}.lm_head.lora_A.weight"), (vec![8, 64], vec![0.0; 512]));
    });
    assert!(error.contains("lm_head") && error.contains("supported: "), "{error}");
    let error = refused(same, |tensors| drop(tensors.remove(&a)));
    assert!(error.contains("layer 0") && error.contains("q_proj"), "{error}");
    let error = refused(same, |tensors| tensors.get_mut(&a).unwrap().0 = vec![64, 8]);
    assert!(error.contains("[64, 8], expected [8, 64]"), "{error}");
    let error = refused(same, |tensors| {
        let tensor = tensors.remove(&a).unwrap();
        tensors.insert(a.replace("layers.0", "layers.7"), tensor);
    });
    assert!(error.contains("layers.7") && error.contains("2 layers"), "{error}");
    let error = refused(same, |tensors| tensors.get_mut(&a).unwrap().1[3] = f32::NAN);
    assert!(error.contains("not finite"), "{error}");
    let error = refused(same, HashMap::clear);
    assert!(error.contains("no tensor"), "{error}");
}

/// Of adapters of the same weights, whose modules have ranks of their own and the others, of which
/// there are none, all the same scale.
#[test]
fn a_digest_tells_scales_of_modules_apart() {
    let folder = small().join("lora/mistral-all");
    let config = model("mistral").config().clone();
    let text = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let digest = |rank: u32, alpha: u32, by_root: bool| {
        let dir = tempfile::tempdir().unwrap();
        let mut settings: Value = serde_json::from_str(&text).unwrap();
        settings["rank_pattern"] = json!({"[a-z]+_proj": 8});
        settings["r"] = json!(rank);
        settings["lora_alpha"] = json!(alpha);
        settings["use_rslora"] = json!(by_root);
        fs::write(dir.path().join("adapter_config.json"), settings.to_string()).unwrap();
        let weights = "adapter_model.safetensors";
        fs::copy(folder.join(weights), dir.path().join(weights)).unwrap();
        peft::read(dir.path(), &config, 64).unwrap().digest().to_owned()
    };
    let plain = digest(4, 8, false);
    assert_eq!(plain, digest(4, 8, false));
    assert_ne!(plain, digest(4, 4, true), "by the rank's root");
    assert_ne!(plain, digest(8, 16, false), "with another alpha");
}

#[test]
fn broken_files_are_refused() {
    let folder = small().join("lora/mistral-all");
    let config = model("mistral").config().clone();
    let dir = tempfile::tempdir().unwrap();
    let read = || peft::read(dir.path(), &config, 64).map(drop).unwrap_err().to_string();
    assert!(read().contains("no adapter_config.json"));
    fs::copy(folder.join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    assert!(read().contains("no adapter_model.safetensors"));
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    for len in [0, 7, 100, bytes.len() - 1] {
        fs::write(dir.path().join("adapter_model.safetensors"), &bytes[..len]).unwrap();
        assert!(read().contains("adapter_model.safetensors"), "{len} bytes");
    }
    let huge = fs::File::create(dir.path().join("adapter_model.safetensors")).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert!(read().contains("at most"), "a file of a terabyte");
    fs::write(dir.path().join("adapter_config.json"), "{").unwrap();
    assert!(read().contains("adapter_config.json"));
}

#[test]
fn adapters_come_and_go_within_bounds_and_stay_while_they_are_used() {
    let config = model("mistral").config().clone();
    let bounds = Bounds { adapters: 2, rank: 64 };
    let adapters = Adapters::new(config, vec!["base".into()], bounds);
    let path = |name: &str| small().join("lora").join(name).display().to_string();
    let load = |name: &str, from: &str, in_place: bool, digest: &str| {
        let (name, path, digest) = (name.to_owned(), path(from), digest.to_owned());
        let request = LoadAdapterRequest { name, path, in_place, digest };
        adapters.load(&request, false).map_err(|error| error.to_string())
    };
    let bytes = || {
        let mut status = WorkerStatus::default();
        adapters.count(&mut status);
        status.adapter_bytes
    };
    load("a", "mistral-all", false, "").unwrap();
    let first = adapters.list();
    load("a", "mistral-all", false, "").unwrap();
    assert_eq!(adapters.list(), first, "the same again changes nothing");
    assert!(load("a", "mistral-attention", false, "").unwrap_err().contains("another adapter"));
    assert!(load("base", "mistral-all", false, "").unwrap_err().contains("the model itself"));
    assert!(load("b c", "mistral-all", false, "").unwrap_err().contains("spaces"));
    assert!(load("b", "nothing", false, "").unwrap_err().contains("does not exist"));
    let digest = first.adapters[0].digest.clone();
    assert!(load("b", "mistral-attention", false, &digest).unwrap_err().contains("digest"));
    load("b", "mistral-attention", false, "").unwrap();
    assert!(load("c", "mistral-all", false, "").unwrap_err().contains("--max-loras"));

    let both = bytes();
    let wanted = AdapterRef { name: "a".into(), digest };
    let held: Arc<Adapter> = adapters.find(&wanted).unwrap();
    load("a", "mistral-attention", true, "").unwrap();
    assert_eq!(adapters.find(&wanted).unwrap_err().code(), tonic::Code::NotFound);
    assert!(bytes() > both, "the one that is still used is counted");
    drop(held);
    assert!(bytes() < both);
    assert!(adapters.unload("a") && adapters.unload("b") && !adapters.unload("b"));
    assert_eq!((adapters.list().adapters.len(), bytes()), (0, 0));
    assert!(adapters.list().version > first.version);
}
