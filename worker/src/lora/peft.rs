//! Reads an adapter as PEFT (Hugging Face) writes it: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! What would change the computation in a way that is not built is refused by name. Everything is
//! checked against the base model before it is used.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use regex::{Regex, RegexBuilder};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use super::{Adapter, AdapterError, MODULES, Module};
use crate::kernels::low_rank::LowRank;
use crate::kernels::quant;
use crate::kernels::rope::Pairs;
use crate::model::ModelConfig;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Ranks and alphas of single modules.
const RANKS: &str = "rank_pattern";
const ALPHAS: &str = "alpha_pattern";
/// Patterns of each, and bytes of a compiled one, at most.
const MAX_PATTERNS: usize = 4096;
const MAX_PATTERN: usize = 1 << 20;
/// Bytes of a config, and of a header in front of the weights, at most.
const MAX_HEADER: u64 = 16 << 20;

/// Modules by PEFT's names.
const NAMES: [(&str, Module); MODULES] = [
    ("self_attn.q_proj", Module::Query),
    ("self_attn.k_proj", Module::Key),
    ("self_attn.v_proj", Module::Value),
    ("self_attn.o_proj", Module::Output),
    ("mlp.gate_proj", Module::Gate),
    ("mlp.up_proj", Module::Up),
    ("mlp.down_proj", Module::Down),
];

/// What comes before `layers.` in a tensor's name, in models of text and in those of more.
const PREFIXES: [&str; 3] = [
    "base_model.model.model.",
    "base_model.model.model.language_model.",
    "base_model.model.language_model.model.",
];

/// Whether a setting's value asks for nothing.
type Harmless = fn(&Value) -> bool;

/// Settings that change what an adapter computes and are not built, and when they ask for nothing.
const UNSUPPORTED: &[(&str, Harmless)] = &[
    ("use_dora", off),
    ("use_qalora", off),
    ("use_bdlora", off),
    ("arrow_config", never),
    ("kasa_config", never),
    ("monteclora_config", never),
    ("velora_config", never),
    ("lora_bias", off),
    ("fan_in_fan_out", off),
    ("bias", |value| value == "none"),
    ("modules_to_save", empty),
    ("layer_replication", empty),
    ("target_parameters", empty),
    ("trainable_token_indices", empty),
    ("alora_invocation_tokens", empty),
    // These start from other base weights than the model's own.
    ("init_lora_weights", |value| {
        let changed = ["pissa", "olora", "corda", "loftq"];
        !value.as_str().is_some_and(|name| changed.iter().any(|start| name.starts_with(start)))
    }),
];

fn never(_: &Value) -> bool {
    false
}

fn off(value: &Value) -> bool {
    *value == false
}

fn empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(serde_json::Map::is_empty)
}

/// Reads the adapter in a folder, for a model of this shape.
pub fn read(folder: &Path, config: &ModelConfig, max_rank: usize) -> Result<Adapter, AdapterError> {
    let refused = |reason: String| AdapterError::Refused { path: folder.to_owned(), reason };
    let settings = file(folder, CONFIG, MAX_HEADER)?;
    let settings: Value =
        serde_json::from_slice(&settings).map_err(|error| refused(format!("{CONFIG}: {error}")))?;
    let ranks = Settings::read(&settings, max_rank).map_err(refused)?;
    // Nothing is read that cannot be an adapter of these ranks.
    let most = MAX_HEADER + 4 * (config.layers * ranks.largest() * sides(config)) as u64;
    let bytes = file(folder, WEIGHTS, most)?;
    let tensors =
        SafeTensors::deserialize(&bytes).map_err(|error| refused(format!("{WEIGHTS}: {error}")))?;
    let layers = layers(&tensors, config, &ranks).map_err(refused)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&ranks.scale(ranks.rank, ranks.alpha).to_le_bytes());
    hasher.update(&bytes);
    let patterns = [RANKS, ALPHAS].map(|name| &settings[name]);
    let patterns = patterns.into_iter().filter(|given| !given.is_null() && !empty(given));
    let patterns: Vec<String> = patterns.map(Value::to_string).collect();
    if !patterns.is_empty() {
        // Modules have scales of their own, which that of the others does not tell.
        hasher.update(&ranks.alpha.to_le_bytes());
        hasher.update(&[u8::from(ranks.by_root)]);
    }
    for pattern in patterns {
        hasher.update(pattern.as_bytes());
    }
    Ok(Adapter::new(hasher.finalize().to_hex().to_string(), ranks.largest(), layers))
}

/// `adapter_config.json`, as far as it matters here.
struct Settings {
    rank: usize,
    alpha: f64,
    /// Other ranks and alphas than these, of some modules.
    ranks: Patterns<usize>,
    alphas: Patterns<f64>,
    /// Whether the product of both matrices is divided by the rank's root (Kalajdzievski 2023).
    by_root: bool,
}

