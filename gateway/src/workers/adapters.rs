//! The LoRA adapters of each worker, as it last said.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_proto::v1::{Adapter, AdapterList, LoadAdapterRequest, UnloadAdapterRequest};
use tonic::Status;

use super::{Registry, Served, Worker};

/// A worker's adapters.
#[derive(Default)]
pub(super) struct Loaded {
    /// `None` until the worker has said what it has.
    version: Option<u64>,
    /// The model with each of them, by name.
    served: BTreeMap<String, Arc<Served>>,
}

impl Loaded {
    /// Of the list that this was made of.
    pub(super) fn version(&self) -> Option<u64> {
        self.version
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.served.keys()
    }
}

impl Worker {
    /// Takes over what the worker says, unless it said something newer before.
    pub(super) fn set_adapters(&self, served: &Served, list: AdapterList) {
        let AdapterList { adapters, version } = list;
        let each = adapters.into_iter().map(|adapter| {
            let with = Served {
                description: served.description.clone(),
                card: served.card.clone(),
                text: served.text.clone(),
                adapter: Some(adapter.clone()),
            };
            (adapter.name, Arc::new(with))
        });
        let loaded = Arc::new(Loaded { version: Some(version), served: each.collect() });
        let before = self.adapters.rcu(|now| match now.version {
            Some(newer) if newer > version => now.clone(),
            _ => loaded.clone(),
        });
        // Unloaded; those of workers that left may still come back.
        let now = self.adapters.load();
        let unloaded = before.served.keys().filter(|name| !now.served.contains_key(*name));
        unloaded.for_each(|name| self.departed.strike(name));
    }

    /// The model with the adapter of this name.
    pub(super) fn with_adapter(&self, name: &str) -> Option<Arc<Served>> {
        self.adapters.load().served.get(name).cloned()
    }

    /// Whether an answer may come from there: the same model, with the same adapter.
    pub(super) fn serves(&self, wanted: &Served) -> bool {
        let model = self.served.load().as_ref().is_some_and(|served| served.equals(wanted));
        let adapter = |adapter: &Adapter| {
            let loaded = self.adapters.load();
            let found = loaded.served.get(&adapter.name).and_then(|it| it.adapter.as_ref());
            found.is_some_and(|found| found.digest == adapter.digest)
        };
        model && wanted.adapter.as_ref().is_none_or(adapter)
    }

    /// Its adapters; `None` while it has not said.
    pub fn adapters(&self) -> Option<Vec<Adapter>> {
        let loaded = self.adapters.load();
        let each = loaded.served.values().filter_map(|served| served.adapter.clone());
        loaded.version.map(|_| each.collect())
    }

    /// The worker has just said that it lacks an adapter.
    pub fn forget_adapter(&self, name: &str) {
        self.adapters.rcu(|now| {
            let mut served = now.served.clone();
            served.remove(name);
            // The next status brings the whole list.
            Loaded { version: None, served }
        });
        self.departed.strike(name);
    }

    /// Has the worker load an adapter.
    pub async fn load_adapter(&self, request: LoadAdapterRequest) -> Result<AdapterList, Status> {
        let list = self.control().load_adapter(request).await?.into_inner();
        self.take_over(&list);
        Ok(list)
    }

    /// Has the worker unload an adapter.
    pub async fn unload_adapter(&self, name: &str) -> Result<AdapterList, Status> {
        let request = UnloadAdapterRequest { name: name.to_owned() };
        let list = self.control().unload_adapter(request).await?.into_inner();
        self.take_over(&list);
        Ok(list)
    }

    fn take_over(&self, list: &AdapterList) {
        if let Some(served) = self.served() {
            self.set_adapters(&served, list.clone());
        }
    }
}

impl Registry {
    /// The models with each adapter of workers that generate, by name.
    pub fn adapters(&self) -> Vec<Arc<Served>> {
        let mut all = BTreeMap::new();
        let workers = self.workers();
        for worker in workers.iter().filter(|worker| worker.record.role.generates()) {
            for (name, served) in &worker.adapters.load().served {
                all.entry(name.clone()).or_insert_with(|| served.clone());
            }
        }
        all.into_values().collect()
    }
}
