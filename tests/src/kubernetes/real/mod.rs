//! A real Kubernetes without nodes: what `tests/kubernetes/control-plane` has built.
//!
//! [`ControlPlane`] owns the processes (etcd, the API server, the controllers, and a proxy that
//! speaks TLS for the test), their folder, and what an administrator does: namespaces with the
//! repository's own Role, StatefulSets, questions about rights. [`Kubelet`] is the double of what
//! is missing, a node: it owns the workers' processes.
//!
//! What a real one does by itself is tested here: rights, conflicts, versions, watches, controllers.
//! What it seldom does when it is waited for is left to the scripted API server
//! ([`super::Kubernetes`]).

mod kubelet;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

pub use self::kubelet::Kubelet;
use crate::binaries::repository;
use crate::http::{Api, Reply};
use crate::poll::eventually;
use crate::ports;
use crate::process::{Process, Spec};

/// How long a program may take until it answers, and a right until it holds.
const WITHIN: Duration = Duration::from_secs(60);
/// How long a coordinator's token is good for: longer than any test takes.
const TOKEN_SECONDS: u64 = 3 * 60 * 60;
/// The service account of coordinators, and the name of its RoleBinding.
const COORDINATOR: &str = "baton-coordinator";
/// Their rights.
const RBAC: &str = "deploy/kubernetes/base/coordinator-rbac.yaml";
const API_SERVER: &str = "kube-apiserver";
const JSON: &str = "application/json";

/// The programs of Kubernetes that need no node.
#[derive(Debug)]
pub struct ControlPlane {
    api: Api,
    programs: BTreeMap<&'static str, Process>,
    // Last, so that the processes end before their folder goes.
    dir: TempDir,
}

