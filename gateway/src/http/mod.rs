//! The HTTP server: what is served where, by whom, and who may.

mod body;
mod call;
mod chat;
mod completions;
mod connection;
mod frames;
mod generation;
mod invocations;
mod load;
mod messages;
mod ops;
mod routes;
mod tokenize;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{AUTHORIZATION, CONNECTION, HeaderValue};
use actix_web::middleware::{Next, from_fn};
use actix_web::{App, Error, HttpRequest, HttpResponse, HttpServer, Resource, web};
use tracing::debug;

use crate::auth::Keys;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::workers::Registry;
use connection::Connection;

pub use call::Parsers;
pub use load::Load;

/// What the handlers share.
pub struct Shared {
    /// The workers.
    pub registry: Arc<Registry>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The keys.
    pub keys: Keys,
    /// Requests in progress.
    pub load: Arc<Load>,
    /// Limits.
    pub limits: Limits,
    /// Who reads the answers of models that may call or reason.
    pub parsers: Parsers,
    /// Set when the process is told to stop: connections are not kept alive any more.
    pub draining: AtomicBool,
}

/// Limits of requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body, in bytes.
    pub max_body_bytes: usize,
    /// Longest time for a request.
    pub request_timeout: Duration,
    /// Uncached prompt tokens from which a prefill worker is used.
    pub handoff_min_tokens: u32,
    /// The most alternatives that log-probabilities may be asked for; without it any number.
    pub max_logprobs: Option<u32>,
    /// Whether a request may bring a chat template of its own.
    pub trust_request_chat_template: bool,
    /// Whether `usage` tells of cached prompt tokens.
    pub prompt_tokens_details: bool,
}

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an idle connection is kept.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// Binds the server; it serves when the returned future is polled.
pub fn server(
    shared: Arc<Shared>,
    listener: std::net::TcpListener,
    threads: usize,
) -> std::io::Result<actix_web::dev::Server> {
    let shared = web::Data::from(shared);
    let server = HttpServer::new(move || {
        App::new()
            .app_data(shared.clone())
            .wrap(from_fn(around))
            .wrap(from_fn(messages::reword_errors))
            .configure(routes::register)
            .default_service(web::to(unknown_route))
    });
    Ok(server
        .on_connect(connection::watch)
        .workers(threads)
        .client_request_timeout(HEAD_TIMEOUT)
        .keep_alive(KEEP_ALIVE)
        // Else an event waits for the acknowledgement of the one before: 40 ms.
        .tcp_nodelay(true)
        .disable_signals()
        .listen(listener)?
        .run())
}

/// Around every request: the key, the count, the goodbye.
async fn around(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let Some(shared) = request.app_data::<web::Data<Shared>>().cloned() else {
        return Err(ApiError::internal("The server is not set up.").into());
    };
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let admitted = shared.keys.admit(request.path(), header);
    let method = request.method().clone();
    // The pattern, not the path: a series for each odd path would be a leak.
    let handler = request.match_pattern().unwrap_or_else(|| "none".to_owned());
    let mut response = if admitted {
        next.call(request).await?.map_into_left_body()
    } else {
        request.error_response(ApiError::unauthorized()).map_into_right_body()
    };
    let status = response.status();
    shared.metrics.answered(&handler, known(&method), status.as_u16());
    debug!(%method, handler, %status, "answered");
    if shared.draining.load(Relaxed) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
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

/// A path whose unknown methods are answered in the API's own words.
fn at(path: &str) -> Resource {
    web::resource(path).default_service(web::to(wrong_method))
}

async fn wrong_method(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::wrong_method(request.method().as_str(), request.path()))
}

async fn unknown_route(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::unknown_route(request.path()))
}

/// The connection that a request came on.
fn connection(request: &HttpRequest) -> Option<Connection> {
    request.conn_data::<Connection>().cloned()
}
