//! `POST /invocations`: Amazon SageMaker's one route for everything. The body says what it is.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};

use super::generation::Intake;
use super::{Shared, chat, completions};
use crate::api::requests::InvocationRequest;
use crate::api::schema::{Invoked, StreamEvent};
use crate::error::ApiError;

/// SageMaker's header for the adapter, which is a model here.
const ADAPTER: &str = "x-amzn-sagemaker-adapter-identifier";

/// Answers a chat or completes a text, by what the body holds.
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
    let has = |field: &str| intake.body.get(field).is_some();
    if has("messages") {
        chat::answer(intake, shared).await
    } else if has("prompt") {
        completions::answer(intake, shared).await
    } else {
        let message = "Cannot find suitable handler for request. Expected one of: \
                       ['ChatCompletionRequest', 'CompletionRequest'].";
        Err(ApiError::no_handler(message))
    }
}
