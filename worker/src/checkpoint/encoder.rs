//! A folder with a text encoder, as Hugging Face publishes it: BERT, RoBERTa, XLM-R, ModernBERT.
//!
//! Tensors have one set of names here: `tokens`, `positions`, `types`, `embedding_norm`,
//! `final_norm`; of layer *i* `layer.i.` and `query`, `key`, `value`, `output`, `gate`, `up`, `down`,
//! and the norms before (`attention_norm`, `ffn_norm`) or after (`attention_output_norm`,
//! `ffn_output_norm`) the two; of a classifier `head`, `head_norm`, `classifier`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use baton_proto::TokenizerBundle;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::hugging_face::{json, read, tensors, tokenizer};
use super::{LoadError, TensorBytes};
use crate::encoder::{EncoderConfig, Positions};

/// How a model's file names and counts things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Bert,
    Roberta,
    ModernBert,
}

/// What a model was trained to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Hidden states.
    Embedding,
    /// Classes of a text.
    Classification,
    /// Classes of each token.
    TokenClassification,
}

/// Model types that are encoders.
const TYPES: [(&str, Family); 5] = [
    ("bert", Family::Bert),
    ("roberta", Family::Roberta),
    ("xlm-roberta", Family::Roberta),
    ("camembert", Family::Roberta),
    ("modernbert", Family::ModernBert),
];

/// `config.json`, as far as it matters here.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    layer_norm_eps: Option<f32>,
    norm_eps: Option<f32>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    type_vocab_size: Option<usize>,
    pad_token_id: Option<usize>,
    global_attn_every_n_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    local_attention: Option<usize>,
    global_rope_theta: Option<f32>,
    local_rope_theta: Option<f32>,
    rope_parameters: Option<Map<String, Value>>,
    classifier_pooling: Option<String>,
    classifier_activation: Option<String>,
    problem_type: Option<String>,
    id2label: Option<Map<String, Value>>,
    num_labels: Option<usize>,
    sentence_transformers: Option<Map<String, Value>>,
    sbert_ce_default_activation_function: Option<String>,
    #[serde(default)]
    is_matryoshka: bool,
    matryoshka_dimensions: Option<Vec<u32>>,
}

impl Config {
    /// The activation's name. A file may have the keys of several families: each reads its own.
    fn activation(&self, family: Family) -> &str {
        let (own, other) = match family {
            Family::ModernBert => (&self.hidden_activation, &self.hidden_act),
            _ => (&self.hidden_act, &self.hidden_activation),
        };
        own.as_deref().or(other.as_deref()).unwrap_or("gelu")
    }

    /// What is added to variances; likewise.
    fn epsilon(&self, family: Family) -> f32 {
        let (own, other, default) = match family {
            Family::ModernBert => (self.norm_eps, self.layer_norm_eps, 1e-5),
            _ => (self.layer_norm_eps, self.norm_eps, 1e-12),
        };
        own.or(other).unwrap_or(default)
    }
}

/// A mapped and checked folder.
pub struct EncoderFolder {
    path: PathBuf,
    config: Config,
    family: Family,
    /// What the names of the encoder's own tensors begin with.
    prefix: &'static str,
    tensors: HashMap<String, TensorBytes>,
    digest: String,
}

/// The model type and the class that a folder's `config.json` names, as far as it does.
pub fn kind(path: &Path) -> Result<(String, String), LoadError> {
    let config = json(path, "config.json")?.unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok((text(&config["model_type"]), text(&config["architectures"][0])))
}

/// Whether a model type is one of the encoders known here.
pub fn is_encoder(model_type: &str) -> bool {
    TYPES.iter().any(|(name, _)| *name == model_type)
}

impl EncoderFolder {
    /// Opens a folder whose model type [is an encoder](is_encoder).
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
        let text = read(&path.join("config.json"))?;
        let config: Config = serde_json::from_str(&text)
            .map_err(|error| corrupt(format!("config.json: {error}")))?;
        let kind = config.model_type.as_str();
        let Some(&(_, family)) = TYPES.iter().find(|(name, _)| *name == kind) else {
            return Err(corrupt(format!("model type `{kind}` is no encoder")));
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(text.as_bytes());
        let tensors = tensors(path, &mut hasher)?;
        let first = match family {
            Family::ModernBert => "embeddings.tok_embeddings.weight",
            _ => "embeddings.word_embeddings.weight",
        };
        let prefixes = ["", "bert.", "roberta.", "model."];
        let prefix = prefixes.iter().find(|it| tensors.contains_key(&format!("{it}{first}")));
        let Some(&prefix) = prefix else {
            return Err(corrupt(format!("tensor {first} is missing, or is not F32, F16 or BF16")));
        };
        let digest = hasher.finalize().to_hex().to_string();
        Ok(Self { path: path.to_owned(), config, family, prefix, tensors, digest })
    }

