//! `baton up`: starts a cluster's processes on this machine and watches over them.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use baton_membership::config::FileArgs;
use baton_membership::daemon::{Exit, Failure, StopSignals};
use baton_membership::tls::ClusterTlsArgs;
use baton_membership::traces::TraceArgs;
use baton_membership::{EtcdAccess, EtcdSettings, InstanceRole, connect};
use clap::Args;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use reqwest::StatusCode;

use super::model;
use super::process::{Process, Spec, programs};
use super::state::{ENDING, Lock, State};
use super::status::new_table;
use super::up_workers::{Served, launch_failed, listed, tell_of_crashes, templates, workers_ready};
use crate::launch::WorkerSpec;
use crate::launch::local::{self, LocalProcesses, LocalWorker};

/// How long a process may take to be ready, and the cluster to serve.
pub(super) const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long a process may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// Signals so close to the first are the same Ctrl-C.
const ECHO: Duration = Duration::from_millis(500);
/// Seconds that running requests get when the cluster stops.
pub(super) const DRAIN_SECONDS: &str = "5";
/// The name of the model that embeds, by default.
const EMBEDDER: &str = "minilm";
/// Waits before a process that ended is started again: the first, and the longest.
const RESTART: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// A process that ran this long is not in a crash loop.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Flags of `baton up`. Settings of the processes beyond these are taken from the environment and
/// the file of --config: see `baton-gateway --help` and `baton-worker --help`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// The file of settings: its table `up` is for these flags, the others are for the processes.
    #[command(flatten)]
    file: FileArgs,

    /// Prefill workers: they compute prompts for decode workers.
    #[arg(long, default_value_t = 1)]
    prefill: usize,

    /// Decode workers: they generate.
    #[arg(long, default_value_t = 1)]
    decode: usize,

    /// Unified workers: they do both.
    #[arg(long, default_value_t = 0)]
    unified: usize,

    /// Port of the HTTP API.
    #[arg(long, default_value_t = 8000)]
    port: u16,

    /// Address of the HTTP API; 0.0.0.0 opens it to other machines.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,

    /// A GGUF file, or a folder with safetensors; by default a small model that is downloaded on first use.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,

    /// Name that clients use in `model`; may be several, the first of which replies have.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,

    /// Serve embeddings too, by a worker of its own: with a small model that is downloaded on
    /// first use, named minilm, or with the one in FOLDER.
    #[arg(long, value_name = "FOLDER")]
    embedder: Option<Option<PathBuf>>,

    /// Memory of each worker's KV cache.
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    pub(super) kv_memory: String,

    /// Threads of each worker; by default the cores are shared out.
    #[arg(long)]
    pub(super) threads: Option<usize>,

    /// A key that clients must send; may be repeated.
    #[arg(long = "api-key", value_name = "KEY", hide_env_values = true)]
    api_keys: Vec<String>,

    /// Traces of all processes.
    #[command(flatten)]
    pub(super) traces: TraceArgs,

    /// TLS between the processes.
    #[command(flatten)]
    pub(super) tls: ClusterTlsArgs,
}

impl UpArgs {
    /// Workers of all roles.
    pub(super) fn workers(&self) -> usize {
        self.pools().into_iter().map(|(_, count)| count).sum()
    }

    /// How many workers each pool has.
    fn pools(&self) -> [(InstanceRole, usize); 4] {
        [
            (InstanceRole::Prefill, self.prefill),
            (InstanceRole::Decode, self.decode),
            (InstanceRole::Unified, self.unified),
            (InstanceRole::Pooling, usize::from(self.embedder.is_some())),
        ]
    }
}

