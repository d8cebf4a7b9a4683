//! What coordinators do on a real Kubernetes: real API server, real controllers, real workers as
//! pods, and a double in the place of nodes.
//!
//! Each check has a namespace and a cluster of its own and prints one line. `tests/kubernetes/run`
//! builds what it needs.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_tests::elastic::{Elastic, worker};
use baton_tests::kubernetes::real::{ControlPlane, Kubelet};
use baton_tests::{MODEL_NAME, Reply, eventually, grpc};
use clap::{Parser, ValueEnum};
use futures::FutureExt as _;
use serde_json::json;
use tokio::task::JoinHandle;

/// The pool of each check.
const POOL: &str = "decode";
/// How long workers may take to come or go.
const WITHIN: Duration = Duration::from_secs(60);
/// How long the API server is away: longer than a worker takes to start.
const AWAY: Duration = Duration::from_secs(5);

/// What the launcher asks for.
const NEEDED: [&str; 6] = [
    "get statefulsets.apps/scale",
    "list pods",
    "list statefulsets.apps",
    "patch statefulsets.apps/scale",
    "watch pods",
    "watch statefulsets.apps",
];
/// What everybody may who is known at all: ask about oneself.
const EVERYBODYS: [&str; 2] = [
    "create selfsubjectaccessreviews.authorization.k8s.io",
    "create selfsubjectrulesreviews.authorization.k8s.io",
];
/// The same, since Kubernetes 1.28.
const WHO_AM_I: &str = "create selfsubjectreviews.authentication.k8s.io";
/// What would do harm. The rights as a whole are compared too: this is asked one by one, as the
/// API server does.
const HARMFUL: [&str; 34] = [
    "get statefulsets.apps",
    "create statefulsets.apps",
    "update statefulsets.apps",
    "patch statefulsets.apps",
    "delete statefulsets.apps",
    "deletecollection statefulsets.apps",
    "update statefulsets.apps/scale",
    "patch statefulsets.apps/status",
    "get pods",
    "create pods",
    "update pods",
    "patch pods",
    "delete pods",
    "deletecollection pods",
    "get pods/log",
    "create pods/exec",
    "create pods/attach",
    "create pods/portforward",
    "create pods/eviction",
    "patch pods/status",
    "get secrets",
    "list secrets",
    "watch secrets",
    "get configmaps",
    "list configmaps",
    "create serviceaccounts/token",
    "create rolebindings.rbac.authorization.k8s.io",
    "patch roles.rbac.authorization.k8s.io",
    "patch deployments.apps",
    "patch deployments.apps/scale",
    "update leases.coordination.k8s.io",
    "list pods in default",
    "list statefulsets.apps in default",
    "patch statefulsets.apps/scale in default",
];

#[derive(Parser)]
struct Args {
    /// Checks to make; all by default.
    checks: Vec<Check>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Check {
    /// The coordinator may do what it needs, and nothing else.
    Rights,
    /// A pool grows and shrinks.
    Scale,
    /// The API server is killed in the middle of a growth.
    Outage,
    /// A pod is deleted by hand.
    Deletion,
    /// Somebody else sets the replicas.
    Replicas,
    /// The rights are taken away and given back.
    Binding,
}

// One thread, the first: the processes that it starts die with it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut args = Args::parse();
    if args.checks.is_empty() {
        args.checks = Check::value_variants().to_vec();
    }
    let mut plane = ControlPlane::start().await;
    println!("Kubernetes {}, with a double of nodes", plane.version().await);
    let mut held = true;
    for check in args.checks {
        let name = check.to_possible_value().expect("a check with a name");
        let name = name.get_name().to_owned();
        // A check that failed may have left it so.
        plane.come_back().await;
        let began = Instant::now();
        let outcome = AssertUnwindSafe(make(check, &name, &mut plane)).catch_unwind().await;
        let (word, seen) = match outcome {
            Ok(seen) => ("ok", seen),
            Err(panic) => ("FAILED", message(panic)),
        };
        held &= word == "ok";
        println!("{word:<6} {name}: {seen} ({:.0} s)", began.elapsed().as_secs_f64());
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Makes a check in a namespace of this name: what was seen.
async fn make(check: Check, namespace: &str, plane: &mut ControlPlane) -> String {
    match check {
        Check::Rights => rights(plane, namespace).await,
        Check::Scale => scale(plane, namespace).await,
        Check::Outage => outage(plane, namespace).await,
        Check::Deletion => deletion(plane, namespace).await,
        Check::Replicas => replicas(plane, namespace).await,
        Check::Binding => binding(plane, namespace).await,
    }
}

/// What a harness function said when it failed, in one line.
fn message(panic: Box<dyn Any + Send>) -> String {
    let text = match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast_ref::<&str>().unwrap_or(&"it panicked")).to_owned(),
    };
    text.replace('\n', " ")
}

/// A cluster on a namespace of its own, with a pool of one worker.
struct Bed {
    cluster: Elastic,
    kubelet: Kubelet,
}

