//! `/v1/responses` and what is below it: creating, reading, following, cancelling, deleting.
//!
//! * [`run`] reads an answer into a response, for a client that waits.
//! * [`background`] does it for nobody, and looks after responses whose gateway is gone.
//! * [`follow`] replays the events of a response in the background, and goes on live.
//!
//! A response is kept before its client is told that it is complete, so that the next request can
//! refer to it. Before anything is generated the store is asked whether the id is free: a store
//! that does not answer is found then. When it fails at the end, the client still gets its answer.

mod background;
mod follow;
mod run;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use actix_web::http::header::ContentType;
use actix_web::web::{self, Payload};
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse};
use serde_json::{Value, json};
use tracing::error;

use self::background::{Background, Cause};
use self::run::Reader;
use super::call::Call;
use super::connection::Connection;
use super::generation::{Intake, Order, streaming};
use super::load::Place;
use super::model::RESPONSES;
use super::{Shared, body, connection};
use crate::api::requests::ResponsesRequest;
use crate::api::responses::object::{Resolved, ResponseObject, Status};
use crate::api::responses::request::{ResponsesFields, is_id, reworded};
use crate::api::usage::{Budget, room};
use crate::api::{Body, schema};
use crate::auth::Admitted;
use crate::error::ApiError;
use crate::quota::Permit;
use crate::store::{MAX_CONVERSATION, MAX_TURNS, Record, Store, StoreError, Stored};
use crate::trace::Trace;

/// Wishes that do not fit are clipped, as in vLLM.
const BUDGET: Budget = Budget { default: None, clip: true };

/// Responses that are kept, and those in the background.
pub struct Responses {
    store: Option<Store>,
    background: Background,
}

impl Responses {
    /// With a store, if there is one, and at most `most` responses in the background.
    pub fn new(store: Option<Store>, most: usize) -> Self {
        Self { store, background: Background::new(most) }
    }

    /// The store, for what needs one; without one there is no response of any id.
    fn store(&self, id: &str) -> Result<&Store, ApiError> {
        let found = self.store.as_ref().filter(|_| is_id(id));
        found.ok_or_else(|| ApiError::unknown_response(id, "response_id"))
    }
}

/// A request that is read and checked, about to be generated.
struct Ready {
    id: String,
    key: String,
    previous: Option<String>,
    /// The request's own items.
    input: Vec<Value>,
    reader: Reader,
    streams: bool,
    stores: bool,
}

impl Ready {
    /// The response as it is to be kept.
    fn record(&self, status: Status, owner: Option<String>) -> Record {
        let response = &self.reader.writer.response;
        Record {
            id: self.id.clone(),
            created: response.created(),
            status: status.as_str(),
            owner,
            streamed: self.streams,
            key: self.key.clone(),
            previous: self.previous.clone(),
            body: response.text(),
            input: Value::from(self.input.as_slice()).to_string(),
        }
    }
}