/// Starts the cluster and runs it until it is told to stop.
pub async fn run(args: UpArgs) -> Result<(), Failure> {
    if args.decode + args.unified == 0 {
        let message = "nothing would generate: give --decode or --unified at least 1";
        return Err(Failure::new(Exit::Config, message));
    }
    let mut stop_signals = StopSignals::take()?;
    let lock = Lock::take()?;
    check_port(SocketAddr::new(args.host, args.port)).await?;
    let names = args.served_model_name.clone();
    let served = match &args.model {
        Some(model) => Served::new(model.clone(), names),
        None => {
            let fetched = model::fetch(model::Known::Smollm2, &mut stop_signals).await?;
            let name = || vec![model::NAME.to_owned()];
            Served::new(fetched, if names.is_empty() { name() } else { names })
        }
    };
    let embedder = match &args.embedder {
        None => None,
        Some(Some(folder)) => Some(Served::new(folder.clone(), Vec::new())),
        Some(None) => {
            let model = model::fetch(model::Known::Minilm, &mut stop_signals).await?;
            Some(Served::new(model, vec![EMBEDDER.to_owned()]))
        }
    };
    let mut cluster = Cluster::new(lock, &args, &served, embedder.as_ref())?;
    let started = Instant::now();
    let start = cluster.start(&args, &served, embedder.as_ref());
    let ended = tokio::select! {
        ended = start => ended,
        () = stop_signals.next() => {
            cluster.stop(&mut stop_signals).await;
            return Ok(());
        }
    };
    if let Err(failure) = ended {
        cluster.stop(&mut stop_signals).await;
        return Err(failure);
    }
    cluster.announce(&args, started.elapsed())?;
    tokio::select! {
        never = cluster.watch_over() => match never {},
        () = stop_signals.next() => {}
    }
    eprintln!("stopping");
    cluster.stop(&mut stop_signals).await;
    Ok(())
}

/// Says it now, under the flag's name here, and not when everything else has started.
async fn check_port(address: SocketAddr) -> Result<(), Failure> {
    // The gateway of one that was killed holds it until it has ended, a moment later.
    let since = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::AddrInUse && since.elapsed() < ENDING => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(Failure::listen("--port", address, &error)),
        }
    }
}

/// The processes, in the order of their start, and the workers, which belong to the coordinator:
/// here they are only started first and ended last.
struct Cluster {
    lock: Lock,
    workers: LocalProcesses,
    programs: PathBuf,
    etcd: [String; 2],
    /// The coordinator's port, the same when it is started again: `baton status` knows it.
    coordinator: u16,
    /// Flags of all processes.
    shared: Vec<String>,
    processes: Vec<Process>,
}