impl Bed {
    async fn start(plane: &ControlPlane, namespace: &str) -> Self {
        let kubeconfig = plane.add_namespace(namespace).await;
        plane.add_pool(namespace, POOL, MODEL_NAME).await;
        let cluster = Elastic::on_kubeconfig(1, &[], &kubeconfig).await;
        let commands = [worker(POOL, &cluster.etcd)];
        let kubelet = Kubelet::start(plane, namespace, &commands);
        cluster.scaled(POOL, 1).await;
        Self { cluster, kubelet }
    }

    async fn finish(self) {
        self.cluster.finish().await;
        self.kubelet.finish().await;
    }

    /// A completion must be answered.
    async fn answers(&self) {
        let body = json!({"model": MODEL_NAME, "prompt": "One two three", "max_tokens": 2});
        self.cluster.api.ok("/v1/completions", &body).await;
    }

    /// Asks for a pool's size, and does not wait.
    fn ask(&self, size: u32) -> JoinHandle<Reply> {
        let api = self.cluster.api.clone();
        tokio::spawn(async move {
            let body = json!({"new_data_parallel_size": size, "pool": POOL});
            api.post("/scale_elastic_ep", &body).await
        })
    }

    /// The workers' addresses by the names of their pods, as the coordinator tells them.
    async fn view(&self) -> BTreeMap<String, String> {
        let view = grpc::cluster_view(&self.cluster.coordinators[0].1).await;
        let workers = view.instances.into_iter().filter(|it| it.role == POOL);
        workers.map(|it| (it.name, it.address)).collect()
    }

    /// Waits until there are these pods and no others, and the coordinator sees their workers.
    async fn has(&self, plane: &ControlPlane, namespace: &str, names: &[&str]) {
        eventually("pods and workers are these", WITHIN, async || {
            let (pods, view) = (plane.pods(namespace).await, self.view().await);
            let good = pods == names && view.keys().eq(names.iter());
            if good { Ok(()) } else { Err(format!("{pods:?}, {view:?}")) }
        })
        .await;
    }

    /// The pods that were ended since so many were, sorted; each must have been drained before.
    fn drained_since(&self, before: usize) -> Vec<String> {
        let ends = self.kubelet.ends().split_off(before);
        assert!(ends.iter().all(|end| end.told == Some((true, 0))), "drained before: {ends:?}");
        let pods: BTreeSet<String> = ends.into_iter().map(|end| end.pod).collect();
        pods.into_iter().collect()
    }
}

async fn rights(plane: &ControlPlane, namespace: &str) -> String {
    plane.add_namespace(namespace).await;
    let mut wanted: Vec<&str> = NEEDED.into_iter().chain(EVERYBODYS).collect();
    wanted.sort_unstable();
    let rights = async |of| {
        let mut rights = plane.rights(namespace, of).await;
        rights.retain(|right| right != WHO_AM_I);
        rights
    };
    assert_eq!(rights(namespace).await, wanted, "in the coordinator's namespace");
    assert_eq!(rights("default").await, EVERYBODYS, "in another namespace");
    for what in NEEDED {
        assert!(plane.may(namespace, what).await, "it needs to {what}");
    }
    for what in HARMFUL {
        assert!(!plane.may(namespace, what).await, "it may {what}");
    }
    let (needed, harmful) = (NEEDED.join(", "), HARMFUL.len());
    format!("may {needed}, and nothing else; {harmful} others refused one by one")
}

async fn scale(plane: &ControlPlane, namespace: &str) -> String {
    let bed = Bed::start(plane, namespace).await;
    bed.answers().await;
    bed.cluster.scaled(POOL, 3).await;
    assert_eq!(plane.pods(namespace).await, ["decode-0", "decode-1", "decode-2"]);
    bed.has(plane, namespace, &["decode-0", "decode-1", "decode-2"]).await;
    bed.answers().await;
    bed.cluster.scaled(POOL, 1).await;
    assert_eq!(plane.pods(namespace).await, ["decode-0"]);
    assert_eq!(bed.drained_since(0), ["decode-1", "decode-2"]);
    let operation = bed.cluster.operations().await.pop().expect("a history");
    assert_eq!(operation.retired, ["decode-2", "decode-1"]);
    bed.answers().await;
    bed.finish().await;
    "1, 3, 1: the last pods went, drained before; answers before, between and after".to_owned()
}

