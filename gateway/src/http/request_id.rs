//! The id by which a request is known: to its client, in the logs here and on the workers.
//!
//! It is the client's `X-Request-Id`; without one the body's `request_id`; without that a random
//! one. Every reply has it as a header.

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
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

/// The header of the reply to `request`.
pub(super) fn of_reply(request: &HttpRequest) -> Option<HeaderValue> {
    let extensions = request.extensions();
    HeaderValue::from_str(extensions.get::<RequestId>()?.as_str()).ok()
}

/// The trace that a request is part of: the second field of W3C's `traceparent`.
pub(super) fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let mut fields = headers.get("traceparent")?.to_str().ok()?.split('-');
    let (version, trace, parent) = (fields.next()?, fields.next()?, fields.next()?);
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let sound = hex(version, 2) && version != "ff" && hex(trace, 32) && hex(parent, 16);
    (sound && trace.bytes().any(|digit| digit != b'0')).then_some(trace)
}

/// Whether an id can be sent back in a header, and found in a log.
fn usable(id: &str) -> bool {
    (1..=MAX_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_trace_is_read_from_a_sound_traceparent_only() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let sound = format!("00-{trace}-00f067aa0ba902b7-01");
        assert_eq!(trace_id(&with("traceparent", &sound)), Some(trace));
        let zeros = "0".repeat(32);
        for bad in
            ["", "00", trace, &sound.to_uppercase(), &sound[1..], &sound.replace(trace, &zeros)]
        {
            assert_eq!(trace_id(&with("traceparent", bad)), None, "{bad}");
        }
    }
}
