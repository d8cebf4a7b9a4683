//! Workers that are not there, for tests. Their connections begin with the first wait of a test, and
//! find nobody.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use baton_membership::{InstanceRecord, InstanceRole, Membership};
use baton_proto::v1::{ModelCard, WorkerDescription, WorkerStatus};
use serde_json::json;

use super::{Registry, Served, Worker};
use crate::routing::Policy;
use crate::text::TextModel;

/// A gateway's registry before it knows anybody.
pub(crate) fn registry() -> Arc<Registry> {
    Arc::new(Registry::new(Policy::default()))
}

/// etcd lists these workers, and no others.
pub(crate) fn list(registry: &Arc<Registry>, workers: &[(&str, InstanceRole)]) {
    let record = |(id, role): &(&str, InstanceRole)| InstanceRecord {
        id: (*id).to_owned(),
        role: *role,
        address: "http://127.0.0.1:1".to_owned(),
        model: String::new(),
        version: String::new(),
        started_ms: 0,
    };
    let records = workers.iter().map(record).map(|record| (record.id.clone(), record));
    registry.apply(&Membership { instances: records.collect(), ..Membership::default() });
}

/// A model.
pub(crate) fn served(model: &str) -> Arc<Served> {
    let tokenizer = json!({
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    });
    Arc::new(Served {
        description: WorkerDescription::default(),
        card: ModelCard { name: model.to_owned(), max_model_len: 100_000, ..ModelCard::default() },
        text: Arc::new(TextModel::of(&tokenizer)),
        adapter: None,
    })
}

/// A worker that is listed has said what it serves, and answers.
pub(crate) fn serves(registry: &Registry, id: &str, served: &Arc<Served>) -> Arc<Worker> {
    let worker = registry.workers.read().get(id).cloned().expect("a worker that is listed");
    worker.served.store(Some(served.clone()));
    worker.alive.store(true, Relaxed);
    worker
}

/// It tells its status.
pub(crate) fn says(worker: &Worker, status: WorkerStatus) {
    worker.heard(status);
}
