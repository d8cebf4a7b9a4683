//! A scripted API server of Kubernetes, for one namespace: StatefulSets, their scale, pods, lists
//! and watches, in the shapes of the real one.
//!
//! What stands behind it is real where it matters: a pod that "runs" is a worker's process, on an
//! IP of its own, and a pod that is deleted gets SIGTERM. The controller of StatefulSets is a loop
//! in the test ([`controller`]). Tests have the server refuse, forget, break off and be away.
//! [`real`] has a real API server with the real controllers.

mod controller;
mod objects;
pub mod real;
mod server;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

pub use self::controller::End;
use self::objects::{Objects, Resource};
use self::server::Server;
use crate::ports;

/// The namespace.
pub const NAMESPACE: &str = "prod";

/// What becomes of the next pods of a StatefulSet.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// A worker starts so long after the pod was made.
    Works {
        /// The program of its container.
        program: PathBuf,
        /// Its arguments; the value of `--listen` is replaced by the pod's address.
        args: Vec<String>,
        /// How long scheduling and pulling take.
        after: Duration,
    },
    /// The container waits for ever.
    Waits {
        /// As `ImagePullBackOff`.
        reason: &'static str,
        /// What the kubelet says of it.
        message: &'static str,
    },
    /// No node takes the pod.
    Unschedulable(&'static str),
    /// The container ends like this, again and again.
    Crashes {
        /// As `OOMKilled`.
        reason: &'static str,
        /// What its process ended with.
        exit_code: i32,
        /// Its last words.
        message: &'static str,
    },
}

impl Behaviour {
    /// As the command of a pool's workers says.
    pub fn works(command: &Value, after: Duration) -> Self {
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let args = command["args"].as_array().expect("arguments").iter().map(text).collect();
        Self::Works { program: text(&command["program"]).into(), args, after }
    }
}

type Shared = Arc<Mutex<Objects>>;

/// The API server, and what stands behind it.
pub struct Kubernetes {
    objects: Shared,
    server: Option<Server>,
    port: u16,
    controller: JoinHandle<()>,
    kubeconfig: PathBuf,
}

impl Kubernetes {
    /// Starts it, with its files and those of the pods' workers in this folder.
    pub async fn start(dir: &Path) -> Self {
        let objects: Shared = Arc::default();
        let port = ports::free();
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
            "users": [{"name": "coordinator", "user": {"token": server::TOKEN}}],
            "contexts": [{"name": "test", "context":
                {"cluster": "test", "user": "coordinator", "namespace": NAMESPACE}}],
        });
        let kubeconfig = dir.join("kubeconfig");
        std::fs::write(&kubeconfig, config.to_string()).expect("write the kubeconfig");
        let controller = tokio::spawn(controller::run(Arc::clone(&objects), dir.to_owned()));
        let mut it = Self { objects, server: None, port, controller, kubeconfig };
        it.come_back().await;
        it
    }

    /// The variable by which a coordinator finds it.
    pub fn env(&self) -> (OsString, OsString) {
        ("KUBECONFIG".into(), self.kubeconfig.clone().into())
    }

    /// The server is away, and all its connections are cut.
    pub async fn go_away(&mut self) {
        self.server.take().expect("it is there").stop().await;
    }

    /// The server is there again, with what it had.
    pub async fn come_back(&mut self) {
        self.server = Some(Server::start(self.port, Arc::clone(&self.objects)).await);
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().expect("nobody panicked")
    }

    /// Adds a StatefulSet that is a pool.
    pub fn add_pool(&self, pool: &str, model: &str, behaviour: Behaviour) {
        let labels = json!({"baton.dev/pool": pool, "app.kubernetes.io/name": "baton"});
        let set = json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {
                "name": pool, "namespace": NAMESPACE, "uid": format!("uid-of-{pool}"),
                "labels": labels, "annotations": {"baton.dev/model": model},
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "managedFields": [{
                    "manager": "kubectl-client-side-apply", "operation": "Update",
                    "apiVersion": "apps/v1", "time": "2026-01-01T00:00:00Z",
                    "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:replicas": {}}},
                }],
            },
            "spec": {
                "replicas": 0, "serviceName": pool, "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": []}},
            },
            "status": {"replicas": 0, "readyReplicas": 0},
        });
        let mut objects = self.objects();
        objects.behaviours.insert(pool.to_owned(), behaviour);
        objects.put(Resource::StatefulSets, pool, set);
    }

    /// What becomes of the pool's next pods.
    pub fn behave(&self, pool: &str, behaviour: Behaviour) {
        self.objects().behaviours.insert(pool.to_owned(), behaviour);
    }

    /// How many pods a pool is to have.
    pub fn replicas(&self, pool: &str) -> u64 {
        self.objects().replicas(pool)
    }

    /// As `kubectl scale` does it.
    pub fn kubectl_scale(&self, pool: &str, replicas: u64) {
        self.objects().scale(pool, replicas, "kubectl");
    }

    /// The pods that are there.
    pub fn pods(&self) -> Vec<String> {
        self.objects().pods.keys().cloned().collect()
    }

    /// The process of a pod's worker.
    pub fn pid(&self, pod: &str) -> i32 {
        *self.objects().pids.get(pod).unwrap_or_else(|| panic!("{pod} does not run"))
    }

    /// The pods that were ended, and what their workers said of themselves just then.
    pub fn ends(&self) -> Vec<End> {
        self.objects().ends.clone()
    }

    /// Refuses a verb on a resource, as when no Role allows it.
    pub fn forbid(&self, verb: &'static str, resource: &'static str) {
        self.objects().forbidden = Some((verb, resource));
        self.cut_watches();
    }

    /// Refuses nothing any more.
    pub fn allow_all(&self) {
        self.objects().forbidden = None;
    }

    /// Answers so many patches with a conflict.
    pub fn conflicts(&self, count: u32) {
        self.objects().conflicts = count;
    }

    /// From now on watches tell of changes so long after them; lists have them at once.
    pub fn tell_late(&self, lag: Duration) {
        self.objects().lag = lag;
    }

    /// Cuts all watches in the middle of an event.
    pub fn cut_watches(&self) {
        self.objects().cut();
    }

    /// Forgets all versions but the last.
    pub fn forget_versions(&self) {
        self.objects().forget();
    }

    /// What was asked of it, as `patch statefulsets/scale decode 3` or `watch pods 17`.
    pub fn requests(&self) -> Vec<String> {
        self.objects().requests.clone()
    }

    /// Ends all pods.
    pub async fn finish(self) {
        self.controller.abort();
        // It drops the processes, which kills them.
        let _ = self.controller.await;
        if let Some(server) = self.server {
            server.stop().await;
        }
    }
}