impl Settings {
    fn read(settings: &Value, max_rank: usize) -> Result<Self, String> {
        let kind = &settings["peft_type"];
        if kind != "LORA" {
            return Err(format!("{CONFIG}: `peft_type` is {kind}; only \"LORA\" is supported"));
        }
        for (name, harmless) in UNSUPPORTED {
            let value = &settings[name];
            if !value.is_null() && !harmless(value) {
                return Err(format!("{CONFIG}: `{name}`: {value} is not supported"));
            }
        }
        let rank = |value: &Value| {
            let rank = value.as_u64().filter(|&rank| rank > 0);
            let rank = rank.ok_or_else(|| "is no whole number above 0".to_owned())?;
            if rank > max_rank as u64 {
                return Err(format!("is {rank}, above --max-lora-rank {max_rank}; raise it"));
            }
            Ok(rank as usize)
        };
        let alpha = |value: &Value| {
            let alpha = value.as_f64().filter(|alpha| alpha.is_finite());
            alpha.ok_or_else(|| "is no number".to_owned())
        };
        let named = |name: &str, reason: String| format!("{CONFIG}: `{name}` {reason}");
        Ok(Self {
            rank: rank(&settings["r"]).map_err(|reason| named("r", reason))?,
            alpha: alpha(&settings["lora_alpha"]).map_err(|reason| named("lora_alpha", reason))?,
            ranks: Patterns::read(&settings[RANKS], rank).map_err(|reason| named(RANKS, reason))?,
            alphas: Patterns::read(&settings[ALPHAS], alpha)
                .map_err(|reason| named(ALPHAS, reason))?,
            by_root: settings["use_rslora"] == true,
        })
    }

    /// A module's rank, and the scale of the product of its matrices.
    fn of(&self, module: &str) -> (usize, f32) {
        let rank = self.ranks.of(module).unwrap_or(self.rank);
        (rank, self.scale(rank, self.alphas.of(module).unwrap_or(self.alpha)))
    }

    fn scale(&self, rank: usize, alpha: f64) -> f32 {
        let by = if self.by_root { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / by) as f32
    }

    /// The highest rank that a module may have.
    fn largest(&self) -> usize {
        self.ranks.0.iter().map(|(_, rank)| *rank).fold(self.rank, usize::max)
    }
}

/// Values of modules whose names match, the first that does, as PEFT's `get_pattern_key` chooses
/// (`peft/utils/other.py`): a pattern is a regular expression for a name, or for its end after a
/// dot.
struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    fn read(patterns: &Value, value: impl Fn(&Value) -> Result<T, String>) -> Result<Self, String> {
        let patterns = match patterns {
            Value::Null => return Ok(Self(Vec::new())),
            Value::Object(patterns) if patterns.len() <= MAX_PATTERNS => patterns,
            _ => return Err(format!("is no object of at most {MAX_PATTERNS} patterns")),
        };
        let read = |(pattern, given): (&String, &Value)| {
            let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                .size_limit(MAX_PATTERN)
                .build()
                .map_err(|error| format!("has the pattern {pattern:?}: {error}"))?;
            let value = value(given).map_err(|reason| format!("of {pattern:?} {reason}"))?;
            Ok((regex, value))
        };
        patterns.iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    fn of(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
    }
}

/// A module's inputs and outputs.
fn shape(config: &ModelConfig, module: Module) -> (usize, usize) {
    let &ModelConfig { hidden, ffn, heads, kv_heads, head_dim, .. } = config;
    match module {
        Module::Query => (hidden, heads * head_dim),
        Module::Key | Module::Value => (hidden, kv_heads * head_dim),
        Module::Output => (heads * head_dim, hidden),
        Module::Gate | Module::Up => (hidden, ffn),
        Module::Down => (ffn, hidden),
    }
}

/// Inputs and outputs of a layer's modules together.
fn sides(config: &ModelConfig) -> usize {
    NAMES.iter().map(|(_, module)| shape(config, *module)).map(|(i, o)| i + o).sum()
}

/// A file of the folder.
fn file(folder: &Path, name: &str, most: u64) -> Result<Vec<u8>, AdapterError> {
    let path = folder.join(name);
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => AdapterError::Missing {
            path: folder.to_owned(),
            reason: format!("there is no {name}; give a folder as PEFT saves it"),
        },
        _ => AdapterError::Io { path: path.clone(), source },
    };
    let metadata = std::fs::metadata(&path).map_err(io)?;
    if !metadata.is_file() || metadata.len() > most {
        let len = metadata.len();
        let reason = format!("{name} is no file of at most {most} bytes, but of {len}");
        return Err(AdapterError::Refused { path: folder.to_owned(), reason });
    }
    std::fs::read(&path).map_err(io)
}