impl ControlPlane {
    /// Starts one, of what was built before, and waits until it makes pods.
    ///
    /// The programs die with the thread that calls this, as all processes of the harness do.
    pub async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("baton-kubernetes-").tempdir();
        let dir = dir.expect("a folder");
        let (port, etcd, proxy) = (ports::free(), ports::free(), ports::free());
        let prepared = Command::new(repository().join("tests/kubernetes/control-plane"))
            .arg("prepare")
            .arg(dir.path())
            .args([port.to_string(), etcd.to_string()])
            .status()
            .expect("run control-plane");
        assert!(prepared.success(), "control-plane prepare: {prepared}");
        let api = Api::new(&format!("http://127.0.0.1:{proxy}"), None);
        let mut it = Self { api, programs: BTreeMap::new(), dir };
        it.run("etcd");
        it.run(API_SERVER);
        eventually("the API server listens", WITHIN, async || {
            it.assert_alive();
            let connected = TcpStream::connect(("127.0.0.1", port)).await;
            connected.map(drop).map_err(|error| error.to_string())
        })
        .await;
        // It trusts the test's authority, and shows the administrator's token.
        let kubeconfig = it.kubeconfig();
        let kubeconfig = kubeconfig.to_str().expect("a path in UTF-8");
        let args = ["--kubeconfig", kubeconfig, "proxy", "--address=127.0.0.1"];
        let args = args.map(str::to_owned).into_iter().chain([format!("--port={proxy}")]);
        let spec = Spec::new("kubectl-proxy", "kubectl".into(), args);
        it.programs.insert("kubectl-proxy", Process::start(&spec, it.dir.path()));
        it.answers("/readyz").await;
        it.run("kube-controller-manager");
        // Its first work; no pod is made before.
        it.answers("/api/v1/namespaces/default/serviceaccounts/default").await;
        it
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Starts a program with the arguments that were prepared for it.
    fn run(&mut self, name: &'static str) {
        let path = self.dir.path().join(format!("{name}.args"));
        let text = std::fs::read_to_string(&path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut lines = text.lines();
        let program = lines.next().expect("a program").into();
        let process = Process::start(&Spec::new(name, program, lines), self.dir.path());
        self.programs.insert(name, process);
    }

    fn assert_alive(&mut self) {
        for process in self.programs.values_mut() {
            if let Some(status) = process.exited() {
                panic!("{} ended with {status}:\n{}", process.name(), process.stderr());
            }
        }
    }

    async fn answers(&mut self, path: &str) {
        eventually(&format!("Kubernetes answers {path}"), WITHIN, async || {
            self.assert_alive();
            let reply = self.api.send(Method::GET, path, None, "").await;
            let reply = reply.map_err(|error| format!("{error:?}"))?;
            if reply.status.is_success() { Ok(()) } else { Err(shown(&reply)) }
        })
        .await;
    }

    /// As it says itself.
    pub async fn version(&self) -> String {
        let version = self.api.get("/version").await.ok();
        text(&version["gitVersion"]).to_owned()
    }

    /// The API server dies; etcd and the controllers live on.
    pub fn kill_api_server(&mut self) {
        self.programs.remove(API_SERVER).expect("it runs").kill();
    }

    /// The API server is there again, unless it was there all the time.
    pub async fn come_back(&mut self) {
        if !self.programs.contains_key(API_SERVER) {
            self.run(API_SERVER);
        }
        self.answers("/readyz").await;
    }

    /// Adds a namespace in which coordinators have their Role: the kubeconfig of one.
    pub async fn add_namespace(&self, namespace: &str) -> PathBuf {
        let body = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace},
        });
        self.create("/api/v1/namespaces", &body).await;
        let accounts = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        let first = format!("{accounts}/default");
        eventually("the namespace has a service account", WITHIN, async || {
            let reply = self.api.get(&first).await;
            if reply.status.is_success() { Ok(()) } else { Err(shown(&reply)) }
        })
        .await;
        self.bind_role(namespace).await;
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS},
        });
        let made = self.create(&format!("{accounts}/{COORDINATOR}/token"), &body).await;
        let config = std::fs::read_to_string(self.kubeconfig()).expect("read the kubeconfig");
        let mut config: Value = serde_json::from_str(&config).expect("a kubeconfig in JSON");
        config["users"][0]["user"] = json!({"token": text(&made["status"]["token"])});
        config["contexts"][0]["context"]["namespace"] = namespace.into();
        let path = self.dir.path().join(format!("{namespace}.kubeconfig"));
        std::fs::write(&path, config.to_string()).expect("write a kubeconfig");
        path
    }

    /// Applies the repository's Role for coordinators, and waits until it holds.
    pub async fn bind_role(&self, namespace: &str) {
        let manifest = repository().join(RBAC);
        let manifest = manifest.to_str().expect("a path in UTF-8");
        self.kubectl(&["apply", "--namespace", namespace, "--filename", manifest]).await;
        self.role_holds(namespace, true).await;
    }

    /// Takes the Role away from the coordinators, and waits until they have it no more.
    pub async fn unbind_role(&self, namespace: &str) {
        self.kubectl(&["delete", "rolebinding", COORDINATOR, "--namespace", namespace]).await;
        self.role_holds(namespace, false).await;
    }

    /// The authorizer sees Roles by a watch, a moment later.
    async fn role_holds(&self, namespace: &str, holds: bool) {
        eventually("the Role is taken note of", WITHIN, async || {
            let may = self.may(namespace, "patch statefulsets.apps/scale").await;
            if may == holds { Ok(()) } else { Err(format!("coordinators may patch: {may}")) }
        })
        .await;
    }

    /// Whether coordinators of a namespace may do this there, as `kubectl auth can-i --as` asks:
    /// `patch statefulsets.apps/scale`, or `list pods in default` for another namespace.
    pub async fn may(&self, namespace: &str, what: &str) -> bool {
        let (verb, object) = what.split_once(' ').expect("a verb and a resource");
        let (object, place) = object.split_once(" in ").unwrap_or((object, namespace));
        let (object, subresource) = object.split_once('/').unwrap_or((object, ""));
        let (resource, group) = object.split_once('.').unwrap_or((object, ""));
        let spec = json!({"resourceAttributes": {
            "namespace": place, "verb": verb, "group": group, "resource": resource,
            "subresource": subresource,
        }});
        let review = self.review(namespace, "SelfSubjectAccessReview", spec).await;
        review["status"]["allowed"].as_bool().expect("an answer")
    }

    /// All that coordinators of `namespace` may do in the namespace `place`, sorted, in the form
    /// that [`Self::may`] takes.
    pub async fn rights(&self, namespace: &str, place: &str) -> Vec<String> {
        let spec = json!({"namespace": place});
        let review = self.review(namespace, "SelfSubjectRulesReview", spec).await;
        let status = &review["status"];
        assert_eq!(status["incomplete"], json!(false), "{status}");
        let mut rights = Vec::new();
        for rule in status["resourceRules"].as_array().expect("rules") {
            for verb in texts(&rule["verbs"]) {
                for resource in texts(&rule["resources"]) {
                    for group in texts(&rule["apiGroups"]) {
                        rights.push(right(verb, resource, group));
                    }
                }
            }
        }
        rights.sort();
        rights
    }

    async fn review(&self, namespace: &str, kind: &str, spec: Value) -> Value {
        let who = format!("system:serviceaccount:{namespace}:{COORDINATOR}");
        let path = format!("/apis/authorization.k8s.io/v1/{}s", kind.to_lowercase());
        let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec});
        let headers = [("Impersonate-User", who.as_str()), ("Content-Type", JSON)];
        let reply = self.api.send_with(Method::POST, &path, &headers, &body.to_string()).await;
        assert!(reply.status.is_success(), "{kind}: {}", shown(&reply));
        reply.json()
    }

    /// Adds a StatefulSet that is a pool, of no pods. Its template is for a [`Kubelet`], which
    /// knows by the pool what to run.
    pub async fn add_pool(&self, namespace: &str, pool: &str, model: &str) {
        let labels = json!({"app.kubernetes.io/name": "baton", "baton.dev/pool": pool});
        let body = json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {
                "name": pool, "labels": labels, "annotations": {"baton.dev/model": model},
            },
            "spec": {
                "replicas": 0, "serviceName": pool, "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 30,
                    "containers": [{"name": "worker", "image": "baton"}],
                }},
            },
        });
        self.create(&format!("/apis/apps/v1/namespaces/{namespace}/statefulsets"), &body).await;
    }

    /// How many pods a pool is to have.
    pub async fn replicas(&self, namespace: &str, pool: &str) -> u64 {
        let path = format!("/apis/apps/v1/namespaces/{namespace}/statefulsets/{pool}");
        self.api.get(&path).await.ok()["spec"]["replicas"].as_u64().expect("a number")
    }

    /// The names of the pods that are there, sorted.
    pub async fn pods(&self, namespace: &str) -> Vec<String> {
        let list = self.api.get(&format!("/api/v1/namespaces/{namespace}/pods")).await.ok();
        let pods = list["items"].as_array().expect("pods").iter();
        let mut names: Vec<String> =
            pods.map(|pod| text(&pod["metadata"]["name"]).to_owned()).collect();
        names.sort();
        names
    }

    /// The uid of a pod, if it is there.
    pub async fn uid(&self, namespace: &str, pod: &str) -> Option<String> {
        let reply = self.api.get(&format!("/api/v1/namespaces/{namespace}/pods/{pod}")).await;
        if reply.status == StatusCode::NOT_FOUND {
            return None;
        }
        Some(text(&reply.ok()["metadata"]["uid"]).to_owned())
    }

    /// What an administrator's kubectl prints.
    pub async fn kubectl(&self, args: &[&str]) -> String {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.kubeconfig());
        command.arg("--request-timeout=20s").args(args);
        // Not in the test's only thread, where the double of a node runs too.
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let output = output.expect("a thread").expect("run kubectl");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {}: {said}", args.join(" "));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    async fn create(&self, path: &str, body: &Value) -> Value {
        let reply = self.api.post(path, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{path}: {}", reply.text);
        reply.json()
    }

    /// Where the files of a namespace's pods are.
    fn files(&self, namespace: &str) -> PathBuf {
        self.dir.path().join(namespace)
    }
}

/// A right as [`ControlPlane::may`] takes it, of what a rule says.
fn right(verb: &str, resource: &str, group: &str) -> String {
    let group = if group.is_empty() { String::new() } else { format!(".{group}") };
    match resource.split_once('/') {
        Some((resource, subresource)) => format!("{verb} {resource}{group}/{subresource}"),
        None => format!("{verb} {resource}{group}"),
    }
}

fn shown(reply: &Reply) -> String {
    format!("{} {}", reply.status, reply.text)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

fn texts(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().map(text)
}
