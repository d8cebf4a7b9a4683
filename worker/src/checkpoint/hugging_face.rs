//! A folder as Hugging Face publishes models: `config.json`, `*.safetensors`, `tokenizer.json`.
//!
//! Tensors have other names than in GGUF, and RoPE always rotates halves.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_proto::TokenizerBundle;
use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Checkpoint, LoadError, TensorBytes};
use crate::kernels::elementwise::Activation;
use crate::kernels::rope::Pairs;
use crate::model::{ModelConfig, Window};

/// Model types, and what GGUF calls them.
const TYPES: [(&str, &str); 5] = [
    ("llama", "llama"),
    ("mistral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma3_text", "gemma3"),
];

/// `config.json`, as far as it matters here.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    #[serde(alias = "hidden_activation")]
    hidden_act: String,
    rope_theta: Option<f32>,
    rope_local_base_freq: Option<f32>,
    rope_scaling: Option<Value>,
    /// Newer files keep all of RoPE here.
    rope_parameters: Option<Value>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f32>,
    #[serde(default)]
    tie_word_embeddings: bool,
    eos_token_id: Option<Value>,
}

/// The tensors of all `*.safetensors` files of a folder. What tells them from other ones goes into
/// the hasher.
pub(super) fn tensors(
    path: &Path,
    hasher: &mut blake3::Hasher,
) -> Result<HashMap<String, TensorBytes>, LoadError> {
    let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
    let listed = std::fs::read_dir(path)
        .map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
    let mut files: Vec<PathBuf> = listed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|end| end == "safetensors"))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(corrupt("the folder has no *.safetensors file".into()));
    }
    let mut tensors = HashMap::new();
    for file in files {
        let map = super::map(&file)?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| corrupt(format!("{}: {error}", file.display())))?;
        // The header's length, eight bytes, comes before it.
        let data = header + 8;
        hasher.update(&map[..data]);
        hasher.update(&(map.len() as u64).to_le_bytes());
        let mut listed: Vec<_> = metadata.tensors().into_iter().collect();
        listed.sort_by(|(one, _), (two, _)| one.cmp(two));
        for (name, info) in listed {
            let (start, end) = info.data_offsets;
            super::hash_sample(hasher, &map[data + start..data + end]);
            let Some(dtype) = dtype(info.dtype) else { continue };
            let tensor = tensor(&map, data + start, end - start, dtype, &info.shape);
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// A mapped and checked folder.
pub(super) struct Folder {
    path: PathBuf,
    config: Config,
    tensors: HashMap<String, TensorBytes>,
    digest: String,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
        let text = read(&path.join("config.json"))?;
        let config: Config = serde_json::from_str(&text)
            .map_err(|error| corrupt(format!("config.json: {error}")))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(text.as_bytes());
        let tensors = tensors(path, &mut hasher)?;
        let digest = hasher.finalize().to_hex().to_string();
        Ok(Self { path: path.to_owned(), config, tensors, digest })
    }

    /// RoPE bases, of all layers and of those with a window.
    fn rope_thetas(&self) -> Result<(f32, f32), LoadError> {
        let config = &self.config;
        let parameters = config.rope_parameters.as_ref().or(config.rope_scaling.as_ref());
        let parameters = parameters.filter(|value| !value.is_null());
        let mut full = config.rope_theta.unwrap_or(10_000.0);
        let mut windowed = config.rope_local_base_freq.unwrap_or(full);
        let take = |value: &Value, thetas: &mut [&mut f32]| {
            let kind = value.get("rope_type").or(value.get("type")).and_then(Value::as_str);
            if let Some(kind) = kind.filter(|kind| *kind != "default") {
                return Err(self.unsupported(format!("RoPE scaling `{kind}` is not supported")));
            }
            if let Some(theta) = value.get("rope_theta").and_then(Value::as_f64) {
                thetas.iter_mut().for_each(|to| **to = theta as f32);
            }
            Ok(())
        };
        if let Some(parameters) = parameters {
            // Models with windows may have a set for each kind of layer.
            let of = |kind: &str| parameters.get(kind);
            match (of("full_attention"), of("sliding_attention")) {
                (Some(all), Some(local)) => {
                    take(all, &mut [&mut full])?;
                    take(local, &mut [&mut windowed])?;
                }
                _ => take(parameters, &mut [&mut full, &mut windowed])?,
            }
        }
        Ok((full, windowed))
    }

    /// Which layers see a window only.
    fn window(&self, rope_theta: f32) -> Result<Option<Window>, LoadError> {
        let config = &self.config;
        let Some(positions) = config.sliding_window else { return Ok(None) };
        if config.use_sliding_window == Some(false) {
            return Ok(None);
        }
        let window = |period| Some(Window { positions, period, rope_theta });
        let Some(types) = &config.layer_types else { return Ok(window(usize::MAX)) };
        let whole = |kind: &String| kind == "full_attention";
        let period = types.iter().position(whole).map_or(usize::MAX, |first| first + 1);
        let regular =
            types.iter().enumerate().all(|(i, kind)| whole(kind) == (i + 1).is_multiple_of(period));
        match (period, regular) {
            (1, true) => Ok(None),
            (_, true) => Ok(window(period)),
            (_, false) => Err(self.unsupported("layer_types without a period".into())),
        }
    }
}

