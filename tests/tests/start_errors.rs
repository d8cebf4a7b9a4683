//! What a daemon says, and with which exit code, when it cannot start.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use baton_tests::binaries::{model, program, repository};
use baton_tests::etcd::Etcd;
use baton_tests::process::{Process, Spec};
use baton_tests::{leftovers, ports};
use tempfile::TempDir;

const DAEMONS: [&str; 3] = ["baton-worker", "baton-gateway", "baton-coordinator"];

/// Runs a daemon that must fail: with this exit code, nothing on stdout, and one line on stderr
/// (besides its log) that starts with `error: ` and names each of `names`.
async fn fails(dir: &TempDir, name: &str, args: &[OsString], code: i32, names: &[&str]) {
    fails_within(dir, name, args, code, names, Duration::from_secs(5)).await;
}

async fn fails_within(
    dir: &TempDir,
    name: &str,
    args: &[OsString],
    code: i32,
    names: &[&str],
    within: Duration,
) {
    let spec = Spec::new(name, program(name), args.iter().cloned());
    let mut process = Process::start(&spec, dir.path());
    let status = process.end(within).await;
    let stderr = process.stderr();
    assert_eq!(status.code(), Some(code), "{name} {args:?}: {status}\n{stderr}");
    assert_eq!(process.stdout(), "", "{name} {args:?}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("{name} {args:?}: no single error line:\n{stderr}") };
    for part in names {
        // clap puts the flag or the way out on the lines after the error.
        let text = if code == 2 { stderr.as_str() } else { error };
        assert!(text.contains(part), "{name} {args:?}: {part:?} is not in {text:?}");
    }
    assert!(!stderr.contains("panicked"), "{name} {args:?}:\n{stderr}");
    leftovers::assert_none(dir.path());
}

fn args<const N: usize>(args: [&str; N]) -> Vec<OsString> {
    args.map(Into::into).into()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The arguments of a daemon that would start, given an etcd and a model.
fn sound(name: &str, etcd: &str, listen: &str, model: &Path) -> Vec<OsString> {
    let mut all = args(["--etcd", etcd, "--listen", listen]);
    if name == "baton-worker" {
        all.extend(args(["--role", "unified", "--model", path(model)]));
        all.extend(args(["--threads", "2", "--kv-memory", "64MiB"]));
    }
    all
}

async fn model_error(model: &Path, code: i32) {
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = Etcd::start(dir.path()).await;
    let worker = sound("baton-worker", etcd.url(), "127.0.0.1:0", model);
    let spec = Spec::new("baton-worker", program("baton-worker"), worker.clone());
    let mut process = Process::start(&spec, dir.path());
    let status = process.end(Duration::from_secs(5)).await;
    let stderr = process.stderr();
    assert_eq!(status.code(), Some(code), "{}: {stderr}", model.display());
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("no single error line:\n{stderr}") };
    assert!(error.contains(path(model)), "the file is not named: {error}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(process.stdout(), "");
    assert!(etcd.instances().is_empty(), "a worker that cannot serve has registered");
}

#[tokio::test]
async fn a_missing_model_file_is_exit_code_66() {
    model_error(Path::new("/no/such/folder/model.gguf"), 66).await;
}

#[tokio::test]
async fn a_folder_without_a_model_is_exit_code_65() {
    let folder = tempfile::tempdir().expect("a folder");
    model_error(folder.path(), 65).await;
}

/// A GGUF cut off inside its header, its metadata, its tensor list and its data; and broken ones.
#[tokio::test]
async fn a_truncated_or_corrupt_model_file_is_exit_code_65() {
    let good = fs::read(model()).expect("read the model");
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("broken.gguf");
    for keep in [0, 3, 7, 20, 1000, 500_000, good.len() / 2, good.len() - 1] {
        fs::write(&file, &good[..keep]).expect("write a truncated model");
        model_error(&file, 65).await;
    }
    let mut corruptions: Vec<(&str, Vec<u8>)> = Vec::new();
    corruptions.push(("not a GGUF", b"#!/bin/sh\necho hello\n".repeat(1000)));
    corruptions.push(("another magic", [b"GGML".as_slice(), &good[4..]].concat()));
    let version = 99u32.to_le_bytes();
    corruptions.push(("a version of the future", [b"GGUF", &version, &good[8..]].concat()));
    let huge = u64::MAX.to_le_bytes();
    corruptions.push(("endless tensors", [&good[..8], &huge, &good[16..]].concat()));
    corruptions.push(("endless metadata", [&good[..16], &huge, &good[24..]].concat()));
    corruptions.push(("a key of endless length", [&good[..24], &huge, &good[32..]].concat()));
    let mut zeros = good.clone();
    zeros[24..4096].fill(0);
    corruptions.push(("zeroed metadata", zeros));
    for (what, bytes) in corruptions {
        eprintln!("{what}");
        fs::write(&file, bytes).expect("write a corrupt model");
        model_error(&file, 65).await;
    }
}

#[tokio::test]
async fn a_port_in_use_is_exit_code_98() {
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = Etcd::start(dir.path()).await;
    let taken = TcpListener::bind("127.0.0.1:0").expect("take a port");
    let address = taken.local_addr().expect("its address").to_string();
    for name in DAEMONS {
        let spec_args = sound(name, etcd.url(), &address, &model());
        let spec = Spec::new(name, program(name), spec_args);
        let mut process = Process::start(&spec, dir.path());
        let status = process.end(Duration::from_secs(5)).await;
        let stderr = process.stderr();
        assert_eq!(status.code(), Some(98), "{name}: {stderr}");
        let error = stderr.lines().find(|line| line.starts_with("error: ")).expect("an error line");
        assert!(error.contains(&address) && error.contains("--listen"), "{name}: {error}");
    }
    assert!(etcd.instances().is_empty(), "a daemon that cannot serve has registered");
}

#[tokio::test]
async fn an_etcd_that_does_not_answer_is_exit_code_69() {
    let dir = tempfile::tempdir().expect("a folder");
    let nobody = format!("http://127.0.0.1:{}", ports::free());
    for name in DAEMONS {
        let mut all = sound(name, &nobody, "127.0.0.1:0", &model());
        all.extend(args(["--etcd-timeout", "2"]));
        let start = Instant::now();
        fails_within(&dir, name, &all, 69, &[&nobody, "--etcd"], Duration::from_secs(8)).await;
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(1500), "{name} gave up after {took:?}");
    }
}

/// A listener that accepts and says nothing: worse than a refused connection.
#[tokio::test]
async fn an_etcd_that_accepts_but_says_nothing_is_exit_code_69() {
    let dir = tempfile::tempdir().expect("a folder");
    let silent = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let url = format!("http://{}", silent.local_addr().expect("its address"));
    for name in DAEMONS {
        let mut all = sound(name, &url, "127.0.0.1:0", &model());
        all.extend(args(["--etcd-timeout", "2"]));
        fails_within(&dir, name, &all, 69, &[&url], Duration::from_secs(8)).await;
    }
}

#[tokio::test]
async fn who_waits_for_etcd_stops_when_it_is_told_to() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in DAEMONS {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let url = format!("http://{}", silent.local_addr().expect("its address"));
        let mut all = sound(name, &url, "127.0.0.1:0", &model());
        all.extend(args(["--etcd-timeout", "60"]));
        let spec = Spec::new(name, program(name), all);
        let mut process = Process::start(&spec, dir.path());
        let asked = tokio::time::timeout(Duration::from_secs(20), silent.accept()).await;
        let _connection = asked.expect("it asks etcd").expect("a connection");
        process.stop().await;
        assert!(!process.stderr().contains("error: "), "{name}: {}", process.stderr());
    }
}

