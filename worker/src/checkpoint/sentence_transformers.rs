//! What sentence-transformers keeps beside a model: what to do with its hidden states.
//!
//! `modules.json` lists the steps, each with a folder of its own (Reimers and Gurevych 2019).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::hugging_face::{json, tensors};
use super::{LoadError, TensorBytes};
use crate::pooling::Pooling;

/// Settings of the transformer's own step, by the names that the file has had. The first counts.
const SENTENCE_CONFIGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// The steps of a model.
#[derive(Default)]
pub struct Modules {
    /// Folder of the transformer itself, when it is not the model's.
    pub transformer: Option<PathBuf>,
    /// How the tokens' vectors become one; several are put one after the other. Empty when the
    /// files do not say.
    pub pooling: Vec<Pooling>,
    /// What follows.
    pub steps: Vec<Step>,
    /// Longest text, in tokens.
    pub max_tokens: Option<usize>,
    /// Fed with what tells the steps from other ones.
    pub hasher: blake3::Hasher,
}

/// What is done with a vector.
pub enum Step {
    /// `activation(x Wᵀ + b)`.
    Dense {
        /// The matrix.
        weight: TensorBytes,
        /// Added to the product.
        bias: Option<TensorBytes>,
        /// As PyTorch names it.
        activation: String,
    },
    /// To length one.
    Normalize,
}

#[derive(Deserialize)]
struct Entry {
    path: String,
    r#type: String,
}

/// Reads the files of a folder; nothing found is no error.
pub fn read(folder: &Path) -> Result<Modules, LoadError> {
    let corrupt = |reason: String| LoadError::Corrupt { path: folder.to_owned(), reason };
    let unsupported = |reason: String| LoadError::Unsupported { path: folder.to_owned(), reason };
    let mut modules = Modules::default();
    let listed = json(folder, "modules.json")?.unwrap_or_else(|| Value::Array(Vec::new()));
    let listed: Vec<Entry> = serde_json::from_value(listed)
        .map_err(|error| corrupt(format!("modules.json: {error}")))?;
    let mut transformer = folder.to_owned();
    for Entry { path, r#type } in listed {
        // What a folder names must be inside of it.
        if Path::new(&path).is_absolute() || path.split('/').any(|part| part == "..") {
            return Err(corrupt(format!("modules.json: path `{path}` leaves the folder")));
        }
        let at = folder.join(&path);
        match r#type.rsplit('.').next().unwrap_or_default() {
            "Transformer" if path.is_empty() => {}
            "Transformer" => {
                transformer = at.clone();
                modules.transformer = Some(at);
            }
            "Pooling" => {
                let config = json(&at, "config.json")?.unwrap_or_default();
                modules.pooling = pooling(&config)
                    .map_err(|name| unsupported(format!("{path}: pooling mode `{name}`")))?;
            }
            "Dense" => modules.steps.push(dense(folder, &at, &mut modules.hasher)?),
            "Normalize" => {
                modules.hasher.update(b"Normalize\0");
                modules.steps.push(Step::Normalize);
            }
            other => return Err(unsupported(format!("modules.json: `{other}` is not supported"))),
        }
    }
    for name in SENTENCE_CONFIGS {
        let Some(sentence) = json(&transformer, name)? else { continue };
        modules.max_tokens = sentence["max_seq_length"].as_u64().map(|tokens| tokens as usize);
        if sentence["do_lower_case"].as_bool() == Some(true) {
            let tokenizer = json(&transformer, "tokenizer.json")?.unwrap_or_default();
            if !lowers(&tokenizer["normalizer"]) {
                return Err(unsupported(format!(
                    "{name}: `do_lower_case` is set, but the tokenizer leaves upper case as it is"
                )));
            }
        }
        break;
    }
    Ok(modules)
}

/// Whether a tokenizer's normalizer makes lower case.
fn lowers(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        Some("Lowercase") => true,
        Some("BertNormalizer") => normalizer["lowercase"].as_bool() == Some(true),
        Some("Sequence") => {
            normalizer["normalizers"].as_array().is_some_and(|steps| steps.iter().any(lowers))
        }
        _ => false,
    }
}