impl Checkpoint for Folder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Result<ModelConfig, LoadError> {
        let config = &self.config;
        let kind = config.model_type.as_str();
        let Some((_, architecture)) = TYPES.iter().find(|(name, _)| *name == kind) else {
            let known: Vec<_> = TYPES.iter().map(|(name, _)| *name).collect();
            return Err(self.unsupported(format!(
                "model type `{kind}` is not supported; supported: {}",
                known.join(", ")
            )));
        };
        let activation = match config.hidden_act.as_str() {
            "silu" => Activation::Silu,
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => {
                return Err(self.unsupported(format!(
                    "activation `{other}` is not supported; supported: silu, gelu_pytorch_tanh"
                )));
            }
        };
        let heads = config.num_attention_heads;
        let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
        if config.query_pre_attn_scalar.is_some_and(|scalar| scalar != head_dim as f32) {
            return Err(self.unsupported("query_pre_attn_scalar is not the width of a head".into()));
        }
        let (rope_theta, window_theta) = self.rope_thetas()?;
        let hidden = config.hidden_size;
        let config = ModelConfig {
            architecture: (*architecture).to_owned(),
            layers: config.num_hidden_layers,
            hidden,
            heads,
            kv_heads: config.num_key_value_heads.unwrap_or(heads),
            head_dim,
            ffn: config.intermediate_size,
            vocab: config.vocab_size,
            max_context: config.max_position_embeddings,
            rope_theta,
            pairs: Pairs::Halves,
            rms_eps: config.rms_norm_eps,
            activation,
            embedding_scale: match *architecture {
                "gemma3" => (hidden as f32).sqrt(),
                _ => 1.0,
            },
            window: self.window(window_theta)?,
        };
        config.checked(self)
    }

    fn has_tensor(&self, name: &str) -> bool {
        let tied = name == "output.weight" && self.config.tie_word_embeddings;
        !tied && self.tensors.contains_key(&self.name_of(name))
    }

    fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError> {
        let name = self.name_of(name);
        let tensor = self.tensors.get(&name).cloned();
        tensor.ok_or_else(|| {
            self.corrupt(format!("tensor {name} is missing, or is not F32, F16 or BF16"))
        })
    }

    fn norm_offset(&self) -> f32 {
        if self.config.model_type == "gemma3_text" { 1.0 } else { 0.0 }
    }

    fn tokenizer(&self) -> Result<TokenizerBundle, LoadError> {
        tokenizer(&self.path)
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError> {
        let generation = json(&self.path, "generation_config.json")?.unwrap_or_default();
        let value = generation.get("eos_token_id").or(self.config.eos_token_id.as_ref());
        let ids = match value {
            Some(Value::Array(ids)) => ids.clone(),
            Some(one) => vec![one.clone()],
            None => Vec::new(),
        };
        Ok(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect())
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }
}

