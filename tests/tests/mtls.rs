//! TLS between the processes of a cluster, and to etcd.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use baton_membership::tls::{self, ClusterTlsArgs};
use baton_proto::endpoint;
use baton_proto::instance::instances_prefix;
use baton_proto::v1::DescribeRequest;
use baton_proto::v1::worker_client::WorkerClient;
use baton_tests::authority::Authority;
use baton_tests::binaries::{MODEL_NAME, model, program};
use baton_tests::cluster::Builder;
use baton_tests::http::ids;
use baton_tests::process::{Process, Spec};
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, Role, eventually, ports};
use serde_json::{Value, json};

/// Files of one identity.
struct Identity {
    ca: String,
    cert: String,
    key: String,
}

impl Identity {
    fn of(authority: &Authority, name: &str) -> Self {
        let file = |end: &str| authority.file(&format!("{name}.{end}"));
        Self { ca: authority.file("ca.pem"), cert: file("pem"), key: file("key") }
    }

    fn env(&self) -> [(&'static str, &str); 3] {
        [
            ("BATON_CLUSTER_TLS_CA", &self.ca),
            ("BATON_CLUSTER_TLS_CERT", &self.cert),
            ("BATON_CLUSTER_TLS_KEY", &self.key),
        ]
    }

    fn flags(&self) -> [&str; 6] {
        [
            "--cluster-tls-ca",
            &self.ca,
            "--cluster-tls-cert",
            &self.cert,
            "--cluster-tls-key",
            &self.key,
        ]
    }

    /// Makes the test one of the cluster.
    fn install(&self) {
        let path = |file: &String| Some(PathBuf::from(file));
        tls::install(&ClusterTlsArgs {
            cluster_tls_ca: path(&self.ca),
            cluster_tls_cert: path(&self.cert),
            cluster_tls_key: path(&self.key),
            cluster_tls_name: "baton".into(),
        })
        .expect("an identity");
    }

    /// Has all processes of a cluster show it.
    fn give(&self, builder: Builder) -> Builder {
        self.env().into_iter().fold(builder, |builder, (name, value)| builder.env(name, value))
    }
}

fn authority(folder: &Path) -> Authority {
    let authority = Authority::new(folder.to_path_buf());
    authority.sign_for("node", "DNS:baton");
    authority
}

/// Runs `baton` with these arguments.
async fn baton(args: &[&str]) -> Output {
    let mut command = Command::new(program("baton"));
    command.args(args);
    let run = tokio::task::spawn_blocking(move || command.output()).await.expect("a thread");
    run.expect("baton runs")
}

fn request(n: usize, stream: bool) -> Value {
    json!({
        "model": MODEL_NAME, "prompt": format!("Story {n}: {}", "a town by the sea, ".repeat(20)),
        "max_tokens": 24, "temperature": 0, "ignore_eos": true, "stream": stream,
    })
}

async fn says(what: &str, process: &Process, words: &[&str]) {
    eventually(what, Duration::from_secs(20), async || {
        let log = process.stderr();
        let all = |line: &str| words.iter().all(|word| line.contains(word));
        if log.lines().any(all) { Ok(()) } else { Err(log) }
    })
    .await;
}

#[tokio::test]
async fn a_cluster_under_mutual_tls_answers_and_nobody_else_may_call_its_processes() {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = authority(&folder.path().join("ours"));
    let node = Identity::of(&ours, "node");
    node.install();
    let builder = Cluster::builder().prefill(1).decode(1).coordinator().transport("grpc");
    let cluster = node.give(builder).handoff_min_tokens(16).start().await;
    let answer = cluster.api.ok("/v1/completions", &request(1, false)).await;
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    // The blocks came from the other worker, over its own connection.
    let status = cluster.only(Role::Decode).status().await;
    assert_eq!((status.handoff_requests, status.handoff_failures), (1, 0), "{status:?}");
    assert!(status.handoff_bytes_grpc > 0, "{status:?}");

    // The operator's command is one of the cluster too.
    let coordinator = ["--coordinator", cluster.coordinator()];
    let said = baton(&[&["status"], &coordinator[..], &node.flags()].concat()).await;
    let table = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success() && table.contains("decode"), "{said:?}");
    let list = baton(&[&["scale", "--list"], &coordinator[..], &node.flags()].concat()).await;
    assert!(list.status.success(), "{list:?}");

