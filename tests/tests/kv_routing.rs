//! Gateways route by what workers say that their prefix caches hold.

use std::time::Duration;

use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, MODEL_NAME, eventually};
use serde_json::{Value, json};

fn body(seed: u32, tokens: u32) -> Value {
    let prompt: Vec<u32> = (0..tokens).map(|i| 1000 + seed * 1000 + 7 * i).collect();
    json!({"model": MODEL_NAME, "prompt": prompt, "max_tokens": 2, "temperature": 0})
}

async fn cached(api: &Api, body: &Value) -> u64 {
    let reply = api.ok("/v1/completions", body).await;
    reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0)
}

async fn indexed(api: &Api) -> Result<u64, String> {
    let reply = api.get("/metrics").await;
    let found = Scrape::parse(&reply.text)?.sum("baton_kv_index_blocks", &[]);
    found.map(|blocks| blocks as u64).ok_or_else(|| "no such gauge".into())
}

/// Waits until the gateway knows exactly the blocks that its workers have cached.
async fn agrees(cluster: &Cluster, api: &Api) -> u64 {
    eventually("the index holds what the workers do", Duration::from_secs(10), async || {
        let mut held = 0;
        for worker in &cluster.workers {
            held += worker.status().await.kv_blocks_cached;
        }
        let known = indexed(api).await?;
        // All prompts here differ, so no block is on two workers.
        if known == held && held > 0 { Ok(known) } else { Err(format!("{known} of {held}")) }
    })
    .await
    .0
}

#[tokio::test]
async fn a_gateway_that_has_just_come_knows_who_has_a_prompt() {
    let cluster = Cluster::builder()
        .unified(3)
        .gateway_switch("--enable-prompt-tokens-details")
        .start()
        .await;
    let bodies: Vec<Value> = (0..9).map(|seed| body(seed, 200)).collect();
    for body in &bodies {
        assert_eq!(cached(&cluster.api, body).await, 0);
    }
    let (mut gateway, other) = cluster.add_gateway().await;
    assert_eq!(agrees(&cluster, &other).await, agrees(&cluster, &cluster.api).await);
    eventually("the other gateway has found all workers", Duration::from_secs(10), async || {
        let reply = other.get("/metrics").await;
        let found = Scrape::parse(&reply.text)?.sum("baton_workers", &[("state", "up")]);
        if found == Some(3.0) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    // By chance a third of them would find theirs.
    for body in &bodies {
        assert_eq!(cached(&other, body).await, 192);
    }
    gateway.stop().await;
    cluster.finish().await;
}

#[tokio::test]
async fn the_index_follows_evictions_and_deaths() {
    let mut cluster = Cluster::builder().unified(2).kv_memory("24MiB").start().await;
    // More than both pools hold.
    for seed in 0..24 {
        cluster.api.ok("/v1/completions", &body(seed, 400)).await;
    }
    let before = agrees(&cluster, &cluster.api).await;
    let pools = {
        let mut total = 0;
        for worker in &cluster.workers {
            total += worker.status().await.kv_blocks_total;
        }
        total
    };
    assert!(before <= pools && before < 24 * 25, "{before} of {pools}: something was evicted");
    cluster.kill_worker(0);
    let after = agrees(&cluster, &cluster.api).await;
    assert!(after < before, "{after} of {before}");
    cluster.still_serves().await;
    cluster.finish().await;
}