/// Tokenizer and chat template of a folder.
pub(super) fn tokenizer(path: &Path) -> Result<TokenizerBundle, LoadError> {
    let settings = json(path, "tokenizer_config.json")?.unwrap_or_default();
    let token = |key: &str| {
        let value = &settings[key];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    };
    let template = path.join("chat_template.jinja");
    let chat_template = match template.is_file() {
        true => Some(read(&template)?),
        false => settings["chat_template"].as_str().map(str::to_owned),
    };
    Ok(TokenizerBundle {
        tokenizer_json: read(&path.join("tokenizer.json"))?,
        chat_template,
        bos_token: token("bos_token"),
        eos_token: token("eos_token"),
        generation_config: object(json(path, "generation_config.json")?),
        tokenizer_config: object(Some(settings)),
    })
}

/// A file of a folder that may be absent, as JSON.
pub(super) fn json(folder: &Path, name: &str) -> Result<Option<Value>, LoadError> {
    let path = folder.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read(&path)?).map(Some).map_err(|error| LoadError::Corrupt {
        path: folder.to_owned(),
        reason: format!("{name}: {error}"),
    })
}

pub(super) fn object(json: Option<Value>) -> Map<String, Value> {
    match json {
        Some(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

impl Folder {
    /// The name that a tensor with a GGUF name has here. A model that was saved without its output
    /// projection, as those that embed are, has no prefix.
    fn name_of(&self, name: &str) -> String {
        let full = self.full_name(name);
        match full.strip_prefix("model.") {
            Some(bare) if self.tensors.contains_key("embed_tokens.weight") => bare.to_owned(),
            _ => full,
        }
    }

    fn full_name(&self, name: &str) -> String {
        let outer = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
        ];
        if let Some((_, here)) = outer.iter().find(|(gguf, _)| *gguf == name) {
            return (*here).to_owned();
        }
        let gemma = self.config.model_type == "gemma3_text";
        let inner = [
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("attn_norm", "input_layernorm"),
            // The same name for two things: of Gemma 3 it is a norm after the attention.
            ("post_attention_norm", if gemma { "post_attention_layernorm" } else { "" }),
            ("post_ffw_norm", "post_feedforward_layernorm"),
            (
                "ffn_norm",
                if gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" },
            ),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ];
        let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let found = parts.and_then(|(layer, rest)| {
            let (stem, kind) = rest.rsplit_once('.')?;
            let (_, here) = inner.iter().find(|(gguf, _)| *gguf == stem)?;
            Some(format!("model.layers.{layer}.{here}.{kind}"))
        });
        found.unwrap_or_else(|| name.to_owned())
    }
}

pub(super) fn tensor(
    map: &Arc<Mmap>,
    start: usize,
    len: usize,
    dtype: GgmlDType,
    dims: &[usize],
) -> TensorBytes {
    TensorBytes { map: Arc::clone(map), start, len, dtype, dims: dims.to_vec() }
}

fn dtype(dtype: Dtype) -> Option<GgmlDType> {
    match dtype {
        Dtype::F32 => Some(GgmlDType::F32),
        Dtype::F16 => Some(GgmlDType::F16),
        Dtype::BF16 => Some(GgmlDType::BF16),
        _ => None,
    }
}

/// A file that a folder must have.
pub(super) fn read(path: &Path) -> Result<String, LoadError> {
    std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => LoadError::Corrupt {
            path: path.to_owned(),
            reason: "the folder does not have this file".to_owned(),
        },
        _ => LoadError::Io { path: path.to_owned(), source },
    })
}
