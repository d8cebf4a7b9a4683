//! Clients that leave, queues that are full, deadlines that pass: nothing is kept.

use std::time::{Duration, Instant};

use baton_proto::v1::WorkerStatus;
use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::RawClient;
use baton_tests::{Cluster, Role, Worker, eventually, grpc};
use reqwest::StatusCode;
use serde_json::{Value, json};

/// By when a client that left must have freed its KV blocks.
const FREED_WITHIN: Duration = Duration::from_millis(100);

/// How often a worker is asked for its status while blocks are waited for.
const SAMPLED_EVERY: Duration = Duration::from_millis(2);

/// Waits until `seen` holds for a worker's status.
async fn until(worker: &Worker, what: &str, seen: impl Fn(&WorkerStatus) -> bool) -> WorkerStatus {
    let mut watch = grpc::watch(&worker.address, SAMPLED_EVERY).await;
    let look = async {
        loop {
            let status = grpc::next(&mut watch).await;
            if seen(&status) {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(Duration::from_secs(60), look).await;
    status.unwrap_or_else(|_| panic!("{} never: {what}", worker.process.name()))
}

/// Waits until no worker has a block that somebody owns; returns how long after `left` the last
/// one was freed.
async fn freed(cluster: &Cluster, left: Instant) -> Duration {
    let waits = cluster.workers.iter().map(|worker| async move {
        until(worker, "all blocks freed", |status| {
            grpc::owned_blocks(status) == 0 && status.running + status.waiting == 0
        })
        .await;
        left.elapsed()
    });
    futures::future::join_all(waits).await.into_iter().max().expect("a worker")
}

async fn freed_in_time(cluster: &Cluster, what: &str, left: Instant) {
    let took = freed(cluster, left).await;
    println!("{what}: freed after {took:?}");
    assert!(took <= FREED_WITHIN, "{what}: freed after {took:?}");
}

/// A prompt of about `tokens` tokens that no other prompt shares a prefix with.
fn prompt(tokens: usize) -> Vec<u32> {
    let salt = rand::random_range(1000..20_000);
    (0..tokens as u32).map(|i| 1000 + (i * 37 + salt) % 20_000).collect()
}

fn request(prompt_tokens: usize, max_tokens: usize, stream: bool) -> Value {
    json!({
        "model": MODEL_NAME,
        "prompt": prompt(prompt_tokens),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": stream,
    })
}

async fn disaggregated(transport: &str) -> Cluster {
    let builder = Cluster::builder().prefill(1).decode(1).transport(transport);
    builder.handoff_min_tokens(32).start().await
}

#[tokio::test]
async fn a_client_that_leaves_during_decode_frees_its_blocks() {
    let cluster = disaggregated("shm").await;
    let decode = cluster.only(Role::Decode);
    for stream in [true, false] {
        for round in 0..3 {
            let before = decode.status().await.generation_tokens;
            let client =
                RawClient::post(&cluster.api, "/v1/completions", &request(200, 1500, stream)).await;
            until(decode, "tokens flow", |status| status.generation_tokens > before + 4).await;
            let what = format!("decode, stream {stream}, round {round}");
            freed_in_time(&cluster, &what, client.leave()).await;
        }
    }
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_during_a_long_prefill_frees_its_blocks_on_both_workers() {
    let cluster = disaggregated("shm,grpc").await;
    let prefill = cluster.only(Role::Prefill);
    for stream in [true, false] {
        let client =
            RawClient::post(&cluster.api, "/v1/completions", &request(4000, 4, stream)).await;
        until(prefill, "the prompt is computed", |status| status.running > 0).await;
        freed_in_time(&cluster, &format!("prefill, stream {stream}"), client.leave()).await;
    }
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_a_unified_worker_during_prefill_frees_its_blocks() {
    let cluster = Cluster::unified().await;
    let worker = cluster.only(Role::Unified);
    for stream in [true, false] {
        let client =
            RawClient::post(&cluster.api, "/v1/completions", &request(4000, 4, stream)).await;
        until(worker, "the prompt is computed", |status| status.running > 0).await;
        freed_in_time(&cluster, &format!("unified, stream {stream}"), client.leave()).await;
    }
    cluster.still_serves().await;
    cluster.finish().await;
}

async fn leaves_during_the_hand_off(transport: &str) {
    let cluster = disaggregated(transport).await;
    let decode = cluster.only(Role::Decode);
    for stream in [true, false] {
        let before = decode.status().await;
        let client =
            RawClient::post(&cluster.api, "/v1/completions", &request(3000, 4, stream)).await;
        let during = until(decode, "blocks arrive", |status| {
            grpc::handoff_bytes(status) > grpc::handoff_bytes(&before)
        })
        .await;
        let left = client.leave();
        assert_eq!(during.generation_tokens, before.generation_tokens, "the hand-off was over");
        freed_in_time(&cluster, &format!("hand-off over {transport}, stream {stream}"), left).await;
    }
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_during_a_hand_off_over_shared_memory_frees_its_blocks() {
    leaves_during_the_hand_off("shm").await;
}

#[tokio::test]
async fn a_client_that_leaves_during_a_hand_off_over_grpc_frees_its_blocks() {
    leaves_during_the_hand_off("grpc").await;
}

/// A client that waits in the queue and leaves makes room for the next.
#[tokio::test]
async fn a_full_queue_is_answered_with_retry_after_and_keeps_nothing() {
    let cluster = Cluster::builder()
        .unified(1)
        .worker_arg("--max-running", "1")
        .worker_arg("--max-waiting", "1")
        .start()
        .await;
    let worker = cluster.only(Role::Unified);
    let running = RawClient::post(&cluster.api, "/v1/completions", &request(20, 4000, false)).await;
    until(worker, "one runs", |status| status.running == 1).await;
    let waiting = RawClient::post(&cluster.api, "/v1/completions", &request(20, 4000, true)).await;
    until(worker, "one waits", |status| status.waiting == 1).await;

    for stream in [false, true] {
        let start = Instant::now();
        let reply = cluster.api.post("/v1/completions", &request(20, 4, stream)).await;
        let refused = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
        assert!(refused.contains(&reply.status), "{} {}", reply.status, reply.text);
        reply.error(reply.status.as_u16()).expect("the error object");
        let after: u64 = reply.header("retry-after").parse().expect("Retry-After in seconds");
        assert!((1..=60).contains(&after), "Retry-After: {after}");
        assert!(start.elapsed() < Duration::from_secs(5), "refused after {:?}", start.elapsed());
    }
    let status = worker.status().await;
    assert_eq!((status.running, status.waiting), (1, 1), "{status:?}");

    waiting.leave();
    until(worker, "nobody waits", |status| status.waiting == 0).await;
    let left = running.leave();
    freed_in_time(&cluster, "the queue", left).await;
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_request_that_outlives_its_deadline_is_ended_and_freed() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(32);
    let cluster = builder.gateway_arg("--request-timeout", "2").start().await;
    let start = Instant::now();
    let reply = cluster.api.post("/v1/completions", &request(100, 7000, false)).await;
    let took = start.elapsed();
    assert!(reply.status == 504 || reply.status == 408, "{} {}", reply.status, reply.text);
    reply.error(reply.status.as_u16()).expect("the error object");
    assert!(took > Duration::from_millis(1800) && took < Duration::from_secs(4), "{took:?}");
    freed_in_time(&cluster, "the deadline", Instant::now()).await;

    // A stream that has begun cannot change its status: its last event is the error.
    let mut stream = cluster.api.stream("/v1/completions", &request(100, 7000, true)).await;
    let mut last = Value::Null;
    while let Some(event) = stream.next().await {
        last = event;
    }
    assert!(last["error"]["message"].is_string(), "{last}");
    freed_in_time(&cluster, "the deadline of a stream", Instant::now()).await;
    cluster.still_serves().await;
    cluster.finish().await;
}

/// Many clients come and go at random moments of their requests' lives.
#[tokio::test]
async fn clients_that_leave_at_any_moment_leave_nothing_behind() {
    let cluster = disaggregated("shm,grpc").await;
    let clients = (0..24u64).map(|i| {
        let api = cluster.api.clone();
        async move {
            let body = request(16 + (i as usize * 97) % 900, 64, i.is_multiple_of(2));
            let client = RawClient::post(&api, "/v1/completions", &body).await;
            // Not synchronization: the moment of leaving is the input of this test.
            tokio::time::sleep(Duration::from_millis(i * 53 % 700)).await;
            client.leave();
        }
    });
    futures::future::join_all(clients).await;
    eventually("everything is freed", Duration::from_secs(5), async || {
        for worker in &cluster.workers {
            let status = worker.status().await;
            if grpc::owned_blocks(&status) + u64::from(status.running + status.waiting) > 0 {
                return Err(format!("{}: {status:?}", worker.process.name()));
            }
        }
        Ok(())
    })
    .await;
    cluster.still_serves().await;
    cluster.finish().await;
}
