//! The double of a node: what scheduler and kubelet do for the pods of pools, with workers in the
//! place of containers.
//!
//! It binds pods, starts a worker for each on an IP of its own, tells the API server when that has
//! said that it is ready, sends SIGTERM when the pod is deleted, and confirms the deletion when the
//! worker has ended. Pods are told apart by their uid, so that one which follows another of the
//! same name is another. Beyond that it does nothing: containers that end are not started again,
//! probes are not asked, grace periods do not end.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_coordinator::workers;
use nix::sys::signal::Signal;
use prost_types::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{ControlPlane, JSON, shown, text};
use crate::http::Api;
use crate::kubernetes::End;
use crate::kubernetes::controller::address;
use crate::process::{Process, Spec};

/// Between two looks at the pods.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long the API server may take for an answer. While it is away the proxy says so at once.
const CALL_WITHIN: Duration = Duration::from_secs(5);
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// A node for one namespace, for as long as it lives.
#[derive(Debug)]
pub struct Kubelet {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

/// What its owner sets and asks.
#[derive(Debug, Default)]
struct Seen {
    held: bool,
    ends: Vec<End>,
    /// What went wrong in the last look.
    trouble: Option<String>,
}

impl Kubelet {
    /// Starts one, with what the pods of each pool run, as `elastic::command` makes it.
    pub fn start(plane: &ControlPlane, namespace: &str, commands: &[Value]) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let of = |command: &Value| {
            let args = command["args"].as_array().expect("arguments").iter();
            let args = args.map(|arg| text(arg).to_owned()).collect();
            let program = text(&command["program"]).into();
            (text(&command["pool"]).to_owned(), Container { program, args })
        };
        let node = Node {
            api: plane.api.clone(),
            path: format!("/api/v1/namespaces/{namespace}/pods"),
            containers: commands.iter().map(of).collect(),
            dir: plane.files(namespace),
            seen: Arc::clone(&seen),
            pods: BTreeMap::new(),
            started: 0,
        };
        Self { seen, task: tokio::spawn(node.run()) }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nobody panicked")
    }

    /// Whether new pods wait, as on a node that pulls an image for long.
    pub fn hold(&self, held: bool) {
        self.seen().held = held;
    }

    /// The pods with a worker that were ended, and what their workers said of themselves just then.
    pub fn ends(&self) -> Vec<End> {
        self.seen().ends.clone()
    }

    /// Ends all workers, without telling anybody.
    pub async fn finish(mut self) {
        self.task.abort();
        // It drops the processes, which kills them.
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
        if std::thread::panicking() {
            // Its own panic may have been the first.
            let trouble = self.seen.lock().ok().and_then(|seen| seen.trouble.clone());
            eprintln!("--- the node's double: {}", trouble.as_deref().unwrap_or("no trouble"));
        }
    }
}

/// What a pod of a pool runs.
#[derive(Debug)]
struct Container {
    program: PathBuf,
    args: Vec<String>,
}

struct Node {
    api: Api,
    /// The path of the namespace's pods.
    path: String,
    /// By pool.
    containers: BTreeMap<String, Container>,
    dir: PathBuf,
    seen: Arc<Mutex<Seen>>,
    /// By uid; those that were started.
    pods: BTreeMap<String, Pod>,
    /// How many were ever.
    started: u8,
}

struct Pod {
    process: Process,
    ip: String,
    started: String,
    /// What the API server knows of it.
    told: Option<State>,
    ending: bool,
}

/// Of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Loading,
    Ready,
    /// With this exit code.
    Ended(i32),
}

impl Node {
    async fn run(mut self) {
        loop {
            let trouble = self.look().await.err();
            self.seen.lock().expect("nobody panicked").trouble = trouble;
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// One step for each pod. What the API server has not taken is tried again with the next look.
    async fn look(&mut self) -> Result<(), String> {
        let path = format!("{}?labelSelector=baton.dev/pool", self.path);
        let list = self.call(Method::GET, &path, JSON, String::new()).await?;
        let pods = list["items"].as_array().expect("a list of pods");
        let there: BTreeSet<&str> = pods.iter().map(|pod| text(&pod["metadata"]["uid"])).collect();
        // Those that were taken away without asking.
        self.pods.retain(|uid, _| there.contains(uid.as_str()));
        let mut trouble = Ok(());
        for pod in pods {
            if let Err(why) = self.step(pod).await {
                trouble = Err(why);
            }
        }
        trouble
    }

    async fn step(&mut self, pod: &Value) -> Result<(), String> {
        let metadata = &pod["metadata"];
        let (name, uid) = (text(&metadata["name"]), text(&metadata["uid"]));
        if !metadata["deletionTimestamp"].is_null() {
            return self.end(name, uid).await;
        }
        if !self.pods.contains_key(uid) {
            let held = self.seen.lock().expect("nobody panicked").held;
            if held {
                return Ok(());
            }
            // Pods that no node has are deleted at once, so this comes first.
            if pod["spec"]["nodeName"].is_null() {
                return self.bind(name, uid).await;
            }
            self.begin(name, uid, text(&metadata["labels"]["baton.dev/pool"]));
        }
        self.tell(name, uid).await
    }

    async fn bind(&self, name: &str, uid: &str) -> Result<(), String> {
        let body = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "uid": uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": "double"},
        });
        let path = format!("{}/{name}/binding", self.path);
        self.call(Method::POST, &path, JSON, body.to_string()).await.map(drop)
    }

