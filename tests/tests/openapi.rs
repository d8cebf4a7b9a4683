//! The OpenAPI document: valid, and true of the gateway that serves it.

use baton_tests::binaries::{EMBEDDER_NAME, MODEL_NAME, repository};
use baton_tests::{Cluster, python};
use serde_json::json;

/// The releases that these tests were written against.
const VALIDATOR: &str = "openapi-spec-validator==0.9.0";
const SCHEMATHESIS: &str = "schemathesis==4.32.5";

#[tokio::test]
async fn the_document_is_valid_and_the_page_that_shows_it_comes_from_here() {
    let cluster = Cluster::unified().await;
    println!("{}", python::drive(VALIDATOR, "openapi/validate.py", &[cluster.api.base()]).await);
    let page = cluster.api.get("/docs").await;
    assert!(page.text.contains("swagger-ui"), "{} {}", page.status, page.text);
    for file in ["swagger-ui.css", "swagger-ui-bundle.js", "swagger-initializer.js"] {
        let reply = cluster.api.get(&format!("/docs/{file}")).await;
        assert_eq!(reply.status, 200, "{file}");
    }
    cluster.api.get("/redoc").await.error(404).expect("there is no such page");
    cluster.finish().await;
}

#[tokio::test]
async fn replies_are_what_the_document_says_to_whatever_it_allows_and_forbids() {
    // A small context keeps answers short.
    let cluster = Cluster::builder()
        .unified(1)
        .worker_arg("--max-model-len", "64")
        .pooling(1)
        .pooling_model(1, repository().join("tests/reference/pooling/bert_classifier"), "classes")
        .api_key("client-key")
        .start()
        .await;
    let embedder = EMBEDDER_NAME;
    let models = json!({
        "": MODEL_NAME, "/v1/embeddings": embedder, "/v2/embed": embedder, "/pooling": embedder,
        "/classify": "classes", "/score": embedder, "/v1/score": embedder, "/rerank": embedder,
        "/v1/rerank": embedder, "/v2/rerank": embedder,
    });
    let arguments = [cluster.api.base(), "client-key", &models.to_string()];
    println!("{}", python::drive(SCHEMATHESIS, "openapi/fuzz.py", &arguments).await);
    let twice = cluster.api.get("/tokenizer_info?model=a&model=b").await;
    twice.error(400).expect("one model at most");
    cluster.still_serves().await;
    cluster.finish().await;
}