/// Generates a response.
#[utoipa::path(
    post, path = "/v1/responses", tag = "responses", request_body = ResponsesRequest,
    responses((
        status = 200,
        description = "The response; a stream of events if `stream` is true. With `background` \
                       it has only begun.",
        content((schema::ResponseObject = "application/json"), (schema::StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn create(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    let Intake { arrived, place, mut body, client, trace, .. } = intake;
    let fields = ResponsesFields::read(&mut body)?;
    let shared = shared.into_inner();
    let key = owner(&request);
    let (ready, order) = prepare(&shared, &fields, &body, key, arrived, place, trace).await?;
    if fields.background() {
        let permit = request.extensions().get::<Permit>().cloned();
        return in_background(shared, ready, order, &body, client, permit).await;
    }
    if ready.stores {
        let store = shared.responses.store(&ready.id)?;
        if failed(&shared, store, "look", store.taken(&ready.id).await)? {
            return Err(taken(&ready.id));
        }
    }
    run::respond(shared, ready, order, &body, client).await
}

/// From a request's fields to an order.
async fn prepare(
    shared: &Arc<Shared>,
    fields: &ResponsesFields,
    body: &Body,
    key: String,
    arrived: Instant,
    place: Place,
    trace: Trace,
) -> Result<(Ready, Order), ApiError> {
    let stores = fields.store() && shared.responses.store.is_some();
    if fields.background() && !stores {
        let message = "`background` needs a store of responses, and this gateway has none: start it \
                       with --responses-store.";
        return Err(ApiError::bad_value("background", message));
    }
    let input = fields.items()?;
    let earlier = match &fields.previous_response_id {
        Some(id) => conversation(shared, id, &key).await?,
        None => Vec::new(),
    };
    let mut chat = fields.chat(body, &earlier, &input)?;
    let call = Call::read(shared, &mut chat, &RESPONSES, trace).await.map_err(reworded)?;
    let sampling = &call.sampling;
    let limit = call.served.card.max_model_len;
    let budget = BUDGET.or(sampling.default_max_tokens);
    let most = room(call.prompt.len(), limit, sampling.max_tokens, budget).map_err(reworded)?;
    let id = fields.id();
    let resolved = Resolved {
        id: &id,
        model: call.served.name(),
        max_output_tokens: most,
        temperature: sampling.params.temperature,
        top_p: sampling.params.top_p,
        store: stores,
    };
    let status = if fields.background() { Status::Queued } else { Status::InProgress };
    let reader = Reader::new(&call, ResponseObject::new(fields, &resolved, status));
    let order = call.order(shared.clone(), id.clone(), BUDGET, arrived, place);
    let previous = fields.previous_response_id.clone();
    let ready = Ready { id, key, previous, input, reader, streams: fields.streams(), stores };
    Ok((ready, order))
}

/// The items of a conversation, up to this response.
async fn conversation(shared: &Shared, id: &str, key: &str) -> Result<Vec<Value>, ApiError> {
    let param = "previous_response_id";
    let unknown = |id: &str| ApiError::unknown_response(id, param);
    let store = shared.responses.store.as_ref().ok_or_else(|| unknown(id))?;
    let turns = failed(shared, store, "conversation", store.conversation(id, key).await)?;
    let (Some(first), Some(last)) = (turns.first(), turns.last()) else { return Err(unknown(id)) };
    if let Some(lost) = &first.previous {
        let size: usize = turns.iter().map(|turn| turn.body.len() + turn.input.len()).sum();
        if turns.len() >= MAX_TURNS || size >= MAX_CONVERSATION {
            let message = format!(
                "The conversation up to response '{id}' has {MAX_TURNS} responses or {} MiB: begin \
                 a new one.",
                MAX_CONVERSATION >> 20
            );
            return Err(ApiError::bad_value(param, message));
        }
        return Err(unknown(lost));
    }
    if Status::is_live(&last.status) {
        let message = format!("Response with id '{id}' is {}: wait for its end.", last.status);
        return Err(ApiError::bad_value(param, message));
    }
    let mut items = Vec::new();
    for turn in &turns {
        items.extend(parse_items(&turn.input)?);
        items.extend_from_slice(ResponseObject::parse(&turn.body)?.output());
    }
    Ok(items)
}

fn parse_items(text: &str) -> Result<Vec<Value>, ApiError> {
    let items = serde_json::from_str(text);
    items.map_err(|_| ApiError::internal("Items were kept that cannot be read."))
}

async fn in_background(
    shared: Arc<Shared>,
    ready: Ready,
    order: Order,
    body: &Body,
    client: Option<Connection>,
    permit: Option<Permit>,
) -> Result<HttpResponse, ApiError> {
    let (id, streams) = (ready.id.clone(), ready.streams);
    let queued = ready.reader.writer.response.json();
    let place = if streams { Some(shared.load.enter()?) } else { None };
    background::start(&shared, ready, order, permit).await?;
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(body, &mut response);
    if let Some(place) = place {
        return Ok(streaming(response, follow::follow(shared, id, -1, place, client)));
    }
    Ok(response.json(queued))
}

/// Shows a stored response, or replays the events of one that was made in the background.
#[utoipa::path(
    get, path = "/v1/responses/{id}", tag = "responses",
    params(
        ("id" = String, Path, description = "A response's id."),
        ("stream" = Option<bool>, Query, description = "Send its events, and follow it."),
        ("starting_after" = Option<i64>, Query, description = "Events up to this one are known.", minimum = 0),
    ),
    responses((
        status = 200, description = "The response, or its events.",
        content((schema::ResponseObject = "application/json"), (schema::StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn retrieve(
    request: HttpRequest,
    id: web::Path<String>,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let id = id.into_inner();
    let query = Query::read(&request);
    let streams = query.flag("stream")?;
    let after = query.number("starting_after")?;
    if after.is_some_and(|after| after < 0) {
        return Err(ApiError::bad_value("starting_after", "`starting_after` must be at least 0."));
    }
    let stored = find(&shared, &id, &owner(&request)).await?;
    if !streams {
        return Ok(text(stored.body));
    }
    if !stored.background || !stored.streamed {
        let message = format!(
            "Unknown response_id '{id}' for a stream: only a response that was created with \
             `background` and `stream` has its events kept."
        );
        return Err(ApiError::wrong_response(message));
    }
    let after = after.unwrap_or(-1);
    let place = shared.load.enter()?;
    let client = connection(&request);
    let events = follow::follow(shared.into_inner(), id, after, place, client);
    Ok(streaming(HttpResponse::Ok(), events))
}

/// Stops a response that is made in the background.
#[utoipa::path(
    post, path = "/v1/responses/{id}/cancel", tag = "responses", params(("id" = String, Path, description = "A response's id.")),
    responses((status = 200, description = "The response, cancelled.", body = schema::ResponseObject)),
)]
pub(super) async fn cancel(
    request: HttpRequest,
    id: web::Path<String>,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let (id, key) = (id.into_inner(), owner(&request));
    loop {
        let stored = find(&shared, &id, &key).await?;
        if !stored.background {
            return Err(ApiError::wrong_response("Cannot cancel a synchronous response."));
        }
        if stored.status == Status::Cancelled.as_str() {
            return Ok(text(stored.body));
        }
        if !Status::is_live(&stored.status) {
            let message = format!(
                "Response with id '{id}' is {} already, and cannot be cancelled.",
                stored.status
            );
            return Err(ApiError::wrong_response(message));
        }
        let mut response = ResponseObject::parse(&stored.body)?;
        response.set_status(Status::Cancelled);
        let (store, status) = (shared.responses.store(&id)?, Status::Cancelled.as_str());
        let ended = store.finish(&id, status, &response.text(), &[]).await;
        if failed(&shared, store, "cancel", ended)? {
            // Another gateway's looks at the store.
            shared.responses.background.end(&id, Cause::Elsewhere);
            return Ok(HttpResponse::Ok().json(response.json()));
        }
        // It has just ended by itself, or was cancelled by another.
    }
}

/// Forgets a stored response.
#[utoipa::path(
    delete, path = "/v1/responses/{id}", tag = "responses", params(("id" = String, Path, description = "A response's id.")),
    responses((status = 200, description = "It is gone.", body = schema::DeletedResponse)),
)]
pub(super) async fn delete(
    request: HttpRequest,
    id: web::Path<String>,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let id = id.into_inner();
    let store = shared.responses.store(&id)?;
    let deleted = store.delete(&id, &owner(&request)).await;
    if !failed(&shared, store, "delete", deleted)? {
        return Err(ApiError::unknown_response(&id, "response_id"));
    }
    shared.responses.background.end(&id, Cause::Elsewhere);
    Ok(HttpResponse::Ok().json(json!({"id": id, "object": "response", "deleted": true})))
}

/// The items that the request has brought; those of responses before it are theirs.
#[utoipa::path(
    get, path = "/v1/responses/{id}/input_items", tag = "responses",
    params(
        ("id" = String, Path, description = "A response's id."),
        ("limit" = Option<u32>, Query, description = "The most items, 1 to 100; 20 by default.", minimum = 1, maximum = 100),
        ("order" = inline(Option<schema::ItemOrder>), Query, description = "desc by default."),
        ("after" = Option<String>, Query, description = "Begin behind the item of this id."),
    ),
    responses((status = 200, description = "The items.", body = schema::InputItems)),
)]
pub(super) async fn input_items(
    request: HttpRequest,
    id: web::Path<String>,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let query = Query::read(&request);
    let limit = query.number("limit")?.unwrap_or(20);
    if !(1..=100).contains(&limit) {
        return Err(ApiError::bad_value("limit", "`limit` must be from 1 to 100."));
    }
    let ascending = match query.0.get("order").map(String::as_str) {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => {
            return Err(ApiError::bad_value("order", "`order` must be \"asc\" or \"desc\"."));
        }
    };
    let stored = find(&shared, &id, &owner(&request)).await?;
    let mut items = parse_items(&stored.input)?;
    if !ascending {
        items.reverse();
    }
    if let Some(after) = query.0.get("after") {
        let position = items.iter().position(|item| item["id"] == after.as_str());
        let position = position.ok_or_else(|| {
            ApiError::bad_value("after", "`after` must be the id of one of the items.")
        })?;
        items.drain(..=position);
    }
    let has_more = items.len() > limit as usize;
    items.truncate(limit as usize);
    let id_of = |item: Option<&Value>| item.map(|item| item["id"].clone());
    Ok(HttpResponse::Ok().json(json!({
        "object": "list",
        "first_id": id_of(items.first()),
        "last_id": id_of(items.last()),
        "has_more": has_more,
        "data": items,
    })))
}

/// The response of this id, if it is this key's.
async fn find(shared: &Shared, id: &str, key: &str) -> Result<Stored, ApiError> {
    let store = shared.responses.store(id)?;
    let found = failed(shared, store, "get", store.get(id, key).await)?;
    found.ok_or_else(|| ApiError::unknown_response(id, "response_id"))
}

/// Whose responses a request sees.
fn owner(request: &HttpRequest) -> String {
    request.extensions().get::<Admitted>().map(Admitted::owner).unwrap_or_default()
}

/// What an operation of the store gave; a failure is logged and counted.
fn failed<T>(
    shared: &Shared,
    store: &Store,
    operation: &str,
    result: Result<T, StoreError>,
) -> Result<T, ApiError> {
    result.map_err(|error| {
        error!(store = store.shown(), operation, %error, "the store of responses has failed");
        shared.metrics.store_failed(operation);
        store.unavailable(&error)
    })
}

fn taken(id: &str) -> ApiError {
    let message = format!("`request_id` is the id of a response that there is already: '{id}'.");
    ApiError::bad_value("request_id", message)
}

/// A JSON text as it was kept.
fn text(json: String) -> HttpResponse {
    HttpResponse::Ok().content_type(ContentType::json()).body(json)
}

/// The query of a request.
struct Query(HashMap<String, String>);

impl Query {
    fn read(request: &HttpRequest) -> Self {
        let query = web::Query::<HashMap<String, String>>::from_query(request.query_string());
        Self(query.map(web::Query::into_inner).unwrap_or_default())
    }

    fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.0.get(name).map(|value| value.to_lowercase()).as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(_) => {
                let message = format!("`{name}` must be true or false.");
                Err(ApiError::malformed(message).param(name))
            }
        }
    }

    fn number(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| {
            ApiError::malformed(format!("`{name}` must be a whole number.")).param(name)
        })
    }
}
