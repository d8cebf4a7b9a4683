//! Reads a request's body, within bounds of size and time.

use actix_web::http::header::{CONTENT_LENGTH, CONTENT_TYPE, WARNING};
use actix_web::web::{BytesMut, Payload};
use actix_web::{HttpRequest, HttpResponseBuilder};
use futures::StreamExt as _;

use super::Limits;
use crate::api::Body;
use crate::error::ApiError;

/// Names in the `warning` header, and characters of each.
const MAX_NAMES: usize = 8;
const MAX_NAME: usize = 48;

/// Reads a JSON object.
pub(super) async fn read(
    request: &HttpRequest,
    payload: Payload,
    limits: &Limits,
) -> Result<Body, ApiError> {
    Body::parse(&collected(request, payload, limits).await?)
}

/// The same, where the API has words of its own for a body that is no JSON object.
pub(super) async fn read_as(
    request: &HttpRequest,
    payload: Payload,
    limits: &Limits,
    unreadable: &str,
) -> Result<Body, ApiError> {
    let bytes = collected(request, payload, limits).await?;
    Body::parse(&bytes).map_err(|_| ApiError::malformed(unreadable))
}

async fn collected(
    request: &HttpRequest,
    payload: Payload,
    limits: &Limits,
) -> Result<BytesMut, ApiError> {
    let max_bytes = limits.max_body_bytes;
    let media = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media = media.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !media.eq_ignore_ascii_case("application/json") {
        let message = format!("Content-Type is {media:?}; only application/json is allowed.");
        return Err(ApiError::malformed(message));
    }
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if announced
        .and_then(|length| length.parse().ok())
        .is_some_and(|length: u64| length > max_bytes as u64)
    {
        return Err(ApiError::body_too_large(max_bytes));
    }
    tokio::time::timeout(limits.body_timeout, collect(payload, max_bytes))
        .await
        .map_err(|_| ApiError::slow_body())?
}

async fn collect(mut payload: Payload, max_bytes: usize) -> Result<BytesMut, ApiError> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|error| {
            ApiError::malformed(format!("The body could not be read: {error}."))
        })?;
        if bytes.len() + chunk.len() > max_bytes {
            return Err(ApiError::body_too_large(max_bytes));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Names the fields that were ignored, so that a typo is seen.
pub(super) fn warn_of_unknown(body: &Body, response: &mut HttpResponseBuilder) {
    let names: Vec<String> = body
        .unknown()
        .iter()
        .take(MAX_NAMES)
        // A header holds visible ASCII only.
        .map(|name| name.escape_default().filter(|c| *c != '"').take(MAX_NAME).collect())
        .collect();
    if !names.is_empty() {
        tracing::debug!(?names, "unknown fields are ignored");
        let text = format!("299 - \"unknown fields ignored: {}\"", names.join(", "));
        response.insert_header((WARNING, text));
    }
}