    // Plain text, another authority, another name, a certificate that has run out.
    let theirs = authority(&folder.path().join("theirs"));
    ours.sign_for("other", "DNS:other");
    ours.sign_late("late", "DNS:baton");
    let stranger = Identity { ca: node.ca.clone(), ..Identity::of(&theirs, "node") };
    let callers: [(&str, Option<Identity>, &str); 4] = [
        ("plain text", None, ""),
        ("another authority", Some(stranger), "UnknownIssuer"),
        ("another name", Some(Identity::of(&ours, "other")), "not valid for name"),
        ("run out", Some(Identity::of(&ours, "late")), "xpired"),
    ];
    for (what, identity, reason) in &callers {
        let flags: Vec<&str> = identity.iter().flat_map(Identity::flags).collect();
        let said = baton(&[&["status"], &coordinator[..], &flags].concat()).await;
        assert_eq!(said.status.code(), Some(69), "{what}: {said:?}");
        let log = cluster.coordinator_process();
        says(what, log, &["a caller was refused", reason]).await;
        // The next line about a caller comes a second later.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    // A server of another authority is not believed.
    let fooled = Identity { ca: theirs.file("ca.pem"), ..Identity::of(&ours, "node") };
    let said = baton(&[&["status"], &coordinator[..], &fooled.flags()].concat()).await;
    let error = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success() && error.contains("UnknownIssuer"), "{error}");
    // Workers do not talk in plain text either.
    let worker = &cluster.only(Role::Decode).address;
    let plain = endpoint(worker).expect("an address").connect().await;
    if let Ok(channel) = plain {
        WorkerClient::new(channel).describe(DescribeRequest {}).await.expect_err("plain text");
    }
    says("plain text", &cluster.only(Role::Decode).process, &["a caller was refused"]).await;
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_sequence_moves_on_under_mutual_tls_and_takes_its_kv_along() {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = authority(folder.path());
    let node = Identity::of(&ours, "node");
    node.install();
    let builder = Cluster::builder().unified(2).coordinator().transport("grpc");
    let cluster = node.give(builder).start().await;
    let mut wanted = request(1, false);
    wanted["max_tokens"] = 400.into();
    wanted["return_token_ids"] = true.into();
    // Caches of their own: what moves is not found where it goes.
    wanted["cache_salt"] = "undisturbed".into();
    let undisturbed = cluster.api.ok("/v1/completions", &wanted).await;
    wanted["cache_salt"] = "moved".into();
    wanted["stream"] = true.into();
    let mut stream = cluster.api.stream("/v1/completions", &wanted).await;
    let mut tokens = Vec::new();
    while tokens.len() < 20 {
        let event = stream.next().await.expect("the stream goes on");
        tokens.extend(ids(&event["choices"][0]["token_ids"]));
    }
    let mut busy = None;
    for worker in &cluster.workers {
        if worker.status().await.running > 0 {
            busy = Some(worker);
        }
    }
    let busy = &*busy.expect("a worker computes it").address;
    let coordinator = ["--coordinator", cluster.coordinator()];
    let said = baton(&[&["drain", busy], &coordinator[..], &node.flags()].concat()).await;
    assert!(said.status.success(), "{said:?}");
    while let Some(event) = stream.next().await {
        assert!(event["error"].is_null(), "{event}");
        tokens.extend(ids(&event["choices"][0]["token_ids"]));
    }
    assert_eq!(tokens, ids(&undisturbed["choices"][0]["token_ids"]));
    let metrics = Scrape::parse(&cluster.api.get("/metrics").await.text).expect("metrics");
    let pulled = metrics.sum("baton_migrations_total", &[("kv", "pulled")]);
    assert_eq!(pulled, Some(1.0));
    cluster.finish().await;
}

#[tokio::test]
async fn a_worker_of_another_authority_gets_no_request_and_the_log_says_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = authority(&folder.path().join("ours"));
    let theirs = authority(&folder.path().join("theirs"));
    let node = Identity::of(&ours, "node");
    node.install();
    let cluster = node.give(Cluster::builder().unified(1)).start().await;
    let stranger = Identity::of(&theirs, "node");
    let mut spec = worker("stranger", cluster.etcd.url());
    spec.env = stranger.env().map(|(name, value)| (name.into(), value.into())).into();
    let mut process = Process::start(&spec, cluster.dir());
    let address = process.ready().await;
    let host = address.trim_start_matches("http://");
    says("the gateway says why", cluster.gateway(), &[host, "UnknownIssuer"]).await;
    for n in 0..4 {
        cluster.api.ok("/v1/completions", &request(n, false)).await;
    }
    process.stop().await;
    cluster.finish().await;
}

fn worker(name: &str, etcd: &str) -> Spec {
    let model = model();
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--etcd",
        etcd,
        "--role",
        "unified",
        "--model",
        model.to_str().expect("a path in UTF-8"),
        "--served-model-name",
        MODEL_NAME,
        "--kv-memory",
        "128MiB",
        "--threads",
        "2",
    ];
    Spec::new(name, program("baton-worker"), args)
}

