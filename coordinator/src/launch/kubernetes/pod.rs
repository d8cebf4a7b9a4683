//! What a pod's status says of its worker.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition, PodStatus};
use kube::ResourceExt as _;

use crate::launch::HOPELESS;
use crate::scale::machine::Process;

/// How much of a container's last words is told.
const MESSAGE: usize = 600;
/// Reasons for which an image will not be there later either.
const NO_IMAGE: [&str; 2] = ["InvalidImageName", "ErrImageNeverPull"];
/// Words of registries that say the same.
const NO_SUCH_IMAGE: [&str; 5] =
    ["not found", "notfound", "manifest unknown", "denied", "unauthorized"];

/// A worker as its pod shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) process: Process,
    /// Why it does not serve, in Kubernetes' own words.
    pub(super) said: String,
}

/// Reads a pod that is to stay. `registered` tells whether its worker is known to the cluster.
///
/// A worker that has served counts as ready whatever the pod's probes say now, so that it is not
/// ended before it has said itself that it has nothing left to do.
pub(super) fn read(pod: &Pod, registered: bool) -> Shown {
    let none = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&none);
    let shown = |process, said: String| Shown { process, said };
    if pod.metadata.deletion_timestamp.is_some() {
        return shown(Process::Starting, "its pod was deleted and is to be replaced".into());
    }
    if status.phase.as_deref() == Some("Failed") {
        let said = words(&[status.reason.as_deref(), status.message.as_deref()]);
        return shown(Process::Crashed { times: 1, hopeless: false }, said);
    }
    for init in status.init_container_statuses.iter().flatten() {
        if let Some(shown) = trouble(init) {
            return shown;
        }
    }
    let worker = worker_container(pod);
    let containers = || status.container_statuses.iter().flatten();
    let own = containers().find(|it| Some(it.name.as_str()) == worker.as_deref());
    if let Some(shown) = own.and_then(trouble) {
        return shown;
    }
    let condition = |kind: &str| status.conditions.iter().flatten().find(|it| it.type_ == kind);
    let ready = condition("Ready");
    let since = own.and_then(|own| own.state.as_ref()?.running.as_ref()?.started_at.as_ref());
    // It was ready, and ceased to be so, since its container runs.
    let was_ready = |ready: &PodCondition| match (&ready.last_transition_time, since) {
        (Some(changed), Some(since)) => changed.0 > since.0,
        _ => false,
    };
    let is = |it: &PodCondition| it.status == "True";
    if registered || ready.is_some_and(|ready| is(ready) || was_ready(ready)) {
        return shown(Process::Ready, String::new());
    }
    let beside = containers().filter_map(trouble).next().map(|beside| beside.said);
    let unscheduled = condition("PodScheduled").filter(|it| !is(it));
    let unscheduled = unscheduled.map(|it| words(&[it.reason.as_deref(), it.message.as_deref()]));
    let before = own.and_then(|own| ended(own.last_state.as_ref()));
    let said = match (beside.or(unscheduled), since, before) {
        (Some(said), _, _) => said,
        (None, Some(_), Some(before)) => format!("it was started again after: {before}"),
        (None, Some(_), None) => {
            let name = pod.name_any();
            format!("its container runs but is not ready; see `kubectl logs {name}`")
        }
        (None, None, _) => {
            let phase = status.phase.as_deref().unwrap_or("Pending");
            format!("its pod is {phase}; see `kubectl describe pod {}`", pod.name_any())
        }
    };
    shown(Process::Starting, said)
}

/// Where the worker runs: the pod's default container, or else its first.
fn worker_container(pod: &Pod) -> Option<String> {
    let named = pod.annotations().get("kubectl.kubernetes.io/default-container").cloned();
    named.or_else(|| pod.spec.as_ref()?.containers.first().map(|first| first.name.clone()))
}

/// What keeps a container from running, if anything does.
fn trouble(container: &ContainerStatus) -> Option<Shown> {
    let state = container.state.as_ref()?;
    let name = &container.name;
    let times = u32::try_from(container.restart_count).unwrap_or(0) + 1;
    let crashed = |state: Option<&ContainerState>| {
        let terminated = state?.terminated.as_ref()?;
        let hopeless = HOPELESS.contains(&terminated.exit_code);
        let said = format!("container {name}: {}", ended(state)?);
        Some(Shown { process: Process::Crashed { times, hopeless }, said })
    };
    if let Some(terminated) = &state.terminated {
        // Init containers end well; whether others may, their pod's owner knows best.
        return if terminated.exit_code == 0 { None } else { crashed(Some(state)) };
    }
    let waiting = state.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().unwrap_or_default();
    if matches!(reason, "" | "PodInitializing" | "ContainerCreating") {
        return None;
    }
    if reason == "CrashLoopBackOff"
        && let Some(crashed) = crashed(container.last_state.as_ref())
    {
        // The restart that is waited for is not counted yet.
        return Some(crashed);
    }
    let message = waiting.message.as_deref();
    let said = format!("container {name}: {}", words(&[Some(reason), message]));
    let lower = message.unwrap_or_default().to_lowercase();
    let no_image = NO_IMAGE.contains(&reason)
        || (reason.contains("Image") && NO_SUCH_IMAGE.iter().any(|word| lower.contains(word)));
    let process = match no_image {
        true => Process::Crashed { times, hopeless: true },
        false => Process::Starting,
    };
    Some(Shown { process, said })
}

