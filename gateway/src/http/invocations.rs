//! `POST /invocations`: Amazon SageMaker's one route for everything. The body says what it is.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::Value;

use super::generation::Intake;
use super::model::{Api, CHAT, CLASSIFY, EMBEDDINGS, POOLING, RERANK, SCORE};
use super::{Shared, chat, classify, completions, embed, rerank, score};
use crate::api::requests::InvocationRequest;
use crate::api::schema::{Invoked, StreamEvent};
use crate::error::ApiError;
use crate::workers::Lack;

/// Fields that hold texts to be scored, two and two.
const PAIRS: [(&str, &str); 4] =
    [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")];

/// SageMaker's header for the adapter, which is a model here.
const ADAPTER: &str = "x-amzn-sagemaker-adapter-identifier";

/// Does what another route does, by what the body holds and what its model can.
#[utoipa::path(
    post, path = "/invocations", tag = "generation", request_body = InvocationRequest,
    params((
        "X-Amzn-SageMaker-Adapter-Identifier" = Option<String>, Header,
        description = "Wins over `model`.",
    )),
    responses((
        status = 200, description = "The reply of the route that takes such bodies.",
        content((Invoked = "application/json"), (StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn invoke(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut intake = Intake::read(&request, payload, &shared).await?;
    let adapter = request.headers().get(ADAPTER).and_then(|value| value.to_str().ok());
    if let Some(adapter) = adapter.filter(|adapter| !adapter.is_empty()) {
        intake.body.set("model", adapter.into());
    }
    // In vLLM's order. What has both is a chat.
    let name = intake.body.get("model").and_then(Value::as_str).unwrap_or_default();
    // A model that is not there is told by the route that is asked for it.
    let does = |api: &Api| {
        let able = shared.registry.able(name, api.tasks());
        !matches!(able, Err(Lack::Unable(_)))
    };
    let has = |field: &str| intake.body.get(field).is_some();
    let texts = has("input") || has("messages");
    // Only the model tells whether messages are to be answered or to be embedded.
    if has("messages") && (does(&CHAT) || !does(&POOLING)) {
        chat::answer(intake, shared).await
    } else if has("prompt") {
        completions::answer(intake, shared).await
    } else if texts && !has("task") && does(&EMBEDDINGS) {
        embed::answer_embeddings(intake, shared).await
    } else if texts && !has("task") && does(&CLASSIFY) {
        classify::answer(intake, shared).await
    } else if PAIRS.iter().any(|(one, two)| has(one) && has(two)) && does(&SCORE) {
        score::answer(intake, shared).await
    } else if has("query") && has("documents") && does(&RERANK) {
        rerank::answer(intake, shared).await
    } else if texts && does(&POOLING) {
        embed::answer_pooling(intake, shared).await
    } else {
        let message = "Cannot find suitable handler for request. Expected one of: \
                       ['ChatCompletionRequest', 'CompletionRequest', 'EmbeddingRequest', \
                       'ClassificationRequest', 'ScoreRequest', 'RerankRequest', \
                       'PoolingRequest'].";
        Err(ApiError::no_handler(message))
    }
}