#[tokio::test]
async fn an_etcd_that_comes_up_late_is_waited_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut etcd = Etcd::start(dir.path()).await;
    etcd.kill();
    let mut all = sound("baton-coordinator", etcd.url(), "127.0.0.1:0", &model());
    all.extend(args(["--etcd-timeout", "30"]));
    let spec = Spec::new("baton-coordinator", program("baton-coordinator"), all);
    let mut coordinator = Process::start(&spec, dir.path());
    // Whichever comes first, the coordinator must not give up: etcd takes its time to start.
    etcd.restart().await;
    coordinator.ready().await;
    coordinator.stop().await;
}

#[tokio::test]
async fn a_bad_flag_is_exit_code_2_and_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = model();
    let model = path(&model);
    for name in DAEMONS {
        fails(&dir, name, &args(["--no-such-flag"]), 2, &["--no-such-flag"]).await;
        fails(&dir, name, &args(["--listen", "nonsense"]), 2, &["--listen"]).await;
        fails(&dir, name, &args(["--lease-ttl", "0"]), 2, &["--lease-ttl"]).await;
        fails(&dir, name, &args(["--lease-ttl", "soon"]), 2, &["--lease-ttl"]).await;
        fails(&dir, name, &args(["--log-format", "xml"]), 2, &["--log-format", "json"]).await;
    }
    let worker = [
        ["--role", "captain"],
        ["--kv-memory", "lots"],
        ["--kv-memory", "0"],
        ["--block-size", "0"],
        ["--max-batch-tokens", "0"],
        ["--max-running", "0"],
        ["--threads", "0"],
        ["--transports", "pigeon"],
    ];
    for [flag, value] in worker {
        let mut all = args(["--model", model]);
        if flag != "--role" {
            all.extend(args(["--role", "unified"]));
        }
        all.extend(args([flag, value]));
        fails(&dir, "baton-worker", &all, 2, &[flag]).await;
    }
    fails(&dir, "baton-worker", &args(["--model", model]), 2, &["--role"]).await;
    fails(&dir, "baton-worker", &args(["--role", "unified"]), 2, &["--model"]).await;
    let missing = args(["--api-key-file", "/no/such/file"]);
    fails(&dir, "baton-gateway", &missing, 2, &["--api-key-file", "/no/such/file"]).await;
    let empty = dir.path().join("no-keys");
    fs::write(&empty, "# none yet\n").expect("write");
    let empty = args(["--api-key-file", path(&empty)]);
    fails(&dir, "baton-gateway", &empty, 2, &["--api-key-file", "no key"]).await;
    fails(&dir, "baton-gateway", &args(["--max-inflight", "0"]), 2, &["--max-inflight"]).await;
    fails(&dir, "baton-gateway", &args(["--request-timeout", "0"]), 2, &["--request-timeout"])
        .await;
}

