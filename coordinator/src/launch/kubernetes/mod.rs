//! Workers as pods of StatefulSets.
//!
//! A pool is a StatefulSet with a label and an annotation ([`set`]); a worker is one of its pods,
//! under the pod's name. All that is ever written is the number of replicas, through the scale
//! subresource and only if the StatefulSet is still the one that was looked at. The next
//! coordinator finds everything in the API server again.
//!
//! Deployments are not taken. Which pod of theirs goes is the choice of the ReplicaSet's
//! controller: `controller.kubernetes.io/pod-deletion-cost` is a hint that ranks behind whether
//! pods are scheduled, running and ready, so a worker with requests could go in place of the
//! drained one. Nor can their pods be named before they are there, and what a scale operation
//! launches is recorded first. A StatefulSet ends its last pod, and calls the next one by number.

mod call;
mod pod;
mod set;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use baton_membership::{InstanceRecord, Membership};
use baton_proto::InstanceRole;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Config, ResourceExt as _};
use serde_json::json;
use tokio::sync::Mutex;
use tracing::info;

use self::call::{refused, within};
use self::set::Set;
use self::watch::{Wanted, Watched};
use super::{LaunchError, Launched, Launcher, Survey, WorkerSpec};
use crate::scale::machine::{Process, Row};
use crate::scale::record::unix_ms;

/// A pod belongs to its StatefulSet by its labels and its name: started again it would be what the
/// StatefulSet says.
const KEEPS_ROLES: &str = "the pods of a StatefulSet have its role: scale both pools instead";

/// Where the pools are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace; by default that of the kubeconfig's context or of the coordinator's pod.
    pub namespace: Option<String>,
    /// The labels of StatefulSets that are pools, and of their pods.
    pub selector: String,
}

/// Workers as pods of StatefulSets.
#[derive(Debug)]
pub struct Kubernetes {
    namespace: String,
    api: Api<StatefulSet>,
    sets: Watched<StatefulSet>,
    pods: Watched<Pod>,
    membership: tokio::sync::watch::Receiver<Arc<Membership>>,
    /// The newest leader that has given orders here. Those in other processes are held off by the
    /// version that they have seen: see [`Kubernetes::resize`].
    fence: AtomicI64,
    /// Numbers are set one after the other.
    turn: Mutex<()>,
}

impl Kubernetes {
    /// A launcher over the cluster that the environment names: a kubeconfig, or the service
    /// account of the pod that this runs in. It need not answer yet.
    ///
    /// # Errors
    /// Why there is no such cluster, or why its settings are of no use.
    pub async fn connect(
        settings: Settings,
        membership: tokio::sync::watch::Receiver<Arc<Membership>>,
    ) -> Result<Self, String> {
        let mut config = Config::infer().await.map_err(|error| error.to_string())?;
        config.connect_timeout = Some(call::CALL_TIMEOUT);
        config.write_timeout = Some(call::CALL_TIMEOUT);
        let namespace = settings.namespace.unwrap_or_else(|| config.default_namespace.clone());
        info!(server = %config.cluster_url, namespace, "pools are StatefulSets of Kubernetes");
        let client = Client::try_from(config).map_err(|error| error.to_string())?;
        let api: Api<StatefulSet> = Api::namespaced(client.clone(), &namespace);
        let sets = Watched::start(Wanted {
            api: api.clone(),
            resource: "statefulsets",
            namespace: namespace.clone(),
            selector: settings.selector.clone(),
            changed: set::tell_changes,
        });
        let pods = Watched::start(Wanted {
            api: Api::namespaced(client, &namespace),
            resource: "pods",
            namespace: namespace.clone(),
            selector: settings.selector,
            changed: |_, _| {},
        });
        // So that requests find the pools from the start. Why it cannot see them is in the log.
        let _ = sets.all().await;
        let (fence, turn) = (AtomicI64::new(0), Mutex::new(()));
        Ok(Self { namespace, api, sets, pods, membership, fence, turn })
    }

    /// The pools, and what is wrong with StatefulSets that look like one.
    fn pools(sets: &BTreeMap<String, Arc<StatefulSet>>) -> (Vec<Set>, Vec<String>) {
        let (mut pools, mut wrong) = (Vec::<Set>::new(), Vec::new());
        for set in sets.values() {
            match Set::read(set) {
                Err(why) => wrong.push(why),
                Ok(set) => {
                    match pools.iter().find(|it| (it.pool, &it.model) == (set.pool, &set.model)) {
                        // Which of them is to grow? The first by name is as good as any, if told.
                        Some(first) => wrong.push(format!(
                            "{} is left alone: {} has the same pool and model",
                            set.row.name, first.row.name
                        )),
                        None => pools.push(set),
                    }
                }
            }
        }
        (pools, wrong)
    }

    fn last_pools(&self) -> Vec<Set> {
        Self::pools(&self.sets.last()).0
    }

