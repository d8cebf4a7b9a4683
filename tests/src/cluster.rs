//! Starts, changes and stops a cluster.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::v1::WorkerStatus;
use serde_json::json;
use tempfile::TempDir;

use crate::binaries::{
    EMBEDDER_NAME, MODEL_NAME, WHISPER_NAME, embedder, model, program, whisper_base,
};
use crate::etcd::Etcd;
use crate::http::Api;
use crate::poll::eventually;
use crate::process::{Process, Spec};
use crate::prometheus::Scrape;
use crate::{grpc, leftovers};

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates.
    Decode,
    /// Does both.
    Unified,
    /// Computes vectors, classes and scores.
    Pooling,
    /// Hears.
    Audio,
}

impl Role {
    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Unified => "unified",
            Self::Pooling => "pooling",
            Self::Audio => "audio",
        }
    }
}

/// A worker process and its gRPC address.
#[derive(Debug)]
pub struct Worker {
    /// What it does.
    pub role: Role,
    /// Its process.
    pub process: Process,
    /// Its advertised address.
    pub address: String,
}

impl Worker {
    /// The worker's gauges and counters.
    pub async fn status(&self) -> WorkerStatus {
        grpc::status(&self.address).await
    }
}

/// What a cluster is made of. [`Cluster::builder`] gives the smallest one.
#[derive(Clone, Debug)]
pub struct Builder {
    prefill: usize,
    decode: usize,
    unified: usize,
    /// Workers of models of their own, and the names that those are served under.
    others: Vec<(Role, PathBuf, String)>,
    coordinator: bool,
    lease_ttl: u64,
    keys: Vec<String>,
    worker_args: Vec<OsString>,
    gateway_args: Vec<OsString>,
    gateway_env: Vec<(OsString, OsString)>,
    worker_env: Vec<(OsString, OsString)>,
    coordinator_env: Vec<(OsString, OsString)>,
    /// In place of the workers' own.
    worker_program: Option<PathBuf>,
}

impl Builder {
    /// This many prefill workers.
    pub fn prefill(mut self, count: usize) -> Self {
        self.prefill = count;
        self
    }

    /// This many decode workers.
    pub fn decode(mut self, count: usize) -> Self {
        self.decode = count;
        self
    }

    /// This many unified workers.
    pub fn unified(mut self, count: usize) -> Self {
        self.unified = count;
        self
    }

    /// This many pooling workers, of the model that embeds.
    pub fn pooling(self, count: usize) -> Self {
        self.pooling_model(count, embedder(), EMBEDDER_NAME)
    }

    /// This many pooling workers, of this model under this name.
    pub fn pooling_model(self, count: usize, model: PathBuf, name: &str) -> Self {
        self.others(Role::Pooling, count, model, name)
    }

    /// This many workers that hear, of the model that knows every language.
    pub fn audio(self, count: usize) -> Self {
        self.audio_model(count, whisper_base(), WHISPER_NAME)
    }

    /// This many workers that hear, of this model under this name.
    pub fn audio_model(self, count: usize, model: PathBuf, name: &str) -> Self {
        self.others(Role::Audio, count, model, name)
    }

    /// This many workers of a role, of this model under this name.
    pub fn others(mut self, role: Role, count: usize, model: PathBuf, name: &str) -> Self {
        self.others.extend(std::iter::repeat_n((role, model, name.to_owned()), count));
        self
    }

    /// A coordinator as well.
    pub fn coordinator(mut self) -> Self {
        self.coordinator = true;
        self
    }

    /// Transports that workers offer, such as `shm` or `grpc`.
    pub fn transport(self, transports: &str) -> Self {
        self.worker_arg("--transports", transports)
    }

    /// Memory of each worker's KV cache, such as `64MiB`.
    pub fn kv_memory(self, size: &str) -> Self {
        self.worker_arg("--kv-memory", size)
    }

    /// Lease of the processes' registrations, in seconds.
    pub fn lease_ttl(mut self, seconds: u64) -> Self {
        self.lease_ttl = seconds;
        self
    }

    /// A key that clients must send. The cluster's own client sends the first.
    pub fn api_key(mut self, key: &str) -> Self {
        self.keys.push(key.to_owned());
        self.gateway_arg("--api-key", key)
    }