/// Gateways are not called by others, and need no address for them.
#[tokio::test]
async fn an_address_that_others_could_not_call_is_exit_code_2() {
    let dir = tempfile::tempdir().expect("a folder");
    let nobody = format!("http://127.0.0.1:{}", ports::free());
    for name in ["baton-worker", "baton-coordinator"] {
        let any = sound(name, &nobody, "0.0.0.0:0", &model());
        fails(&dir, name, &any, 2, &["--listen 0.0.0.0:", "--advertise http://HOST:"]).await;
        for url in ["10.0.0.5:7000", "http://fd00::1:7000", "tcp://10.0.0.5:7000", "http://:7000"] {
            let mut all = sound(name, &nobody, "127.0.0.1:0", &model());
            all.extend(args(["--advertise", url]));
            fails(&dir, name, &all, 2, &["--advertise", url, "http://HOST:", "brackets"]).await;
        }
    }
}

#[tokio::test]
async fn keys_and_certificates_that_cannot_be_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("write");
        path
    };
    let (empty, text) = (file("empty", "# none\n"), file("text", "no certificate\n"));
    let (empty, text) = (path(&empty), path(&text));
    let cases: [(&[&str], &[&str]); 12] = [
        (&["--admin-key-file", "/no/such/file"], &["--admin-key-file", "/no/such/file"]),
        (&["--admin-key-file", empty], &["--admin-key-file", "no key"]),
        (&["--guard-all"], &["--guard-all", "--api-key"]),
        (&["--ssl-certfile", "/no/such/file"], &["--ssl-certfile", "/no/such/file"]),
        (&["--ssl-certfile", text], &["--ssl-certfile", text]),
        (&["--ssl-keyfile", text], &["--ssl-certfile"]),
        (&["--ssl-cert-reqs", "2"], &["--ssl-cert-reqs", "--ssl-ca-certs"]),
        (&["--ssl-cert-reqs", "3"], &["--ssl-cert-reqs"]),
        (&["--allowed-origins", "page.example"], &["--allowed-origins", "page.example"]),
        (&["--allowed-methods", "[1]"], &["--allowed-methods"]),
        (&["--head-timeout", "0"], &["--head-timeout"]),
        (&["--key-requests-per-minute=-1"], &["--key-requests-per-minute"]),
    ];
    for (flags, names) in cases {
        let flags: Vec<OsString> = flags.iter().map(Into::into).collect();
        fails(&dir, "baton-gateway", &flags, 2, names).await;
    }
}

/// A role and a model that do not go together are told before anything serves.
#[tokio::test]
async fn models_that_cannot_do_what_the_role_asks_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    // Not in the folder in which nothing may be left.
    let etcd_dir = tempfile::tempdir().expect("a folder");
    let etcd = Etcd::start(etcd_dir.path()).await;
    let reference = repository().join("tests/reference");
    let (speech, text) = (reference.join("whisper/small-ct2"), reference.join("small/mistral"));
    let start = |role: &str, model: &Path| {
        let worker = ["--etcd", etcd.url(), "--listen", "127.0.0.1:0", "--threads", "1"];
        let model = ["--role", role, "--model", path(model)];
        worker.iter().chain(&model).map(Into::into).collect::<Vec<OsString>>()
    };
    let within = Duration::from_secs(20);
    let audio = start("audio", &text);
    fails_within(&dir, "baton-worker", &audio, 2, &["--role audio", "none for speech"], within)
        .await;
    let pooling = start("pooling", &speech);
    fails_within(&dir, "baton-worker", &pooling, 2, &["--role pooling", "for speech"], within)
        .await;
    let mut adapted = start("audio", &speech);
    adapted.extend(args(["--lora-modules", "a=/no/such/folder"]));
    fails_within(&dir, "baton-worker", &adapted, 2, &["--lora-modules", "speech"], within).await;
}

#[tokio::test]
async fn every_program_explains_itself() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in DAEMONS.into_iter().chain(["baton"]) {
        for flag in ["--help", "--version"] {
            let spec = Spec::new(name, program(name), [flag]);
            let mut process = Process::start(&spec, dir.path());
            let status = process.end(Duration::from_secs(5)).await;
            assert!(status.success(), "{name} {flag}: {status}");
            assert!(process.stdout().contains("baton"), "{name} {flag}: {}", process.stdout());
        }
    }
}
