//! What shows only after thousands of requests.

use baton_tests::bench::null::{NullCluster, TOKEN};
use baton_tests::bench::wire::{Wire, post};
use baton_tests::{Cluster, MODEL_NAME};
use serde_json::json;

const CONNECTIONS: usize = 32;
const REQUESTS: usize = 200;

/// An answer that a stop string ends is dropped while the worker still sends. HTTP/2 libraries
/// count what then arrives as errors of the peer, and close a connection that has had a thousand.
#[tokio::test]
async fn answers_cut_short_never_break_the_connection_to_a_worker() {
    let null = NullCluster::start(Cluster::builder()).await;
    let api = &null.cluster.api;
    let text = api.ok("/detokenize", &json!({"model": MODEL_NAME, "tokens": [TOKEN]})).await;
    let body = json!({
        "model": MODEL_NAME,
        "prompt": "One two three",
        "max_tokens": 100,
        "temperature": 0,
        "stop": text["prompt"],
    });
    let host = api.base().trim_start_matches("http://");
    let request = post(host, "/v1/completions", &body.to_string());
    let one = async || {
        let mut wire = Wire::connect(host).await.unwrap();
        for _ in 0..REQUESTS {
            let (status, body) = wire.call(&request).await.unwrap();
            let body = String::from_utf8_lossy(body);
            assert!(
                status == 200 && body.contains("\"finish_reason\":\"stop\""),
                "{status} {body}"
            );
        }
    };
    futures::future::join_all((0..CONNECTIONS).map(|_| one())).await;
    let log = null.cluster.gateway().stderr();
    assert!(!log.contains("does not answer a request"), "{log}");
    null.finish().await;
}
