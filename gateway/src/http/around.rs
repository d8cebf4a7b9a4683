//! What happens around every request: its id, its log span, its count, its key, its quota.
//!
//! [`record`] is outermost, then come the rules of CORS, then [`guard`]: so a request that is
//! refused has an id and is counted, and a browser may read why.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::web::{Bytes, Data};
use actix_web::{Error, HttpMessage as _};
use baton_membership::traces::Parent;
use tracing::field::Empty;
use tracing::{Instrument as _, debug, info_span};

use super::Shared;
use super::request_id::{self, RequestId};
use crate::auth::Admitted;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::quota::{Client, Permit, Standing};
use crate::trace::Trace;

/// Gives the request its id, and notes how it went.
pub(super) async fn record(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<Recorded>, Error> {
    let shared = shared(&request)?;
    let began = Instant::now();
    let id = RequestId::of(request.headers());
    let method = request.method().clone();
    // The pattern, not the path: a series for each odd path would be a leak.
    let handler = request.resource_map().match_pattern(path(&request));
    let client = Parent::of_headers(|name| request.headers().get(name)?.to_str().ok());
    let client_trace = client.trace_id();
    let trace = match &handler {
        // Those who only look are many, and nobody asks where their time went.
        Some(route) if !method.is_safe() => Trace::begin(client, method.as_str(), route),
        _ => Trace::default(),
    };
    let trace_id = trace.trace_id().or(client_trace);
    let span = info_span!("request", request_id = id.as_str(), trace_id, own_id = Empty);
    request.extensions_mut().insert(id);
    if trace.exists() {
        request.extensions_mut().insert(trace.clone());
    }
    let handler = handler.unwrap_or_else(|| "none".to_owned());
    let sent = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let sent: u64 = sent.and_then(|length| length.parse().ok()).unwrap_or(0);

    let mut response = next.call(request).instrument(span.clone()).await?.map_into_boxed_body();
    let status = response.status();
    span.in_scope(|| debug!(%method, handler, %status, took = ?began.elapsed(), "answered"));
    shared.metrics.answered(&handler, known(&method), status.as_u16());
    if let Some(id) = request_id::of_reply(response.request()) {
        trace.answered(&id, status.as_u16());
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(request_id::HEADER, id);
        }
    }
    if shared.draining.load(Relaxed) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let permit = response.request().extensions_mut().remove::<Permit>();
    let note = Note {
        metrics: shared.metrics.clone(),
        handler,
        method,
        began,
        sent,
        received: 0,
        _permit: permit,
        _trace: trace,
    };
    Ok(response.map_body(|_, body| Recorded { body, note }))
}

/// Lets the request pass if its key and its quota allow it.
pub(super) async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let shared = shared(&request)?;
    // A question that a browser asks before it sends a key. Those that CORS has not answered by
    // now are no route's.
    if request.method() == Method::OPTIONS {
        let error = ApiError::wrong_method("OPTIONS", path(&request));
        return Ok(request.error_response(error));
    }
    let standing = match enter(&shared, &request) {
        Ok((permit, standing)) => {
            if let Some(permit) = permit {
                request.extensions_mut().insert(permit);
            }
            standing
        }
        Err((error, standing)) => {
            let mut response = request.error_response(error);
            tell(&mut response, standing);
            return Ok(response);
        }
    };
    let mut response = next.call(request).await?.map_into_boxed_body();
    tell(&mut response, standing);
    Ok(response)
}

type Entered = (Option<Permit>, Option<Standing>);

fn enter(
    shared: &Shared,
    request: &ServiceRequest,
) -> Result<Entered, (ApiError, Option<Standing>)> {
    let admitted = shared.keys.admit(path(request), request.headers());
    let admitted = admitted.map_err(|error| (error, None))?;
    request.extensions_mut().insert(admitted);
    let Admitted { key, limited } = admitted;
    if !limited || !shared.quota.limits() {
        return Ok((None, None));
    }
    let address = request.peer_addr().map(|address| Client::at(address.ip()));
    let Some(client) = key.map(Client::Key).or(address) else { return Ok((None, None)) };
    let entered = match is_about_a_response(request) {
        true => shared.quota.count(client).map(|standing| (None, standing)),
        false => shared.quota.enter(client),
    };
    entered.map_err(|refused| (refused.error, refused.standing))
}

/// Whether a request only asks after a response that there is, or ends it. It takes no place: a
/// client whose places are all taken in the background could do neither.
fn is_about_a_response(request: &ServiceRequest) -> bool {
    // A query may ask for a stream, which takes one.
    path(request).starts_with("/v1/responses/") && request.query_string().is_empty()
}

/// Says in headers how much the client may still ask for.
fn tell(response: &mut ServiceResponse<BoxBody>, standing: Option<Standing>) {
    for (name, value) in standing.iter().flat_map(Standing::headers) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
}

fn shared(request: &ServiceRequest) -> Result<Data<Shared>, ApiError> {
    let shared = request.app_data::<Data<Shared>>().cloned();
    shared.ok_or_else(|| ApiError::internal("The server is not set up."))
}

/// The path as the router sees it: decoded, so that no spelling of it passes by its guard.
fn path(request: &ServiceRequest) -> &str {
    request.match_info().as_str()
}

/// A method as a label: clients may make up any number of them.
fn known(method: &Method) -> &str {
    match *method {
        Method::GET
        | Method::POST
        | Method::PUT
        | Method::DELETE
        | Method::HEAD
        | Method::OPTIONS
        | Method::PATCH => method.as_str(),
        _ => "other",
    }
}

/// A body, and what is noted when it has been sent, or its client has gone.
pub(super) struct Recorded {
    body: BoxBody,
    note: Note,
}

struct Note {
    metrics: Arc<Metrics>,
    handler: String,
    method: Method,
    began: Instant,
    /// Bytes of the request's body, as announced.
    sent: u64,
    /// Bytes of the reply's body.
    received: u64,
    /// The request's place in its client's quota.
    _permit: Option<Permit>,
    /// The request's span lasts until its reply has been sent.
    _trace: Trace,
}

impl MessageBody for Recorded {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_next(context);
        if let Poll::Ready(Some(Ok(bytes))) = &polled {
            self.note.received += bytes.len() as u64;
        }
        polled
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let Self { metrics, handler, method, began, sent, received, .. } = self;
        metrics.exchanged(handler, known(method), began.elapsed(), *sent, *received);
    }
}
