//! Adapters of seeded random weights for the default model: large enough to change its answers.

use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Map, Value, json};

/// Rank of the adapters.
const RANK: usize = 8;
/// Layers of the default model, and inputs and outputs of each module.
const LAYERS: usize = 30;
const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 576, 576),
    ("self_attn.k_proj", 576, 192),
    ("self_attn.v_proj", 576, 192),
    ("self_attn.o_proj", 576, 576),
    ("mlp.gate_proj", 576, 1536),
    ("mlp.up_proj", 576, 1536),
    ("mlp.down_proj", 1536, 576),
];

/// Writes an adapter as PEFT does, into a new folder under `dir`; returns the folder.
pub fn write(dir: &Path, name: &str, seed: u64) -> PathBuf {
    let folder = dir.join(name);
    fs::create_dir_all(&folder).expect("a folder for the adapter");
    let config = json!({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": MODULES.map(|(name, ..)| name.rsplit('.').next()),
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).expect("write the config");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut header, mut data) = (Map::new(), Vec::new());
    for layer in 0..LAYERS {
        for (module, inputs, outputs) in MODULES {
            for (which, shape) in [("A", [RANK, inputs]), ("B", [outputs, RANK])] {
                let start = data.len();
                for _ in 0..shape[0] * shape[1] {
                    data.extend(random.random_range(-0.1f32..0.1).to_le_bytes());
                }
                header.insert(
                    format!("base_model.model.model.layers.{layer}.{module}.lora_{which}.weight"),
                    json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
                );
            }
        }
    }
    let header = Value::Object(header).to_string();
    let len = (header.len() as u64).to_le_bytes();
    let file = [&len[..], header.as_bytes(), &data].concat();
    fs::write(folder.join("adapter_model.safetensors"), file).expect("write the weights");
    folder
}

/// The value of `--lora-modules` that names these adapters.
pub fn modules(adapters: &[(&str, &Path)]) -> String {
    let each = adapters.iter().map(|(name, path)| json!({"name": name, "path": path}));
    Value::Array(each.collect()).to_string()
}
