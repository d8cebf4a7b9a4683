//! The operator's command: `baton up`, `baton status`, `baton down`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use baton_tests::authority::Authority;
use baton_tests::binaries::{model_dir, program};
use baton_tests::process::{Process, STOP_WITHIN, Spec};
use baton_tests::{eventually, leftovers, ports};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// How long `baton up` may take when model and build are there: "starts in seconds".
const UP_WITHIN: Duration = Duration::from_secs(15);

/// A home of its own for an operator, so that tests meet neither each other nor the machine's own
/// cluster.
struct Operator {
    home: TempDir,
    port: String,
}

impl Operator {
    fn new() -> Self {
        let home = tempfile::Builder::new().prefix("baton-up-").tempdir().expect("a folder");
        Self { home, port: ports::free().to_string() }
    }

    fn dir(&self) -> &Path {
        self.home.path()
    }

    fn start(&self, args: &[&str]) -> Process {
        let name = args.first().copied().unwrap_or_default();
        let mut spec = Spec::new(format!("baton-{name}"), program("baton"), args);
        let home = self.dir().as_os_str();
        for variable in ["HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"] {
            spec.env.push((variable.into(), home.into()));
        }
        spec.env.push(("BATON_MODEL_DIR".into(), model_dir().into()));
        Process::start(&spec, self.dir())
    }

    /// Runs a command to its end: its exit code, stdout and stderr.
    async fn run(&self, args: &[&str]) -> (i32, String, String) {
        let mut process = self.start(args);
        let status = process.end(Duration::from_secs(30)).await;
        (status.code().expect("an exit code"), process.stdout(), process.stderr())
    }

    /// `baton up`, and what it printed when the cluster was ready, and how long that took.
    async fn up(&self, args: &[&str]) -> (Process, String, Duration) {
        let mut process = self.start(&[&["up", "--port", &self.port], args].concat());
        let (printed, took) = eventually("baton up prints a curl", UP_WITHIN, async || {
            if let Some(status) = process.exited() {
                panic!("baton up ended with {status}:\n{}\n{}", process.stdout(), process.stderr());
            }
            let out = process.stdout();
            let whole = curl(&out).is_some_and(|curl| curl.ends_with('\''));
            if whole { Ok(out) } else { Err(format!("{out}\n{}", process.stderr())) }
        })
        .await;
        (process, printed, took)
    }

    async fn nothing_left(&self) {
        eventually("no process is left", Duration::from_secs(5), async || {
            let processes = leftovers::processes(self.dir());
            if processes.is_empty() { Ok(()) } else { Err(format!("{processes:#?}")) }
        })
        .await;
        leftovers::assert_none(self.dir());
    }
}

/// The `curl` command in what `baton up` printed, over several lines when they end with `\`.
fn curl(printed: &str) -> Option<String> {
    let start = printed.find("curl ")?;
    let mut command = String::new();
    for line in printed[start..].lines() {
        command.push_str(line.trim_end_matches('\\'));
        if !line.ends_with('\\') {
            break;
        }
    }
    Some(command.trim_end().to_owned())
}

/// What a user gets who pastes the printed command.
fn paste(printed: &str) -> Value {
    let command = curl(printed).expect("a curl command");
    let output = Command::new("sh").args(["-c", &command]).output().expect("run curl");
    let reply = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&reply).unwrap_or_else(|e| panic!("{command}: {e}: {reply}"))
}