    fn check(&self, ours: i64) -> Result<(), LaunchError> {
        let newest = self.fence.fetch_max(ours, Ordering::SeqCst);
        if ours < newest { Err(LaunchError::Stale { newest, ours }) } else { Ok(()) }
    }

    /// Sets the end of a row to what `next` makes of it, if it is to change.
    ///
    /// The number is written only if nobody has written to the StatefulSet since it was read. So a
    /// coordinator that was replaced while it slept between the two can, at worst, do once what
    /// it had recorded as the leader, and only if its follower has not touched this pool. Conflicts
    /// are told for that reason, and not tried again here: others write the StatefulSet's status
    /// while pods come and go, and whoever asked looks whether it still leads before it asks again.
    async fn resize(
        &self,
        set: &Set,
        next: impl FnOnce(u32) -> Result<Option<u32>, LaunchError>,
    ) -> Result<(), LaunchError> {
        let name = &set.row.name;
        let tried = |verb: &str| {
            let namespace = &self.namespace;
            format!("cannot {verb} statefulsets/scale `{name}` in namespace `{namespace}`")
        };
        let _turn = self.turn.lock().await;
        let scale = within(self.api.get_scale(name)).await;
        let scale = scale.map_err(|error| refused(tried("get"), error))?;
        let replicas = scale.spec.and_then(|spec| spec.replicas).unwrap_or(0);
        let end = set.first.saturating_add(u32::try_from(replicas).unwrap_or(0));
        let Some(wanted) = next(end)? else { return Ok(()) };
        let replicas = wanted.saturating_sub(set.first);
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": scale.metadata.resource_version},
            "spec": {"replicas": replicas},
        }));
        let params =
            PatchParams { field_manager: Some(set::MANAGER.into()), ..PatchParams::default() };
        let patched = within(self.api.patch_scale(name, &params, &patch)).await;
        patched.map_err(|error| refused(tried("patch"), error))?;
        info!(statefulset = name, replicas, "set the number of replicas");
        Ok(())
    }

    /// The workers of a pool.
    fn workers(
        set: &Set,
        pods: &BTreeMap<String, Arc<Pod>>,
        membership: &Membership,
    ) -> Vec<Launched> {
        let own = |pod: &&Arc<Pod>| {
            pod.owner_references()
                .iter()
                .any(|owner| owner.uid == set.uid && owner.kind == "StatefulSet")
        };
        let row = &set.row;
        let launched = |name: String, pod: Option<&Pod>, stays: bool| {
            let record = pod.and_then(|pod| registered(pod, set, membership));
            let shown = pod.map(|pod| pod::read(pod, record.is_some()));
            let (process, said) = match shown {
                _ if !stays => (Process::Stopping, String::new()),
                Some(shown) => (shown.process, shown.said),
                None => {
                    let set = &row.name;
                    let said = format!("it has no pod; see `kubectl describe statefulset {set}`");
                    (Process::Starting, said)
                }
            };
            let created = pod.and_then(|pod| pod.metadata.creation_timestamp.as_ref());
            let created = created.and_then(|it| u64::try_from(it.0.as_millisecond()).ok());
            Launched {
                spec: WorkerSpec { name, pool: set.pool, model: set.model.clone() },
                process,
                address: record.map(|record| record.address.clone()).unwrap_or_default(),
                started_ms: created.unwrap_or_else(unix_ms),
                said,
                exit_code: None,
            }
        };
        let there = (set.first..row.end).map(|number| {
            let name = row.worker(number);
            let pod = pods.get(&name).filter(own);
            launched(name, pod.map(Arc::as_ref), true)
        });
        let stays = |name: &str| {
            row.number(name).is_some_and(|number| (set.first..row.end).contains(&number))
        };
        let ending = pods.iter().filter(|(name, pod)| own(pod) && !stays(name));
        there.chain(ending.map(|(name, pod)| launched(name.clone(), Some(pod), false))).collect()
    }
}

/// The record of a pod's worker: that of the address which has the pod's own IP or name.
fn registered<'m>(pod: &Pod, set: &Set, membership: &'m Membership) -> Option<&'m InstanceRecord> {
    // On the node's own network an IP is no sign of who it is.
    let shared = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
    let status = pod.status.as_ref().filter(|_| !shared);
    let ips = status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
    let first = status.and_then(|status| status.pod_ip.as_deref());
    let ips: Vec<&str> = ips.map(|ip| ip.ip.as_str()).chain(first).collect();
    let name = pod.name_any();
    let here = |record: &&InstanceRecord| {
        let Some(host) = host(&record.address) else { return false };
        let by_name =
            host.strip_prefix(name.as_str()).is_some_and(|it| it.is_empty() || it.starts_with('.'));
        (record.role, &record.model) == (set.pool, &set.model) && (by_name || ips.contains(&host))
    };
    // An earlier pod may have had the IP.
    membership.instances.values().filter(here).max_by_key(|record| record.started_ms)
}

