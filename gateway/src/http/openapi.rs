//! `GET /openapi.json` and `GET /docs`: the API described by the types that serve it.

use std::sync::{Arc, LazyLock};

use actix_web::http::header::{ContentType, LOCATION};
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, ResponseBuilder};
use utoipa::{OpenApi as _, ToSchema as _};
use utoipa_swagger_ui::{Config, Url};

use super::messages::PATHS as ANTHROPIC;
use super::routes::Paths;
use crate::api::rules;
use crate::api::schema::{ErrorBody, anthropic};
use crate::auth;
use crate::error::ApiError;

/// The document.
pub(super) static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let mut document = serde_json::to_value(document()).unwrap_or_else(|_| json!({}));
    rules::complete(&mut document);
    link(&mut document);
    document
});

/// The pages, which read the document from this server and nothing from elsewhere.
static PAGES: LazyLock<Arc<Config<'static>>> =
    LazyLock::new(|| Arc::new(Config::new([Url::from("../openapi.json")])));

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operation",
    responses((status = 200, description = "An OpenAPI document.", body = Object)),
)]
pub(super) async fn json() -> HttpResponse {
    HttpResponse::Ok().json(&*DOCUMENT)
}

/// Leads to the page that shows this document.
#[utoipa::path(
    get, path = "/docs", tag = "operation",
    responses((status = 307, description = "To the page.")),
)]
pub(super) async fn index() -> HttpResponse {
    HttpResponse::TemporaryRedirect().insert_header((LOCATION, "docs/index.html")).finish()
}

/// The page that shows this document, and its files.
#[utoipa::path(
    get, path = "/docs/{file}", tag = "operation",
    params(
        ("file" = String, Path, description = "`index.html`, or what it loads.", example = "index.html"),
    ),
    responses((status = 200, description = "The file.", content_type = "*/*", body = String)),
)]
pub(super) async fn page(file: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let missing = || ApiError::unknown_route(&format!("/docs/{file}"));
    let served = utoipa_swagger_ui::serve(&file, PAGES.clone())
        .map_err(|error| ApiError::internal(format!("The page cannot be made: {error}.")))?;
    let served = served.ok_or_else(missing)?;
    let mut response = HttpResponse::Ok();
    let media =
        served.content_type.parse().map_or_else(|_| ContentType::octet_stream(), ContentType);
    response.insert_header(media);
    if served.gzpipped {
        response.insert_header(("Content-Encoding", "gzip"));
    }
    Ok(response.body(served.bytes.into_owned()))
}

fn document() -> OpenApi {
    let mut document = Paths::openapi();
    document.info.title = "Baton".into();
    document.info.description = Some(
        "vLLM's and OpenAI's API, and Anthropic's messages. Fields that are not listed are \
         ignored, and named in a `warning` header."
            .into(),
    );
    let components = document.components.get_or_insert_default();
    let mut errors = Vec::new();
    for (name, schema, parts) in [
        (ErrorBody::name(), schema::<ErrorBody>(), ErrorBody::schemas as fn(&mut _)),
        (
            anthropic::ErrorBody::name(),
            schema::<anthropic::ErrorBody>(),
            anthropic::ErrorBody::schemas,
        ),
    ] {
        errors.push((name.into_owned(), schema));
        parts(&mut errors);
    }
    components.schemas.extend(errors);
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
    let bearer = bearer.description(Some("A key, if the gateway has any.")).build();
    let header = ApiKey::Header(ApiKeyValue::with_description(
        "x-api-key",
        "The same, as Anthropic's clients send it.",
    ));
    for (name, scheme) in
        [("bearer", SecurityScheme::Http(bearer)), ("header", SecurityScheme::ApiKey(header))]
    {
        components.security_schemes.insert(name.into(), scheme.into());
    }
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations(item) {
            // Handlers in different modules share names.
            let words = path.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
            let words: Vec<&str> = std::iter::once(method).chain(words).collect();
            operation.operation_id = Some(words.join("_"));
            finish(path, method, operation);
        }
    }
    document
}

/// What one operation's reply is good for in another: where a value of it goes.
const LINKS: [(&str, &str, &str, &str); 6] = [
    ("/v1/responses", "get_v1_responses_id", "id", "/id"),
    ("/v1/responses", "delete_v1_responses_id", "id", "/id"),
    ("/v1/responses", "post_v1_responses_id_cancel", "id", "/id"),
    ("/v1/responses", "get_v1_responses_id_input_items", "id", "/id"),
    ("/v1/models", "get_v1_models_name", "name", "/data/0/id"),
    ("/tokenize", "post_detokenize", "tokens", "/tokens"),
];

