//! LoRA adapters (Hu et al. 2021): small updates of a model's weights, loaded beside it.
//!
//! * [`Adapter`]: one, in memory, in the order that the kernels read.
//! * [`peft`]: reads the folder that PEFT writes.
//! * [`Adapters`]: those that a worker has loaded, by name, within bounds.
//!
//! A request holds its adapter: one that is unloaded stays in memory until the last request that
//! runs with it is over.

pub mod peft;
mod store;

pub use store::{Adapters, Bounds, Named};

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::kernels::low_rank::LowRank;

/// The products of a layer that adapters may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Module {
    /// Queries of the residual stream.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Of the attention's output.
    Output,
    /// The MLP's gate.
    Gate,
    /// What the gate multiplies.
    Up,
    /// Back to the residual stream.
    Down,
}

/// How many modules there are.
const MODULES: usize = 7;

/// One adapter's matrices.
#[derive(Debug)]
pub struct Adapter {
    digest: String,
    rank: usize,
    bytes: u64,
    layers: Vec<[Option<LowRank>; MODULES]>,
    /// Where the memory of all adapters is counted, while this one is counted.
    counter: Option<Arc<AtomicU64>>,
}

impl Adapter {
    fn new(digest: String, rank: usize, layers: Vec<[Option<LowRank>; MODULES]>) -> Self {
        let bytes = layers.iter().flatten().flatten().map(|pair| pair.bytes() as u64).sum();
        Self { digest, rank, bytes, layers, counter: None }
    }

    /// Equal for adapters that compute the same.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Its rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Memory of its matrices.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it adds to a module of a layer; `None` when nothing.
    pub fn update(&self, layer: usize, module: Module) -> Option<&LowRank> {
        self.layers.get(layer)?[module as usize].as_ref()
    }

    /// Counts its memory for as long as it is there.
    fn counted(mut self, counter: &Arc<AtomicU64>) -> Self {
        counter.fetch_add(self.bytes, Relaxed);
        self.counter = Some(counter.clone());
        self
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        if let Some(counter) = &self.counter {
            counter.fetch_sub(self.bytes, Relaxed);
        }
    }
}

/// Why an adapter was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// There is no such folder, or no adapter in it.
    #[error("adapter {} does not exist: {reason}", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A file cannot be read.
    #[error("adapter {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is damaged, not one of this model, or asks for what is not supported.
    #[error("adapter {}: {reason}", path.display())]
    Refused {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The name cannot be used.
    #[error("the adapter name {name:?} {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another adapter has the name.
    #[error("another adapter is loaded as `{0}`; unload it first, or load in place")]
    Exists(String),
    /// No room.
    #[error("{0} adapters are loaded, the most that --max-loras allows; unload one first")]
    Full(usize),
    /// The folder holds another adapter than the cluster serves under the name.
    #[error(
        "adapter {} has the digest {found}, but the cluster serves {expected}; put the same files \
         on all workers",
        path.display()
    )]
    Differs {
        /// The folder.
        path: PathBuf,
        /// Of what is there.
        found: String,
        /// Of what should be there.
        expected: String,
    },
}