#[tokio::test]
async fn certificates_are_renewed_under_load_without_a_failed_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let (old, new) = (authority(&folder.path().join("old")), authority(&folder.path().join("new")));
    let used = Identity {
        ca: path(folder.path().join("ca.pem")),
        cert: path(folder.path().join("cert.pem")),
        key: path(folder.path().join("key.pem")),
    };
    let place = |to: &str, from: &[String]| {
        let text: Vec<u8> =
            from.iter().flat_map(|file| std::fs::read(file).expect("read")).collect();
        let beside = format!("{to}.new");
        std::fs::write(&beside, text).expect("write");
        std::fs::rename(&beside, to).expect("rename");
    };
    place(&used.ca, &[old.file("ca.pem")]);
    place(&used.cert, &[old.file("node.pem")]);
    place(&used.key, &[old.file("node.key")]);
    used.install();
    let builder = Cluster::builder().prefill(1).decode(1).transport("grpc").handoff_min_tokens(16);
    let mut cluster = used.give(builder).start().await;

    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..2)
        .map(|client| {
            let (api, stop): (Api, _) = (cluster.api.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(Relaxed) {
                    let n = client * 10_000 + answered;
                    if client == 0 {
                        api.ok("/v1/completions", &request(n, false)).await;
                    } else {
                        let stream = api.stream("/v1/completions", &request(n, true)).await;
                        for event in stream.collect().await {
                            assert!(event["error"].is_null(), "{event}");
                        }
                    }
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    let renewed = async |cluster: &Cluster, times: usize| {
        let workers = cluster.workers.iter().map(|worker| &worker.process);
        for process in workers.chain([cluster.gateway()]) {
            eventually("the certificates are taken up", Duration::from_secs(20), async || {
                let log = process.stderr();
                let seen = log.matches("certificates have changed, and are used").count();
                if seen >= times { Ok(()) } else { Err(log) }
            })
            .await;
        }
    };
    // First both authorities are believed, then the new one signs, then the old one goes.
    place(&used.ca, &[old.file("ca.pem"), new.file("ca.pem")]);
    renewed(&cluster, 1).await;
    // In between certificate and key do not go together: the old ones stay.
    place(&used.cert, &[new.file("node.pem")]);
    says("half a change is told", cluster.gateway(), &["WARN", "--cluster-tls-key"]).await;
    place(&used.key, &[new.file("node.key")]);
    renewed(&cluster, 2).await;
    place(&used.ca, &[new.file("ca.pem")]);
    renewed(&cluster, 3).await;
    // Connections that are new from here on know the new one alone.
    cluster.add_worker(Role::Decode).await;
    cluster.all_found().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Relaxed);
    for client in load {
        let answered = client.await.expect("no request failed");
        assert!(answered > 2, "{answered}");
    }
    let gone = Identity { ca: new.file("ca.pem"), ..Identity::of(&old, "node") };
    let mut spec = worker("old", cluster.etcd.url());
    spec.env = gone.env().map(|(name, value)| (name.into(), value.into())).into();
    let mut process = Process::start(&spec, cluster.dir());
    let address = process.ready().await;
    let host = address.trim_start_matches("http://");
    says("the old authority has gone", cluster.gateway(), &[host, "UnknownIssuer"]).await;
    process.stop().await;
    // Not before the test itself has the new files.
    eventually("the test is one of the cluster", Duration::from_secs(10), async || {
        let endpoint = endpoint(&cluster.workers[0].address).expect("an address");
        let channel = tls::connect(&endpoint).await.map_err(|error| format!("{error:?}"))?;
        let reply = WorkerClient::new(channel).describe(DescribeRequest {}).await;
        reply.map(drop).map_err(|status| status.to_string())
    })
    .await;
    cluster.finish().await;
}

fn path(path: PathBuf) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}

#[tokio::test]
async fn etcd_is_entered_by_tls_with_a_certificate_a_user_and_a_password() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path().join("tls"));
    authority.sign("server");
    authority.sign("client");
    let (ca, cert, key) =
        (authority.file("ca.pem"), authority.file("client.pem"), authority.file("client.key"));
    let urls = [(); 2].map(|()| format!("https://127.0.0.1:{}", ports::free()));
    let [client, peer] = &urls;
    let (server_cert, server_key) = (authority.file("server.pem"), authority.file("server.key"));
    let data = path(folder.path().join("etcd"));
    let peer = peer.replace("https", "http");
    let cluster = format!("test={peer}");
    let args = [
        ["--name", "test"],
        ["--data-dir", &data],
        ["--listen-client-urls", client],
        ["--advertise-client-urls", client],
        ["--listen-peer-urls", &peer],
        ["--initial-advertise-peer-urls", &peer],
        ["--initial-cluster", &cluster],
        ["--cert-file", &server_cert],
        ["--key-file", &server_key],
        ["--trusted-ca-file", &ca],
        // Seconds that a token lives unused: five minutes elsewhere.
        ["--auth-token-ttl", "3"],
    ];
    let args = args.concat().into_iter().chain(["--client-cert-auth"]);
    let mut etcd = Process::start(&Spec::new("etcd", "etcd".into(), args), folder.path());
    let etcdctl = |args: &[&str]| {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", client, "--cacert", &ca, "--cert", &cert, "--key", &key])
            .args(args)
            .output()
            .expect("run etcdctl");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    eventually("etcd answers", Duration::from_secs(30), async || etcdctl(&["get", "x"])).await;
    for command in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "baton:pass word"],
        &["role", "add", "baton"],
        &["role", "grant-permission", "baton", "--prefix=true", "readwrite", "/baton/"],
        &["user", "grant-role", "baton", "baton"],
        &["auth", "enable"],
    ] {
        etcdctl(command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
    }
    etcdctl(&["get", "x"]).expect_err("nobody enters without a name");
    let password = path(folder.path().join("password"));
    std::fs::write(&password, "pass word\n").expect("write");
    let entry = [
        ["--etcd", client],
        ["--etcd-ca", &ca],
        ["--etcd-cert", &cert],
        ["--etcd-key", &key],
        ["--etcd-user", "baton"],
        ["--etcd-password-file", &password],
    ]
    .concat();
    let with_entry = |mut spec: Spec, args: &[&str]| {
        spec.args.extend(args.iter().map(Into::into));
        spec
    };
    let mut worker_spec = worker("worker", "");
    // Given once: by the entry.
    worker_spec.args.drain(2..4);
    let mut worker = Process::start(&with_entry(worker_spec, &entry), folder.path());
    worker.ready().await;
    let gateway = Spec::new("gateway", program("baton-gateway"), ["--listen", "127.0.0.1:0"]);
    let mut gateway = Process::start(&with_entry(gateway, &entry), folder.path());
    let api = Api::new(&gateway.ready().await, None);
    let body = json!({"model": MODEL_NAME, "prompt": "One two", "max_tokens": 2});
    eventually("the gateway finds the worker", Duration::from_secs(20), async || {
        let reply = api.post("/v1/completions", &body).await;
        if reply.status == 200 { Ok(()) } else { Err(reply.text) }
    })
    .await;

    // Whose record is lost comes back, also when the token of its start has lapsed.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let root = |args: &[&str]| etcdctl(&[&["--user", "root:secret"][..], args].concat());
    let leases = root(&["lease", "list"]).expect("the leases");
    let leases: Vec<&str> = leases.lines().filter(|line| !line.starts_with("found")).collect();
    assert!(leases.len() >= 2, "{leases:?}");
    for lease in leases {
        root(&["lease", "revoke", lease]).expect("revoked");
    }
    eventually("both are registered again", Duration::from_secs(20), async || {
        let keys = root(&["get", "--prefix", "--keys-only", &instances_prefix("default")])?;
        if keys.split_whitespace().count() == 2 { Ok(()) } else { Err(keys) }
    })
    .await;

    // Each of them is needed, and the error says what is wrong.
    let wrong = path(folder.path().join("wrong"));
    std::fs::write(&wrong, "guess\n").expect("write");
    let fails = |entry: &[&str], code: i32, said: &str| {
        let mut command = Command::new(program("baton-gateway"));
        command.args(["--listen", "127.0.0.1:0", "--etcd-timeout", "1"]).args(entry);
        let output = command.output().expect("the gateway runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{entry:?}: {error}");
        assert!(error.contains(said), "{entry:?}: {error}");
    };
    let with_password = [&entry[..11], &[&wrong]].concat();
    fails(&with_password, 69, "authentication failed");
    fails(&entry[..2], 2, "--etcd-ca");
    fails(&["--etcd", client, "--etcd-ca", &server_key], 2, "holds no certificate");
    fails(&entry[..4], 69, "not reachable");
    fails(&["--etcd-ca", &ca], 2, "https");
    fails(&["--etcd-user", "baton"], 2, "--etcd-password-file");
    fails(&["--cluster-tls-ca", &ca], 2, "give all of them, or none");
    gateway.stop().await;
    worker.stop().await;
    etcd.kill();
}
