//! What the scripted API server holds.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Behaviour, End, NAMESPACE};

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resource {
    StatefulSets,
    Pods,
}

impl Resource {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::StatefulSets => "statefulsets",
            Self::Pods => "pods",
        }
    }

    pub(super) fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::StatefulSets => ("apps/v1", "StatefulSet"),
            Self::Pods => ("v1", "Pod"),
        }
    }
}

/// A change that watches tell of.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) at: Instant,
    pub(super) version: u64,
    pub(super) resource: Resource,
    pub(super) kind: &'static str,
    pub(super) object: Value,
}

#[derive(Debug)]
pub(super) struct Objects {
    pub(super) version: u64,
    pub(super) sets: BTreeMap<String, Value>,
    pub(super) pods: BTreeMap<String, Value>,
    pub(super) log: Vec<Change>,
    /// Versions before this are forgotten.
    pub(super) forgotten: u64,
    /// Watches tell of changes so long after them.
    pub(super) lag: Duration,
    /// How often watches were cut.
    pub(super) cuts: u64,
    pub(super) conflicts: u32,
    pub(super) forbidden: Option<(&'static str, &'static str)>,
    pub(super) requests: Vec<String>,
    pub(super) behaviours: BTreeMap<String, Behaviour>,
    pub(super) pids: BTreeMap<String, i32>,
    pub(super) ends: Vec<End>,
    /// Told of every change.
    pub(super) news: watch::Sender<()>,
}

impl Default for Objects {
    fn default() -> Self {
        Self {
            version: 100,
            sets: BTreeMap::new(),
            pods: BTreeMap::new(),
            log: Vec::new(),
            forgotten: 0,
            lag: Duration::ZERO,
            cuts: 0,
            conflicts: 0,
            forbidden: None,
            requests: Vec::new(),
            behaviours: BTreeMap::new(),
            pids: BTreeMap::new(),
            ends: Vec::new(),
            news: watch::channel(()).0,
        }
    }
}

impl Objects {
    pub(super) fn of(&mut self, resource: Resource) -> &mut BTreeMap<String, Value> {
        match resource {
            Resource::StatefulSets => &mut self.sets,
            Resource::Pods => &mut self.pods,
        }
    }

    fn note(&mut self, resource: Resource, kind: &'static str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let (at, version, told) = (Instant::now(), self.version, object.clone());
        self.log.push(Change { at, version, resource, kind, object: told });
        self.news.send_replace(());
        object
    }

    /// Adds or replaces an object.
    pub(super) fn put(&mut self, resource: Resource, name: &str, object: Value) {
        let there = self.of(resource).contains_key(name);
        let object = self.note(resource, if there { "MODIFIED" } else { "ADDED" }, object);
        self.of(resource).insert(name.to_owned(), object);
    }

    /// Changes an object that is there.
    pub(super) fn change(
        &mut self,
        resource: Resource,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) {
        let mut object = self.of(resource)[name].clone();
        change(&mut object);
        self.put(resource, name, object);
    }

    pub(super) fn delete(&mut self, resource: Resource, name: &str) {
        if let Some(object) = self.of(resource).remove(name) {
            self.note(resource, "DELETED", object);
        }
    }

    pub(super) fn replicas(&self, set: &str) -> u64 {
        self.sets[set]["spec"]["replicas"].as_u64().expect("a number")
    }

    /// Sets the replicas, and notes who did.
    pub(super) fn scale(&mut self, set: &str, replicas: u64, manager: &str) {
        self.change(Resource::StatefulSets, set, |set| {
            set["spec"]["replicas"] = replicas.into();
            set["metadata"]["managedFields"] = json!([{
                "manager": manager, "operation": "Update", "apiVersion": "apps/v1",
                "time": "2026-02-03T04:05:06Z", "fieldsType": "FieldsV1", "subresource": "scale",
                "fieldsV1": {"f:spec": {"f:replicas": {}}},
            }]);
        });
    }

    /// The scale of a StatefulSet.
    pub(super) fn scale_of(&self, set: &str) -> Option<Value> {
        let it = self.sets.get(set)?;
        let metadata = &it["metadata"];
        Some(json!({
            "kind": "Scale", "apiVersion": "autoscaling/v1",
            "metadata": {
                "name": set, "namespace": NAMESPACE, "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
                "creationTimestamp": metadata["creationTimestamp"],
            },
            "spec": {"replicas": it["spec"]["replicas"]},
            "status": {
                "replicas": it["status"]["replicas"],
                "selector": format!("baton.dev/pool={set}"),
            },
        }))
    }

    pub(super) fn cut(&mut self) {
        self.cuts += 1;
        self.news.send_replace(());
    }

    pub(super) fn forget(&mut self) {
        self.forgotten = self.version;
        self.log.clear();
    }
}
