//! Who starts and ends workers.
//!
//! * [`Launcher`]: what a scale operation needs of it.
//! * [`local`]: processes on this machine, kept in a folder; [`supervise`]: the small process
//!   beside each of them, which outlives the coordinator.
//! * [`template`]: the command of a pool's workers.

pub mod local;
pub mod supervise;
pub mod template;

use baton_proto::InstanceRole;

use crate::scale::machine::Process;

/// A worker to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    /// Unique among all workers of the launcher.
    pub name: String,
    /// What it does.
    pub pool: InstanceRole,
    /// The served name of its model.
    pub model: String,
}

/// A worker that was launched and has not been retired.
#[derive(Clone, Debug)]
pub struct Launched {
    /// What it was launched as.
    pub spec: WorkerSpec,
    /// What its process does.
    pub process: Process,
    /// Where it serves; empty until it is ready.
    pub address: String,
    /// When it was launched, in Unix milliseconds.
    pub started_ms: u64,
    /// The last lines of its log.
    pub said: String,
    /// The code that its process ended with, when it has crashed.
    pub exit_code: Option<i32>,
}

/// Why a launcher did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// There is no command for such workers.
    #[error(
        "no worker of pool `{pool}` and model `{model}` can be launched: add it to the file of \
         --workers"
    )]
    NoTemplate {
        /// The pool asked for.
        pool: InstanceRole,
        /// The model asked for.
        model: String,
    },
    /// A newer leader has given orders since.
    #[error("another coordinator leads: its orders came later (fence {newest}, ours {ours})")]
    Stale {
        /// The newest order's leader.
        newest: i64,
        /// Ours.
        ours: i64,
    },
    /// The system refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Starts and ends workers. What it has started it keeps running, also when the coordinator is
/// gone, until it is told to retire it.
///
/// Orders carry the revision at which their leader was elected, and are refused after those of a
/// later leader: a coordinator that was replaced while it slept cannot start or end anything.
#[tonic::async_trait]
pub trait Launcher: Send + Sync {
    /// Starts a worker, unless there is one of this name.
    async fn launch(&self, fence: i64, spec: &WorkerSpec) -> Result<(), LaunchError>;

    /// Has a worker end, gracefully if it can. It is listed until it has.
    async fn retire(&self, fence: i64, name: &str) -> Result<(), LaunchError>;

    /// All workers.
    async fn list(&self) -> Result<Vec<Launched>, LaunchError>;

    /// The served names of the models that workers of a pool can be launched for.
    fn models(&self, pool: InstanceRole) -> Vec<String>;
}
