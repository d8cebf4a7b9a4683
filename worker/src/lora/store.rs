//! The adapters of a worker, by name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use baton_proto::adapter::bad_name;
use baton_proto::v1;
use parking_lot::Mutex;

use super::{Adapter, AdapterError, peft};
use crate::model::ModelConfig;

/// How much may be loaded.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Adapters.
    pub adapters: usize,
    /// Rank of each.
    pub rank: usize,
}

/// An adapter under its name.
#[derive(Clone, Debug)]
pub struct Named {
    /// The matrices.
    pub adapter: Arc<Adapter>,
    path: String,
    from_flags: bool,
}

/// All adapters of a worker.
pub struct Adapters {
    config: ModelConfig,
    /// The model's names, which no adapter may have.
    taken: Vec<String>,
    bounds: Bounds,
    state: Mutex<State>,
    /// Held while files are read: one load at a time bounds the memory that loads take.
    loading: Mutex<()>,
    bytes: Arc<AtomicU64>,
}

#[derive(Default)]
struct State {
    named: BTreeMap<String, Named>,
    /// Counts changes.
    version: u64,
}

impl Adapters {
    /// None yet, for a model of this shape and with these names.
    pub fn new(config: ModelConfig, taken: Vec<String>, bounds: Bounds) -> Self {
        Self {
            config,
            taken,
            bounds,
            state: Mutex::default(),
            loading: Mutex::default(),
            bytes: Arc::default(),
        }
    }

    /// How much may be loaded.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Reads an adapter. Blocks while files are read. Loading the same again changes nothing.
    pub fn load(
        &self,
        request: &v1::LoadAdapterRequest,
        from_flags: bool,
    ) -> Result<(), AdapterError> {
        let v1::LoadAdapterRequest { name, path, in_place, digest } = request;
        let bad = |reason: &str| AdapterError::Name { name: name.clone(), reason: reason.into() };
        if let Some(reason) = bad_name(name) {
            return Err(bad(reason));
        }
        if self.taken.contains(name) {
            return Err(bad("is a name of the model itself"));
        }
        let _one = self.loading.lock();
        // Before the files: a full worker reads nothing.
        self.check_room(name)?;
        let adapter = peft::read(Path::new(path), &self.config, self.bounds.rank)?;
        if !digest.is_empty() && digest != adapter.digest() {
            return Err(AdapterError::Differs {
                path: path.into(),
                found: adapter.digest().to_owned(),
                expected: digest.clone(),
            });
        }
        let mut state = self.state.lock();
        match state.named.get(name) {
            Some(named) if named.adapter.digest() == adapter.digest() => return Ok(()),
            Some(_) if !in_place => return Err(AdapterError::Exists(name.clone())),
            _ => {}
        }
        // A name from the flags stays one, whatever is loaded in its place.
        let from_flags = from_flags || state.named.get(name).is_some_and(|named| named.from_flags);
        let adapter = Arc::new(adapter.counted(&self.bytes));
        state.named.insert(name.clone(), Named { adapter, path: path.clone(), from_flags });
        state.version += 1;
        Ok(())
    }

    /// Takes an adapter away from new requests; false when there is none of the name.
    pub fn unload(&self, name: &str) -> bool {
        let mut state = self.state.lock();
        let removed = state.named.remove(name).is_some();
        state.version += u64::from(removed);
        removed
    }

    /// The adapter that a request names; an error when it is not here, or another one is.
    pub fn find(&self, wanted: &v1::AdapterRef) -> Result<Arc<Adapter>, tonic::Status> {
        let state = self.state.lock();
        let found = state.named.get(&wanted.name).map(|named| &named.adapter);
        found.filter(|adapter| adapter.digest() == wanted.digest).cloned().ok_or_else(|| {
            tonic::Status::not_found(format!("the adapter `{}` is not loaded here", wanted.name))
        })
    }

    /// What is loaded.
    pub fn list(&self) -> v1::AdapterList {
        let state = self.state.lock();
        let adapters = state.named.iter().map(|(name, named)| v1::Adapter {
            name: name.clone(),
            path: named.path.clone(),
            digest: named.adapter.digest().to_owned(),
            from_flags: named.from_flags,
            rank: named.adapter.rank() as u32,
            bytes: named.adapter.bytes(),
        });
        v1::AdapterList { adapters: adapters.collect(), version: state.version }
    }

    /// Puts what is loaded into a status.
    pub fn count(&self, status: &mut v1::WorkerStatus) {
        status.adapters_version = self.state.lock().version;
        status.adapter_bytes = self.bytes.load(Relaxed);
    }

    fn check_room(&self, name: &str) -> Result<(), AdapterError> {
        let state = self.state.lock();
        let loaded = state.named.len();
        let full = loaded >= self.bounds.adapters && !state.named.contains_key(name);
        if full { Err(AdapterError::Full(loaded)) } else { Ok(()) }
    }
}
