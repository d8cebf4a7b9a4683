//! The model that a request names, and whether it does what the route is for.

use std::sync::Arc;

use baton_proto::v1::Task;

use super::Shared;
use crate::error::ApiError;
use crate::workers::{Lack, Served};

/// A part of the HTTP API, by vLLM's name for it, and the tasks that it is for: a model must have
/// one of them.
pub(super) struct Api {
    name: &'static str,
    tasks: &'static [Task],
}

impl Api {
    /// One of which a model must have.
    pub(super) fn tasks(&self) -> &'static [Task] {
        self.tasks
    }
}

pub(super) const CHAT: Api = Api { name: "Chat Completions", tasks: &[Task::Generate] };
pub(super) const COMPLETIONS: Api = Api { name: "Completions", tasks: &[Task::Generate] };
pub(super) const MESSAGES: Api = Api { name: "Messages", tasks: &[Task::Generate] };
pub(super) const EMBEDDINGS: Api = Api { name: "Embeddings", tasks: &[Task::Embed] };
pub(super) const POOLING: Api = Api {
    name: "Pooling",
    tasks: &[Task::Embed, Task::Classify, Task::Score, Task::TokenEmbed, Task::TokenClassify],
};
pub(super) const CLASSIFY: Api = Api { name: "Classification", tasks: &[Task::Classify] };
pub(super) const SCORE: Api = Api { name: "Score", tasks: &[Task::Score, Task::Embed] };
pub(super) const RERANK: Api = Api { name: "Rerank (Score)", tasks: SCORE.tasks };
pub(super) const RESPONSES: Api = Api { name: "Responses", tasks: &[Task::Generate] };
pub(super) const TRANSCRIPTIONS: Api = Api { name: "Transcriptions", tasks: &[Task::Transcribe] };
pub(super) const TRANSLATIONS: Api = Api { name: "Translations", tasks: &[Task::Translate] };

/// What serves a request's model by `api`. Without a name, the first that can.
pub(super) fn model(
    shared: &Shared,
    name: Option<&str>,
    api: &Api,
) -> Result<Arc<Served>, ApiError> {
    let name = name.unwrap_or_default();
    shared.registry.able(name, api.tasks).map_err(|lack| match lack {
        Lack::Nobody => ApiError::no_worker(name),
        Lack::Unknown => ApiError::unknown_model(name),
        Lack::Unable(other) => unable(&other, api),
    })
}

/// What serves a request's model, whatever it does. Without a name, whatever is there.
pub(super) fn any_model(shared: &Shared, name: Option<&str>) -> Result<Arc<Served>, ApiError> {
    let name = name.unwrap_or_default();
    match shared.registry.served(name) {
        Some(served) => Ok(served),
        None if shared.registry.models().is_empty() || shared.registry.awaits(name) => {
            Err(ApiError::no_worker(name))
        }
        None => Err(ApiError::unknown_model(name)),
    }
}

fn unable(served: &Served, api: &Api) -> ApiError {
    let does: Vec<String> = served
        .tasks()
        .into_iter()
        .map(described)
        .map(|(does, routes)| format!("{does} ({})", routes.join(", ")))
        .collect();
    let message = format!(
        "The model does not support {} API: `{}` {}.",
        api.name,
        served.name(),
        does.join("; it ")
    );
    ApiError::bad_value("model", message)
}

/// What a model with this task does, and the routes by which it is asked for it.
fn described(task: Task) -> (&'static str, &'static [&'static str]) {
    match task {
        Task::Generate => (
            "generates text",
            &["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"],
        ),
        Task::Embed => {
            ("embeds texts", &["/v1/embeddings", "/v2/embed", "/pooling", "/score", "/rerank"])
        }
        Task::Classify => ("classifies texts", &["/classify", "/pooling"]),
        Task::Score => ("scores pairs of texts", &["/score", "/rerank"]),
        Task::TokenEmbed => ("embeds tokens", &["/pooling"]),
        Task::TokenClassify => ("classifies tokens", &["/pooling"]),
        Task::Transcribe => ("transcribes speech", &["/v1/audio/transcriptions"]),
        Task::Translate => ("translates speech to English", &["/v1/audio/translations"]),
        Task::Unspecified => ("has a task that this gateway does not know", &["/tokenize"]),
    }
}
