//! Holds docs/api.md against the routes, and against the types that read their bodies.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::openapi::DOCUMENT;
use super::routes::ROUTES;
use crate::api::{Body, IGNORED, UNSUPPORTED};

const PAGE: &str = include_str!("../../../docs/api.md");

/// A section's table: what its first column names, and what the second says of it.
fn table(section: &str) -> BTreeMap<&'static str, &'static str> {
    let heading = format!("\n## {section}\n");
    let text = PAGE.split_once(&heading).unwrap_or_else(|| panic!("no section {section:?}")).1;
    let text = text.split("\n## ").next().unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = line.trim_matches('|').split(" | ").map(str::trim);
        let name = cells.next().unwrap().trim_matches('`');
        let earlier = rows.insert(name, cells.next().unwrap());
        assert!(earlier.is_none(), "{section}: {name} is there twice");
    }
    assert!(!rows.is_empty(), "{section}: no table");
    rows
}

/// The fields that the document has for a route.
fn fields(path: &str) -> BTreeSet<&'static str> {
    let content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"].as_object().unwrap();
    let to = &content.values().next().unwrap()["schema"]["$ref"];
    let schema = DOCUMENT.pointer(to.as_str().unwrap().trim_start_matches('#')).unwrap();
    schema["properties"].as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_page_lists_every_route() {
    let served: BTreeSet<String> = ROUTES
        .iter()
        .flat_map(|(path, methods)| {
            let path = path.replace(":.+", "");
            methods.iter().map(move |method| format!("{} {path}", method.to_uppercase()))
        })
        .collect();
    let listed: BTreeSet<String> = table("Routes").into_keys().map(str::to_owned).collect();
    assert_eq!(listed, served);
}

#[test]
fn the_page_lists_every_field_of_every_body() {
    for (path, sections) in [
        ("/v1/chat/completions", &["Fields of generation", "POST /v1/chat/completions"][..]),
        ("/v1/completions", &["Fields of generation", "POST /v1/completions"]),
        ("/v1/messages", &["POST /v1/messages"]),
        ("/v1/messages/count_tokens", &["POST /v1/messages"]),
        ("/v1/responses", &["POST /v1/responses"]),
        ("/v1/audio/transcriptions", &["POST /v1/audio/transcriptions"]),
        ("/v1/audio/translations", &["POST /v1/audio/transcriptions"]),
        ("/v1/embeddings", &["Fields of texts", "Texts and messages", "POST /v1/embeddings"]),
        ("/pooling", &["Fields of texts", "Texts and messages", "POST /pooling"]),
        ("/classify", &["Fields of texts", "Texts and messages"]),
        ("/score", &["Fields of texts", "POST /score"]),
        ("/v1/score", &["Fields of texts", "POST /score"]),
        ("/rerank", &["Fields of texts", "POST /rerank"]),
        ("/v1/rerank", &["Fields of texts", "POST /rerank"]),
        ("/v2/rerank", &["Fields of texts", "POST /rerank"]),
        ("/v2/embed", &["POST /v2/embed"]),
        ("/scale_elastic_ep", &["POST /scale_elastic_ep"]),
        ("/tokenize", &["POST /tokenize"]),
        ("/detokenize", &["POST /detokenize"]),
    ] {
        let listed: BTreeSet<_> =
            sections.iter().flat_map(|section| table(section).into_keys()).collect();
        assert_eq!(listed, fields(path), "{path}");
    }
}

#[test]
fn what_the_page_calls_refused_is_refused_and_what_it_calls_ignored_is_ignored() {
    let mut refused = BTreeSet::new();
    let mut ignored = BTreeSet::new();
    for (field, says) in table("Fields of generation") {
        let body = json!({field: {"some": "thing"}}).to_string();
        let mut body = Body::parse(body.as_bytes()).unwrap();
        let outcome = body.refuse_unsupported();
        match says {
            "refused" => {
                let error = outcome.unwrap_err().body();
                assert_eq!(error["error"]["param"], field);
                assert_eq!(error["error"]["code"], 400);
                refused.insert(field);
            }
            "ignored" => {
                assert!(outcome.is_ok() && body.unknown().is_empty(), "{field}");
                ignored.insert(field);
            }
            "same" | "differs" => {
                // It is left for the types that take it.
                assert!(outcome.is_ok() && body.unknown().contains(field), "{field}");
            }
            other => panic!("{field}: {other:?}"),
        }
    }
    assert_eq!(refused, UNSUPPORTED.iter().map(|(field, _)| *field).collect());
    assert_eq!(ignored, IGNORED.iter().copied().collect());
}

#[test]
fn what_asks_for_nothing_is_taken_as_the_page_says() {
    for (field, harmless) in UNSUPPORTED {
        let harmless: Value = serde_json::from_str(harmless).unwrap();
        let body = json!({*field: harmless}).to_string();
        let mut body = Body::parse(body.as_bytes()).unwrap();
        assert!(body.refuse_unsupported().is_ok() && body.unknown().is_empty(), "{field}");
        let row = PAGE.lines().find(|line| line.starts_with(&format!("| `{field}`"))).unwrap();
        if !harmless.is_null() {
            let value = harmless.to_string();
            assert!(
                row.contains(&format!("unless {value}"))
                    || row.contains(&format!("unless `{value}`")),
                "{row}"
            );
        }
    }
}