/// The host of a URL, without the brackets of an IPv6 address.
fn host(url: &str) -> Option<&str> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split('/').next()?;
    match authority.strip_prefix('[') {
        Some(ip) => Some(ip.split_once(']')?.0),
        None => Some(authority.rsplit_once(':').map_or(authority, |(host, _)| host)),
    }
}

#[tonic::async_trait]
impl Launcher for Kubernetes {
    async fn launch(&self, fence: i64, spec: &WorkerSpec) -> Result<(), LaunchError> {
        self.check(fence)?;
        let pools = self.last_pools();
        let of_spec = |set: &&Set| (set.pool, &set.model) == (spec.pool, &spec.model);
        let found = pools.iter().find(of_spec);
        let numbered = found.and_then(|set| Some((set, set.row.number(&spec.name)?)));
        let Some((set, number)) = numbered else {
            return Err(self.unknown(spec.pool, &spec.model));
        };
        if (set.first..set.row.end).contains(&number) {
            // Kubernetes keeps it running.
            return Ok(());
        }
        self.resize(set, |end| Ok((number >= end).then_some(number + 1))).await
    }

    async fn retire(&self, fence: i64, name: &str) -> Result<(), LaunchError> {
        self.check(fence)?;
        let pools = self.last_pools();
        let mut numbered = pools.iter().filter_map(|set| Some((set, set.row.number(name)?)));
        // Without its StatefulSet a pod is ended too.
        let Some((set, number)) = numbered.next() else { return Ok(()) };
        self.resize(set, |end| match number {
            _ if number >= end => Ok(None),
            _ if number + 1 == end => Ok(Some(number)),
            _ => {
                let (name, told) = (name.to_owned(), set.row.told.clone());
                Err(LaunchError::NotLast { name, told })
            }
        })
        .await
    }

    async fn assign(&self, _: i64, _: &str, _: InstanceRole) -> Result<(), LaunchError> {
        Err(LaunchError::KeepsRoles(KEEPS_ROLES))
    }

    fn keeper(&self) -> String {
        format!("Kubernetes, namespace {}", self.namespace)
    }

    fn keeps_roles(&self) -> Option<&'static str> {
        Some(KEEPS_ROLES)
    }

    async fn list(&self) -> Result<Vec<Launched>, LaunchError> {
        Ok(self.survey().await?.workers)
    }

    async fn survey(&self) -> Result<Survey, LaunchError> {
        let blind = |why: String| LaunchError::Kubernetes {
            what: "cannot see the pools".into(),
            why,
            passes: true,
        };
        let sets = self.sets.all().await.map_err(blind)?;
        let pods = self.pods.all().await.map_err(blind)?;
        let membership = Arc::clone(&self.membership.borrow());
        let (pools, _) = Self::pools(&sets);
        let workers = pools.iter().flat_map(|set| Self::workers(set, &pods, &membership)).collect();
        let row = |set: Set| -> (InstanceRole, String, Row) { (set.pool, set.model, set.row) };
        Ok(Survey { workers, rows: pools.into_iter().map(row).collect() })
    }

    async fn lead(&self, fence: i64) -> Result<(), LaunchError> {
        // Also back: the revisions of an etcd that lost its data begin again. No order of an earlier
        // term is left in this process, and other processes see our changes.
        self.fence.store(fence, Ordering::SeqCst);
        self.sets.list_anew();
        self.pods.list_anew();
        Ok(())
    }

    async fn look_anew(&self) {
        self.sets.list_anew();
        // Why it cannot see them is in the log.
        let _ = self.sets.all().await;
    }

    fn models(&self, pool: InstanceRole) -> Vec<String> {
        let pools = self.last_pools().into_iter().filter(|set| set.pool == pool);
        pools.map(|set| set.model).collect()
    }

    fn unknown(&self, pool: InstanceRole, model: &str) -> LaunchError {
        let (_, wrong) = Self::pools(&self.sets.last());
        let more = wrong.iter().map(|wrong| format!("; {wrong}")).collect();
        let (model, namespace) = (model.to_owned(), self.namespace.clone());
        LaunchError::NoStatefulSet { pool, model, namespace, more }
    }
}

#[cfg(test)]
mod tests {
    use super::host;

    #[test]
    fn hosts_are_read_from_addresses() {
        for (url, expected) in [
            ("http://10.0.0.5:7000", "10.0.0.5"),
            ("https://decode-0.decode.prod.svc:7000", "decode-0.decode.prod.svc"),
            ("http://[fd00::1]:7000/", "fd00::1"),
            ("http://decode-0", "decode-0"),
        ] {
            assert_eq!(host(url), Some(expected));
        }
        assert_eq!(host("decode-0"), None);
    }
}
