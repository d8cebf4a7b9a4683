//! Folders with a Whisper model (Radford et al. 2022), of Hugging Face or of CTranslate2.
//!
//! Hugging Face: `config.json`, `*.safetensors`, `tokenizer.json`, `generation_config.json`.
//! CTranslate2: `config.json`, `model.bin`, `tokenizer.json`. Its tensors get the names that they
//! have in the other form; what it keeps as one is cut into the parts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use baton_proto::TokenizerBundle;
use baton_proto::v1::SpeechCard;
use serde_json::{Map, Value};

use super::hugging_face::{object, read, tensors};
use super::{Checkpoint, LoadError, TensorBytes, ctranslate2};
use crate::kernels::elementwise::Activation;
use crate::kernels::rope::Pairs;
use crate::model::ModelConfig;

/// The first vocabulary that has tokens of languages, as in the reference implementation.
const MULTILINGUAL_VOCAB: usize = 51_865;

/// The shape of a Whisper model.
#[derive(Clone, Copy, Debug)]
pub struct WhisperShape {
    /// Width of the residual streams.
    pub hidden: usize,
    /// Heads of all attentions.
    pub heads: usize,
    /// Width of the MLPs.
    pub ffn: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Bands of the spectrogram.
    pub mels: usize,
    /// Positions of the encoder.
    pub audio_positions: usize,
    /// Positions of the decoder.
    pub text_positions: usize,
}

/// A mapped and checked folder.
pub struct WhisperFolder {
    path: PathBuf,
    shape: WhisperShape,
    tensors: HashMap<String, TensorBytes>,
    /// `config.json` and `generation_config.json`.
    config: Map<String, Value>,
    generation: Map<String, Value>,
    tokenizer_json: String,
    /// Special tokens by their content.
    special: HashMap<String, u32>,
    digest: String,
}

impl WhisperFolder {
    /// Opens a folder; `None` when it is none of a Whisper model.
    pub fn open(path: &Path) -> Result<Option<Self>, LoadError> {
        let binary = path.join("model.bin");
        let file = path.join("config.json");
        if !path.is_dir() || !(file.is_file() || binary.is_file()) {
            return Ok(None);
        }
        let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
        let json = |name: &str| -> Result<Map<String, Value>, LoadError> {
            let file = path.join(name);
            if !file.is_file() {
                return Ok(Map::new());
            }
            let value = serde_json::from_str(&read(&file)?)
                .map_err(|error| corrupt(format!("{name}: {error}")))?;
            Ok(object(Some(value)))
        };
        let config = json("config.json")?;
        let kind = config.get("model_type").and_then(Value::as_str);
        if kind != Some("whisper") && (kind.is_some() || !binary.is_file()) {
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"whisper");
        let (tensors, heads) = match kind {
            Some(_) => {
                let heads = |key: &str| config.get(key).and_then(Value::as_u64);
                let both = [heads("encoder_attention_heads"), heads("decoder_attention_heads")];
                hasher.update(Value::Object(config.clone()).to_string().as_bytes());
                (tensors(path, &mut hasher)?, both)
            }
            None => {
                let variables = ctranslate2::open(&binary, &mut hasher)?;
                if variables.spec != "WhisperSpec" {
                    let reason = format!(
                        "a CTranslate2 model of `{}` is not supported; supported: WhisperSpec",
                        variables.spec
                    );
                    return Err(LoadError::Unsupported { path: path.to_owned(), reason });
                }
                let heads = |side: &str| {
                    let count = variables.scalars.get(&format!("{side}/num_heads"));
                    count.and_then(|count| u64::try_from(*count).ok())
                };
                (renamed(&variables.tensors), [heads("encoder"), heads("decoder")])
            }
        };
        let [Some(heads), Some(of_decoder)] = heads else {
            return Err(corrupt("the numbers of heads are missing".into()));
        };
        if heads != of_decoder || heads == 0 {
            let reason = format!("{heads} heads in the encoder, {of_decoder} in the decoder");
            return Err(LoadError::Unsupported { path: path.to_owned(), reason });
        }
        let tokenizer_json = read(&path.join("tokenizer.json"))?;
        let special = special(&tokenizer_json)
            .map_err(|error| corrupt(format!("tokenizer.json: {error}")))?;
        let mut folder = Self {
            path: path.to_owned(),
            shape: WhisperShape {
                hidden: 0,
                heads: heads as usize,
                ffn: 0,
                encoder_layers: 0,
                decoder_layers: 0,
                vocab: 0,
                mels: 0,
                audio_positions: 0,
                text_positions: 0,
            },
            tensors,
            generation: json("generation_config.json")?,
            config,
            tokenizer_json,
            special,
            digest: hasher.finalize().to_hex().to_string(),
        };
        folder.measure()?;
        Ok(Some(folder))
    }

