//! What a StatefulSet's controller, the scheduler and the kubelet do, as far as tests need it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_coordinator::workers;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::objects::Resource;
use super::{Behaviour, NAMESPACE, Shared};
use crate::process::{Process, Spec};

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(25);

/// A pod that was ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Its name.
    pub pod: String,
    /// Whether its worker refused requests by then, and how many it had; `None` when it had no
    /// worker, or the worker did not answer.
    pub told: Option<(bool, u32)>,
}

struct Pod {
    behaviour: Behaviour,
    made: Instant,
    process: Option<Process>,
    ending: bool,
    restarts: u64,
}

/// Runs for ever.
pub(super) async fn run(shared: Shared, dir: PathBuf) {
    let mut pods: BTreeMap<String, Pod> = BTreeMap::new();
    let mut made = 0u8;
    loop {
        let wanted: Vec<(String, u64)> = {
            let objects = shared.lock().expect("nobody panicked");
            objects.sets.keys().map(|set| (set.clone(), objects.replicas(set))).collect()
        };
        for (set, replicas) in &wanted {
            for number in 0..*replicas {
                let name = format!("{set}-{number}");
                if pods.contains_key(&name) {
                    continue;
                }
                let mut objects = shared.lock().expect("nobody panicked");
                let behaviour = objects.behaviours[set].clone();
                objects.put(Resource::Pods, &name, new_pod(set, &name));
                let process = None;
                let made = Instant::now();
                pods.insert(name, Pod { behaviour, made, process, ending: false, restarts: 0 });
            }
        }
        let mut gone = Vec::new();
        for (name, pod) in &mut pods {
            let (set, number) = name.rsplit_once('-').expect("a number");
            let number: u64 = number.parse().expect("a number");
            let stays = wanted.iter().any(|(it, replicas)| it == set && number < *replicas);
            if !stays && !pod.ending {
                pod.ending = true;
                end(&shared, name, pod).await;
            }
            let ended = pod.process.as_mut().is_none_or(|process| process.exited().is_some());
            match pod.ending {
                true if ended => gone.push(name.clone()),
                true => {}
                false => live(&shared, name, pod, &dir, &mut made),
            }
        }
        for name in gone {
            pods.remove(&name);
            let mut objects = shared.lock().expect("nobody panicked");
            objects.pids.remove(&name);
            objects.delete(Resource::Pods, &name);
        }
        count(&shared);
        tokio::time::sleep(INTERVAL).await;
    }
}

fn new_pod(set: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": format!("uid-of-{name}"),
            "labels": {"baton.dev/pool": set, "statefulset.kubernetes.io/pod-name": name},
            "creationTimestamp": "2026-01-01T00:00:01Z",
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "StatefulSet", "name": set,
                "uid": format!("uid-of-{set}"), "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": {"containers": [{"name": "worker", "image": "baton"}]},
        "status": {"phase": "Pending"},
    })
}

fn container(restarts: u64, ready: bool, state: Value, last: Value) -> Value {
    json!([{
        "name": "worker", "image": "baton", "imageID": "", "ready": ready,
        "restartCount": restarts, "state": state, "lastState": last,
    }])
}

/// Tells a pod to end, as its deletion does.
async fn end(shared: &Shared, name: &str, pod: &mut Pod) {
    let address = pod.process.as_ref().and_then(address);
    let told = match &address {
        Some(address) => workers::status(address).await.ok(),
        None => None,
    };
    let told = told.map(|status| (status.draining, status.running + status.waiting));
    if let Some(process) = &pod.process {
        process.signal(Signal::SIGTERM);
    }
    let mut objects = shared.lock().expect("nobody panicked");
    objects.ends.push(End { pod: name.to_owned(), told });
    objects.change(Resource::Pods, name, |pod| {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:10:00Z");
    });
}

/// Where a worker serves, once it has said so.
pub(super) fn address(process: &Process) -> Option<String> {
    let out = process.stdout();
    let line = out.lines().find(|line| line.starts_with("ready "))?;
    line.split_whitespace().nth(2).map(str::to_owned)
}

/// Whatever a pod does next.
fn live(shared: &Shared, name: &str, pod: &mut Pod, dir: &Path, made: &mut u8) {
    let mut objects = shared.lock().expect("nobody panicked");
    let phase = objects.pods[name]["status"].clone();
    let mut status = phase.clone();
    match (&pod.behaviour, &mut pod.process) {
        (Behaviour::Works { program, args, after }, None) if pod.made.elapsed() >= *after => {
            *made += 1;
            let ip = format!("127.0.77.{made}");
            let mut args = args.clone();
            let listen = args.iter().position(|arg| arg == "--listen").expect("it listens");
            args[listen + 1] = format!("{ip}:0");
            let process = Process::start(&Spec::new(name, program.clone(), args), dir);
            objects.pids.insert(name.to_owned(), process.pid().try_into().expect("a pid"));
            pod.process = Some(process);
            let running = json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}});
            status = json!({
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "10.0.0.1",
                "containerStatuses": container(0, false, running, json!({})),
                "conditions": [{
                    "type": "Ready", "status": "False", "reason": "ContainersNotReady",
                    "lastTransitionTime": "2026-01-01T00:00:01Z",
                }],
            });
        }
        (Behaviour::Works { .. }, Some(process)) => {
            let ready = &mut status["conditions"][0];
            if ready["status"] == "False" && address(process).is_some() {
                ready["status"] = "True".into();
                ready["lastTransitionTime"] = "2026-01-01T00:00:09Z".into();
                status["containerStatuses"][0]["ready"] = true.into();
            }
        }
        (Behaviour::Waits { reason, message }, _) => {
            let waiting = json!({"waiting": {"reason": reason, "message": message}});
            status["containerStatuses"] = container(0, false, waiting, json!({}));
        }
        (Behaviour::Unschedulable(message), _) => {
            status["conditions"] = json!([{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": message, "lastTransitionTime": "2026-01-01T00:00:02Z",
            }]);
        }
        (Behaviour::Crashes { reason, exit_code, message }, _) => {
            pod.restarts = pod.made.elapsed().as_millis() as u64 / 300;
            let waiting = json!({"waiting": {
                "reason": "CrashLoopBackOff",
                "message": "back-off 10s restarting failed container=worker",
            }});
            let last = json!({"terminated": {
                "exitCode": exit_code, "reason": reason, "message": message,
            }});
            status["containerStatuses"] = container(pod.restarts, false, waiting, last);
        }
        (Behaviour::Works { .. }, None) => {
            let waiting = json!({"waiting": {"reason": "ContainerCreating"}});
            status["containerStatuses"] = container(0, false, waiting, json!({}));
        }
    }
    if status != phase {
        objects.change(Resource::Pods, name, |pod| pod["status"] = status);
    }
}

/// Writes the StatefulSets' status, which makes new versions of them as the real one does.
fn count(shared: &Shared) {
    let mut objects = shared.lock().expect("nobody panicked");
    for set in objects.sets.keys().cloned().collect::<Vec<_>>() {
        let of_set =
            objects.pods.values().filter(|it| it["metadata"]["labels"]["baton.dev/pool"] == set);
        let ready = |it: &&Value| it["status"]["containerStatuses"][0]["ready"] == true;
        let status = json!({
            "replicas": of_set.clone().count(), "readyReplicas": of_set.filter(ready).count(),
        });
        if objects.sets[&set]["status"] != status {
            objects.change(Resource::StatefulSets, &set, |it| it["status"] = status);
        }
    }
}