impl Cluster {
    fn new(
        lock: Lock,
        args: &UpArgs,
        model: &Served,
        embedder: Option<&Served>,
    ) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::new(Exit::Failure, error);
        let programs = programs()?;
        let [client, peer, coordinator] = free_ports(args.port)?;
        let etcd = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
        let templates = templates(args, &programs, &etcd[0], model, embedder);
        let path = lock.directory().join("workers.json");
        let text = serde_json::to_vec_pretty(&templates).unwrap_or_default();
        std::fs::write(&path, text).map_err(failed)?;
        let workers = LocalProcesses::new(
            local::Settings {
                dir: lock.directory().join("workers"),
                logs: lock.directory().join("logs"),
                supervisor: programs.join("baton-coordinator"),
                owner: Some(lock.file()),
                grace: STOP_WITHIN,
            },
            templates,
        )
        .map_err(launch_failed)?;
        workers.clear().map_err(launch_failed)?;
        let shared = shared_flags(args);
        Ok(Self { lock, workers, programs, etcd, coordinator, shared, processes: Vec::new() })
    }

    async fn start(
        &mut self,
        args: &UpArgs,
        model: &Served,
        embedder: Option<&Served>,
    ) -> Result<(), Failure> {
        self.start_etcd().await?;
        let gateway = self.spec("gateway", "gateway", "baton-gateway", &{
            let mut flags = vec![
                "--listen".into(),
                SocketAddr::new(args.host, args.port).to_string(),
                "--drain-timeout".into(),
                DRAIN_SECONDS.into(),
            ];
            flags.extend(self.shared.iter().cloned());
            flags
        });
        let gateway = match args.api_keys.is_empty() {
            true => gateway,
            // Everybody may see a process's flags.
            false => Spec { env: vec![("BATON_API_KEY", args.api_keys.join(","))], ..gateway },
        };
        let directory = self.lock.directory().to_path_buf();
        let file = |name: &str| directory.join(name).display().to_string();
        let flags = [
            ["--listen".into(), format!("127.0.0.1:{}", self.coordinator)],
            ["--advertise".into(), format!("http://127.0.0.1:{}", self.coordinator)],
            ["--workers".into(), file("workers.json")],
            ["--workers-dir".into(), file("workers")],
            ["--workers-logs".into(), file("logs")],
            ["--workers-owner".into(), file("lock")],
            ["--stop-timeout".into(), STOP_WITHIN.as_secs().to_string()],
        ];
        let coordinator = {
            let mut flags = flags.concat();
            flags.extend(self.shared.iter().cloned());
            self.spec("coordinator", "coordinator", "baton-coordinator", &flags)
        };
        // Before the coordinator: from its first order on it alone starts and ends workers.
        for (pool, count) in args.pools() {
            let model = match (pool, embedder) {
                (InstanceRole::Pooling, Some(embedder)) => embedder,
                _ => model,
            };
            for n in 1..=count {
                let (name, model) = (format!("{pool}-{n}"), model.name().to_owned());
                let started = self.workers.start(None, &WorkerSpec { name, pool, model });
                started.map_err(launch_failed)?;
            }
        }
        let logs = self.lock.directory().join("logs");
        let first = self.processes.len();
        for spec in [coordinator, gateway] {
            self.processes.push(Process::start(spec, &logs)?);
        }
        let waits = self.processes[first..].iter_mut().map(|process| process.ready(READY_WITHIN));
        let (ready, workers) =
            tokio::join!(futures::future::try_join_all(waits), workers_ready(&self.workers));
        // A worker's own error first: without workers the others may fail too.
        workers?;
        ready?;
        let address = |role: &str| {
            let of = self.processes.iter().find(|process| process.spec.role == role);
            of.map(|process| process.address.clone()).unwrap_or_default()
        };
        self.lock.publish(&State {
            pid: std::process::id() as i32,
            coordinator: address("coordinator"),
            gateway: address("gateway"),
        })?;
        self.wait_until_served(&address("gateway"), args).await
    }

    /// etcd, on data of its own: what it held for an earlier cluster means nothing now.
    async fn start_etcd(&mut self) -> Result<(), Failure> {
        let data = self.lock.directory().join("etcd");
        if data.exists() {
            std::fs::remove_dir_all(&data).map_err(|error| {
                Failure::new(Exit::Failure, format!("cannot empty {}: {error}", data.display()))
            })?;
        }
        let [client, peer] = &self.etcd;
        let flags: [(&str, OsString); 8] = [
            ("--name", "baton".into()),
            ("--data-dir", data.into()),
            ("--listen-client-urls", client.into()),
            ("--advertise-client-urls", client.into()),
            ("--listen-peer-urls", peer.into()),
            ("--initial-advertise-peer-urls", peer.into()),
            ("--initial-cluster", format!("baton={peer}").into()),
            ("--log-level", "warn".into()),
        ];
        let spec = Spec {
            name: "etcd".into(),
            role: "etcd",
            program: "etcd".into(),
            args: flags.into_iter().flat_map(|(flag, value)| [flag.into(), value]).collect(),
            env: Vec::new(),
            announces: false,
        };
        let logs = self.lock.directory().join("logs");
        let mut etcd = Process::start(spec, &logs)?;
        etcd.address.clone_from(client);
        self.processes.push(etcd);
        let settings = EtcdSettings {
            endpoints: vec![client.clone()],
            cluster: "default".into(),
            lease_ttl: Duration::from_secs(5),
            start_timeout: Duration::from_secs(30),
            access: EtcdAccess::default(),
        };
        let Some(etcd) = self.processes.last_mut() else { return Ok(()) };
        tokio::select! {
            connected = connect(&settings) => connected.map(drop).map_err(Failure::from),
            failure = etcd.ended() => Err(Failure {
                message: format!("{} (package etcd-server)", failure.message),
                ..failure
            }),
        }
    }

    fn spec(&self, name: &str, role: &'static str, program: &str, flags: &[String]) -> Spec {
        let mut args: Vec<OsString> = vec!["--etcd".into(), self.etcd[0].clone().into()];
        args.extend(flags.iter().map(Into::into));
        let program = self.programs.join(program);
        Spec { name: name.into(), role, program, args, env: Vec::new(), announces: true }
    }

    /// Waits until the gateway has found the workers.
    async fn wait_until_served(&self, gateway: &str, args: &UpArgs) -> Result<(), Failure> {
        let expected = args.workers();
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(2))
            .build()
            .map_err(|error| Failure::new(Exit::Failure, error))?;
        let get = async |path| client.get(format!("{}{path}", loopback(gateway))).send().await;
        let since = Instant::now();
        while since.elapsed() < READY_WITHIN {
            let served = match get("/metrics").await {
                // Not for everybody, with --guard-all: that it serves must do.
                Ok(reply) if reply.status() == StatusCode::UNAUTHORIZED => {
                    get("/health").await.is_ok_and(|reply| reply.status().is_success())
                }
                Ok(reply) => reply.text().await.is_ok_and(|text| workers_up(&text) >= expected),
                Err(_) => false,
            };
            if served {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let message = format!("the gateway has not found all workers within {READY_WITHIN:?}");
        Err(Failure::new(Exit::Unavailable, message))
    }

    fn announce(&self, args: &UpArgs, took: Duration) -> Result<(), Failure> {
        let mut table = new_table(&["role", "address", "pid", "log"]);
        for process in &self.processes {
            table.add_row([
                process.spec.role.to_owned(),
                process.address.clone(),
                process.pid().map_or_else(String::new, |pid| pid.to_string()),
                process.log().display().to_string(),
            ]);
        }
        for LocalWorker { launched, pid, log } in listed(&self.workers)? {
            let (role, log) = (launched.spec.pool.to_string(), log.display().to_string());
            table.add_row([role, launched.address, pid.to_string(), log]);
        }
        let gateway = self.processes.iter().find(|process| process.spec.role == "gateway");
        let url = gateway.map(|process| loopback(&process.address)).unwrap_or_default();
        println!("{table}");
        println!("ready after {:.1} s; Ctrl-C stops everything. Try:\n", took.as_secs_f64());
        let key = match args.api_keys.first() {
            Some(key) => format!(" -H 'Authorization: Bearer {key}'"),
            None => String::new(),
        };
        println!(
            "curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{\
             \"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}], \
             \"temperature\": 0, \"max_tokens\": 50}}'"
        );
        if args.embedder.is_some() {
            println!(
                "\ncurl -s {url}/v1/embeddings -H 'Content-Type: application/json'{key} -d '{{\
                 \"input\": \"The capital of France is Paris.\"}}'"
            );
        }
        Ok(())
    }

    /// Starts again what ends, for ever.
    async fn watch_over(&mut self) -> std::convert::Infallible {
        let logs = self.lock.directory().join("logs");
        let watches: FuturesUnordered<BoxFuture<'_, std::convert::Infallible>> = self
            .processes
            .iter_mut()
            .map(|process| Box::pin(keep_running(process, logs.clone())) as _)
            .collect();
        let mut watches = watches;
        tokio::select! {
            Some(never) = watches.next() => never,
            never = tell_of_crashes(&self.workers) => never,
        }
    }

    /// Stops all: who sends requests, who starts workers, the workers, what they all need. Another
    /// signal kills what is left.
    async fn stop(&mut self, stop_signals: &mut StopSignals) {
        let workers = self.workers.clone();
        let stops = async {
            for role in ["gateway", "coordinator", "etcd"] {
                if role == "etcd" {
                    workers.stop_all(STOP_WITHIN).await;
                }
                let group = self.processes.iter_mut().filter(|process| process.spec.role == role);
                futures::future::join_all(group.map(|process| process.stop(STOP_WITHIN))).await;
            }
        };
        tokio::select! {
            () = stops => {}
            () = again(stop_signals) => self.workers.kill_all().await,
        }
        // Those that still run are killed as they are dropped.
        self.processes.clear();
        let _ = std::fs::remove_dir_all(self.lock.directory().join("etcd"));
    }
}