    /// Takes the shape from the tensors.
    fn measure(&mut self) -> Result<(), LoadError> {
        let dims = |name: &str, rank: usize| {
            let dims = self.tensor(name)?.dims;
            match dims.len() == rank && !dims.contains(&0) {
                true => Ok(dims),
                false => Err(self.corrupt(format!("tensor {name} is {dims:?}"))),
            }
        };
        let layers = |side: &str| {
            let known = |i: &usize| {
                self.tensors.contains_key(&format!("model.{side}.layers.{i}.fc1.weight"))
            };
            (0..).take_while(known).count()
        };
        let conv = dims("model.encoder.conv1.weight", 3)?;
        let embedding = dims("model.decoder.embed_tokens.weight", 2)?;
        let shape = WhisperShape {
            hidden: conv[0],
            mels: conv[1],
            ffn: dims("model.encoder.layers.0.fc1.weight", 2)?[0],
            encoder_layers: layers("encoder"),
            decoder_layers: layers("decoder"),
            vocab: embedding[0],
            audio_positions: dims("model.encoder.embed_positions.weight", 2)?[0],
            text_positions: dims("model.decoder.embed_positions.weight", 2)?[0],
            ..self.shape
        };
        // What sound is cut into: half a minute, 3000 frames, of which the second convolution takes
        // every other.
        if shape.audio_positions != 1500 || conv[2] != 3 || shape.decoder_layers == 0 {
            return Err(self.unsupported(format!(
                "{} positions of sound, convolutions of {}, {} layers in the decoder",
                shape.audio_positions, conv[2], shape.decoder_layers
            )));
        }
        self.shape = shape;
        Ok(())
    }

    /// The model's shape.
    pub fn shape(&self) -> WhisperShape {
        self.shape
    }

    /// Layers and heads of the decoder that look at the sound of the token that they compute.
    pub fn alignment_heads(&self) -> Result<Vec<(usize, usize)>, LoadError> {
        let WhisperShape { decoder_layers, heads, .. } = self.shape;
        let listed = self.generation.get("alignment_heads");
        let listed = listed.or(self.config.get("alignment_heads")).and_then(Value::as_array);
        let Some(listed) = listed.filter(|list| !list.is_empty()) else {
            // As the reference implementation: the last half of the layers.
            let layers = decoder_layers / 2..decoder_layers;
            return Ok(layers
                .flat_map(|layer| (0..heads).map(move |head| (layer, head)))
                .collect());
        };
        let pair = |value: &Value| {
            let at = |i: usize| value.get(i)?.as_u64().map(|at| at as usize);
            let pair = (at(0)?, at(1)?);
            (pair.0 < decoder_layers && pair.1 < heads).then_some(pair)
        };
        let pairs = listed.iter().map(pair).collect::<Option<Vec<_>>>();
        pairs.ok_or_else(|| self.corrupt("alignment_heads are no layers and heads".into()))
    }

    /// What clients need to know.
    pub fn card(&self) -> Result<SpeechCard, LoadError> {
        let id = |names: &[&str]| {
            let found = names.iter().find_map(|name| self.special.get(*name).copied());
            found.ok_or_else(|| {
                self.corrupt(format!("tokenizer.json has no special token {}", names[0]))
            })
        };
        let multilingual = self.generation.get("is_multilingual").and_then(Value::as_bool);
        let multilingual = multilingual.unwrap_or(self.shape.vocab >= MULTILINGUAL_VOCAB);
        let no_timestamps = id(&["<|notimestamps|>"])?;
        let ids = |keys: [&str; 2]| -> Vec<u32> {
            let list = self.generation.get(keys[0]).or(self.config.get(keys[0]));
            let list = list.or(self.config.get(keys[1])).and_then(Value::as_array);
            let ids = list.into_iter().flatten().filter_map(Value::as_u64);
            ids.map(|id| id as u32).filter(|id| (*id as usize) < self.shape.vocab).collect()
        };
        let language = |content: &str| {
            let code = content.strip_prefix("<|")?.strip_suffix("|>")?;
            let letters = code.bytes().all(|byte| byte.is_ascii_lowercase());
            (letters && (2..=3).contains(&code.len())).then(|| code.to_owned())
        };
        let languages = self.special.iter().filter(|_| multilingual);
        let languages = languages.filter_map(|(content, id)| Some((language(content)?, *id)));
        let card = SpeechCard {
            multilingual,
            start_of_transcript: id(&["<|startoftranscript|>"])?,
            transcribe: id(&["<|transcribe|>"])?,
            translate: id(&["<|translate|>"])?,
            start_of_previous: id(&["<|startofprev|>"])?,
            no_speech: id(&["<|nospeech|>", "<|nocaptions|>"])?,
            no_timestamps,
            // Some tokenizers leave the times out.
            timestamp_begin: id(&["<|0.00|>"]).unwrap_or(no_timestamps + 1),
            languages: languages.collect(),
            max_text_tokens: self.shape.text_positions as u32,
            suppress_token_ids: ids(["suppress_tokens", "suppress_ids"]),
            begin_suppress_token_ids: ids(["begin_suppress_tokens", "suppress_ids_begin"]),
        };
        if card.timestamp_begin as usize >= self.shape.vocab {
            return Err(self.corrupt("the tokenizer has more tokens than the model".into()));
        }
        Ok(card)
    }
}

