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
    hidden_act: Option<String>,
    /// Gemma's name of it; a file may have both.
    hidden_activation: Option<String>,
    use_bidirectional_attention: Option<Value>,
    is_causal: Option<bool>,
    rope_theta: Option<f32>,
    rope_local_base_freq: Option<f32>,
    rope_scaling: Option<Value>,
    /// Newer files keep all of RoPE here.
    rope_parameters: Option<Value>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    /// Of Qwen: the first layer with a window.
    max_window_layers: Option<usize>,
    /// Of Gemma 3; other families have texts here.
    sliding_window_pattern: Option<Value>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f32>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    #[serde(default)]
    tie_word_embeddings: bool,
    eos_token_id: Option<Value>,
}

impl Config {
    /// The activation's name, by the key that the architecture reads.
    fn activation(&self, architecture: &str) -> Option<&str> {
        let (own, other) = match architecture {
            "gemma3" => (&self.hidden_activation, &self.hidden_act),
            _ => (&self.hidden_act, &self.hidden_activation),
        };
        own.as_deref().or(other.as_deref())
    }

    /// The key that asks for attention to later tokens, as embedders made of decoders have it.
    fn bidirectional(&self) -> Option<&'static str> {
        let causal = match &self.use_bidirectional_attention {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::String(kind)) => {
                ["false", "none"].iter().any(|off| kind.eq_ignore_ascii_case(off))
            }
            Some(_) => false,
        };
        match (causal, self.is_causal) {
            (false, _) => Some("use_bidirectional_attention"),
            (true, Some(false)) => Some("is_causal"),
            (true, _) => None,
        }
    }

    /// The key that asks for logits to be squashed, as Gemma 2's are.
    fn softcapping(&self) -> Option<&'static str> {
        let caps = [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ];
        let set = |cap: Option<f32>| cap.is_some_and(|cap| cap != 0.0);
        caps.into_iter().find(|(_, cap)| set(*cap)).map(|(key, _)| key)
    }
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
        // Where the file does not say, as transformers' Gemma3TextConfig and the others have it.
        let gemma = config.model_type == "gemma3_text";
        let mut full = config.rope_theta.unwrap_or(if gemma { 1_000_000.0 } else { 10_000.0 });
        let local = if gemma { 10_000.0 } else { full };
        let mut windowed = config.rope_local_base_freq.unwrap_or(local);
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
        let kind = config.model_type.as_str();
        // As in transformers: Llama has no windows whatever its file says, Qwen where it asks.
        let wanted = match kind {
            "llama" => false,
            "qwen2" | "qwen3" => config.use_sliding_window == Some(true),
            _ => config.use_sliding_window != Some(false),
        };
        let Some(positions) = config.sliding_window.filter(|_| wanted) else { return Ok(None) };
        let period = match (&config.layer_types, kind) {
            (Some(types), _) => self.period_of(types)?,
            (None, "gemma3_text") => self.gemma_period()?,
            (None, "qwen2" | "qwen3") => self.qwen_period()?,
            (None, _) => usize::MAX,
        };
        Ok((period != 1).then_some(Window { positions, period, rope_theta }))
    }

    /// Every so many layers one sees all positions.
    fn period_of(&self, types: &[String]) -> Result<usize, LoadError> {
        let whole = |kind: &String| kind == "full_attention";
        let period = types.iter().position(whole).map_or(usize::MAX, |first| first + 1);
        let regular =
            types.iter().enumerate().all(|(i, kind)| whole(kind) == (i + 1).is_multiple_of(period));
        if regular {
            return Ok(period);
        }
        Err(self.unsupported("layer_types without a period".into()))
    }

    /// The same where the layers are not listed, as in the files that Google publishes:
    /// transformers' Gemma3TextConfig.
    fn gemma_period(&self) -> Result<usize, LoadError> {
        let Some(pattern) = &self.config.sliding_window_pattern else { return Ok(6) };
        match pattern.as_u64() {
            Some(period @ 1..) => Ok(period as usize),
            _ => Err(self.corrupt(format!("config.json: `sliding_window_pattern` is {pattern}"))),
        }
    }

    /// Qwen's layers have windows from one on: transformers' Qwen2Config and Qwen3Config.
    fn qwen_period(&self) -> Result<usize, LoadError> {
        let layers = self.config.num_hidden_layers;
        match self.config.max_window_layers.unwrap_or(28) {
            0 => Ok(usize::MAX),
            first if first >= layers => Ok(1),
            first => Err(self.unsupported(format!(
                "`max_window_layers` is {first} of {layers} layers; supported: windows in all \
                 layers, or in none"
            ))),
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
        if let Some(key) = config.bidirectional() {
            return Err(self.unsupported(format!(
                "`{key}` asks for attention to later tokens, which decoders are not run with"
            )));
        }
        if let Some(key) = config.softcapping() {
            return Err(self.unsupported(format!("`{key}` is not supported")));
        }
        let activation = match config.activation(architecture) {
            Some("silu") => Activation::Silu,
            Some("gelu_pytorch_tanh") => Activation::GeluTanh,
            None => return Err(self.corrupt("config.json: `hidden_act` is missing".into())),
            Some(other) => {
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

    /// As in vLLM: the tokenizer's own, then those that generation is said to end with.
    fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError> {
        let settings = json(&self.path, "tokenizer_config.json")?.unwrap_or_default();
        let own = match token(&settings, "eos_token") {
            Some(text) => token_id(&self.path, text)?,
            None => None,
        };
        let generation = json(&self.path, "generation_config.json")?.unwrap_or_default();
        let value = generation.get("eos_token_id").filter(|value| !value.is_null());
        let more = match value.or(self.config.eos_token_id.as_ref()) {
            Some(Value::Array(ids)) => ids.clone(),
            Some(one) => vec![one.clone()],
            None => Vec::new(),
        };
        let mut ids = Vec::new();
        for id in own.into_iter().chain(more.iter().filter_map(Value::as_u64)) {
            // What has no logit is never drawn.
            let Ok(id) = u32::try_from(id) else { continue };
            if (id as usize) < self.config.vocab_size && !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }
}

/// Tokenizer and chat template of a folder.
pub(super) fn tokenizer(path: &Path) -> Result<TokenizerBundle, LoadError> {
    let settings = json(path, "tokenizer_config.json")?.unwrap_or_default();
    let token = |key: &str| token(&settings, key).map(str::to_owned);
    let template = path.join("chat_template.jinja");
    let chat_template = match template.is_file() {
        true => Some(read(&template)?),
        false => chat_template(&settings),
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

/// A special token in `tokenizer_config.json`: its text, or an object that has it.
fn token<'a>(settings: &'a Value, key: &str) -> Option<&'a str> {
    let value = &settings[key];
    value.as_str().or_else(|| value["content"].as_str())
}

/// The template in `tokenizer_config.json`. Of several with names, the one that transformers takes
/// for chats without tools.
fn chat_template(settings: &Value) -> Option<String> {
    let template = match &settings["chat_template"] {
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            let only = named.first().filter(|_| named.len() == 1);
            &default.or(only)?["template"]
        }
        one => one,
    };
    template.as_str().map(str::to_owned)
}

/// `tokenizer.json`, as far as it tells ids.
#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    model: Vocabulary,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
}

#[derive(Default, Deserialize)]
struct Vocabulary {
    /// Ids by their texts; of Unigram models a list.
    #[serde(default)]
    vocab: Value,
}

/// The id of a token's text in `tokenizer.json`.
fn token_id(path: &Path, text: &str) -> Result<Option<u64>, LoadError> {
    let tokens: Tokens =
        serde_json::from_str(&read(&path.join("tokenizer.json"))?).map_err(|error| {
            LoadError::Corrupt { path: path.to_owned(), reason: format!("tokenizer.json: {error}") }
        })?;
    if let Some(added) = tokens.added_tokens.iter().find(|added| added.content == text) {
        return Ok(Some(added.id));
    }
    Ok(match &tokens.model.vocab {
        Value::Object(ids) => ids.get(text).and_then(Value::as_u64),
        Value::Array(pieces) => {
            let at = pieces.iter().position(|piece| piece[0].as_str() == Some(text));
            at.map(|at| at as u64)
        }
        _ => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        let text = format!(
            r#"{{"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-6 {more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_config_may_have_both_names_of_the_activation() {
        let both = config(r#", "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh""#);
        assert_eq!(both.activation("gemma3"), Some("gelu_pytorch_tanh"));
        assert_eq!(both.activation("llama"), Some("silu"));
        let one = config(r#", "hidden_act": "silu""#);
        assert_eq!(one.activation("gemma3"), Some("silu"));
        assert_eq!(config("").activation("llama"), None);
    }

    #[test]
    fn attention_to_later_tokens_is_found() {
        for causal in [
            "",
            r#", "use_bidirectional_attention": false"#,
            r#", "use_bidirectional_attention": null, "is_causal": null"#,
            r#", "use_bidirectional_attention": "none", "is_causal": true"#,
        ] {
            assert_eq!(config(causal).bidirectional(), None, "{causal}");
        }
        for (key, value) in [
            ("use_bidirectional_attention", "true"),
            ("use_bidirectional_attention", r#""all""#),
            ("is_causal", "false"),
        ] {
            let found = config(&format!(r#", "{key}": {value}"#)).bidirectional();
            assert_eq!(found, Some(key), "{value}");
        }
    }

    /// A folder of a model with eight layers, without files.
    fn folder(kind: &str, more: &str) -> Folder {
        let text = format!(
            r#"{{"model_type": "{kind}", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 256,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh" {more}}}"#
        );
        let config = serde_json::from_str(&text).unwrap();
        let (tensors, digest) = (HashMap::new(), String::new());
        Folder { path: PathBuf::from("folder"), config, tensors, digest }
    }

    /// The layers that see all positions.
    fn whole(config: &ModelConfig) -> Vec<usize> {
        (0..config.layers).filter(|layer| config.window_of(*layer).is_none()).collect()
    }

    #[test]
    fn gemma_without_layer_types_has_a_pattern() {
        // As google/gemma-3-1b-it.
        let published = r#", "sliding_window": 512, "sliding_window_pattern": 6,
            "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": null,
            "attn_logit_softcapping": null, "final_logit_softcapping": null"#;
        let bare = r#", "sliding_window": 512"#;
        for more in [published, bare] {
            let config = folder("gemma3_text", more).config().unwrap();
            let window = config.window.unwrap();
            assert_eq!((window.positions, window.period), (512, 6), "{more}");
            assert_eq!((config.rope_theta, window.rope_theta), (1_000_000.0, 10_000.0), "{more}");
            assert_eq!(whole(&config), [5], "{more}");
        }
        let of = |pattern: &str| {
            let more = format!(r#", "sliding_window": 512, "sliding_window_pattern": {pattern}"#);
            folder("gemma3_text", &more).config().map(|config| whole(&config))
        };
        assert_eq!(of("3").unwrap(), [2, 5]);
        assert_eq!(of("1").unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        for wrong in ["0", r#""LLLG""#] {
            let error = of(wrong).unwrap_err().to_string();
            assert!(error.contains("`sliding_window_pattern`"), "{error}");
        }
        // A list of the layers counts before it.
        let listed = r#", "sliding_window": 16, "sliding_window_pattern": 6, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention", "full_attention",
            "sliding_attention", "full_attention", "sliding_attention", "full_attention"]"#;
        assert_eq!(whole(&folder("gemma3_text", listed).config().unwrap()), [1, 3, 5, 7]);
    }

    #[test]
    fn windows_are_where_transformers_has_them() {
        let window = |kind: &str, more: &str| {
            let more = format!(r#", "sliding_window": 16 {more}"#);
            folder(kind, &more).config().map(|config| whole(&config).len())
        };
        assert_eq!(window("mistral", "").unwrap(), 0);
        assert_eq!(window("llama", "").unwrap(), 8);
        assert_eq!(window("llama", r#", "use_sliding_window": true"#).unwrap(), 8);
        for kind in ["qwen2", "qwen3"] {
            for off in ["", r#", "use_sliding_window": false, "max_window_layers": 0"#] {
                assert_eq!(window(kind, off).unwrap(), 8, "{kind} {off}");
            }
            let from =
                |first: &str| window(kind, &format!(r#", "use_sliding_window": true {first}"#));
            assert_eq!(from("").unwrap(), 8, "28 is more than there are");
            assert_eq!(from(r#", "max_window_layers": 8"#).unwrap(), 8);
            assert_eq!(from(r#", "max_window_layers": 0"#).unwrap(), 0);
            let error = from(r#", "max_window_layers": 5"#).unwrap_err().to_string();
            assert!(error.contains("`max_window_layers` is 5 of 8 layers"), "{error}");
        }
    }

    #[test]
    fn squashed_logits_are_refused() {
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            for off in ["null", "0", "0.0"] {
                let more = format!(r#", "{key}": {off}"#);
                assert!(folder("gemma3_text", &more).config().is_ok(), "{more}");
            }
            let more = format!(r#", "{key}": 30.0"#);
            let error = folder("gemma3_text", &more).config().map(drop).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn a_bias_has_its_gguf_name_too() {
        let mut folder = folder("llama", "");
        let bias = TensorBytes::anonymous(&[0; 4], GgmlDType::F32, vec![1]);
        folder.tensors.insert("model.layers.1.self_attn.o_proj.bias".into(), bias.clone());
        folder.tensors.insert("model.layers.2.mlp.down_proj.bias".into(), bias);
        assert!(folder.has_tensor("blk.1.attn_output.bias"));
        assert!(folder.has_tensor("blk.2.ffn_down.bias"));
        assert!(!folder.has_tensor("blk.0.attn_output.bias"));
    }

    #[test]
    fn the_tokenizers_own_end_comes_first() {
        let written = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(written.path().join(name), text).unwrap();
        };
        let ids = |config: &str| {
            let folder = folder("llama", config);
            Folder { path: written.path().to_owned(), ..folder }.eos_token_ids().unwrap()
        };
        let three = r#", "eos_token_id": 3"#;
        assert!(ids("").is_empty());
        assert_eq!(ids(three), [3]);
        // A null is not an answer.
        write("generation_config.json", r#"{"eos_token_id": null}"#);
        assert_eq!(ids(three), [3]);
        write("generation_config.json", r#"{"eos_token_id": [4, 9, 1000]}"#);
        assert_eq!(ids(three), [4, 9], "there are 256 tokens");
        let added = r#"{"added_tokens": [{"id": 9, "content": "<|im_end|>", "special": true}],
            "model": {"type": "BPE", "vocab": {"</s>": 7}, "merges": []}}"#;
        write("tokenizer.json", added);
        for (eos, expected) in [
            (r#""<|im_end|>""#, &[9u32, 4][..]),
            (r#"{"content": "<|im_end|>", "lstrip": false}"#, &[9, 4]),
            (r#""</s>""#, &[7, 4, 9]),
            (r#""<unheard of>""#, &[4, 9]),
            ("null", &[4, 9]),
        ] {
            write("tokenizer_config.json", &format!(r#"{{"eos_token": {eos}}}"#));
            assert_eq!(ids(three), expected, "{eos}");
        }
        write("tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        write("tokenizer.json", r#"{"model": {"vocab": [["<unk>", 0.0], ["</s>", -1.5]]}}"#);
        assert_eq!(ids(three), [1, 4, 9]);
    }

    #[test]
    fn of_several_templates_the_default_one_is_taken() {
        for (written, expected) in [
            (r#""{{ x }}""#, Some("{{ x }}")),
            (
                r#"[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]"#,
                Some("d"),
            ),
            (r#"[{"name": "tool_use", "template": "t"}]"#, Some("t")),
            (r#"[{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]"#, None),
            ("[]", None),
            ("null", None),
        ] {
            let settings: Value =
                serde_json::from_str(&format!(r#"{{"chat_template": {written}}}"#)).unwrap();
            assert_eq!(chat_template(&settings).as_deref(), expected, "{written}");
        }
    }
}
