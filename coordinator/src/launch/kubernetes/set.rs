//! What a StatefulSet says of its pool.

use baton_proto::InstanceRole;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt as _;
use serde::Deserialize as _;
use serde::de::IntoDeserializer as _;

use crate::scale::machine::Row;

/// The label that makes a StatefulSet a pool, with the pool's name; its pods have it too.
pub(super) const POOL: &str = "baton.dev/pool";
/// The annotation with the served name of the pool's model, which need not be fit for a label.
pub(super) const MODEL: &str = "baton.dev/model";
/// Under what name replicas are set, so that others can be told from coordinators.
pub(super) const MANAGER: &str = "baton-coordinator";

/// A pool as a StatefulSet keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) uid: String,
    pub(super) pool: InstanceRole,
    pub(super) model: String,
    /// The number of its first pod.
    pub(super) first: u32,
    pub(super) row: Row,
}

impl Set {
    /// Reads a StatefulSet.
    ///
    /// # Errors
    /// Why it is no pool.
    pub(super) fn read(set: &StatefulSet) -> Result<Self, String> {
        let name = set.name_any();
        let pool = set.labels().get(POOL).map(String::as_str).unwrap_or_default();
        let role = InstanceRole::deserialize(pool.into_deserializer());
        let role = role.map_err(|_: serde::de::value::Error| ()).ok();
        let role = role.filter(|role| role.is_worker());
        let role =
            role.ok_or_else(|| format!("{name} has the label {POOL}={pool}: no such pool"))?;
        let model = set.annotations().get(MODEL).filter(|model| !model.is_empty());
        let model = model.ok_or_else(|| format!("{name} has no annotation {MODEL}"))?;
        let spec = set.spec.as_ref();
        let first = spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0);
        let first = u32::try_from(first).unwrap_or(0);
        let replicas = replicas(set);
        let by = set_by(set).map(|by| format!(", last set by {by}")).unwrap_or_default();
        let told = format!("StatefulSet `{name}` has {replicas} replicas{by}");
        Ok(Self {
            uid: set.uid().unwrap_or_default(),
            pool: role,
            model: model.clone(),
            first,
            row: Row { name, end: first.saturating_add(replicas), told },
        })
    }
}

/// How many pods a StatefulSet is to have.
fn replicas(set: &StatefulSet) -> u32 {
    let replicas = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    u32::try_from(replicas).unwrap_or(0)
}

/// Who has set the replicas last, and when, as the API server has written down.
fn set_by(set: &StatefulSet) -> Option<String> {
    let owns = |fields: &serde_json::Value| !fields["f:spec"]["f:replicas"].is_null();
    let managers = set.metadata.managed_fields.iter().flatten();
    let owners = managers.filter(|it| it.fields_v1.as_ref().is_some_and(|it| owns(&it.0)));
    let last = owners.max_by_key(|it| it.time.as_ref().map(|time| time.0))?;
    let manager = last.manager.clone()?;
    let at = last.time.as_ref().map(|time| format!(" at {}", time.0)).unwrap_or_default();
    Some(format!("{manager}{at}"))
}

/// Says so when somebody other than a coordinator has changed the replicas.
pub(super) fn tell_changes(before: &StatefulSet, now: &StatefulSet) {
    let (was, is) = (replicas(before), replicas(now));
    let by = set_by(now).unwrap_or_else(|| "somebody".to_owned());
    if was != is && !by.starts_with(MANAGER) {
        let name = now.name_any();
        tracing::warn!(name, was, is, by, "replicas of a StatefulSet were changed by others");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(change: impl FnOnce(&mut serde_json::Value)) -> StatefulSet {
        let mut set = json!({
            "metadata": {
                "name": "decode", "uid": "u",
                "labels": {"baton.dev/pool": "decode"},
                "annotations": {"baton.dev/model": "org/model"},
                "managedFields": [
                    {"manager": "kubectl-client-side-apply", "time": "2026-01-01T00:00:00Z",
                     "fieldsV1": {"f:spec": {"f:replicas": {}, "f:template": {}}}},
                    {"manager": "kube-controller-manager", "time": "2026-01-03T00:00:00Z",
                     "fieldsV1": {"f:status": {"f:replicas": {}}}},
                    {"manager": "kubectl-edit", "time": "2026-01-02T00:00:00Z",
                     "fieldsV1": {"f:spec": {"f:replicas": {}}}},
                ],
            },
            "spec": {"replicas": 3, "serviceName": "decode", "selector": {}, "template": {}},
        });
        change(&mut set);
        serde_json::from_value(set).unwrap()
    }

    #[test]
    fn a_pool_is_read_from_label_annotation_and_spec() {
        let read = Set::read(&set(|_| {})).unwrap();
        assert_eq!((read.pool, read.model.as_str()), (InstanceRole::Decode, "org/model"));
        assert_eq!((read.first, read.row.end), (0, 3));
        let told = "StatefulSet `decode` has 3 replicas, last set by kubectl-edit at 2026-01-02";
        assert!(read.row.told.starts_with(told), "{}", read.row.told);
        let moved = Set::read(&set(|set| set["spec"]["ordinals"] = json!({"start": 5}))).unwrap();
        assert_eq!((moved.first, moved.row.end), (5, 8));
        assert_eq!(moved.row.number(&moved.row.worker(7)), Some(7));
        let one = Set::read(&set(|set| set["spec"]["replicas"] = json!(null))).unwrap();
        assert_eq!(one.row.end, 1, "what Kubernetes takes for none given");
    }

    #[test]
    fn what_is_no_pool_says_why() {
        let gateway = set(|set| set["metadata"]["labels"]["baton.dev/pool"] = json!("gateway"));
        assert!(Set::read(&gateway).unwrap_err().contains("baton.dev/pool=gateway"));
        let bare = set(|set| set["metadata"]["annotations"] = json!({}));
        assert_eq!(Set::read(&bare).unwrap_err(), "decode has no annotation baton.dev/model");
    }
}
