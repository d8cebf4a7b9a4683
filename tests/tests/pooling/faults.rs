//! Workers that die, clients that leave, keys, and what is counted.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_tests::binaries::EMBEDDER_NAME;
use baton_tests::http::RawClient;
use baton_tests::prometheus::Scrape;
use baton_tests::{Cluster, eventually};
use serde_json::json;

use super::{difference, vectors};

#[tokio::test]
async fn no_request_fails_when_a_worker_is_killed() {
    let mut cluster = Cluster::builder().pooling(2).start().await;
    let text = |at: usize| format!("Text number {at} is about something.");
    let body = json!({"input": (0..300).map(text).collect::<Vec<_>>()});
    let expected = vectors(&cluster.api.ok("/v1/embeddings", &body).await);
    let api = cluster.api.clone();
    let answered = AtomicUsize::new(0);
    let killed = AtomicUsize::new(0);
    let clients = (0..8).map(|_| async {
        // Until some requests have begun after the kill.
        while killed.load(Relaxed) == 0 || answered.load(Relaxed) < killed.load(Relaxed) + 16 {
            let reply = api.post("/v1/embeddings", &body).await;
            assert_eq!(reply.status, 200, "{}", reply.text);
            let apart = vectors(&reply.json())
                .iter()
                .zip(&expected)
                .map(|(one, two)| difference(one, two))
                .fold(0.0, f32::max);
            assert!(apart < 1e-4, "{apart}");
            answered.fetch_add(1, Relaxed);
        }
    });
    let kill = async {
        while answered.load(Relaxed) < 8 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cluster.kill_worker(0);
        killed.store(answered.load(Relaxed), Relaxed);
    };
    futures::join!(kill, futures::future::join_all(clients));
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_texts_out_of_the_queue() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let text = "river stone window garden carry yellow seven quickly ".repeat(20);
    let body = json!({"input": vec![text; 2000]});
    let client = RawClient::post(&cluster.api, "/v1/embeddings", &body).await;
    let worker = &cluster.workers[0];
    eventually("the worker has texts", Duration::from_secs(20), async || {
        let status = worker.status().await;
        let busy = status.running + status.waiting > 0;
        if busy { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    let left = client.leave();
    cluster.at_rest().await;
    println!("at rest {:?} after the client left", left.elapsed());
    let computed = worker.status().await.pooled_inputs;
    assert!(computed < 2000, "all {computed} texts were computed for nobody");
    let soon = Instant::now();
    cluster.api.ok("/v1/embeddings", &json!({"input": "still there"})).await;
    assert!(soon.elapsed() < Duration::from_secs(5));
    let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text).expect("metrics");
    let aborted = [("model_name", EMBEDDER_NAME), ("finished_reason", "abort")];
    assert_eq!(scrape.sum("vllm:request_success_total", &aborted), Some(2000.0));
    cluster.finish().await;
}

#[tokio::test]
async fn requests_are_counted_and_keys_guard_all_routes() {
    let cluster = Cluster::builder().pooling(1).api_key("secret").start().await;
    let stranger = cluster.api.with_key(None);
    for path in [
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    ] {
        stranger.post(path, &json!({"input": "a"})).await.error(401).expect(path);
    }
    let reply = cluster.api.ok("/v1/embeddings", &json!({"input": ["a b", "c", "d"]})).await;
    let tokens = reply["usage"]["prompt_tokens"].as_f64().expect("tokens");
    let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text).expect("metrics");
    let of = |name: &str, labels: &[(&str, &str)]| {
        let all = [&[("model_name", EMBEDDER_NAME)], labels].concat();
        scrape.sum(name, &all)
    };
    assert_eq!(of("vllm:request_success_total", &[("finished_reason", "stop")]), Some(3.0));
    assert_eq!(of("vllm:prompt_tokens_total", &[]), Some(tokens));
    assert_eq!(of("vllm:e2e_request_latency_seconds_count", &[]), Some(3.0));
    assert_eq!(of("vllm:request_prompt_tokens_sum", &[]), Some(tokens));
    eventually("the worker's texts are counted", Duration::from_secs(5), async || {
        let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text)?;
        let texts = scrape.sum("baton_pooled_texts_total", &[("model_name", EMBEDDER_NAME)]);
        if texts == Some(3.0) { Ok(()) } else { Err(format!("{texts:?}")) }
    })
    .await;
    cluster.finish().await;
}