    /// The model's shape.
    pub fn config(&self) -> Result<EncoderConfig, LoadError> {
        let config = &self.config;
        let activation = config.activation(self.family);
        if activation != "gelu" {
            return Err(
                self.unsupported(format!("activation `{activation}` is not supported; only gelu"))
            );
        }
        let embedding = config.position_embedding_type.as_deref().unwrap_or("absolute");
        if self.family != Family::ModernBert && embedding != "absolute" {
            return Err(self.unsupported(format!("positions `{embedding}` are not supported")));
        }
        if config.is_decoder {
            return Err(self.unsupported("`is_decoder` is set: only encoders pool".into()));
        }
        if !(1..=1000).contains(&config.num_hidden_layers) {
            return Err(self.corrupt(format!("{} layers", config.num_hidden_layers)));
        }
        let first = match self.family {
            // The rows up to that of padding are nobody's.
            Family::Roberta => config.pad_token_id.unwrap_or(1) + 1,
            _ => 0,
        };
        let shape = EncoderConfig {
            layers: config.num_hidden_layers,
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            ffn: config.intermediate_size,
            vocab: config.vocab_size,
            max_tokens: config.max_position_embeddings.saturating_sub(first),
            types: match self.family {
                Family::ModernBert => 0,
                _ => config.type_vocab_size.unwrap_or(2),
            },
            positions: match self.family {
                Family::ModernBert => self.rotary()?,
                _ => Positions::Learned { first },
            },
            norm_eps: config.epsilon(self.family),
            windows: self.windows()?,
        };
        shape.check().map_err(|reason| self.unsupported(reason))?;
        Ok(shape)
    }

    /// RoPE bases of ModernBERT; newer files keep them in `rope_parameters`.
    fn rotary(&self) -> Result<Positions, LoadError> {
        let config = &self.config;
        let newer = |layers: &str| -> Result<Option<f32>, LoadError> {
            let Some(found) = config.rope_parameters.as_ref().and_then(|all| all.get(layers))
            else {
                return Ok(None);
            };
            match found["rope_type"].as_str() {
                None | Some("default") => Ok(found["rope_theta"].as_f64().map(|base| base as f32)),
                Some(kind) => {
                    Err(self.unsupported(format!("RoPE scaling `{kind}` is not supported")))
                }
            }
        };
        let theta = newer("full_attention")?.or(config.global_rope_theta).unwrap_or(160_000.0);
        let window_theta = newer("sliding_attention")?.or(config.local_rope_theta);
        // An explicit null in older files: the same base everywhere.
        let default = if config.global_rope_theta.is_some() { theta } else { 10_000.0 };
        Ok(Positions::Rotary { theta, window_theta: window_theta.unwrap_or(default) })
    }

