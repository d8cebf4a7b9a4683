//! The id by which a request is known: to its client, in the logs here and on the workers.
//!
//! It is the client's `X-Request-Id`; without one the body's `request_id`; without that a random
//! one. Every reply has it as a header.

use actix_web::http::header::{HeaderMap, HeaderName};
use actix_web::{HttpMessage as _, HttpRequest};
use tracing::Span;

/// The header, of requests and of replies.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that a client may give its request.
const MAX_BYTES: usize = 256;

/// The id of a request, among its extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestId {
    id: String,
    /// Whether the client has given it.
    given: bool,
}

impl RequestId {
    /// The id of a request with these headers. One that cannot be used is replaced.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok());
        match given.filter(|id| usable(id)) {
            Some(id) => Self { id: id.to_owned(), given: true },
            None => Self::random(),
        }
    }

    fn random() -> Self {
        // From the thread's own generator: the system's would be asked at each request.
        let random = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
        Self { id: random.simple().to_string(), given: false }
    }

    /// The id.
    pub(super) fn as_str(&self) -> &str {
        &self.id
    }
}

/// Settles the id of a request, now that its body is known; `own` is the body's `request_id`.
pub(super) fn settle(request: &HttpRequest, own: Option<&str>) -> String {
    let mut extensions = request.extensions_mut();
    let Some(known) = extensions.get_mut::<RequestId>() else { return RequestId::random().id };
    if !known.given
        && let Some(own) = own.filter(|id| usable(id))
    {
        *known = RequestId { id: own.to_owned(), given: true };
        Span::current().record("own_id", own);
    }
    known.id.clone()
}

/// The id of `request` as it is now.
pub(super) fn of_reply(request: &HttpRequest) -> Option<String> {
    request.extensions().get::<RequestId>().map(|id| id.id.clone())
}

/// Whether an id can be sent back in a header, and found in a log.
fn usable(id: &str) -> bool {
    (1..=MAX_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_usable_id_is_kept_and_another_replaced() {
        let id = |value: &str| RequestId::of(&with("x-request-id", value)).id;
        let longest = "x".repeat(256);
        for good in ["a", "job/7:b", &longest] {
            assert_eq!(id(good), good);
        }
        for bad in ["", "two words", "tab\tbed", "é", &"x".repeat(257)] {
            let made = id(bad);
            assert_ne!(made, bad);
            assert!(made.len() == 32 && made.bytes().all(|b| b.is_ascii_hexdigit()), "{made}");
        }
        assert_ne!(id(""), id(""));
    }
}