/// How a container ended: `OOMKilled, exit code 137: its last words`.
fn ended(state: Option<&ContainerState>) -> Option<String> {
    let terminated = state?.terminated.as_ref()?;
    let reason = terminated.reason.as_deref().unwrap_or("ended");
    let how = format!("{reason}, exit code {}", terminated.exit_code);
    // Of a log's last lines, the last is the error.
    let message = terminated.message.as_deref().map(str::trim).unwrap_or_default();
    let last = message.lines().rev().find_map(|line| line.strip_prefix("error: "));
    Some(words(&[Some(&how), last.or(Some(message))]))
}

fn words(parts: &[Option<&str>]) -> String {
    let parts = parts.iter().flatten().map(|part| part.trim()).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join(": ").chars().take(MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A pod whose only container is in this state.
    fn pod(state: Value, status: Value) -> Pod {
        let mut container = json!({
            "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
        });
        container.as_object_mut().unwrap().extend(state.as_object().unwrap().clone());
        let mut all = json!({"phase": "Pending", "containerStatuses": [container]});
        all.as_object_mut().unwrap().extend(status.as_object().unwrap().clone());
        let spec = json!({"containers": [{"name": "worker"}]});
        let pod = json!({"metadata": {"name": "decode-2"}, "spec": spec, "status": all});
        serde_json::from_value(pod).unwrap()
    }

    fn running(ready: bool, changed: &str) -> Pod {
        let status = if ready { "True" } else { "False" };
        let ready = json!({"type": "Ready", "status": status, "lastTransitionTime": changed});
        let state = json!({"state": {"running": {"startedAt": "2026-01-01T00:01:00Z"}}});
        pod(state, json!({"phase": "Running", "conditions": [ready]}))
    }

    #[test]
    fn a_worker_that_has_served_counts_as_ready_whatever_its_probe_says() {
        let loading = running(false, "2026-01-01T00:00:30Z");
        assert_eq!(read(&loading, false).process, Process::Starting);
        assert_eq!(read(&loading, true).process, Process::Ready, "others know it");
        assert_eq!(read(&running(true, "2026-01-01T00:02:00Z"), false).process, Process::Ready);
        let silent = running(false, "2026-01-01T00:05:00Z");
        assert_eq!(read(&silent, false).process, Process::Ready, "it was ready since its start");
    }

    #[test]
    fn what_keeps_a_pod_from_starting_is_told_in_kubernetes_own_words() {
        let waits = |reason: &str, message: &str| json!({"state": {"waiting": {"reason": reason, "message": message}}});
        let hopeless = |times| Process::Crashed { times, hopeless: true };
        let image = "Back-off pulling image \"baton:typo\": ErrImagePull: not found";
        for (state, status, process, said) in [
            (waits("ImagePullBackOff", image), json!({}), hopeless(1), image),
            (waits("ErrImagePull", "i/o timeout"), json!({}), Process::Starting, "i/o timeout"),
            (waits("ErrImageNeverPull", ""), json!({}), hopeless(1), "ErrImageNeverPull"),
            (
                waits("CreateContainerConfigError", "configmap \"x\" not found"),
                json!({}),
                Process::Starting,
                "configmap \"x\" not found",
            ),
            (
                json!({}),
                json!({"containerStatuses": null, "conditions": [{
                    "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient memory.",
                }]}),
                Process::Starting,
                "Unschedulable: 0/3 nodes are available: 3 Insufficient memory.",
            ),
            (
                json!({"restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}),
                json!({}),
                Process::Crashed { times: 3, hopeless: false },
                "OOMKilled, exit code 137",
            ),
            (
                json!({"state": {"terminated": {"reason": "Error", "exitCode": 66,
                    "message": "INFO loading\nerror: no model at /models/x\n"}}}),
                json!({}),
                hopeless(1),
                "container worker: Error, exit code 66: no model at /models/x",
            ),
            (
                json!({}),
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}),
                Process::Crashed { times: 1, hopeless: false },
                "Evicted: low on memory",
            ),
            (
                waits("PodInitializing", ""),
                json!({"initContainerStatuses": [{
                    "name": "model", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"terminated": {"exitCode": 1, "message": "error: no such model"}},
                }]}),
                Process::Crashed { times: 1, hopeless: false },
                "container model: ended, exit code 1: no such model",
            ),
        ] {
            let shown = read(&pod(state, status), false);
            assert_eq!(shown.process, process, "{}", shown.said);
            assert!(shown.said.contains(said), "{}", shown.said);
        }
    }

    #[test]
    fn a_container_beside_the_worker_does_not_make_it_a_dead_one() {
        let mut pod = running(true, "2026-01-01T00:02:00Z");
        let beside = json!({
            "name": "proxy", "image": "i", "imageID": "", "ready": false, "restartCount": 4,
            "state": {"terminated": {"exitCode": 1}},
        });
        let statuses = pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
        statuses.push(serde_json::from_value(beside).unwrap());
        assert_eq!(read(&pod, false).process, Process::Ready);
    }
}