fn link(document: &mut Value) {
    for (from, to, field, value) in LINKS {
        let value = format!("$response.body#{value}");
        let uses = match to.starts_with("post_detokenize") {
            true => json!({"operationId": to, "requestBody": {field: value}}),
            false => json!({"operationId": to, "parameters": {field: value}}),
        };
        let method = if from == "/v1/models" { "get" } else { "post" };
        document["paths"][from][method]["responses"]["200"]["links"][to] = uses;
    }
}

fn schema<T: utoipa::PartialSchema>() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
    T::schema()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    [
        ("get", &mut item.get),
        ("head", &mut item.head),
        ("post", &mut item.post),
        ("delete", &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Adds what follows from where an operation is: how it may fail, and which key it wants.
fn finish(path: &str, method: &str, operation: &mut Operation) {
    let takes_body = operation.request_body.is_some();
    let open = auth::is_open(path);
    let admin = auth::is_for_admins(path);
    let of_model = takes_body || path == "/tokenizer_info";
    let generates = takes_body && !path.ends_with("tokenize");
    let named = path.contains('{');
    let scales = path == "/scale_elastic_ep";
    let stored = path.starts_with("/v1/responses/");
    let failures = [
        (
            400,
            of_model || stored && method != "delete" || path == "/server_info",
            "A field is wrong; `param` names it.",
        ),
        (401, !open, "A key is missing or wrong."),
        (403, admin, "The key is no admin key."),
        (404, (of_model && !scales) || named, "There is no such thing."),
        (408, takes_body, "The body did not arrive in time."),
        (422, path.starts_with("/v1/audio/"), "`file` is a text."),
        (409, scales, "Another operation runs for the pool, or it was cancelled."),
        (413, takes_body && !path.starts_with("/v1/audio/"), "The body is too large."),
        (429, !open && !admin, "Too many requests; `retry-after` says when to come again."),
        (500, of_model || stored, "A failure of the server."),
        (502, generates, "The workers that had the request are gone, with what they had begun."),
        (
            503,
            of_model || stored || path == "/is_scaling_elastic_ep",
            "Nobody can serve this now; `retry-after` says when to come again.",
        ),
        (504, generates, "The request's time is over."),
    ];
    let body = match ANTHROPIC.contains(&path) {
        true => anthropic::ErrorBody::name(),
        false => ErrorBody::name(),
    };
    for (status, _, what) in failures.into_iter().filter(|(_, applies, _)| *applies) {
        let content =
            ContentBuilder::new().schema(Some(Ref::from_schema_name(body.clone()))).build();
        let response =
            ResponseBuilder::new().description(what).content("application/json", content).build();
        operation.responses.responses.insert(status.to_string(), response.into());
    }
    let none: [&str; 0] = [];
    operation.security = Some(match open {
        true => Vec::new(),
        false => ["bearer", "header"].map(|name| SecurityRequirement::new(name, none)).into(),
    });
}

#[cfg(test)]
mod tests {
    use super::super::routes::ROUTES;
    use super::*;

    #[test]
    fn every_route_is_described_with_its_methods_and_no_other() {
        let mut described: Vec<(String, Vec<String>)> = DOCUMENT["paths"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(path, item)| {
                let mut methods: Vec<String> = item.as_object().unwrap().keys().cloned().collect();
                methods.sort_unstable();
                (path.clone(), methods)
            })
            .collect();
        let mut served: Vec<(String, Vec<String>)> = ROUTES
            .iter()
            .map(|(path, methods)| {
                let mut methods: Vec<String> = methods.iter().map(|it| (*it).to_owned()).collect();
                methods.sort_unstable();
                (path.replace(":.+", ""), methods)
            })
            .collect();
        described.sort_unstable();
        served.sort_unstable();
        assert_eq!(described, served);
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(value: &Value) {
            match value {
                Value::Object(fields) => {
                    if let Some(Value::String(to)) = fields.get("$ref") {
                        let found = DOCUMENT.pointer(to.trim_start_matches('#'));
                        assert!(found.is_some(), "{to}");
                    }
                    fields.values().for_each(check);
                }
                Value::Array(items) => items.iter().for_each(check),
                _ => {}
            }
        }
        check(&DOCUMENT);
    }

    #[actix_web::test]
    async fn the_pages_load_nothing_from_elsewhere() {
        for file in ["index.html", "swagger-initializer.js", "index.css"] {
            let reply = page(web::Path::from(file.to_owned())).await.unwrap();
            let bytes = actix_web::body::to_bytes(reply.into_body()).await.unwrap();
            let text = std::str::from_utf8(&bytes).unwrap();
            assert!(!text.contains("://"), "{file}: {text}");
        }
        let missing = page(web::Path::from("../secret".to_owned())).await;
        assert!(missing.is_err());
    }
}