    fn windows(&self) -> Result<Vec<Option<usize>>, LoadError> {
        let config = &self.config;
        let layers = config.num_hidden_layers;
        if self.family != Family::ModernBert {
            return Ok(vec![None; layers]);
        }
        let near = config.local_attention.unwrap_or(128) / 2;
        let Some(types) = &config.layer_types else {
            let period = config.global_attn_every_n_layers.unwrap_or(3).max(1);
            return Ok((0..layers).map(|i| (i % period != 0).then_some(near)).collect());
        };
        if types.len() != layers {
            return Err(self.corrupt(format!("{} `layer_types` for {layers} layers", types.len())));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(Some(near)),
                other => Err(self.unsupported(format!("layers of type `{other}`"))),
            })
            .collect()
    }

    /// The class that the checkpoint was saved from.
    pub fn architecture(&self) -> &str {
        self.config.architectures.first().map_or("", String::as_str)
    }

    /// What it was trained to give.
    pub fn purpose(&self) -> Result<Purpose, LoadError> {
        let architecture = self.architecture();
        let known = [
            ("ForSequenceClassification", Purpose::Classification),
            ("ForTokenClassification", Purpose::TokenClassification),
            ("ForMaskedLM", Purpose::Embedding),
            ("ForPreTraining", Purpose::Embedding),
            ("Model", Purpose::Embedding),
        ];
        let found = known.iter().find(|(end, _)| architecture.ends_with(end));
        match found {
            Some((_, purpose)) => Ok(*purpose),
            None if architecture.is_empty() => Ok(Purpose::Embedding),
            None => Err(self.unsupported(format!(
                "architecture `{architecture}` is not supported; supported are models, sequence \
                 classifiers and token classifiers"
            ))),
        }
    }

    /// Whether a classifier looks at the mean of all tokens and not at the first.
    pub fn classifies_mean(&self) -> bool {
        self.config.classifier_pooling.as_deref() == Some("mean")
    }

    /// What follows the first matrix of a classifier's head, as PyTorch names it.
    pub fn head_activation(&self) -> &str {
        match self.family {
            Family::ModernBert => self.config.classifier_activation.as_deref().unwrap_or("gelu"),
            _ => "tanh",
        }
    }

    /// Names of classes.
    pub fn labels(&self) -> Result<Vec<String>, LoadError> {
        let count = self.tensor("classifier.weight")?.dims[0];
        let names = self.config.id2label.as_ref();
        let said = self.config.num_labels.or(names.map(Map::len));
        if let Some(said) = said.filter(|said| *said != count) {
            return Err(self.corrupt(format!("config.json names {said} labels, there are {count}")));
        }
        let name = |i: usize| {
            let name = names.and_then(|names| names.get(&i.to_string())?.as_str());
            name.map_or_else(|| format!("LABEL_{i}"), str::to_owned)
        };
        Ok((0..count).map(name).collect())
    }

    /// `problem_type`, which decides what makes probabilities of a classifier's output.
    pub fn problem_type(&self) -> Option<&str> {
        self.config.problem_type.as_deref()
    }

    /// What sentence-transformers applies to a cross-encoder's output, as PyTorch names it.
    pub fn score_activation(&self) -> Result<Option<String>, LoadError> {
        let newer = self.config.sentence_transformers.as_ref();
        let newer = newer.and_then(|settings| settings.get("activation_fn")?.as_str());
        let here = newer.or(self.config.sbert_ce_default_activation_function.as_deref());
        if let Some(name) = here {
            return Ok(Some(name.to_owned()));
        }
        let file = json(&self.path, "config_sentence_transformers.json")?.unwrap_or_default();
        Ok(file["activation_fn"].as_str().map(str::to_owned))
    }

    /// Whether an embedding may be cut (Kusupati et al. 2022), and to which numbers.
    pub fn matryoshka(&self) -> (bool, Vec<u32>) {
        let mut to = self.config.matryoshka_dimensions.clone().unwrap_or_default();
        to.sort_unstable();
        (self.config.is_matryoshka || !to.is_empty(), to)
    }

    /// Tokens of the longest text, as the tokenizer's settings have it: where sentence-transformers
    /// keeps `max_seq_length` in its newer files.
    pub fn tokenizer_limit(&self) -> Result<Option<usize>, LoadError> {
        let settings = json(&self.path, "tokenizer_config.json")?.unwrap_or_default();
        // A number without end, as a float, stands for none.
        Ok(settings["model_max_length"].as_u64().map(|tokens| tokens as usize))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<TokenizerBundle, LoadError> {
        tokenizer(&self.path)
    }

    /// Equal for folders that hold the same model.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether there is a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        let (here, _) = self.find(name);
        self.tensors.contains_key(&here)
    }

    /// A tensor, or the rows of one that have this name.
    pub fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError> {
        let (here, (part, parts)) = self.find(name);
        let Some(tensor) = self.tensors.get(&here) else {
            return Err(
                self.corrupt(format!("tensor {here} is missing, or is not F32, F16 or BF16"))
            );
        };
        let Some(&rows) = tensor.dims.first().filter(|rows| rows.is_multiple_of(parts)) else {
            return Err(self.corrupt(format!("tensor {here} does not have {parts} parts")));
        };
        let rows = rows / parts;
        Ok(tensor.rows(part * rows, rows))
    }

    /// The name that a tensor has in the file.
    pub fn name_of(&self, name: &str) -> String {
        self.find(name).0
    }

    /// An error that says the folder is damaged.
    pub fn corrupt(&self, reason: String) -> LoadError {
        LoadError::Corrupt { path: self.path.clone(), reason }
    }

    /// An error that says the folder is sound but beyond this worker.
    pub fn unsupported(&self, reason: String) -> LoadError {
        LoadError::Unsupported { path: self.path.clone(), reason }
    }

    /// The name in the file, and which of how many equal parts of its rows.
    fn find(&self, name: &str) -> (String, (usize, usize)) {
        let (stem, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let (layer, stem) = match stem.strip_prefix("layer.").and_then(|it| it.split_once('.')) {
            Some((layer, stem)) => (Some(layer), stem),
            None => (None, stem),
        };
        let names: &[(&str, &str, (usize, usize))] = match (self.family, layer.is_some()) {
            (Family::ModernBert, false) => MODERN_OUTER,
            (Family::ModernBert, true) => MODERN_LAYER,
            (_, false) => BERT_OUTER,
            (_, true) => BERT_LAYER,
        };
        let found = names.iter().find(|(known, ..)| *known == stem);
        let (here, part) = found.map_or(("", (0, 1)), |&(_, here, part)| (here, part));
        // Where RoBERTa's classifier of texts has two matrices, that of tokens has one.
        let here = match (self.family, stem) {
            (Family::Roberta, "head") => "classifier.dense",
            (Family::Roberta, "classifier")
                if self.tensors.contains_key("classifier.out_proj.weight") =>
            {
                "classifier.out_proj"
            }
            _ => here,
        };
        let outside = here.starts_with("classifier") || here.starts_with("head");
        let prefix = if outside { "" } else { self.prefix };
        let layers = match self.family {
            Family::ModernBert => "layers",
            _ => "encoder.layer",
        };
        let full = match layer {
            Some(layer) => format!("{prefix}{layers}.{layer}.{here}.{kind}"),
            None => format!("{prefix}{here}.{kind}"),
        };
        // BERT's first files, converted from TensorFlow.
        let older = match kind {
            "weight" => full.replace("LayerNorm.weight", "LayerNorm.gamma"),
            _ => full.replace("LayerNorm.bias", "LayerNorm.beta"),
        };
        let name = if self.tensors.contains_key(&older) { older } else { full };
        (name, part)
    }
}

