//! The file of settings: what programs take from it, what they refuse, and what `baton config` says
//! of it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use baton_tests::binaries::{model, program, repository};
use baton_tests::etcd::Etcd;
use baton_tests::process::{Process, Spec};
use baton_tests::{Api, MODEL_NAME, eventually, python};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The validator that these tests were written against.
const VALIDATOR: &str = "jsonschema==4.26.0";

/// Files, and the programs that read them.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("baton-config-").tempdir().expect("a folder") }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("write a file");
        path
    }

    fn start(&self, name: &str, args: &[&str], env: &[(&str, &str)]) -> Process {
        let mut spec = Spec::new(name, program(name), args);
        spec.env = env.iter().map(|(name, value)| (name.into(), OsString::from(value))).collect();
        Process::start(&spec, self.dir.path())
    }

    /// Runs a program to its end: its exit code, stdout and stderr.
    async fn run(&self, name: &str, args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
        let mut process = self.start(name, args, env);
        let status = process.end(Duration::from_secs(10)).await;
        (status.code().expect("an exit code"), process.stdout(), process.stderr())
    }

    /// What `baton config` prints.
    async fn config(&self, args: &[&str], env: &[(&str, &str)]) -> String {
        let (code, stdout, stderr) = self.run("baton", &[&["config"], args].concat(), env).await;
        assert_eq!((code, &*stderr), (0, ""), "baton config {args:?}");
        stdout
    }
}

