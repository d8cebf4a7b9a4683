//! Python clients: an environment with pinned packages, and scripts that must be content.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binaries::build_dir;

/// Runs a script of this package's folder with `package`, such as `openai==3.54.0`, at hand.
/// Returns what it prints.
///
/// # Panics
/// When it fails, with what it printed.
pub async fn drive(package: &'static str, script: &str, arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let drive = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(python(package));
        // Nothing of the machine's settings may steer the client elsewhere.
        for variable in
            ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
        {
            command.env_remove(variable);
        }
        run(command.arg(script).args(arguments))
    });
    drive.await.expect("the client is content")
}

/// A Python with the package: `BATON_TEST_PYTHON`, or an environment of our own in the build's
/// folder, made on first use.
fn python(package: &str) -> PathBuf {
    if let Some(python) = std::env::var_os("BATON_TEST_PYTHON") {
        return python.into();
    }
    let name = package.split_once("==").expect("a pinned package").0;
    let folder = build_dir().with_file_name(format!("test-venv-{name}"));
    fs::create_dir_all(&folder).expect("create the environment's folder");
    // Another test run may be making it at this moment.
    let lock = File::create(folder.join("lock")).expect("create a lock");
    lock.lock().expect("take the lock");
    let python = folder.join("bin/python");
    let made = folder.join("made");
    if fs::read_to_string(&made).is_ok_and(|of| of == package) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", package]));
    fs::write(made, package).expect("remember what was made");
    python
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (output.stdout, output.stderr);
    let (out, err) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}