/// The layer, the module and whether it is B, of a tensor's name.
fn place(name: &str) -> Option<(usize, Module, bool)> {
    let rest =
        PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)?.strip_prefix("layers."));
    let (layer, rest) = rest?.split_once('.')?;
    let (module, is_b) = match rest.strip_suffix(".lora_A.weight") {
        Some(module) => (module, false),
        None => (rest.strip_suffix(".lora_B.weight")?, true),
    };
    let (_, module) = NAMES.iter().find(|(name, _)| *name == module)?;
    Some((layer.parse().ok()?, *module, is_b))
}

/// The module's name in the base model, of a tensor's name.
fn module_name(tensor: &str) -> &str {
    let name = tensor.strip_prefix("base_model.model.").unwrap_or(tensor);
    name.rsplit_once(".lora_").map_or(name, |(module, _)| module)
}

/// What is found of one module.
#[derive(Default)]
struct Found {
    rank: usize,
    scale: f32,
    /// A and B.
    pair: [Option<Vec<f32>>; 2],
}

type Layers = Vec<[Option<LowRank>; MODULES]>;

fn layers(
    tensors: &SafeTensors<'_>,
    config: &ModelConfig,
    settings: &Settings,
) -> Result<Layers, String> {
    let mut found: HashMap<(usize, usize), Found> = HashMap::new();
    for (name, tensor) in tensors.tensors() {
        let Some((layer, module, is_b)) = place(&name) else {
            let known: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
            return Err(format!(
                "tensor {name} is not supported; supported: lora_A and lora_B of {}",
                known.join(", ")
            ));
        };
        if layer >= config.layers {
            return Err(format!("tensor {name}: the model has {} layers", config.layers));
        }
        let (inputs, outputs) = shape(config, module);
        let (rank, scale) = settings.of(module_name(&name));
        let expected = if is_b { [outputs, rank] } else { [rank, inputs] };
        if tensor.shape() != expected {
            return Err(format!("tensor {name} is {:?}, expected {expected:?}", tensor.shape()));
        }
        let values = floats(&tensor).ok_or_else(|| {
            format!("tensor {name} is {:?}; supported: F32, F16, BF16", tensor.dtype())
        })?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(format!("tensor {name} holds values that are not finite"));
        }
        let found = found.entry((layer, module as usize)).or_default();
        (found.rank, found.scale) = (rank, scale);
        found.pair[usize::from(is_b)] = Some(values);
    }
    if found.is_empty() {
        return Err(format!("{WEIGHTS} holds no tensor"));
    }
    let mut layers: Layers = (0..config.layers).map(|_| Default::default()).collect();
    for ((layer, index), Found { rank, scale, pair }) in found {
        let (name, module) = NAMES[index];
        let [Some(a), Some(b)] = pair else {
            return Err(format!("layer {layer}: {name} has only one of lora_A and lora_B"));
        };
        let (inputs, _) = shape(config, module);
        let b = transposed(&b, config, module, rank, scale);
        if b.iter().any(|value| !value.is_finite()) {
            return Err(format!("layer {layer}: {name} is not finite times its scale, {scale}"));
        }
        let update = LowRank::new(rank, inputs, a, b);
        layers[layer][index] =
            Some(update.ok_or_else(|| format!("layer {layer}: {name} has sides that do not fit"))?);
    }
    Ok(layers)
}

fn floats(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let dtype = match tensor.dtype() {
        Dtype::F32 => GgmlDType::F32,
        Dtype::F16 => GgmlDType::F16,
        Dtype::BF16 => GgmlDType::BF16,
        _ => return None,
    };
    let mut values = vec![0.0; tensor.shape().iter().product()];
    quant::decode_row(dtype, tensor.data(), &mut values);
    Some(values)
}

/// B, `outputs × rank`, as the kernel reads it: transposed, scaled, and with its outputs in the
/// order of the model's own weights.
fn transposed(
    b: &[f32],
    config: &ModelConfig,
    module: Module,
    rank: usize,
    scale: f32,
) -> Vec<f32> {
    let outputs = b.len() / rank;
    // GGUF keeps the rows of Llama's queries and keys so that RoPE rotates neighbours; PEFT's are
    // in the order that it rotates halves in.
    let reordered =
        config.pairs == Pairs::Neighbours && matches!(module, Module::Query | Module::Key);
    let (width, half) = (config.head_dim, config.head_dim / 2);
    let from = |output: usize| match reordered {
        true => output / width * width + output % 2 * half + output % width / 2,
        false => output,
    };
    let mut transposed = vec![0.0; b.len()];
    for output in 0..outputs {
        let row = &b[from(output) * rank..][..rank];
        for (k, value) in row.iter().enumerate() {
            transposed[k * outputs + output] = value * scale;
        }
    }
    transposed
}