#[tokio::test]
async fn up_serves_until_ctrl_c_and_leaves_nothing() {
    let operator = Operator::new();
    let (mut up, printed, took) = operator.up(&[]).await;
    println!("baton up took {took:?}\n{printed}");
    for role in ["etcd", "coordinator", "gateway", "prefill", "decode"] {
        assert!(printed.contains(role), "{role} is not in the table:\n{printed}");
    }
    let reply = paste(&printed);
    let content = &reply["choices"][0]["message"]["content"];
    assert!(content.as_str().is_some_and(|content| !content.is_empty()), "{reply}");

    // Five processes and the command itself.
    let processes = leftovers::processes(operator.dir());
    for program in ["etcd", "baton-coordinator", "baton-gateway"] {
        let of = processes.iter().filter(|process| process.contains(program)).count();
        assert!(of >= 1, "{program} does not run: {processes:#?}");
    }
    let workers = processes.iter().filter(|process| process.contains("baton-worker")).count();
    assert_eq!(workers, 2, "{processes:#?}");

    let (code, status, stderr) = operator.run(&["status"]).await;
    assert_eq!(code, 0, "{stderr}");
    for role in ["coordinator", "gateway", "prefill", "decode"] {
        assert!(status.contains(role), "{role} is not in:\n{status}");
    }
    let (code, status, stderr) = operator.run(&["status", "--json"]).await;
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str::<Value>(&status).unwrap_or_else(|e| panic!("{e}: {status}"));

    // A second one is refused, and does the first no harm.
    let (code, _, stderr) = operator.run(&["up", "--port", &operator.port]).await;
    assert_ne!(code, 0);
    assert!(stderr.contains("error: ") && stderr.contains("baton down"), "{stderr}");
    assert!(paste(&printed)["choices"].is_array());

    up.interrupt();
    let status = up.end(STOP_WITHIN).await;
    assert!(status.success(), "{status}: {}", up.stderr());
    operator.nothing_left().await;
    let (code, stdout, stderr) = operator.run(&["status"]).await;
    assert_ne!(code, 0, "nothing runs, yet status says: {stdout}");
    assert!(stderr.contains("--coordinator http://HOST:7700"), "{stderr}");

    let (mut up, printed, took) = operator.up(&[]).await;
    println!("started again in {took:?}");
    assert!(paste(&printed)["choices"].is_array());
    let (code, stdout, stderr) = operator.run(&["down"]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let status = up.end(STOP_WITHIN).await;
    assert!(status.success(), "{status}: {}", up.stderr());
    operator.nothing_left().await;
}

#[tokio::test]
async fn an_embedder_runs_beside_the_model_that_chats() {
    let operator = Operator::new();
    let flags = ["--prefill", "0", "--decode", "0", "--unified", "1", "--embedder"];
    let (mut up, printed, _) = operator.up(&flags).await;
    assert!(printed.contains("pooling"), "{printed}");
    assert!(paste(&printed)["choices"].is_array());
    let second = printed.rfind("curl ").expect("a second command");
    let reply = paste(&printed[second..]);
    let vector = reply["data"][0]["embedding"].as_array();
    assert_eq!((vector.map(Vec::len), &reply["model"]), (Some(384), &"minilm".into()), "{reply}");
    let (code, status, stderr) = operator.run(&["status"]).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(status.contains("pooling") && status.contains("1 texts in 1 batches"), "{status}");
    up.interrupt();
    let ended = up.end(STOP_WITHIN).await;
    assert!(ended.success(), "{ended}: {}", up.stderr());
    operator.nothing_left().await;
}

#[tokio::test]
async fn a_file_has_settings_of_up_and_of_what_it_starts() {
    let operator = Operator::new();
    let text = "etcd = ['http://127.0.0.1:1']\n\
                [gateway]\nmax-logprobs = 3\nguard-all = true\n\
                [coordinator]\nadvertise = 'http://192.0.2.1:7700'\n\
                [worker]\nmax-running = 7\nrole = 'pooling'\n\
                [up]\nprefill = 0\ndecode = 0\nunified = 1\nkv-memory = '64MiB'\napi-key = ['k']\n";
    std::fs::write(operator.dir().join("baton.toml"), text).expect("write a file");
    let file = operator.dir().join("baton.toml");
    let file = file.to_str().expect("a path in UTF-8");
    let (mut up, printed, _) = operator.up(&["--config", file]).await;
    assert!(paste(&printed)["choices"].is_array());
    let url = format!("http://127.0.0.1:{}/server_info?config_format=json", operator.port);
    let info = paste(&format!("curl -s -H 'Authorization: Bearer k' '{url}'"));
    assert_eq!(info["vllm_config"]["max_logprobs"], 3, "{info}");
    assert_eq!(info["baton"]["workers"][0]["role"], "unified", "{info}");
    assert_eq!(info["baton"]["workers"].as_array().map(Vec::len), Some(1), "{info}");
    // The coordinator is where `up` has put it.
    let (code, status, stderr) = operator.run(&["status"]).await;
    assert_eq!(code, 0, "{status}{stderr}");
    up.interrupt();
    let ended = up.end(STOP_WITHIN).await;
    assert!(ended.success(), "{ended}: {}", up.stderr());
    operator.nothing_left().await;
}

#[tokio::test]
async fn a_cluster_under_mutual_tls_starts_serves_and_is_scaled_by_one_command_each() {
    let operator = Operator::new();
    let authority = Authority::new(operator.dir().join("authority"));
    authority.sign_for("node", "DNS:baton");
    let [ca, cert, key] = ["ca.pem", "node.pem", "node.key"].map(|file| authority.file(file));
    let identity =
        ["--cluster-tls-ca", &ca, "--cluster-tls-cert", &cert, "--cluster-tls-key", &key];
    let (mut up, printed, _) = operator.up(&identity).await;
    assert!(paste(&printed)["choices"].is_array());
    let scale = [&["scale", "2", "--pool", "decode"], &identity[..]].concat();
    let (code, stdout, stderr) = operator.run(&scale).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, status, stderr) = operator.run(&[&["status"], &identity[..]].concat()).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(status.contains("decode-1") && status.contains("decode-2"), "{status}");
    assert!(paste(&printed)["choices"].is_array());
    // Without the identity nothing is told.
    let (code, _, stderr) = operator.run(&["status"]).await;
    assert_eq!(code, 69, "{stderr}");
    up.interrupt();
    let ended = up.end(STOP_WITHIN).await;
    assert!(ended.success(), "{ended}: {}", up.stderr());
    operator.nothing_left().await;
}

