//! The commands of a launcher's workers: the file of `--workers`.
//!
//! ```json
//! {"pools": [{
//!   "pool": "decode",
//!   "model": "smollm2",
//!   "program": "/usr/local/bin/baton-worker",
//!   "args": ["--role", "decode", "--listen", "127.0.0.1:0", "--model", "/models/smollm2.gguf",
//!            "--served-model-name", "smollm2", "--etcd", "http://127.0.0.1:2379"]
//! }]}
//! ```

use std::path::{Path, PathBuf};

use baton_membership::daemon::{Exit, Failure};
use baton_proto::InstanceRole;
use serde::{Deserialize, Serialize};

/// The commands, one for each pool and model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Templates {
    /// One for each pool and model.
    pub pools: Vec<Template>,
}

/// How to start a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What it does.
    pub pool: InstanceRole,
    /// The name that its model is served under.
    pub model: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments. Each start must take a port of its own.
    pub args: Vec<String>,
}

impl Templates {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Exit::Config`], naming the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |error: &dyn std::fmt::Display| {
            Failure::new(Exit::Config, format!("--workers {}: {error}", path.display()))
        };
        let text = std::fs::read(path).map_err(|error| wrong(&error))?;
        let templates: Self = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
        for (i, one) in templates.pools.iter().enumerate() {
            if !one.pool.is_worker() {
                return Err(wrong(&format_args!("pool `{}` is none of workers", one.pool)));
            }
            if templates.pools[..i].iter().any(|it| (it.pool, &it.model) == (one.pool, &one.model))
            {
                let (pool, model) = (one.pool, &one.model);
                return Err(wrong(&format_args!("pool `{pool}`, model `{model}` is there twice")));
            }
        }
        Ok(templates)
    }

    /// How workers of a pool and a model are started.
    pub fn find(&self, pool: InstanceRole, model: &str) -> Option<&Template> {
        self.pools.iter().find(|it| it.pool == pool && it.model == model)
    }
}
