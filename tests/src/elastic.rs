//! A cluster whose workers are launched by its coordinators.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::InstanceRecord;
use baton_proto::v1::{ListScalesRequest, ScaleOperation};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries::{MODEL_NAME, model, program};
use crate::etcd::Etcd;
use crate::http::{Api, Reply};
use crate::kubernetes::Kubernetes;
use crate::poll::eventually;
use crate::process::{Process, Spec};
use crate::{grpc, leftovers};

/// How long leases live: short, since tests wait for leaders to be missed.
const LEASE_TTL: &str = "2";

/// A running cluster: etcd, coordinators, a gateway, and whatever workers they were told to have.
pub struct Elastic {
    /// A client of the gateway.
    pub api: Api,
    /// The coordinators, each with its address.
    pub coordinators: Vec<(Process, String)>,
    /// Its etcd.
    pub etcd: Etcd,
    gateway: Process,
    args: Vec<String>,
    env: Vec<(OsString, OsString)>,
    kubernetes: Option<Kubernetes>,
    // Held: the workers end when it is not.
    _owner: File,
    // Last, so that the processes end before their folder goes.
    dir: TempDir,
}

/// The command of a pool's workers that work.
pub fn worker(pool: &str, etcd: &Etcd) -> Value {
    let model = model();
    let args = [
        ["--role", pool],
        ["--listen", "127.0.0.1:0"],
        ["--etcd", etcd.url()],
        ["--lease-ttl", LEASE_TTL],
        ["--model", model.to_str().expect("a path in UTF-8")],
        ["--served-model-name", MODEL_NAME],
        ["--threads", "1"],
        ["--kv-memory", "128MiB"],
        ["--drain-timeout", "5"],
    ];
    command(pool, MODEL_NAME, &program("baton-worker"), &args.concat())
}

/// The command of a pool's workers.
pub fn command(pool: &str, model: &str, program: &Path, args: &[&str]) -> Value {
    json!({"pool": pool, "model": model, "program": program, "args": args})
}

/// The flags of a coordinator whose workers are pods.
fn launching_pods(flags: &[&str]) -> Vec<String> {
    ["--launcher", "kubernetes"].iter().chain(flags).map(|flag| (*flag).to_owned()).collect()
}

