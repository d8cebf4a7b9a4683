//! Routes for operators and probes.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;

use actix_web::http::header::ContentType;
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::Shared;
use crate::api::envelope::unix_seconds;
use crate::api::schema::{ModelCard, Models, ServerLoad, Version};
use crate::error::ApiError;
use crate::workers::Served;
use crate::workers::tasks::name;

/// Says whether a request would be served.
///
/// 503 when no worker that serves a model answers: what a load balancer must know, and what vLLM says
/// when its engine is dead.
#[utoipa::path(
    get, path = "/health", tag = "operation",
    responses(
        (status = 200, description = "It would."),
        (status = 503, description = "No worker that serves a model answers."),
    ),
)]
pub(super) async fn health(shared: web::Data<Shared>) -> HttpResponse {
    match shared.registry.ready() && !shared.draining.load(Relaxed) {
        true => HttpResponse::Ok().finish(),
        false => HttpResponse::ServiceUnavailable().finish(),
    }
}

/// Says whether a request would be served, for SageMaker.
#[utoipa::path(
    method(get, post), path = "/ping", tag = "operation",
    responses(
        (status = 200, description = "It would."),
        (status = 503, description = "No worker that serves a model answers."),
    ),
)]
pub(super) async fn ping(shared: web::Data<Shared>) -> HttpResponse {
    health(shared).await
}

/// Says that this gateway answers, whatever it could serve.
#[utoipa::path(
    get, path = "/live", tag = "operation",
    responses((status = 200, description = "It does.")),
)]
pub(super) async fn live() -> HttpResponse {
    HttpResponse::Ok().finish()
}

/// Tells the gateway's version.
#[utoipa::path(
    get, path = "/version", tag = "operation",
    responses((status = 200, description = "The version.", body = Version)),
)]
pub(super) async fn version() -> HttpResponse {
    HttpResponse::Ok().json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Tells how many requests are in progress.
#[utoipa::path(
    get, path = "/load", tag = "operation",
    responses((status = 200, description = "How many.", body = ServerLoad)),
)]
pub(super) async fn load(shared: web::Data<Shared>) -> HttpResponse {
    HttpResponse::Ok().json(json!({"server_load": shared.load.now()}))
}

/// Tells everything that is counted, for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses((
        status = 200, description = "Prometheus' text format.", content_type = "text/plain",
        body = String,
    )),
)]
pub(super) async fn metrics(shared: web::Data<Shared>) -> Result<HttpResponse, ApiError> {
    let text = shared
        .metrics
        .scrape(&shared.registry, &shared.load)
        .map_err(|error| ApiError::internal(format!("The metrics cannot be written: {error}.")))?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}

/// Lists the models that are served.
#[utoipa::path(
    get, path = "/v1/models", tag = "operation",
    responses((status = 200, description = "The models.", body = Models)),
)]
pub(super) async fn models(shared: web::Data<Shared>) -> HttpResponse {
    let list = json!({"object": "list", "data": cards(&shared)});
    HttpResponse::Ok().insert_header(ContentType::json()).json(list)
}

/// Shows one model, as OpenAI has it.
#[utoipa::path(
    get, path = "/v1/models/{name}", tag = "operation",
    params(("name" = String, Path, description = "A name of the model; it may have slashes.")),
    responses((status = 200, description = "The model.", body = ModelCard)),
)]
pub(super) async fn model(
    shared: web::Data<Shared>,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let card = cards(&shared).into_iter().find(|card| card["id"] == **name);
    let card = card.ok_or_else(|| ApiError::unknown_model(&name))?;
    Ok(HttpResponse::Ok().insert_header(ContentType::json()).json(card))
}

/// A card for each name of each model, then for each adapter.
fn cards(shared: &Shared) -> Vec<Value> {
    let created = unix_seconds();
    let mut cards = Vec::new();
    for served in shared.registry.models() {
        let names = std::iter::once(&served.card.name).chain(&served.card.aliases);
        let (root, len) = (&served.card.root, Some(served.card.max_model_len));
        let tasks = tasks(&served);
        cards.extend(names.map(|name| card(name, root, None, len, &tasks, created)));
    }
    for served in shared.registry.adapters() {
        let path = served.adapter.as_ref().map_or("", |adapter| &adapter.path);
        let parent = Some(&*served.card.name);
        cards.push(card(served.name(), path, parent, None, &tasks(&served), created));
    }
    // Two models may share a name: whoever asks for it gets the first.
    let mut seen = HashSet::new();
    cards.retain(|card| seen.insert(card["id"].to_string()));
    cards
}

/// The names of what a model can be asked for.
fn tasks(served: &Served) -> Vec<&'static str> {
    served.tasks().into_iter().map(name).collect()
}

fn card(
    name: &str,
    root: &str,
    parent: Option<&str>,
    len: Option<u32>,
    tasks: &[&str],
    created: u64,
) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": len,
        "tasks": tasks,
        "permission": [{
            "id": format!("modelperm-{}", uuid::Uuid::new_v4().simple()),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
    })
}