    /// Hands the prompt over when at least this many of its tokens are not cached.
    pub fn handoff_min_tokens(self, tokens: usize) -> Self {
        self.gateway_arg("--handoff-min-tokens", &tokens.to_string())
    }

    /// Another flag of every worker.
    pub fn worker_arg(mut self, flag: &str, value: &str) -> Self {
        self.worker_args.extend([flag.into(), value.into()]);
        self
    }

    /// Another flag of the gateway.
    pub fn gateway_arg(mut self, flag: &str, value: &str) -> Self {
        self.gateway_args.extend([flag.into(), value.into()]);
        self
    }

    /// A key that clients must send, given to the gateway by its environment.
    pub fn api_key_from_env(mut self, key: &str) -> Self {
        self.keys.push(key.to_owned());
        self.gateway_env.push(("VLLM_API_KEY".into(), key.into()));
        self
    }

    /// Has the gateway and the workers log everything of their own, as JSON.
    pub fn verbose(mut self) -> Self {
        let filter = ("RUST_LOG", "info,baton_gateway=debug,baton_worker=debug");
        for env in [&mut self.gateway_env, &mut self.worker_env] {
            env.push((filter.0.into(), filter.1.into()));
            env.push(("BATON_LOG_FORMAT".into(), "json".into()));
        }
        self
    }

