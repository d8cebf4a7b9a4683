//! What etcd holds of a scale operation.

use std::time::{SystemTime, UNIX_EPOCH};

use baton_proto::{InstanceRole, v1};
use serde::{Deserialize, Serialize};

/// A change of a pool's size, from the request to its end.
///
/// It names what it launches and what it retires before it does so: whoever leads next goes on
/// from the record alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Unique, and in the order of the requests.
    pub id: String,
    /// The pool.
    pub pool: InstanceRole,
    /// The served name of the pool's model; empty until it is planned, when none was given.
    #[serde(default)]
    pub model: String,
    /// Workers wanted.
    pub size: u32,
    /// Workers found by the plan.
    #[serde(default)]
    pub from: u32,
    /// Time for the requests of workers that are to go.
    pub drain_timeout_ms: u64,
    /// How far it is.
    pub phase: Phase,
    /// Names of workers that it launches.
    #[serde(default)]
    pub launched: Vec<String>,
    /// Names of workers that it retires.
    #[serde(default)]
    pub retired: Vec<String>,
    /// The pool that the new workers are taken from; `None` when they are launched.
    #[serde(default)]
    pub donor: Option<InstanceRole>,
    /// Names of workers that it gives another role.
    #[serde(default)]
    pub converted: Vec<String>,
    /// Those of `retired` that an operator had drained before: they are left so when it fails.
    #[serde(default)]
    pub held: Vec<String>,
    /// Unix times in milliseconds: of the request, of the phase's beginning, of the end.
    pub started_ms: u64,
    /// See `started_ms`.
    pub phase_ms: u64,
    /// See `started_ms`.
    #[serde(default)]
    pub ended_ms: u64,
    /// Somebody has taken it back.
    #[serde(default)]
    pub cancel: bool,
    /// Whose the workers are, as [`crate::launch::Launcher::keeper`] of the coordinator that planned
    /// it says: one that has others cannot go on with it.
    #[serde(default)]
    pub keeper: String,
    /// The planner asked for it, and no operator.
    #[serde(default)]
    pub planned: bool,
}

/// How far an operation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing is decided.
    Plan,
    /// Workers are being started.
    Launch,
    /// Workers that were started must register and answer.
    Join,
    /// Workers of another pool get rid of their requests and serve in this one.
    Convert,
    /// All who are to serve afterwards must answer.
    Rebalance,
    /// Workers that are to go get rid of their requests.
    Drain,
    /// Drained workers are being ended. From here on there is no way back.
    Retire,
    /// What was begun is being undone; then the operation ends like this.
    Undo(Outcome),
    /// The pool has the size.
    Done,
    /// The pool is as before.
    Failed(Failure),
    /// Likewise, because somebody has taken the operation back.
    Cancelled,
}

/// How an operation ends that does not reach its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// By a failure.
    Failed(Failure),
    /// By somebody's wish.
    Cancelled,
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What an operator needs to know.
    pub reason: String,
    /// Whether requests did not end in time.
    #[serde(default)]
    pub drain_timed_out: bool,
}

impl Phase {
    /// Its name in answers and tables.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Launch => "launch",
            Self::Join => "join",
            Self::Convert => "convert",
            Self::Rebalance => "rebalance",
            Self::Drain => "drain",
            Self::Retire => "retire",
            Self::Undo(_) => "undo",
            Self::Done => "done",
            Self::Failed(_) => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the operation is over.
    pub fn ended(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_) | Self::Cancelled)
    }

    /// Whether the operation may still be taken back.
    pub fn cancellable(&self) -> bool {
        !self.ended() && *self != Self::Retire
    }
}

impl Record {
    /// A request that nothing has been done for.
    pub fn new(pool: InstanceRole, model: String, size: u32, drain_timeout_ms: u64) -> Self {
        let now = unix_ms();
        Self {
            // Ids sort in time: the oldest are forgotten first.
            id: format!("scale-{now:013}-{}", &uuid::Uuid::new_v4().simple().to_string()[..4]),
            pool,
            model,
            size,
            from: 0,
            drain_timeout_ms,
            phase: Phase::Plan,
            launched: Vec::new(),
            retired: Vec::new(),
            donor: None,
            converted: Vec::new(),
            held: Vec::new(),
            started_ms: now,
            phase_ms: now,
            ended_ms: 0,
            cancel: false,
            keeper: String::new(),
            planned: false,
        }
    }

    /// Whether a request asks for what this operation does.
    pub fn is_asked_by(&self, request: &Self) -> bool {
        let same_model = request.model.is_empty() || request.model == self.model;
        let same_pools = (self.pool, self.donor) == (request.pool, request.donor);
        self.size == request.size && same_pools && same_model && !self.cancel
    }

    /// The pools that it changes: its own first.
    pub fn pools(&self) -> impl Iterator<Item = InstanceRole> {
        std::iter::once(self.pool).chain(self.donor)
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let Self { id, pool, size, phase, .. } = self;
        format!("{id} ({pool} to {size}, in phase {})", phase.as_str())
    }
}

impl From<&Record> for v1::ScaleOperation {
    fn from(record: &Record) -> Self {
        let failure = match &record.phase {
            Phase::Failed(failure) | Phase::Undo(Outcome::Failed(failure)) => Some(failure),
            _ => None,
        };
        Self {
            id: record.id.clone(),
            pool: record.pool.to_string(),
            model: record.model.clone(),
            size: record.size,
            from: record.from,
            phase: record.phase.as_str().into(),
            reason: failure.map(|failure| failure.reason.clone()).unwrap_or_default(),
            drain_timed_out: failure.is_some_and(|failure| failure.drain_timed_out),
            drain_timeout_ms: record.drain_timeout_ms,
            started_ms: record.started_ms,
            ended_ms: record.ended_ms,
            launched: record.launched.clone(),
            retired: record.retired.clone(),
            planned: record.planned,
            from_pool: record.donor.map(|pool| pool.to_string()).unwrap_or_default(),
            converted: record.converted.clone(),
        }
    }
}

/// Now, as records have it.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