/// The modes of a `Pooling` module, in the order in which their vectors are put together; or the
/// name of one that is not known.
fn pooling(config: &Value) -> Result<Vec<Pooling>, String> {
    let by_name = |name: &str| Pooling::by_name(name).ok_or_else(|| name.to_owned());
    match &config["pooling_mode"] {
        Value::String(name) => return Ok(vec![by_name(name)?]),
        Value::Array(names) if !names.is_empty() => {
            return names.iter().map(|name| by_name(name.as_str().unwrap_or_default())).collect();
        }
        _ => {}
    }
    // Older files have a switch for each.
    let switches = [
        ("pooling_mode_cls_token", Pooling::Cls),
        ("pooling_mode_max_tokens", Pooling::Max),
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
        ("pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
        ("pooling_mode_lasttoken", Pooling::Last),
    ];
    let on = switches.into_iter().filter(|(name, _)| config[*name].as_bool() == Some(true));
    let modes: Vec<Pooling> = on.map(|(_, mode)| mode).collect();
    Ok(if modes.is_empty() { vec![Pooling::Mean] } else { modes })
}

fn dense(folder: &Path, at: &Path, hasher: &mut blake3::Hasher) -> Result<Step, LoadError> {
    let corrupt = |reason: String| LoadError::Corrupt { path: at.to_owned(), reason };
    let config = json(at, "config.json")?.unwrap_or_default();
    if config["use_residual"].as_bool() == Some(true) {
        let reason = "a Dense module with `use_residual` is not supported".to_owned();
        return Err(LoadError::Unsupported { path: folder.to_owned(), reason });
    }
    hasher.update(b"Dense\0");
    let mut found = tensors(at, hasher)?;
    let weight = found
        .remove("linear.weight")
        .filter(|weight| weight.dims.len() == 2)
        .ok_or_else(|| corrupt("linear.weight is missing, or is no matrix".into()))?;
    let bias = found.remove("linear.bias");
    if bias.as_ref().is_some_and(|bias| bias.dims != weight.dims[..1]) {
        return Err(corrupt("linear.bias does not fit linear.weight".into()));
    }
    let activation = config["activation_function"].as_str();
    let activation = activation.unwrap_or("torch.nn.modules.activation.Tanh").to_owned();
    hasher.update(activation.as_bytes());
    Ok(Step::Dense { weight, bias, activation })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_longest_text_is_in_a_file_of_many_names() {
        for name in SENTENCE_CONFIGS {
            let folder = folder(&[(name, r#"{"max_seq_length": 77}"#)]);
            assert_eq!(read(folder.path()).unwrap().max_tokens, Some(77), "{name}");
        }
        let both = folder(&[
            ("sentence_roberta_config.json", r#"{"max_seq_length": 77}"#),
            ("sentence_bert_config.json", r#"{"max_seq_length": 55}"#),
        ]);
        assert_eq!(read(both.path()).unwrap().max_tokens, Some(55));
        assert_eq!(read(folder(&[]).path()).unwrap().max_tokens, None);
    }

    #[test]
    fn lower_case_is_the_tokenizers_or_refused() {
        let bert = r#"{"type": "BertNormalizer", "lowercase": true}"#;
        let listed =
            format!(r#"{{"type": "Sequence", "normalizers": [{{"type": "NFC"}}, {bert}]}}"#);
        for (normalizer, taken) in [
            (bert, true),
            (listed.as_str(), true),
            (r#"{"type": "Lowercase"}"#, true),
            (r#"{"type": "BertNormalizer", "lowercase": false}"#, false),
            ("null", false),
        ] {
            let tokenizer = format!(r#"{{"normalizer": {normalizer}}}"#);
            let of = |lower: &str| {
                let settings = format!(r#"{{"do_lower_case": {lower}}}"#);
                let folder = folder(&[
                    ("sentence_bert_config.json", settings.as_str()),
                    ("tokenizer.json", tokenizer.as_str()),
                ]);
                read(folder.path()).map(drop).map_err(|error| error.to_string())
            };
            assert_eq!(of("false"), Ok(()), "{normalizer}");
            match of("true") {
                Ok(()) => assert!(taken, "{normalizer}"),
                Err(said) => {
                    assert!(!taken && said.contains("_config.json: `do_lower_case`"), "{said}");
                }
            }
        }
    }

    #[test]
    fn the_digest_tells_steps_from_other_ones() {
        let digest = |listed: &str, weight: f32, activation: &str| {
            let folder = folder(&[("modules.json", listed)]);
            let dense = folder.path().join("2_Dense");
            std::fs::create_dir(&dense).unwrap();
            let config = format!(r#"{{"activation_function": "{activation}"}}"#);
            std::fs::write(dense.join("config.json"), config).unwrap();
            let header = r#"{"linear.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}"#
                .as_bytes();
            let len = (header.len() as u64).to_le_bytes();
            let bytes = [&len[..], header, &weight.to_le_bytes()].concat();
            std::fs::write(dense.join("model.safetensors"), bytes).unwrap();
            read(folder.path()).unwrap().hasher.finalize()
        };
        let one = r#"[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"#;
        let two = r#"[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
        let same = digest(one, 1.0, "Tanh");
        assert_eq!(same, digest(one, 1.0, "Tanh"));
        assert_ne!(same, digest(one, 2.0, "Tanh"));
        assert_ne!(same, digest(one, 1.0, "ReLU"));
        assert_ne!(same, digest(two, 1.0, "Tanh"));
        assert_ne!(same, digest("[]", 1.0, "Tanh"));
    }
}
