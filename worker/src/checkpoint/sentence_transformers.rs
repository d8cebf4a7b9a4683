//! What sentence-transformers keeps beside a model: what to do with its hidden states.
//!
//! `modules.json` lists the steps, each with a folder of its own (Reimers and Gurevych 2019).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::hugging_face::{json, tensors};
use super::{LoadError, TensorBytes};
use crate::pooling::Pooling;

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
            "Dense" => modules.steps.push(dense(folder, &at)?),
            "Normalize" => modules.steps.push(Step::Normalize),
            other => return Err(unsupported(format!("modules.json: `{other}` is not supported"))),
        }
    }
    let sentence = json(&transformer, "sentence_bert_config.json")?.unwrap_or_default();
    modules.max_tokens = sentence["max_seq_length"].as_u64().map(|tokens| tokens as usize);
    Ok(modules)
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

fn dense(folder: &Path, at: &Path) -> Result<Step, LoadError> {
    let corrupt = |reason: String| LoadError::Corrupt { path: at.to_owned(), reason };
    let config = json(at, "config.json")?.unwrap_or_default();
    if config["use_residual"].as_bool() == Some(true) {
        let reason = "a Dense module with `use_residual` is not supported".to_owned();
        return Err(LoadError::Unsupported { path: folder.to_owned(), reason });
    }
    let mut found = tensors(at, &mut blake3::Hasher::new())?;
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
    Ok(Step::Dense { weight, bias, activation })
}