async fn outage(plane: &mut ControlPlane, namespace: &str) -> String {
    let bed = Bed::start(plane, namespace).await;
    // So that the growth is not over before the API server is away.
    bed.kubelet.hold(true);
    let up = bed.ask(3);
    assert_eq!(bed.cluster.phase("join").await.launched, ["decode-1", "decode-2"]);
    plane.kill_api_server();
    bed.kubelet.hold(false);
    let began = Instant::now();
    while began.elapsed() < AWAY {
        bed.answers().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let operation = bed.cluster.operations().await.pop().expect("an operation");
    assert_eq!(operation.phase, "join", "it waits: {operation:?}");
    plane.come_back().await;
    up.await.expect("a reply").ok();
    assert_eq!(plane.pods(namespace).await, ["decode-0", "decode-1", "decode-2"]);
    bed.answers().await;
    bed.cluster.scaled(POOL, 1).await;
    assert_eq!(bed.drained_since(0), ["decode-1", "decode-2"]);
    bed.finish().await;
    format!("away for {AWAY:?} while 1 grew to 3: answers meanwhile, and it grew; then 1 again")
}

async fn deletion(plane: &ControlPlane, namespace: &str) -> String {
    let bed = Bed::start(plane, namespace).await;
    bed.cluster.scaled(POOL, 2).await;
    bed.has(plane, namespace, &["decode-0", "decode-1"]).await;
    let (uid, before) = (plane.uid(namespace, "decode-0").await, bed.view().await);
    plane.kubectl(&["delete", "pod", "decode-0", "--namespace", namespace, "--wait=false"]).await;
    let began = Instant::now();
    eventually("another pod serves in its place", WITHIN, async || {
        let now = (plane.uid(namespace, "decode-0").await, bed.view().await);
        let serves = now.1.contains_key("decode-0")
            && now.1.get("decode-1") == before.get("decode-1")
            && now.1.get("decode-0") != before.get("decode-0")
            && now.1.len() == 2;
        if serves && now.0.is_some() && now.0 != uid { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    let took = began.elapsed().as_secs_f64();
    bed.answers().await;
    let ended = bed.kubelet.ends();
    assert_eq!(ended.len(), 1, "one pod has ended: {ended:?}");
    // The coordinator was not asked: the pod drains by itself, on SIGTERM.
    assert_eq!(ended[0].told, Some((false, 0)), "{ended:?}");
    bed.cluster.scaled(POOL, 1).await;
    assert_eq!(bed.drained_since(1), ["decode-1"]);
    assert_eq!(plane.pods(namespace).await, ["decode-0"]);
    bed.answers().await;
    bed.finish().await;
    format!("decode-0 was another pod that served after {took:.1} s; then 2 to 1 took decode-1")
}

async fn replicas(plane: &ControlPlane, namespace: &str) -> String {
    let bed = Bed::start(plane, namespace).await;
    patch_replicas(plane, namespace, 3).await;
    bed.has(plane, namespace, &["decode-0", "decode-1", "decode-2"]).await;
    bed.cluster.scaled(POOL, 2).await;
    let operation = bed.cluster.operations().await.pop().expect("an operation");
    assert_eq!((operation.from, operation.size), (3, 2), "{operation:?}");
    assert_eq!(bed.drained_since(0), ["decode-2"]);
    patch_replicas(plane, namespace, 1).await;
    bed.has(plane, namespace, &["decode-0"]).await;
    bed.answers().await;
    bed.cluster.scaled(POOL, 2).await;
    let operation = bed.cluster.operations().await.pop().expect("an operation");
    assert_eq!((operation.from, operation.size), (1, 2), "{operation:?}");
    assert_eq!(plane.pods(namespace).await, ["decode-0", "decode-1"]);
    bed.answers().await;
    bed.finish().await;
    "kubectl set 3, then 1: the coordinator saw both, and scaled from 3 and from 1 to 2".to_owned()
}

async fn patch_replicas(plane: &ControlPlane, namespace: &str, replicas: u32) {
    let patch = json!({"spec": {"replicas": replicas}}).to_string();
    let patch = format!("--patch={patch}");
    let args = ["patch", "statefulset", POOL, "--namespace", namespace, "--type=merge", &patch];
    plane.kubectl(&args).await;
}

async fn binding(plane: &ControlPlane, namespace: &str) -> String {
    let bed = Bed::start(plane, namespace).await;
    plane.unbind_role(namespace).await;
    let error = bed.cluster.scale(POOL, 2).await.error(500).expect("it fails");
    let message = error["message"].as_str().expect("a text");
    let said = format!("\"system:serviceaccount:{namespace}:baton-coordinator\" cannot ");
    let refused = NEEDED.iter().find(|right| {
        let (verb, resource) = right.split_once(' ').expect("a verb and a resource");
        let resource = resource.replace(".apps", "");
        message.contains(&format!("cannot {verb} {resource} "))
            || message.contains(&format!("{said}{verb} resource \"{resource}\""))
    });
    let refused = refused.unwrap_or_else(|| panic!("it names no right: {message}"));
    assert!(message.contains(&said) && message.contains("403"), "{message}");
    assert!(message.contains("coordinator-rbac.yaml"), "it names the Role: {message}");
    assert_eq!(plane.replicas(namespace, POOL).await, 1);
    bed.answers().await;
    plane.bind_role(namespace).await;
    bed.cluster.scaled(POOL, 2).await;
    bed.answers().await;
    bed.finish().await;
    format!("without it, refused for want of `{refused}`; with it again, the same process scaled")
}
