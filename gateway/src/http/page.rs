//! `GET /`: a page to chat with the cluster and to see it work.
//!
//! The page is one file, `gateway/assets/chat.html`, in the program itself. It asks the routes that
//! any client asks, so it needs no key to be loaded, and asks its user for one when they want it.
//! Its policy lets it run its own script and style and talk to this gateway, nothing else: what a
//! model writes stays text, whatever it is.

use std::sync::LazyLock;

use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, ContentType, ETag, EntityTag, HeaderName, HeaderValue,
    IfNoneMatch, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

const PAGE: &str = include_str!("../../assets/chat.html");

/// Headers that are the same each time.
const FIXED: [(HeaderName, &str); 4] = [
    // It is small, and changes with the gateway: ask each time.
    (CACHE_CONTROL, "no-cache"),
    (REFERRER_POLICY, "no-referrer"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// What the page may do: its one script and one style, by hash.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let [style, script] = ["style", "script"].map(|tag| hash(inside(PAGE, tag)));
    format!(
        "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'"
    )
});

static TAG: LazyLock<EntityTag> = LazyLock::new(|| EntityTag::new_strong(hash(PAGE)));

/// Shows a page to chat on.
#[utoipa::path(
    method(get, head), path = "/", tag = "operation",
    params((
        "If-None-Match" = Option<String>, Header,
        description = "The `etag` of a page that is there already.", example = "*",
    )),
    responses(
        (status = 200, description = "The page.", content_type = "text/html", body = String),
        (status = 304, description = "It has not changed."),
    ),
)]
pub(super) async fn show(request: HttpRequest) -> HttpResponse {
    let same = match request.get_header() {
        Some(IfNoneMatch::Any) => true,
        Some(IfNoneMatch::Items(tags)) => tags.iter().any(|tag| tag.weak_eq(&TAG)),
        None => false,
    };
    let mut response = if same { HttpResponse::NotModified() } else { HttpResponse::Ok() };
    for (name, value) in FIXED {
        response.insert_header((name, HeaderValue::from_static(value)));
    }
    response.insert_header(ETag(TAG.clone()));
    if same {
        return response.finish();
    }
    response.insert_header((CONTENT_SECURITY_POLICY, POLICY.as_str()));
    response.insert_header(ContentType::html()).body(PAGE)
}

/// The text of the page's only element of this kind.
fn inside<'a>(page: &'a str, tag: &str) -> &'a str {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let rest = page.split_once(&open).map_or("", |(_, rest)| rest);
    rest.split_once(&close).map_or("", |(text, _)| text)
}

/// A hash as policies write it.
fn hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use actix_web::dev::ServiceResponse;
    use actix_web::http::StatusCode;
    use actix_web::http::header::{ETAG, IF_NONE_MATCH};
    use actix_web::test::{TestRequest, call_service, init_service, read_body};
    use actix_web::{App, web};

    use super::*;

    #[actix_web::test]
    async fn the_page_comes_once_and_then_only_when_it_has_changed() {
        let app = init_service(App::new().route("/", web::get().to(show))).await;
        let ask = |known: Option<&str>| {
            let request = TestRequest::get().uri("/");
            let request = known.into_iter().fold(request, |request, tag| {
                request.insert_header((IF_NONE_MATCH, tag.to_owned()))
            });
            call_service(&app, request.to_request())
        };
        let text = |reply: &ServiceResponse<_>, name| {
            reply.headers().get(name).unwrap().to_str().unwrap().to_owned()
        };
        let first = ask(None).await;
        assert_eq!(first.status(), StatusCode::OK);
        let (tag, policy) = (text(&first, ETAG), text(&first, CONTENT_SECURITY_POLICY));
        assert_eq!(read_body(first).await, PAGE);
        // Never laxer than by hash.
        assert!(!policy.contains("unsafe") && policy.starts_with("default-src 'none'"), "{policy}");
        let lists: [String; 4] =
            [tag.clone(), format!("\"x\", {tag}"), format!("W/{tag}"), "*".into()];
        for same in lists {
            let reply = ask(Some(&same)).await;
            assert_eq!(reply.status(), StatusCode::NOT_MODIFIED, "{same}");
            assert_eq!(text(&reply, ETAG), tag);
            assert!(read_body(reply).await.is_empty());
        }
        assert_eq!(ask(Some("\"other\"")).await.status(), StatusCode::OK);
    }

    #[test]
    fn the_page_is_small_and_whole_in_itself() {
        assert!(PAGE.len() < 40_000, "{} bytes", PAGE.len());
        for tag in ["style", "script"] {
            assert_eq!(
                PAGE.matches(&format!("<{tag}")).count(),
                1,
                "one {tag}, without attributes"
            );
            assert!(!inside(PAGE, tag).is_empty(), "{tag}");
        }
        // The policy forbids them, so they would be dead.
        for outside in ["<link rel=\"stylesheet", " src=", " style=\"", " onclick=", "innerHTML"] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
    }
}
