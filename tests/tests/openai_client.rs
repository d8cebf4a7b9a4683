//! The official `openai` Python client against a cluster.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use baton_tests::Cluster;
use baton_tests::binaries::{MODEL_NAME, build_dir};

/// The client's release that this test was written against.
const OPENAI: &str = "openai==3.54.0";

/// A Python with the client: `BATON_TEST_PYTHON`, or an environment of our own in the build's
/// folder, made on first use.
fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("BATON_TEST_PYTHON") {
        return python.into();
    }
    let folder = build_dir().with_file_name("test-venv");
    fs::create_dir_all(&folder).expect("create the environment's folder");
    // Another test run may be making it at this moment.
    let lock = File::create(folder.join("lock")).expect("create a lock");
    lock.lock().expect("take the lock");
    let python = folder.join("bin/python");
    let made = folder.join("made");
    if fs::read_to_string(&made).is_ok_and(|of| of == OPENAI) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", OPENAI]));
    fs::write(made, OPENAI).expect("remember what was made");
    python
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (output.stdout, output.stderr);
    let (out, err) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

#[tokio::test]
async fn the_official_client_drives_chat_completions_streaming_models_and_errors() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16);
    let cluster = builder.api_key("client-key").start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("openai_client/drive.py");
    let url = format!("{}/v1", cluster.api.base());
    let drive = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(python());
        // Nothing of the machine's settings may steer the client elsewhere.
        for variable in
            ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
        {
            command.env_remove(variable);
        }
        run(command.arg(script).args([&url, "client-key", MODEL_NAME]))
    });
    println!("{}", drive.await.expect("the client is content"));
    cluster.finish().await;
}