/// The flags of `baton up` that all its processes have too.
pub(super) fn shared_flags(args: &UpArgs) -> Vec<String> {
    let endpoint = args.traces.endpoint().into_iter();
    let traces = endpoint.flat_map(|url| ["--otlp-traces-endpoint".to_owned(), url]);
    traces.chain(args.tls.flags()).chain(args.file.flags()).collect()
}

/// Waits for a signal that is not an echo of the first: some shells and wrappers send it twice.
async fn again(stop_signals: &mut StopSignals) {
    let first = Instant::now();
    loop {
        stop_signals.next().await;
        if first.elapsed() > ECHO {
            return;
        }
    }
}

/// Starts a process again whenever it ends, with growing waits.
async fn keep_running(process: &mut Process, logs: PathBuf) -> std::convert::Infallible {
    let mut wait = RESTART.0;
    loop {
        let started = Instant::now();
        let failure = process.ended().await;
        if started.elapsed() > STABLE_AFTER {
            wait = RESTART.0;
        }
        eprintln!("{failure}; starting it again in {:.1} s", wait.as_secs_f64());
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RESTART.1);
        let address = process.address.clone();
        match Process::start(process.spec.clone(), &logs) {
            Ok(again) => *process = again,
            Err(failure) => {
                eprintln!("{failure}");
                continue;
            }
        }
        match process.spec.announces {
            true => match process.ready(READY_WITHIN).await {
                Ok(()) => eprintln!("{} runs again at {}", process.spec.name, process.address),
                Err(failure) => eprintln!("{failure}"),
            },
            false => process.address = address,
        }
    }
}