    fn begin(&mut self, name: &str, uid: &str, pool: &str) {
        self.started = self.started.checked_add(1).expect("an IP for each pod");
        let ip = format!("127.0.77.{}", self.started);
        let container = self.containers.get(pool);
        let container = container.unwrap_or_else(|| panic!("nothing to run for pool {pool}"));
        let mut args = container.args.clone();
        let listen = args.iter().position(|arg| arg == "--listen").expect("it listens");
        args[listen + 1] = format!("{ip}:0");
        let process = Process::start(&Spec::new(name, container.program.clone(), args), &self.dir);
        let pod = Pod { process, ip, started: now(), told: None, ending: false };
        self.pods.insert(uid.to_owned(), pod);
    }

    async fn tell(&mut self, name: &str, uid: &str) -> Result<(), String> {
        let pod = self.pods.get_mut(uid).expect("it was started");
        let state = pod.state();
        if pod.told == Some(state) {
            return Ok(());
        }
        let body = json!({"metadata": {"uid": uid}, "status": pod.status(state)});
        let path = format!("{}/{name}/status", self.path);
        self.call(Method::PATCH, &path, STRATEGIC, body.to_string()).await?;
        self.pods.get_mut(uid).expect("it was started").told = Some(state);
        Ok(())
    }

    async fn end(&mut self, name: &str, uid: &str) -> Result<(), String> {
        if let Some(pod) = self.pods.get_mut(uid) {
            if !pod.ending {
                pod.ending = true;
                let told = match address(&pod.process) {
                    Some(address) => workers::status(&address).await.ok(),
                    None => None,
                };
                let told = told.map(|status| (status.draining, status.running + status.waiting));
                let end = End { pod: name.to_owned(), told };
                self.seen.lock().expect("nobody panicked").ends.push(end);
                if pod.process.exited().is_none() {
                    pod.process.signal(Signal::SIGTERM);
                }
            }
            if pod.process.exited().is_none() {
                return Ok(());
            }
        }
        let body = json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0,
            "preconditions": {"uid": uid},
        });
        let path = format!("{}/{name}", self.path);
        self.call(Method::DELETE, &path, JSON, body.to_string()).await?;
        self.pods.remove(uid);
        Ok(())
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        media: &str,
        body: String,
    ) -> Result<Value, String> {
        let call = self.api.send(method, path, Some(media), body);
        let reply = tokio::time::timeout(CALL_WITHIN, call).await;
        let reply = reply.map_err(|_| format!("{path}: no answer within {CALL_WITHIN:?}"))?;
        let reply = reply.map_err(|error| format!("{path}: {error:?}"))?;
        if !reply.status.is_success() {
            return Err(format!("{path}: {}", shown(&reply)));
        }
        Ok(reply.json())
    }
}

impl Pod {
    fn state(&mut self) -> State {
        match self.process.exited() {
            Some(status) => {
                let by_signal = status.signal().map(|signal| 128 + signal);
                State::Ended(status.code().or(by_signal).expect("it has ended"))
            }
            None if address(&self.process).is_some() => State::Ready,
            None => State::Loading,
        }
    }

    fn status(&self, state: State) -> Value {
        let ready = state == State::Ready;
        let container = match state {
            State::Loading | State::Ready => json!({"running": {"startedAt": self.started}}),
            State::Ended(code) => json!({"terminated": {
                "exitCode": code, "reason": "Error", "startedAt": self.started,
                "finishedAt": now(), "message": self.process.stderr(),
            }}),
        };
        json!({
            "phase": "Running", "startTime": self.started, "hostIP": "127.0.0.1",
            "podIP": self.ip, "podIPs": [{"ip": self.ip}],
            "containerStatuses": [{
                "name": "worker", "image": "baton", "imageID": "", "ready": ready,
                "restartCount": 0, "state": container,
            }],
            "conditions": [{
                "type": "Ready", "status": if ready { "True" } else { "False" },
                "lastTransitionTime": now(),
            }],
        })
    }
}

/// The time as Kubernetes writes it, in whole seconds.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set");
    let seconds = since.as_secs().try_into().expect("a time");
    Timestamp { seconds, nanos: 0 }.to_string()
}