    /// A variable in the environment of the gateway, the coordinator and all workers.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        let all = [&mut self.gateway_env, &mut self.worker_env, &mut self.coordinator_env];
        for env in all {
            env.push((name.into(), value.into()));
        }
        self
    }

    /// Has another program be the workers, with these variables in its environment.
    pub fn worker_program(mut self, program: PathBuf, env: &[(&str, String)]) -> Self {
        self.worker_program = Some(program);
        self.worker_env.extend(env.iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Has the gateway and the workers export their traces soon.
    pub fn traces(self, url: &str) -> Self {
        let flag = "--otlp-traces-endpoint";
        self.env("OTEL_BSP_SCHEDULE_DELAY", "100").gateway_arg(flag, url).worker_arg(flag, url)
    }

    /// Another flag of the gateway that takes no value.
    pub fn gateway_switch(mut self, flag: &str) -> Self {
        self.gateway_args.push(flag.into());
        self
    }

    fn worker_spec(
        &self,
        name: String,
        role: Role,
        common: &[OsString],
        extra: &[OsString],
    ) -> Spec {
        let own = || program("baton-worker");
        let program = self.worker_program.clone().unwrap_or_else(own);
        let mut spec = Spec::new(name, program, worker_args(role, common, extra));
        spec.env = self.worker_env.clone();
        spec
    }

    /// Starts everything and waits until a request would be served as the builder says.
    pub async fn start(self) -> Cluster {
        let dir = tempfile::Builder::new().prefix("baton-test-").tempdir().expect("a folder");
        let etcd = Etcd::start(dir.path()).await;
        let common = common_args(&etcd, self.lease_ttl);
        let mut workers = Vec::new();
        let roles = [
            (Role::Prefill, self.prefill),
            (Role::Decode, self.decode),
            (Role::Unified, self.unified),
        ];
        for (role, count) in roles {
            for n in 0..count {
                let name = format!("{}-{n}", role.as_str());
                let spec = self.worker_spec(name, role, &common, &self.worker_args);
                let process = Process::start(&spec, dir.path());
                workers.push(Worker { role, process, address: String::new() });
            }
        }
        for (n, (role, model, name)) in self.others.iter().enumerate() {
            let mut extra = self.worker_args.clone();
            extra.extend(["--model".into(), model.into()]);
            extra.extend(["--served-model-name".into(), name.into()]);
            let role = *role;
            let spec = self.worker_spec(format!("{}-{n}", role.as_str()), role, &common, &extra);
            let process = Process::start(&spec, dir.path());
            workers.push(Worker { role, process, address: String::new() });
        }
        for worker in &mut workers {
            worker.address = worker.process.ready().await;
        }
        let coordinator = if self.coordinator {
            Some(
                start_daemon("baton-coordinator", &common, &[], &self.coordinator_env, dir.path())
                    .await,
            )
        } else {
            None
        };
        let gateway = start_daemon(
            "baton-gateway",
            &common,
            &self.gateway_args,
            &self.gateway_env,
            dir.path(),
        )
        .await;
        let api = Api::new(&gateway.1, self.keys.first().map(String::as_str));
        let killed = Vec::new();
        let cluster =
            Cluster { api, gateway, coordinator, workers, etcd, killed, builder: self, dir };
        cluster.serves().await;
        cluster
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// A client of the gateway.
    pub api: Api,
    /// Its workers, in the order prefill, decode, unified, others, then those added.
    pub workers: Vec<Worker>,
    /// Its etcd.
    pub etcd: Etcd,
    gateway: (Process, String),
    coordinator: Option<(Process, String)>,
    /// Addresses of gateways that were killed: their leases may still run.
    killed: Vec<String>,
    builder: Builder,
    // Last, so that the processes end before their folder goes.
    dir: TempDir,
}

impl Cluster {
    /// One etcd and one gateway; add workers.
    pub fn builder() -> Builder {
        let builder = Builder {
            prefill: 0,
            decode: 0,
            unified: 0,
            others: Vec::new(),
            coordinator: false,
            lease_ttl: 5,
            keys: Vec::new(),
            worker_args: Vec::new(),
            gateway_args: Vec::new(),
            gateway_env: Vec::new(),
            worker_env: Vec::new(),
            coordinator_env: Vec::new(),
            worker_program: None,
        };
        builder.worker_arg("--threads", "2").kv_memory("512MiB")
    }

    /// A cluster of one unified worker, for tests of what does not depend on the hand-off.
    pub async fn unified() -> Self {
        Self::builder().unified(1).start().await
    }

    /// Starts another worker and waits for its `ready` line.
    pub async fn add_worker(&mut self, role: Role) -> &Worker {
        self.add_worker_with(role, &[]).await
    }

    /// The same, with more flags, which win over the builder's.
    pub async fn add_worker_with(&mut self, role: Role, flags: &[(&str, &str)]) -> &Worker {
        let name = format!("{}-{}", role.as_str(), self.workers.len());
        let common = common_args(&self.etcd, self.builder.lease_ttl);
        let mut extra = self.builder.worker_args.clone();
        extra.extend(flags.iter().flat_map(|(flag, value)| [(*flag).into(), (*value).into()]));
        let spec = self.builder.worker_spec(name, role, &common, &extra);
        let mut process = Process::start(&spec, self.dir.path());
        let address = process.ready().await;
        self.workers.push(Worker { role, process, address });
        self.workers.last().expect("the worker just added")
    }

    /// Starts another gateway with the same flags; the cluster's own client asks the first.
    pub async fn add_gateway(&self) -> (Process, Api) {
        let common = common_args(&self.etcd, self.builder.lease_ttl);
        let spec = Spec::new(
            "baton-gateway-2",
            program("baton-gateway"),
            common.iter().chain(&self.builder.gateway_args).cloned(),
        );
        let mut process = Process::start(&spec, self.dir.path());
        let address = process.ready().await;
        let api = Api::new(&address, self.builder.keys.first().map(String::as_str));
        (process, api)
    }

    /// Ends the gateway, by a signal or with no chance to say goodbye, and starts it again.
    pub async fn restart_gateway(&mut self, graceful: bool) {
        if graceful {
            self.gateway.0.stop().await;
        } else {
            self.gateway.0.kill();
            self.killed.push(self.gateway.1.clone());
        }
        let common = common_args(&self.etcd, self.builder.lease_ttl);
        let Builder { gateway_args, gateway_env, keys, .. } = &self.builder;
        let name = "baton-gateway";
        self.gateway =
            start_daemon(name, &common, gateway_args, gateway_env, self.dir.path()).await;
        self.api = Api::new(&self.gateway.1, keys.first().map(String::as_str));
        self.serves().await;
    }

    /// Waits until the gateway has found all workers, those added later too.
    pub async fn all_found(&self) {
        self.serves().await;
    }

    /// Kills a worker with no chance to say goodbye, and forgets it.
    pub fn kill_worker(&mut self, index: usize) {
        self.workers.remove(index).process.kill();
    }

    /// The only worker of this role.
    pub fn only(&self, role: Role) -> &Worker {
        let mut of_role = self.workers.iter().filter(|worker| worker.role == role);
        let worker = of_role.next().expect("a worker of this role");
        assert!(of_role.next().is_none(), "several {role:?} workers");
        worker
    }

    /// The coordinator's process.
    pub fn coordinator_process(&self) -> &Process {
        &self.coordinator.as_ref().expect("built with a coordinator").0
    }

    /// The coordinator's address.
    pub fn coordinator(&self) -> &str {
        &self.coordinator.as_ref().expect("built with a coordinator").1
    }

    /// The gateway's process.
    pub fn gateway(&self) -> &Process {
        &self.gateway.0
    }

    /// The folder of this cluster's files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Asserts that the gateway answers a request now.
    pub async fn still_serves(&self) {
        let body = json!({"model": MODEL_NAME, "prompt": "One two three", "max_tokens": 2});
        let reply = self.api.ok("/v1/completions", &body).await;
        assert_eq!(reply["usage"]["completion_tokens"], 2, "{reply}");
    }

    /// Waits until the gateway has found all workers.
    async fn serves(&self) {
        let expected = self.workers.len() as f64;
        eventually("the gateway finds all workers", Duration::from_secs(30), async || {
            let reply = self.api.get("/metrics").await;
            let found = Scrape::parse(&reply.text)?.sum("baton_workers", &[("state", "up")]);
            if found.unwrap_or(0.0) == expected { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }

    /// Asserts that no request and no KV block is left on any worker.
    pub async fn at_rest(&self) {
        for worker in &self.workers {
            let what = format!("{} is at rest", worker.process.name());
            eventually(&what, Duration::from_secs(5), async || {
                grpc::at_rest(&worker.address).await
            })
            .await;
        }
    }

    /// Ends the test: everything must be at rest, stop when asked, and leave nothing behind.
    pub async fn finish(mut self) {
        self.at_rest().await;
        self.gateway.0.stop().await;
        if let Some((coordinator, _)) = &mut self.coordinator {
            coordinator.stop().await;
        }
        for worker in &mut self.workers {
            worker.process.stop().await;
        }
        // A worker that was killed may still be there: its lease is running out.
        let left = self.etcd.instances();
        let stopped: Vec<&str> = self.workers.iter().map(|worker| &*worker.address).collect();
        let left = left.iter().find(|left| {
            let ours = stopped.contains(&&*left.address) || left.model.is_empty();
            ours && !self.killed.contains(&left.address)
        });
        assert_eq!(left, None, "still registered after a graceful stop");
        self.etcd.kill();
        leftovers::assert_none(self.dir.path());
    }
}

/// The flags that all daemons share.
fn common_args(etcd: &Etcd, lease_ttl: u64) -> Vec<OsString> {
    let ttl = lease_ttl.to_string();
    ["--listen", "127.0.0.1:0", "--etcd", etcd.url(), "--lease-ttl", &ttl].map(Into::into).into()
}

fn worker_args(role: Role, common: &[OsString], extra: &[OsString]) -> Vec<OsString> {
    let mut args = common.to_vec();
    args.extend(["--role".into(), role.as_str().into()]);
    let defaults =
        ["--model".into(), model().into(), "--served-model-name".into(), MODEL_NAME.into()];
    let extra: Vec<OsString> = defaults.into_iter().chain(extra.iter().cloned()).collect();
    // Later flags must win over the builder's defaults: clap refuses a flag given twice.
    let pairs: Vec<&[OsString]> = extra.chunks(2).collect();
    for (i, pair) in pairs.iter().enumerate() {
        if !pairs[i + 1..].iter().any(|later| later[0] == pair[0]) {
            args.extend(pair.iter().cloned());
        }
    }
    args
}

async fn start_daemon(
    name: &str,
    common: &[OsString],
    args: &[OsString],
    env: &[(OsString, OsString)],
    dir: &Path,
) -> (Process, String) {
    let args = common.iter().chain(args).cloned();
    let mut spec = Spec::new(name, program(name), args);
    spec.env = env.to_vec();
    let mut process = Process::start(&spec, dir);
    let address = process.ready().await;
    (process, address)
}