/// As `baton config | head` has it.
#[test]
fn a_reader_that_leaves_ends_the_command_without_a_word() {
    let mut command = Command::new(program("baton"));
    command.args(["config", "--schema"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut baton = command.spawn().expect("start baton");
    drop(baton.stdout.take());
    let output = baton.wait_with_output().expect("its end");
    assert_eq!(output.status.signal(), Some(Signal::SIGPIPE as i32), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

async fn settings(address: &str, key: Option<&str>) -> Value {
    let api = Api::new(address, key);
    api.get("/server_info?config_format=json").await.ok()["vllm_config"].clone()
}

#[tokio::test]
async fn a_cluster_of_one_file_serves_and_variables_and_flags_win_over_it() {
    let bench = Bench::new();
    let etcd = Etcd::start(bench.dir.path()).await;
    let file = bench.file(
        "baton.toml",
        &format!(
            "etcd = ['{}']\nlease-ttl = 7\n\
             [gateway]\nlisten = '127.0.0.1:0'\nmax-logprobs = -1\nhandoff-min-tokens = 7\n\
             enable-prompt-tokens-details = true\nallowed-methods = ['GET', 'POST']\n\
             api-key = ['file-key']\n\
             [worker]\nrole = 'unified'\nmodel = '{}'\nserved-model-name = ['{MODEL_NAME}', 'b']\n\
             threads = 2\nkv-memory = '64MiB'\nlease-ttl = 8\n\
             [coordinator]\nlisten = '127.0.0.1:0'\n",
            etcd.url(),
            text(&model()),
        ),
    );
    let config = ["--config", text(&file)];
    let by_variable = [("BATON_CONFIG", text(&file))];
    let mut worker = bench.start("baton-worker", &config, &[]);
    let mut coordinator = bench.start("baton-coordinator", &[], &by_variable);
    let mut gateway = bench.start("baton-gateway", &config, &[]);
    worker.ready().await;
    coordinator.ready().await;
    let address = gateway.ready().await;
    assert!(gateway.stderr().contains("chmod o-r"), "it holds a key: {}", gateway.stderr());

    let api = Api::new(&address, Some("file-key"));
    let body = json!({"model": "b", "prompt": "One two three", "max_tokens": 2});
    eventually("the gateway finds the worker", Duration::from_secs(30), async || {
        let reply = api.get("/health").await;
        if reply.status == 200 { Ok(()) } else { Err(reply.text) }
    })
    .await;
    let reply = api.ok("/v1/completions", &body).await;
    assert_eq!(reply["usage"]["completion_tokens"], 2, "{reply}");
    api.with_key(None).get("/v1/models").await.error(401).expect("the file's key is wanted");
    let found = settings(&address, Some("file-key")).await;
    assert_eq!(found["config"], text(&file));
    for (name, value) in [
        ("lease_ttl", json!(7)),
        ("max_logprobs", json!(-1)),
        ("handoff_min_tokens", json!(7)),
        ("enable_prompt_tokens_details", json!(true)),
        ("allowed_methods", json!(["GET", "POST"])),
        ("request_timeout", json!(600)),
        ("api_keys", json!(1)),
    ] {
        assert_eq!(found[name], value, "{name}");
    }
    gateway.stop().await;

    let env = [
        ("BATON_LEASE_TTL", "9"),
        ("BATON_HANDOFF_MIN_TOKENS", "9"),
        ("BATON_ENABLE_PROMPT_TOKENS_DETAILS", "false"),
        ("BATON_API_KEY", "other-key"),
    ];
    let flags = [&config[..], &["--handoff-min-tokens", "11"]].concat();
    let mut gateway = bench.start("baton-gateway", &flags, &env);
    let found = settings(&gateway.ready().await, Some("other-key")).await;
    for (name, value) in [
        ("lease_ttl", json!(9)),
        ("handoff_min_tokens", json!(11)),
        ("enable_prompt_tokens_details", json!(false)),
        ("max_logprobs", json!(-1)),
    ] {
        assert_eq!(found[name], value, "{name}");
    }
    for process in [&mut gateway, &mut worker, &mut coordinator] {
        process.stop().await;
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_file_ends_every_program_with_code_2_and_a_way_out() {
    let bench = Bench::new();
    // Each is refused by all: a mistake in another program's table is one too.
    let typo = "\n[worker]\nmodel = 'x'\nmax-batch-tokns = 512\n";
    for (toml, parts) in [
        (
            typo,
            &["unknown key `max-batch-tokns` in [worker]", "baton.toml:4", "`max-batch-tokens`?"][..],
        ),
        ("[gatway]\n", &["unknown table `gatway`", "baton.toml:1", "`gateway`?"]),
        ("max-inflight = 5\n", &["unknown key `max-inflight`", "it belongs in [gateway]"]),
        ("lease-ttl = 'soon'\n", &["`lease-ttl`", "baton.toml:1", "an integer", "a string"]),
        ("lease-ttl = 0\n", &["`lease-ttl`", "baton.toml:1", "1..=3600"]),
        ("log-format = 'xml'\n", &["`log-format`", "baton.toml:1", "text, json"]),
        ("etcd = [\n", &["baton.toml:"]),
    ] {
        let file = bench.file("baton.toml", toml);
        let config = ["--config", text(&file)];
        let check = [&["config", "--check"], &config[..]].concat();
        for (name, args) in [
            ("baton-gateway", &config[..]),
            ("baton-worker", &config),
            ("baton-coordinator", &config),
            ("baton", &check),
            ("baton", &[&["up"], &config[..]].concat()),
        ] {
            // `baton up` has no such settings of its own: what it starts says what is wrong.
            if args[0] == "up" && toml.starts_with("l") {
                continue;
            }
            let (code, stdout, stderr) = bench.run(name, args, &[]).await;
            assert_eq!((code, &*stdout), (2, ""), "{name} {toml:?}: {stderr}");
            let lines: Vec<&str> = stderr.lines().collect();
            let [error] = lines[..] else { panic!("{name} {toml:?}: {stderr}") };
            assert!(error.starts_with("error: "), "{error}");
            for part in parts {
                assert!(error.contains(part), "{name}: {part:?} is not in {error:?}");
            }
        }
    }
    let missing = ["--config", "/no/such/baton.toml"];
    let (code, _, stderr) = bench.run("baton-gateway", &missing, &[]).await;
    assert_eq!(code, 2);
    assert!(stderr.starts_with("error: --config /no/such/baton.toml cannot be read"), "{stderr}");
    // Clap's own rules hold for flags and file together.
    let half = bench.file("half.toml", "[gateway]\nssl-keyfile = 'tls.key'\n");
    let (code, _, stderr) = bench.run("baton-gateway", &["--config", text(&half)], &[]).await;
    assert_eq!(code, 2);
    assert!(stderr.contains("--ssl-certfile"), "{stderr}");
}

#[tokio::test]
async fn settings_in_force_are_shown_as_a_file_that_gives_the_same_again() {
    let bench = Bench::new();
    let file = bench.file(
        "baton.toml",
        "etcd = ['http://user:hush-1@etcd:2379', 'http://b:2379']\nlease-ttl = 7\n\
         [gateway]\nguard-all = true\nallowed-origins = ['https://a.example', \"https://b.example\"]\n\
         [worker]\nmodel = 'a \"model\"\\with' # a comment\nlease-ttl = 8\nkv-memory = '2GiB'\n\
         [coordinator]\nplanner-attainment = 99\nplanner-pool = ['decode=1..4', 'prefill=1..2']\n\
         [up]\nembedder = true\napi-key = ['hush-2']\n",
    );
    let env = [
        ("BATON_API_KEY", "hush-3,hush-4"),
        ("BATON_ETCD", "http://c:2379,http://user:hush-5@d:2379"),
        ("BATON_RESPONSES_STORE", "postgres://user:hush-6@db/x?password=hush-7"),
        ("BATON_GUARD_ALL", "false"),
    ];
    let shown = bench.config(&["--config", text(&file)], &env).await;
    println!("{shown}");
    assert!(!shown.contains("hush"));
    for line in [
        "etcd = [\"http://c:2379\", \"http://***@d:2379\"]  # BATON_ETCD",
        "lease-ttl = 7  # file",
        "lease-ttl = 8  # file",
        "guard-all = false  # BATON_GUARD_ALL",
        "api-key = [\"…\", \"…\"]  # BATON_API_KEY",
        "responses-store = \"postgres://***@db/x?***\"  # BATON_RESPONSES_STORE",
        "# max-inflight = 1024  # default",
        "kv-memory = \"2GiB\"  # file",
        "# role is not set",
        "planner-attainment = 99.0  # file",
        "planner-pool = [\"decode=1..4\", \"prefill=1..2\"]  # file",
        "embedder = true  # file",
        "# cluster = \"default\"  # default",
    ] {
        let times = shown.lines().filter(|shown| *shown == line).count();
        let expected = if line.starts_with("lease-ttl = 7") { 2 } else { 1 };
        assert_eq!(times, expected, "{line}");
    }
    // What is hidden is not there to be used again.
    let again = bench.file("again.toml", &shown);
    let args = ["config", "--config", text(&again)];
    let (code, _, stderr) = bench.run("baton", &args, &env).await;
    assert_eq!(code, 2);
    assert!(stderr.contains("`api-key` in [up]") && stderr.contains("no secrets"), "{stderr}");
    let again = bench.file("again.toml", &shown.replace("api-key = [\"…\"]  #", "# api-key"));
    let without = bench.file(
        "without.toml",
        &fs::read_to_string(&file).expect("read").replace("api-key = ['hush-2']", ""),
    );
    let expected = bench.config(&["--config", text(&without)], &env).await;
    assert_eq!(bench.config(&["--config", text(&again)], &env).await, expected);
    let by_variable = [&env[..], &[("BATON_CONFIG", text(&again))]].concat();
    assert_eq!(bench.config(&["--check"], &by_variable).await, "");

    for (name, other) in
        [("gateway", "worker"), ("worker", "up"), ("coordinator", "gateway"), ("up", "worker")]
    {
        let shown = bench.config(&[name, "--config", text(&without)], &[]).await;
        assert!(shown.contains(&format!("\n[{name}]\n")), "{shown}");
        assert!(!shown.contains(&format!("[{other}]")), "{shown}");
    }
    let (code, _, stderr) =
        bench.run("baton", &["config", "--check"], &[("BATON_MAX_INFLIGHT", "0")]).await;
    assert_eq!(code, 2);
    assert!(stderr.contains("--max-inflight"), "{stderr}");
}

#[tokio::test]
async fn the_schema_is_that_of_the_programs_and_the_example_keeps_to_it() {
    let bench = Bench::new();
    let deploy = repository().join("deploy");
    let kept = deploy.join("baton.schema.json");
    let printed = bench.config(&["--schema"], &[("BATON_CONFIG", "/no/such/file")]).await;
    assert!(
        fs::read_to_string(&kept).expect("the schema") == printed,
        "settings have changed: target/release/baton config --schema >deploy/baton.schema.json"
    );
    let example = deploy.join("baton.example.toml");
    bench.config(&["--check", "--config", text(&example)], &[]).await;
    let shown = bench.config(&["--config", text(&example)], &[]).await;
    let defaults = bench.config(&[], &[]).await;
    // What a comment says is the default is a value that programs and schema take.
    let lines = defaults.lines().filter(|line| !line.ends_with(" is not set"));
    let defaults = lines.map(|line| line.trim_start_matches("# ")).collect::<Vec<_>>().join("\n");
    let good = [bench.file("shown.toml", &shown), bench.file("defaults.toml", &defaults)];
    bench.config(&["--check", "--config", text(&good[1])], &[]).await;
    let bad = [
        ("typo", "[worker]\nmax-batch-tokns = 512\n"),
        ("table", "[gatway]\n"),
        ("type", "lease-ttl = 'soon'\n"),
        ("type-in-table", "[worker]\nlease-ttl = 'soon'\n"),
        ("choice", "log-format = 'xml'\n"),
        ("items", "[worker]\ntransports = [1]\n"),
        ("negative", "[gateway]\nmax-inflight = -1\n"),
    ]
    .map(|(name, toml)| bench.file(&format!("{name}.toml"), toml));
    let all = [&[kept, example][..], &good, &["--".into()], &bad].concat();
    let arguments: Vec<&str> = all.iter().map(|path| text(path)).collect();
    println!("{}", python::drive(VALIDATOR, "config/validate.py", &arguments).await);
}