impl Checkpoint for WhisperFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Result<ModelConfig, LoadError> {
        let shape = self.shape;
        let config = ModelConfig {
            architecture: "whisper".into(),
            layers: shape.decoder_layers,
            hidden: shape.hidden,
            heads: shape.heads,
            kv_heads: shape.heads,
            head_dim: shape.hidden / shape.heads,
            ffn: shape.ffn,
            vocab: shape.vocab,
            max_context: shape.text_positions,
            // There is none.
            rope_theta: 0.0,
            pairs: Pairs::Halves,
            // Of the layer norms, which PyTorch's default is.
            rms_eps: 1e-5,
            activation: Activation::Gelu,
            embedding_scale: 1.0,
            window: None,
        };
        config.checked(self)
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError> {
        self.tensors.get(name).cloned().ok_or_else(|| {
            self.unsupported(format!(
                "tensor {name} is missing, or is not float32, float16 or bfloat16"
            ))
        })
    }

    fn tokenizer(&self) -> Result<TokenizerBundle, LoadError> {
        Ok(TokenizerBundle {
            tokenizer_json: self.tokenizer_json.clone(),
            chat_template: None,
            bos_token: None,
            eos_token: Some("<|endoftext|>".into()),
            generation_config: self.generation.clone(),
            tokenizer_config: Map::new(),
        })
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError> {
        let id = self.special.get("<|endoftext|>");
        id.map(|id| vec![*id])
            .ok_or_else(|| self.corrupt("tokenizer.json has no <|endoftext|>".into()))
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }
}

/// The special tokens of a `tokenizer.json`.
fn special(json: &str) -> Result<HashMap<String, u32>, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Tokenizer {
        added_tokens: Vec<Added>,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let tokenizer: Tokenizer = serde_json::from_str(json)?;
    Ok(tokenizer.added_tokens.into_iter().map(|token| (token.content, token.id)).collect())
}

/// Tensors of CTranslate2 (`specs/whisper_spec.py`, `specs/transformer_spec.py`) under the names
/// of Hugging Face.
fn renamed(tensors: &HashMap<String, TensorBytes>) -> HashMap<String, TensorBytes> {
    let mut renamed = HashMap::new();
    for (name, tensor) in tensors {
        let Some((stem, kind)) = name.rsplit_once('/') else { continue };
        let kind = match kind {
            "gamma" => "weight",
            "beta" => "bias",
            other => other,
        };
        let Some((side, rest)) = stem.split_once('/') else { continue };
        let outer = match rest {
            "conv1" | "conv2" => Some(format!("model.{side}.{rest}.{kind}")),
            "embeddings" => Some(format!("model.{side}.embed_tokens.weight")),
            "position_encodings" => Some(format!("model.{side}.embed_positions.weight")),
            "layer_norm" => Some(format!("model.{side}.layer_norm.{kind}")),
            "projection" if kind == "weight" => Some("proj_out.weight".to_owned()),
            _ => None,
        };
        if let Some(outer) = outer {
            renamed.insert(outer, tensor.clone());
            continue;
        }
        let Some((layer, part)) = rest.strip_prefix("layer_").and_then(|rest| rest.split_once('/'))
        else {
            continue;
        };
        let parts: &[&str] = match part {
            "self_attention/layer_norm" => &["self_attn_layer_norm"],
            "self_attention/linear_0" => {
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
            }
            "self_attention/linear_1" => &["self_attn.out_proj"],
            "attention/layer_norm" => &["encoder_attn_layer_norm"],
            "attention/linear_0" => &["encoder_attn.q_proj"],
            "attention/linear_1" => &["encoder_attn.k_proj", "encoder_attn.v_proj"],
            "attention/linear_2" => &["encoder_attn.out_proj"],
            "ffn/layer_norm" => &["final_layer_norm"],
            "ffn/linear_0" => &["fc1"],
            "ffn/linear_1" => &["fc2"],
            _ => continue,
        };
        // Queries, keys and values are one matrix, in this order.
        let Some(&rows) = tensor.dims.first() else { continue };
        if rows % parts.len() != 0 {
            continue;
        }
        let each = rows / parts.len();
        for (i, part) in parts.iter().enumerate() {
            let name = format!("model.{side}.layers.{layer}.{part}.{kind}");
            renamed.insert(name, tensor.rows(i * each, each));
        }
    }
    renamed
}
