//! What a client is told when something goes wrong: the one place that decides status and body.
//!
//! Body: `{"error": {"message", "type", "param", "code"}}`, `code` equal to the HTTP status, as
//! vLLM has it. `type` is the HTTP phrase (`Bad Request`) where a body does not parse, and the
//! error's name (`BadRequestError`) where its values are refused.

use std::fmt;

use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, retry_after: None }
    }

    /// 400: the body does not parse, or a field has the wrong type.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", message)
    }

    /// 400: a field has a value that cannot be served.
    pub fn bad_value(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message).param(param)
    }

    /// 400: what is asked for is not built.
    pub fn not_supported(param: &str) -> Self {
        Self::bad_value(param, format!("`{param}` is not supported by this server; leave it out"))
    }

    /// 400: no route takes such a body.
    pub fn no_handler(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        let message =
            "A valid key is required: send `Authorization: Bearer KEY` or `x-api-key: KEY`.";
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
    }

    /// 403: a key, but not one for this route.
    pub fn forbidden(path: &str) -> Self {
        let message = format!("{path} needs an admin key; this is an API key.");
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// 404: no worker serves this model.
    pub fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist.");
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message).param("model")
    }

    /// 400: an adapter cannot be loaded as the request says.
    pub fn adapter_refused(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidUserInput", message)
    }

    /// 404: no such adapter, or nothing at its path.
    pub fn unknown_adapter(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message)
    }

    /// 404: no such route.
    pub fn unknown_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "Not Found", format!("No route {path}."))
    }

    /// 404: no such response, or not this key's.
    pub fn unknown_response(id: &str, param: &str) -> Self {
        let message = format!("Response with id '{id}' not found.");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message).param(param)
    }

    /// 400: the response is not in a state for this.
    pub fn wrong_response(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        error.param("response_id")
    }

    /// 405.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}.");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed", message)
    }

    /// 408: the client sends too slowly.
    pub fn slow_body() -> Self {
        let message = "The request's body did not arrive in time.";
        Self::new(StatusCode::REQUEST_TIMEOUT, "Request Timeout", message)
    }

    /// 408: requests did not end in time, and a pool keeps its size.
    pub fn drain_timed_out(seconds: u64, reason: &str) -> Self {
        let message =
            format!("Scale failed due to request drain timeout after {seconds} seconds: {reason}");
        Self::new(StatusCode::REQUEST_TIMEOUT, "Request Timeout", message)
    }

    /// 500: a pool could not be given its size.
    pub fn scale_failed(reason: &str) -> Self {
        let message = format!("Scale failed: {reason}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error", message)
    }

    /// 409: it cannot be done beside, or after, what others do.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "Conflict", message)
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!(
            "The request body is larger than {limit} bytes; send less or raise --max-body-bytes."
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large", message)
    }

    /// 422: a part of a form is of the wrong kind.
    pub fn unprocessable(param: &str, message: &str) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Unprocessable Entity", message).param(param)
    }

    /// 429: every queue is full.
    pub fn overloaded(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsError", message);
        Self { retry_after: Some(1), ..error }
    }

    /// 429: the client has asked for more than it may; in `seconds` it may again.
    pub fn over_quota(message: impl Into<String>, seconds: u32) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsError", message);
        Self { retry_after: Some(seconds), ..error }
    }

    /// 502: the workers that had the request are gone. Unlike with 503, it may have begun.
    pub fn given_up(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_GATEWAY, "BadGatewayError", message);
        Self { retry_after: Some(1), ..error }
    }

    /// 503: nobody can serve this now, and nothing of it was begun: balancers ask another gateway.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", message);
        Self { retry_after: Some(1), ..error }
    }

    /// 503: no worker that serves the model is there. An empty name is any model.
    pub fn no_worker(model: &str) -> Self {
        let what = if model.is_empty() { "a model".to_owned() } else { format!("`{model}`") };
        Self::unavailable(format!("No worker that serves {what} is running; try again soon."))
    }

    /// 499, as nginx has it: nobody reads this, but logs and metrics tell it from a failure.
    pub fn client_gone() -> Self {
        let status = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(status, "ClientClosedRequest", "The client has gone.")
    }

    /// 504: the request's time is over.
    pub fn timed_out() -> Self {
        let message = "The request took longer than --request-timeout allows.";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "GatewayTimeoutError", message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// Names the field at fault.
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Whether the same request may be served a little later.
    pub fn passes(&self) -> bool {
        matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
        )
    }

    /// The field at fault.
    pub fn field(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// The same under the name that a field, at fault or only mentioned, has for the client.
    pub fn rename(mut self, from: &str, to: &str) -> Self {
        self.message = self.message.replace(&format!("`{from}`"), &format!("`{to}`"));
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
        }
        self
    }

    /// The body; also sent as a frame when a stream has begun.
    pub fn body(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status.as_u16(),
            }
        })
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.status.as_u16(), self.kind, self.message)
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
        }
        if let Some(seconds) = self.retry_after {
            response.insert_header((RETRY_AFTER, seconds));
        }
        response.json(self.body())
    }
}
