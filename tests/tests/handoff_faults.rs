//! Prefill workers that die while they hand a prompt over.

use std::time::Duration;

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::ids;
use baton_tests::{Api, Cluster, Role, eventually, grpc};
use serde_json::{Value, json};

/// A prompt of 1,500 tokens that no other prompt shares a prefix with.
fn request(salt: u32) -> Value {
    let prompt: Vec<u32> = (0..1500).map(|i| 1000 + (i * 37 + salt * 1009) % 20_000).collect();
    json!({
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    })
}

async fn answer(api: &Api, request: &Value) -> Vec<u32> {
    let reply = api.ok("/v1/completions", request).await;
    ids(&reply["choices"][0]["token_ids"])
}

/// What a cluster without hand-off answers.
async fn reference(requests: &[Value]) -> Vec<Vec<u32>> {
    let cluster = Cluster::unified().await;
    let mut answers = Vec::new();
    for request in requests {
        answers.push(answer(&cluster.api, request).await);
    }
    cluster.finish().await;
    answers
}

async fn the_prefill_worker_dies(transport: &str) {
    let requests: Vec<Value> = (0..3).map(request).collect();
    let expected = reference(&requests).await;
    let builder = Cluster::builder().prefill(1).decode(1).transport(transport);
    // Small chunks: the hand-off has begun long before the prompt is done.
    let builder = builder.worker_arg("--max-batch-tokens", "64").handoff_min_tokens(32);
    let mut cluster = builder.start().await;
    let decode = cluster.only(Role::Decode).address.clone();

    // Mid-way: some blocks have arrived, most have not.
    let call = tokio::spawn({
        let (api, request) = (cluster.api.clone(), requests[0].clone());
        async move { answer(&api, &request).await }
    });
    let arrived = async || {
        let status = grpc::status(&decode).await;
        if grpc::handoff_bytes(&status) > 0 { Ok(status) } else { Err(format!("{status:?}")) }
    };
    let (during, _) = eventually("blocks arrive", Duration::from_secs(30), arrived).await;
    assert_eq!(during.generation_tokens, 0, "the hand-off was over");
    cluster.kill_worker(0);
    assert_eq!(call.await.expect("an answer"), expected[0], "the peer died mid-way");
    let after = grpc::status(&decode).await;
    assert!(after.handoff_failures >= 1, "{after:?}");

    // With no prefill worker at all, the decode worker computes prompts itself.
    assert_eq!(answer(&cluster.api, &requests[1]).await, expected[1], "no peer");
    let (alone, _) = grpc::until_unowned(&decode, "no block stays", Duration::from_secs(5)).await;

    // A new one is used again.
    cluster.add_worker(Role::Prefill).await;
    let (api, salt) = (cluster.api.clone(), std::cell::Cell::new(10));
    eventually("the new prefill worker is used", Duration::from_secs(20), async || {
        salt.set(salt.get() + 1);
        answer(&api, &request(salt.get())).await;
        let status = grpc::status(&decode).await;
        let used = grpc::handoff_bytes(&status) > grpc::handoff_bytes(&alone);
        if used { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    assert_eq!(answer(&cluster.api, &requests[2]).await, expected[2], "a new peer");
    cluster.finish().await;
}

#[tokio::test]
async fn the_answer_is_right_when_the_prefill_worker_dies_mid_hand_off_over_shared_memory() {
    the_prefill_worker_dies("shm").await;
}

#[tokio::test]
async fn the_answer_is_right_when_the_prefill_worker_dies_mid_hand_off_over_grpc() {
    the_prefill_worker_dies("grpc").await;
}

/// A prefill worker that hangs is worse than one that is gone: nothing breaks, nothing comes.
#[tokio::test]
async fn a_prefill_worker_that_hangs_does_not_hang_the_request() {
    let requests = [request(0)];
    let expected = reference(&requests).await;
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(32);
    let cluster = builder.worker_arg("--max-batch-tokens", "64").start().await;
    let prefill = cluster.only(Role::Prefill);
    prefill.process.signal(nix::sys::signal::Signal::SIGSTOP);
    let start = std::time::Instant::now();
    let got = answer(&cluster.api, &requests[0]).await;
    let took = start.elapsed();
    prefill.process.signal(nix::sys::signal::Signal::SIGCONT);
    println!("answered {took:?} after the peer had hung");
    assert_eq!(got, expected[0]);
    assert!(took < Duration::from_secs(60), "{took:?}");
    cluster.finish().await;
}

/// The decode worker dies while its prompt is being handed over: the prefill worker must not keep
/// the blocks that nobody will fetch.
#[tokio::test]
async fn a_prefill_worker_frees_what_a_dead_decode_worker_will_not_fetch() {
    let builder = Cluster::builder().prefill(1).decode(2).handoff_min_tokens(32);
    let mut cluster = builder.worker_arg("--max-batch-tokens", "64").start().await;
    let expected = reference(&[request(0)]).await;
    let call = tokio::spawn({
        let (api, request) = (cluster.api.clone(), request(0));
        async move { answer(&api, &request).await }
    });
    let prefill = cluster.only(Role::Prefill).address.clone();
    let decodes: Vec<String> =
        cluster.workers[1..].iter().map(|worker| worker.address.clone()).collect();
    let (victim, _) = eventually("blocks arrive", Duration::from_secs(30), async || {
        for (index, address) in decodes.iter().enumerate() {
            if grpc::handoff_bytes(&grpc::status(address).await) > 0 {
                return Ok(index);
            }
        }
        Err("no block has arrived".to_owned())
    })
    .await;
    cluster.kill_worker(1 + victim);
    assert_eq!(call.await.expect("an answer"), expected[0]);
    let what = "the prefill worker is at rest";
    grpc::until_unowned(&prefill, what, Duration::from_secs(2)).await;
    cluster.finish().await;
}