/// Workers that answer the gateway, in its metrics.
fn workers_up(metrics: &str) -> usize {
    metrics
        .lines()
        .filter(|line| line.starts_with("baton_workers{") && line.contains("state=\"up\""))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
        .sum()
}

/// How this machine reaches an address that may stand for all of its addresses.
fn loopback(url: &str) -> String {
    url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
}

/// Three ports that are free now, and not `taken`.
fn free_ports(taken: u16) -> Result<[u16; 3], Failure> {
    let failed = |error: std::io::Error| Failure::new(Exit::Failure, error);
    // All held at once, so that they differ.
    let listeners: Vec<TcpListener> = (0..4)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    let mut ports = listeners
        .iter()
        .filter_map(|listener| listener.local_addr().ok())
        .map(|address| address.port())
        .filter(|port| *port != taken);
    match (ports.next(), ports.next(), ports.next()) {
        (Some(a), Some(b), Some(c)) => Ok([a, b, c]),
        _ => Err(Failure::new(Exit::Failure, "no free ports on 127.0.0.1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_counted_in_metrics() {
        let metrics = "# TYPE baton_workers gauge\n\
            baton_workers{role=\"decode\",state=\"up\"} 2\n\
            baton_workers{role=\"prefill\",state=\"down\"} 1\n\
            baton_workers{role=\"unified\",state=\"up\"} 1\n";
        assert_eq!(workers_up(metrics), 3);
        assert_eq!(workers_up(""), 0);
    }

    #[test]
    fn ports_differ() {
        let [a, b, c] = free_ports(8000).unwrap();
        assert!(a != b && a != c && b != c && ![a, b, c].contains(&8000));
    }
}
