//! What each model can be asked for, and who does it.

use std::sync::Arc;

use baton_membership::InstanceRole;
use baton_proto::v1::Task;

use super::{Registry, Served, Ticket, Worker};

/// Why a request finds no model.
pub enum Lack {
    /// No worker serves any model, or none does any more that served this one a while ago.
    Nobody,
    /// No model has the name.
    Unknown,
    /// There is one, but it does something else.
    Unable(Arc<Served>),
}

impl Served {
    /// What the model can be asked for.
    pub fn tasks(&self) -> Vec<Task> {
        match self.card.tasks.is_empty() {
            // A worker that is older than the field.
            true => vec![Task::Generate],
            false => self.card.tasks().collect(),
        }
    }

    /// Whether the model does one of `tasks`.
    pub fn does(&self, tasks: &[Task]) -> bool {
        self.tasks().iter().any(|task| tasks.contains(task))
    }
}

/// A task's name, as requests and lists have it.
pub fn name(task: Task) -> &'static str {
    match task {
        Task::Generate => "generate",
        Task::Embed => "embed",
        Task::Classify => "classify",
        Task::Score => "score",
        Task::TokenEmbed => "token_embed",
        Task::TokenClassify => "token_classify",
        Task::Transcribe => "transcribe",
        Task::Translate => "translate",
        Task::Unspecified => "unknown",
    }
}

impl Registry {
    /// What serves `model` and does one of `tasks`. `model` is a name of a model or of an adapter;
    /// with an empty one, the model that was there first of those that do it.
    pub fn able(&self, model: &str, tasks: &[Task]) -> Result<Arc<Served>, Lack> {
        if let Some(served) = self.named(model, |served| served.does(tasks)) {
            return Ok(served);
        }
        match self.served(model) {
            Some(other) => Err(Lack::Unable(other)),
            None if self.models().is_empty() || self.awaits(model) => Err(Lack::Nobody),
            None => Err(Lack::Unknown),
        }
    }

    /// Chooses the worker that computes texts of `tokens` in all, and `longest` at most:
    /// the least loaded one. `None` when nobody answers that takes it but instances in `avoid`.
    pub fn choose_pooling(
        &self,
        served: &Served,
        (tokens, longest): (usize, usize),
        avoid: &[String],
    ) -> Option<Ticket> {
        self.choose(served, tokens, &[], &self.turns[2], avoid, |worker| {
            worker.record.role == InstanceRole::Pooling && worker.takes(longest)
        })
    }

    /// The model of this name that `fits`, or one with an adapter of this name.
    pub(super) fn named(&self, model: &str, fits: impl Fn(&Served) -> bool) -> Option<Arc<Served>> {
        let named = |worker: &Worker| {
            worker.served().filter(|served| model.is_empty() || served.answers_to(model))
        };
        self.find(|worker| named(worker).filter(|served| fits(served))).or_else(|| {
            self.find(|worker| worker.with_adapter(model).filter(|served| fits(served)))
        })
    }
}