impl Elastic {
    /// Starts so many coordinators, with these flags and the pools that `pools` makes; no workers.
    pub async fn start(
        coordinators: usize,
        flags: &[&str],
        pools: impl FnOnce(&Etcd) -> Vec<Value>,
    ) -> Self {
        let (dir, etcd) = Self::begin().await;
        let templates = json!({"pools": pools(&etcd)});
        let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
        std::fs::write(path("workers.json"), templates.to_string()).expect("write the commands");
        let mut args: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        for (flag, value) in [
            ("--workers", path("workers.json")),
            ("--workers-dir", path("workers")),
            ("--workers-logs", path("logs")),
            ("--workers-owner", path("owner")),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        Self::with(coordinators, dir, etcd, args, Vec::new()).await
    }

    /// The same, with the pods of a scripted Kubernetes as workers. Pools are added to it later.
    pub async fn on_kubernetes(coordinators: usize, flags: &[&str]) -> Self {
        let (dir, etcd) = Self::begin().await;
        let kubernetes = Kubernetes::start(dir.path()).await;
        let (args, env) = (launching_pods(flags), vec![kubernetes.env()]);
        let mut cluster = Self::with(coordinators, dir, etcd, args, env).await;
        cluster.kubernetes = Some(kubernetes);
        cluster
    }

    /// The same, on the Kubernetes that a kubeconfig leads to: its pools, and what runs their pods,
    /// are the caller's.
    pub async fn on_kubeconfig(coordinators: usize, flags: &[&str], kubeconfig: &Path) -> Self {
        let (dir, etcd) = Self::begin().await;
        let env = vec![("KUBECONFIG".into(), kubeconfig.into())];
        Self::with(coordinators, dir, etcd, launching_pods(flags), env).await
    }

    async fn begin() -> (TempDir, Etcd) {
        let dir = tempfile::Builder::new().prefix("baton-scale-").tempdir().expect("a folder");
        let etcd = Etcd::start(dir.path()).await;
        (dir, etcd)
    }

    async fn with(
        coordinators: usize,
        dir: TempDir,
        etcd: Etcd,
        flags: Vec<String>,
        env: Vec<(OsString, OsString)>,
    ) -> Self {
        let owner = File::create(dir.path().join("owner")).expect("a file to lock");
        owner.lock().expect("lock it");
        let common = ["--listen", "127.0.0.1:0", "--etcd", etcd.url(), "--lease-ttl", LEASE_TTL];
        let spec = Spec::new("baton-gateway", program("baton-gateway"), common);
        let mut gateway = Process::start(&spec, dir.path());
        let mut cluster = Self {
            api: Api::new(&gateway.ready().await, None),
            coordinators: Vec::new(),
            args: common.iter().map(|it| (*it).to_owned()).chain(flags).collect(),
            env,
            etcd,
            gateway,
            kubernetes: None,
            _owner: owner,
            dir,
        };
        for _ in 0..coordinators {
            cluster.add_coordinator().await;
        }
        cluster
    }

    /// Its scripted Kubernetes.
    pub fn kubernetes(&mut self) -> &mut Kubernetes {
        self.kubernetes.as_mut().expect("a cluster on Kubernetes")
    }

    /// Starts another coordinator, with the same flags.
    pub async fn add_coordinator(&mut self) {
        let name = "baton-coordinator";
        let mut spec = Spec::new(name, program(name), &self.args);
        spec.env.clone_from(&self.env);
        let mut process = Process::start(&spec, self.dir.path());
        let address = process.ready().await;
        self.coordinators.push((process, address));
    }

    /// The folder of its files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Asks the gateway for a pool's size, and waits for the answer.
    pub async fn scale(&self, pool: &str, size: u32) -> Reply {
        self.api
            .post("/scale_elastic_ep", &json!({"new_data_parallel_size": size, "pool": pool}))
            .await
    }

    /// The same, which must succeed.
    pub async fn scaled(&self, pool: &str, size: u32) {
        let reply = self.scale(pool, size).await.ok();
        assert_eq!(reply, json!({"message": format!("Scaled to {size} data parallel engines")}));
        assert_eq!(self.registered(pool).len(), size as usize);
    }

    /// The workers of a pool that are registered.
    pub fn registered(&self, pool: &str) -> Vec<InstanceRecord> {
        let mut all = self.etcd.instances();
        all.retain(|record| record.role.as_str() == pool);
        all
    }

    /// The names of launched workers, sorted.
    pub fn launched(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("workers")).expect("list workers");
        let folders = entries.flatten().filter(|entry| entry.path().is_dir());
        let mut names: Vec<String> =
            folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// What a launched worker's supervisor tells of it.
    pub fn status(&self, name: &str) -> Value {
        let path: PathBuf = self.dir.path().join("workers").join(name).join("status.json");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// The process of a launched worker.
    pub fn pid(&self, name: &str) -> i32 {
        let pid = self.status(name)["pid"].as_i64().and_then(|pid| pid.try_into().ok());
        pid.filter(|pid| *pid > 0).unwrap_or_else(|| panic!("{name} does not run"))
    }

    /// The operations, oldest first, as the last coordinator has them.
    pub async fn operations(&self) -> Vec<ScaleOperation> {
        let (_, address) = self.coordinators.last().expect("a coordinator");
        let mut client = grpc::coordinator(address).await;
        let listed = client.list_scales(ListScalesRequest {}).await;
        listed.expect("the operations").into_inner().operations
    }

    /// Waits until the last operation is in this phase.
    pub async fn phase(&self, phase: &str) -> ScaleOperation {
        let what = format!("the operation is in phase {phase}");
        let look = async || match self.operations().await.pop() {
            Some(operation) if operation.phase == phase => Ok(operation),
            other => Err(format!("{other:?}")),
        };
        eventually(&what, Duration::from_secs(60), look).await.0
    }

    /// Which coordinator leads, by position.
    pub async fn leader(&self) -> usize {
        let (_, address) = self.coordinators.last().expect("a coordinator");
        let look = async || {
            let view = grpc::cluster_view(address).await;
            let leader = view.instances.iter().find(|instance| instance.id == view.leader);
            let position = leader.and_then(|leader| {
                self.coordinators.iter().position(|(_, address)| *address == leader.address)
            });
            position.ok_or_else(|| format!("{view:?}"))
        };
        eventually("a coordinator leads", Duration::from_secs(20), look).await.0
    }

    /// Ends everything; nothing may be left.
    pub async fn finish(mut self) {
        self.gateway.stop().await;
        for (coordinator, _) in &mut self.coordinators {
            coordinator.stop().await;
        }
        if let Some(kubernetes) = self.kubernetes.take() {
            kubernetes.finish().await;
        }
        // As when the owner ends.
        self._owner.unlock().expect("unlock");
        eventually("the workers follow their owner", Duration::from_secs(10), async || {
            let left = leftovers::processes(self.dir.path());
            let left: Vec<_> = left.iter().filter(|it| !it.contains("etcd")).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
        })
        .await;
        self.etcd.kill();
        leftovers::assert_none(self.dir.path());
    }
}
