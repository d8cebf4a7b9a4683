//! The HTTP server: what is served where, by whom, and who may.

#[cfg(test)]
mod api_page;
mod around;
mod audio;
mod body;
mod call;
mod chat;
mod cluster;
mod completions;
mod connection;
mod cors;
mod frames;
mod generation;
mod invocations;
mod load;
mod lora;
mod messages;
mod model;
mod multipart;
mod openapi;
mod ops;
mod orca;
mod page;
mod pooling;
mod request_id;
mod responses;
mod routes;
mod scale;
mod server_info;
mod tokenize;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use actix_http::HttpService;
use actix_service::map_config;
use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::dev::{AppConfig, Server};
use actix_web::http::header::{ALLOW, HeaderValue};
use actix_web::middleware::from_fn;
use actix_web::rt::net::TcpStream;
use actix_web::{App, HttpRequest, HttpResponse, Resource, web};
use rustls::ServerConfig;
use serde_json::Value;

use crate::adapters::Catalog;
use crate::audio::windows::Decoders;
use crate::auth::Keys;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::quota::Quota;
use crate::workers::Registry;
use connection::Connection;
use pooling::{classify, cohere, embed, rerank, score};

pub use call::Parsers;
pub use cors::Policy;
pub use load::Load;
pub use responses::Responses;

/// What the handlers share.
pub struct Shared {
    /// The workers.
    pub registry: Arc<Registry>,
    /// The LoRA adapters of the cluster.
    pub adapters: Arc<Catalog>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The keys.
    pub keys: Keys,
    /// What each client may ask for.
    pub quota: Arc<Quota>,
    /// The settings, as they may be shown.
    pub settings: Value,
    /// Requests in progress.
    pub load: Arc<Load>,
    /// Recordings in progress, which take more memory than other requests.
    pub recordings: Arc<Load>,
    /// The threads that decode recordings.
    pub decoders: Arc<Decoders>,
    /// Limits.
    pub limits: Limits,
    /// Who reads the answers of models that may call or reason.
    pub parsers: Parsers,
    /// Responses that are kept, and those in the background.
    pub responses: Responses,
    /// Set when the process is told to stop: connections are not kept alive any more.
    pub draining: AtomicBool,
}

/// Limits of requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body, in bytes.
    pub max_body_bytes: usize,
    /// Largest recording, in bytes.
    pub max_audio_bytes: usize,
    /// Longest time for a body to arrive.
    pub body_timeout: Duration,
    /// Longest time for a request.
    pub request_timeout: Duration,
    /// Uncached prompt tokens from which a prefill worker is used.
    pub handoff_min_tokens: u32,
    /// The most alternatives that log-probabilities may be asked for; without it any number.
    pub max_logprobs: Option<u32>,
    /// Whether a request may bring a chat template of its own.
    pub trust_request_chat_template: bool,
    /// The most texts that one request may have embedded, classified or compared.
    pub max_texts: usize,
    /// Whether `usage` tells of cached prompt tokens.
    pub prompt_tokens_details: bool,
}

/// How the server listens.
pub struct Listening {
    /// Where.
    pub listener: std::net::TcpListener,
    /// HTTPS in place of HTTP.
    pub tls: Option<ServerConfig>,
    /// Threads that serve.
    pub threads: usize,
    /// How long a client may take to send a request's head.
    pub head_timeout: Duration,
    /// How long a client may leave unread what it was sent.
    pub send_timeout: Duration,
    /// How long an idle connection is kept.
    pub keep_alive: Duration,
    /// Which pages of browsers may call.
    pub cors: Policy,
}

/// How long a connection that the server closes is kept for the client to read the last reply: one
/// that is closed while a body still comes is reset, and the client would not see why.
const LINGER: Duration = Duration::from_secs(1);

/// Binds the server; it serves when the returned future is polled.
pub fn server(shared: Arc<Shared>, listening: Listening) -> std::io::Result<Server> {
    let shared = web::Data::from(shared);
    let Listening { listener, tls, threads, head_timeout, send_timeout, keep_alive, cors } =
        listening;
    let app = move || {
        let app = App::new()
            .app_data(shared.clone())
            .wrap(from_fn(around::guard))
            .wrap(from_fn(messages::reword_errors))
            .wrap(cors.middleware())
            .wrap(from_fn(around::record))
            .configure(routes::register)
            .default_service(web::to(unknown_route));
        map_config(app, |()| AppConfig::default())
    };
    let server = Server::build().workers(threads).disable_signals();
    let server = match tls {
        None => server.listen("http", listener, move || {
            HttpService::build()
                .client_request_timeout(head_timeout)
                .keep_alive(keep_alive)
                .client_disconnect_timeout(LINGER)
                .on_connect_ext(move |stream: &TcpStream, extensions| {
                    connection::watch(stream, send_timeout, extensions);
                })
                .h1(app())
                .tcp()
        }),
        Some(config) => server.listen("https", listener, move || {
            HttpService::build()
                .client_request_timeout(head_timeout)
                .keep_alive(keep_alive)
                .client_disconnect_timeout(LINGER)
                .on_connect_ext(move |stream: &TlsStream<TcpStream>, extensions| {
                    connection::watch(stream.get_ref().0, send_timeout, extensions);
                })
                .h1(app())
                .rustls_0_23(config.clone())
        }),
    };
    Ok(server?.run())
}

/// A path whose unknown methods are answered in the API's own words.
fn at(path: &str) -> Resource {
    web::resource(path).default_service(web::to(wrong_method))
}

async fn wrong_method(request: HttpRequest) -> HttpResponse {
    let error = ApiError::wrong_method(request.method().as_str(), request.path());
    let mut response = HttpResponse::from_error(error);
    let allowed = routes::allowed(request.match_pattern().as_deref());
    if let Ok(allowed) = HeaderValue::from_str(&allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

async fn unknown_route(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::unknown_route(request.path()))
}

/// The connection that a request came on.
fn connection(request: &HttpRequest) -> Option<Connection> {
    request.conn_data::<Connection>().cloned()
}