const WHOLE: (usize, usize) = (0, 1);

const BERT_OUTER: &[(&str, &str, (usize, usize))] = &[
    ("tokens", "embeddings.word_embeddings", WHOLE),
    ("positions", "embeddings.position_embeddings", WHOLE),
    ("types", "embeddings.token_type_embeddings", WHOLE),
    ("embedding_norm", "embeddings.LayerNorm", WHOLE),
    ("head", "pooler.dense", WHOLE),
    ("classifier", "classifier", WHOLE),
];

const BERT_LAYER: &[(&str, &str, (usize, usize))] = &[
    ("query", "attention.self.query", WHOLE),
    ("key", "attention.self.key", WHOLE),
    ("value", "attention.self.value", WHOLE),
    ("output", "attention.output.dense", WHOLE),
    ("attention_output_norm", "attention.output.LayerNorm", WHOLE),
    ("up", "intermediate.dense", WHOLE),
    ("down", "output.dense", WHOLE),
    ("ffn_output_norm", "output.LayerNorm", WHOLE),
];

const MODERN_OUTER: &[(&str, &str, (usize, usize))] = &[
    ("tokens", "embeddings.tok_embeddings", WHOLE),
    ("embedding_norm", "embeddings.norm", WHOLE),
    ("final_norm", "final_norm", WHOLE),
    ("head", "head.dense", WHOLE),
    ("head_norm", "head.norm", WHOLE),
    ("classifier", "classifier", WHOLE),
];

const MODERN_LAYER: &[(&str, &str, (usize, usize))] = &[
    ("attention_norm", "attn_norm", WHOLE),
    ("query", "attn.Wqkv", (0, 3)),
    ("key", "attn.Wqkv", (1, 3)),
    ("value", "attn.Wqkv", (2, 3)),
    ("output", "attn.Wo", WHOLE),
    ("ffn_norm", "mlp_norm", WHOLE),
    ("gate", "mlp.Wi", (0, 2)),
    ("up", "mlp.Wi", (1, 2)),
    ("down", "mlp.Wo", WHOLE),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        let text = format!(
            r#"{{"model_type": "modernbert", "hidden_size": 768, "intermediate_size": 1152,
            "num_hidden_layers": 22, "num_attention_heads": 12, "vocab_size": 50368,
            "max_position_embeddings": 8192 {more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    /// As in ModernBERT's own file.
    #[test]
    fn a_config_may_have_the_keys_of_two_families() {
        let both = config(
            r#", "layer_norm_eps": 1e-3, "norm_eps": 1e-4, "hidden_act": "relu",
            "hidden_activation": "gelu""#,
        );
        assert_eq!((both.epsilon(Family::ModernBert), both.epsilon(Family::Bert)), (1e-4, 1e-3));
        assert_eq!(both.activation(Family::ModernBert), "gelu");
        assert_eq!(both.activation(Family::Roberta), "relu");
        let other = config(r#", "layer_norm_eps": 1e-3, "hidden_act": "relu""#);
        assert_eq!(other.epsilon(Family::ModernBert), 1e-3);
        assert_eq!(other.activation(Family::ModernBert), "relu");
        let none = config("");
        assert_eq!((none.epsilon(Family::ModernBert), none.epsilon(Family::Bert)), (1e-5, 1e-12));
        assert_eq!(none.activation(Family::Bert), "gelu");
    }
}