#[tokio::test]
async fn nothing_outlives_a_killed_up() {
    let operator = Operator::new();
    let (mut up, _, _) = operator.up(&["--prefill", "0", "--decode", "0", "--unified", "1"]).await;
    assert!(leftovers::processes(operator.dir()).len() > 3);
    up.kill();
    eventually("all processes follow", Duration::from_secs(5), async || {
        let processes = leftovers::processes(operator.dir());
        if processes.is_empty() { Ok(()) } else { Err(format!("{processes:#?}")) }
    })
    .await;
    // What the killed one had written down does not stop the next.
    let (mut up, printed, _) =
        operator.up(&["--prefill", "0", "--decode", "0", "--unified", "1"]).await;
    assert!(paste(&printed)["choices"].is_array());
    up.signal(Signal::SIGTERM);
    let status = up.end(STOP_WITHIN).await;
    assert!(status.success(), "{status}: {}", up.stderr());
    operator.nothing_left().await;
}

/// The workers that `up` started are the coordinator's: it ends them too, also the last but one,
/// and `up` does not start them again. Nor does the death of the coordinator touch them.
#[tokio::test]
async fn pools_are_scaled_below_what_up_began_with_and_workers_outlive_the_coordinator() {
    let operator = Operator::new();
    let small = ["--decode", "2", "--prefill", "1", "--threads", "1", "--kv-memory", "128MiB"];
    let (mut up, printed, _) = operator.up(&small).await;
    let workers = || {
        let all = leftovers::processes(operator.dir());
        let mut workers: Vec<String> =
            all.into_iter().filter(|process| process.contains("baton-worker")).collect();
        workers.sort();
        workers
    };
    let began = workers();
    assert_eq!(began.len(), 3, "{began:#?}");
    let coordinator = leftovers::processes(operator.dir());
    let coordinator = coordinator.iter().find(|it| it.contains("baton-coordinator --etcd"));
    let pid = coordinator.and_then(|it| it.split(' ').next()?.parse().ok()).expect("its pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("kill it");
    eventually("the coordinator is started again", Duration::from_secs(10), async || {
        let (code, _, stderr) = operator.run(&["status"]).await;
        if code == 0 { Ok(()) } else { Err(stderr) }
    })
    .await;
    assert_eq!(workers(), began, "the workers are the same");

    for (args, left) in
        [(&["scale", "1"][..], 2), (&["scale", "--pool", "prefill", "0"], 1), (&["scale", "2"], 2)]
    {
        let (code, stdout, stderr) = operator.run(args).await;
        assert_eq!(code, 0, "{args:?}: {stdout}{stderr}");
        assert_eq!(workers().len(), left, "after {args:?}");
    }
    assert!(paste(&printed)["choices"].is_array());
    let (code, stdout, stderr) = operator.run(&["scale", "--pool", "audio", "1"]).await;
    assert_eq!(code, 2, "{stdout}{stderr}");
    assert!(stderr.contains("pool `audio`") && stderr.contains("--workers"), "{stderr}");
    let (_, history, _) = operator.run(&["scale", "--list"]).await;
    assert_eq!(history.matches("done").count(), 3, "{history}");

    let (code, top, stderr) = operator.run(&["top", "--once"]).await;
    assert_eq!(code, 0, "{stderr}");
    let name = ["decode-1", "decode-2"].into_iter().find(|name| top.contains(name));
    let name = name.unwrap_or_else(|| panic!("no worker is named in\n{top}"));
    let (code, stdout, stderr) = operator.run(&["drain", name]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (_, top, _) = operator.run(&["top", "--once"]).await;
    assert_eq!(top.matches("draining").count(), 1, "{top}");
    let (_, status, _) = operator.run(&["status"]).await;
    let line = status.lines().find(|line| line.contains("decode (draining)"));
    assert!(line.is_some_and(|line| line.contains(name)), "{name} drains:\n{status}");
    assert!(paste(&printed)["choices"].is_array(), "the other serves");
    let (code, stdout, stderr) = operator.run(&["drain", "--undo", name]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, _, stderr) = operator.run(&["drain", "nobody"]).await;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("no worker nobody"), "{stderr}");

    let (code, stdout, stderr) = operator.run(&["down"]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let status = up.end(STOP_WITHIN).await;
    assert!(status.success(), "{status}: {}", up.stderr());
    operator.nothing_left().await;
}

/// Each failure has its exit code, names what is wrong, and leaves no half of a cluster.
#[tokio::test]
async fn up_refuses_what_it_cannot_start_and_cleans_up() {
    let operator = Operator::new();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("take a port");
    let port = taken.local_addr().expect("its address").port().to_string();
    let start = Instant::now();
    let (code, _, stderr) = operator.run(&["up", "--port", &port]).await;
    assert_eq!(code, 98, "{stderr}");
    assert!(stderr.contains(&port) && stderr.contains("--port"), "{stderr}");
    operator.nothing_left().await;
    let (code, _, stderr) =
        operator.run(&["up", "--port", &operator.port, "--model", "/no/such/model.gguf"]).await;
    assert_eq!(code, 66, "{stderr}");
    assert!(stderr.contains("/no/such/model.gguf"), "{stderr}");
    operator.nothing_left().await;
    let (code, _, stderr) = operator
        .run(&["up", "--port", &operator.port, "--decode", "0", "--prefill", "1", "--unified", "0"])
        .await;
    assert_eq!(code, 2, "no worker would answer: {stderr}");
    operator.nothing_left().await;
    let (code, _, stderr) = operator.run(&["down"]).await;
    assert_ne!(code, 0, "there was nothing to stop");
    assert!(stderr.contains("error: `baton up` runs no cluster here\n"), "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}
