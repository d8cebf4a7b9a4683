//! Who starts and ends workers.
//!
//! * [`Launcher`]: what a scale operation needs of it.
//! * [`local`]: processes on this machine, kept in a folder; [`supervise`]: the small process
//!   beside each of them, which outlives the coordinator.
//! * [`template`]: the command of a pool's workers.
//! * [`kubernetes`]: pods of StatefulSets.

pub mod kubernetes;
pub mod local;
pub mod supervise;
pub mod template;

use baton_proto::InstanceRole;

use crate::scale::machine::{Process, Row};

/// Codes of processes that end like this however often they are started: a wrong flag, a broken or
/// missing model, no such program.
const HOPELESS: [i32; 5] = [2, 65, 66, 126, 127];

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

/// Everything that a launcher has, of one moment.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// All workers.
    pub workers: Vec<Launched>,
    /// The pools that are rows: of which role and model.
    pub rows: Vec<(InstanceRole, String, Row)>,
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
    /// No StatefulSet has such workers.
    #[error(
        "no worker of pool `{pool}` and model `{model}` can be launched: no StatefulSet in \
         namespace `{namespace}` has the label baton.dev/pool={pool} and the annotation \
         baton.dev/model={model}{more}"
    )]
    NoStatefulSet {
        /// The pool asked for.
        pool: InstanceRole,
        /// The model asked for.
        model: String,
        /// Where it was looked for.
        namespace: String,
        /// What is wrong with those that are there.
        more: String,
    },
    /// Workers stay what they were launched as.
    #[error("{0}")]
    KeepsRoles(&'static str),
    /// Another worker would have to end first.
    #[error("{name} cannot be ended before those after it: {told}")]
    NotLast {
        /// The worker that was to end.
        name: String,
        /// How many there are, and who said so.
        told: String,
    },
    /// The API of Kubernetes refused, or did not answer.
    #[error("{what}: {why}")]
    Kubernetes {
        /// What was tried: a verb, and on what.
        what: String,
        /// Why it failed.
        why: String,
        /// Whether the same may succeed later.
        passes: bool,
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

impl LaunchError {
    /// Whether the same order may succeed later.
    pub fn passes(&self) -> bool {
        match self {
            Self::Kubernetes { passes, .. } => *passes,
            Self::NotLast { .. } => true,
            _ => false,
        }
    }
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

    /// Has a worker be one of another pool from its next start on. Its process goes on as it is:
    /// it is told by whoever asks for this.
    async fn assign(&self, fence: i64, name: &str, pool: InstanceRole) -> Result<(), LaunchError>;

    /// Whose the workers are, for people: equal for launchers that have the same ones.
    fn keeper(&self) -> String;

    /// Why no worker can be one of another pool, if so.
    fn keeps_roles(&self) -> Option<&'static str> {
        None
    }

    /// All workers.
    async fn list(&self) -> Result<Vec<Launched>, LaunchError>;

    /// All workers, and how the pools are kept.
    async fn survey(&self) -> Result<Survey, LaunchError> {
        Ok(Survey { workers: self.list().await?, rows: Vec::new() })
    }

    /// A coordinator begins to lead: nobody who led before may give orders from here on, and what is
    /// told from here on must not be older than this.
    async fn lead(&self, fence: i64) -> Result<(), LaunchError>;

    /// Learns what can be launched as of now, where `models` may not know it yet.
    async fn look_anew(&self) {}

    /// The served names of the models that workers of a pool can be launched for.
    fn models(&self, pool: InstanceRole) -> Vec<String>;

    /// Why no worker of a pool and a model can be launched, which `models` does not have.
    fn unknown(&self, pool: InstanceRole, model: &str) -> LaunchError {
        LaunchError::NoTemplate { pool, model: model.to_owned() }
    }
}
