//! Workers on a GPU, in whole clusters: what they answer, how their KV crosses, and what happens when
//! it does not. With no GPU at hand they run on its double (`tests/gpu/README.md`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::v1::{DrainRequest, WorkerStatus};
use baton_tests::binaries::{model, other_model, program, small_model};
use baton_tests::cluster::Builder;
use baton_tests::etcd::Etcd;
use baton_tests::http::ids;
use baton_tests::process::{Process, Spec};
use baton_tests::{Api, Cluster, MODEL_NAME, Role, eventually, gpu, grpc};
use serde_json::{Value, json};

/// A model of two layers: a prompt of hundreds of tokens takes the double no time.
fn qwen3() -> PathBuf {
    small_model("qwen3")
}

/// Workers of the small model.
fn workers(builder: Builder, roles: &[Role]) -> Builder {
    roles.iter().fold(builder, |builder, &role| builder.others(role, 1, qwen3(), MODEL_NAME))
}

/// A prompt of the small model's tokens that shares no prefix with another's.
fn request(salt: usize, length: usize, tokens: usize) -> Value {
    let prompt: Vec<usize> = (0..length).map(|i| 3 + (i * 37 + salt * 101) % 250).collect();
    json!({
        "model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "logprobs": 5,
        "return_tokens_as_token_ids": true,
    })
}

/// An answer: its tokens, and of each step the likeliest tokens.
struct Answer {
    ids: Vec<u32>,
    top: Vec<Value>,
}

async fn answer(api: &Api, request: &Value) -> Answer {
    let reply = api.ok("/v1/completions", request).await;
    let choice = &reply["choices"][0];
    let top = choice["logprobs"]["top_logprobs"].as_array().expect("steps").clone();
    Answer { ids: ids(&choice["token_ids"]), top }
}

/// The same tokens up to where two are about as likely: bfloat16 may prefer the other.
fn agree(expected: &Answer, got: &Answer, tolerance: f64) {
    let differ = expected.ids.iter().zip(&got.ids).position(|(x, y)| x != y);
    let Some(step) = differ else {
        assert_eq!(expected.ids.len(), got.ids.len());
        return;
    };
    let logprob = |id: u32| expected.top[step][format!("token_id:{id}")].as_f64();
    let (best, other) = (expected.ids[step], got.ids[step]);
    let behind = logprob(best).expect("the best") - logprob(other).unwrap_or(f64::NEG_INFINITY);
    assert!(behind < tolerance, "step {step}: {other} in place of {best}, {behind} behind it");
}

#[tokio::test]
async fn a_unified_worker_answers_as_one_on_the_processor_does() {
    let prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):\n    "];
    let requests = prompts.map(|prompt| {
        json!({
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": 10, "temperature": 0,
            "return_token_ids": true, "logprobs": 5, "return_tokens_as_token_ids": true,
        })
    });
    let cpu = Cluster::unified().await;
    let on_gpu = gpu::cluster().unified(1).start().await;
    for request in &requests {
        let (expected, got) = tokio::join!(answer(&cpu.api, request), answer(&on_gpu.api, request));
        agree(&expected, &got, 0.3);
    }
    // A prompt that is cached, and two at a time.
    let first = answer(&on_gpu.api, &requests[0]).await;
    let both = tokio::join!(answer(&on_gpu.api, &requests[0]), answer(&on_gpu.api, &requests[1]),);
    agree(&first, &both.0, 0.1);
    cpu.finish().await;
    on_gpu.finish().await;
}

/// The bytes that came over each transport.
fn came(status: &WorkerStatus) -> [(&'static str, u64); 3] {
    [
        ("cuda-ipc", status.handoff_bytes_cuda_ipc),
        ("nccl", status.handoff_bytes_nccl),
        ("grpc", status.handoff_bytes_grpc),
    ]
}

/// Prompts are computed in one process and answered in another, as in one alone.
async fn handed_over(transport: &str) {
    let alone = workers(gpu::cluster(), &[Role::Unified]).start().await;
    let builder = workers(gpu::cluster(), &[Role::Prefill, Role::Decode]);
    let cluster = builder.transport(transport).handoff_min_tokens(16).start().await;
    let lengths = [17, 100, 300, 32, 451];
    for (salt, length) in lengths.into_iter().enumerate() {
        let request = request(salt, length, 12);
        let (expected, got) =
            tokio::join!(answer(&alone.api, &request), answer(&cluster.api, &request));
        assert_eq!(expected.ids, got.ids, "a prompt of {length}");
    }
    let decode = cluster.only(Role::Decode);
    let status = decode.status().await;
    assert_eq!((status.handoff_requests, status.handoff_failures), (5, 0), "{status:?}");
    let blocks: usize = lengths.iter().map(|length| length.div_ceil(16)).sum();
    // Two layers, two heads of 32 dimensions, keys and values, sixteen bits.
    let bytes = (blocks * 16 * 2 * 2 * 32 * 2 * 2) as u64;
    for (name, came) in came(&status) {
        assert_eq!(came, if name == transport { bytes } else { 0 }, "{name}: {status:?}");
    }
    if transport == "nccl" {
        let joined = decode.process.stderr().matches("joined an NCCL link").count();
        assert_eq!(joined, 1, "one link served all");
    }
    cluster.finish().await;
    alone.finish().await;
}

#[tokio::test]
async fn prompts_are_handed_over_by_cuda_ipc() {
    handed_over("cuda-ipc").await;
}

#[tokio::test]
async fn prompts_are_handed_over_by_nccl() {
    handed_over("nccl").await;
}

#[tokio::test]
async fn prompts_are_handed_over_by_grpc() {
    handed_over("grpc").await;
}

/// Several at a time, each over a link of its own, and more than there may be.
#[tokio::test]
async fn many_hand_offs_at_a_time_are_all_right() {
    let builder = workers(gpu::cluster(), &[Role::Prefill, Role::Decode]);
    let builder = builder.transport("nccl,grpc").handoff_min_tokens(16);
    let cluster = builder.start().await;
    let alone = workers(gpu::cluster(), &[Role::Unified]).start().await;
    let requests: Vec<Value> = (0..24).map(|salt| request(salt, 40 + salt * 9, 4)).collect();
    let all = requests.iter().map(|request| answer(&cluster.api, request));
    let got = futures::future::join_all(all).await;
    for (request, got) in requests.iter().zip(got) {
        agree(&answer(&alone.api, request).await, &got, 0.1);
    }
    let status = cluster.only(Role::Decode).status().await;
    assert_eq!(status.handoff_failures, 0, "{status:?}");
    assert!(status.handoff_bytes_nccl > 0, "{status:?}");
    cluster.finish().await;
    alone.finish().await;
}

/// The memory of the peer is out of reach: the next transport is taken, and the request waits for
/// nothing.
#[tokio::test]
async fn a_transport_that_does_not_reach_the_peer_is_done_without() {
    if gpu::real() {
        // Its driver cannot be told to refuse.
        return;
    }
    for (without, used) in [("cuda-ipc,nccl,grpc", "nccl"), ("cuda-ipc,grpc", "grpc")] {
        let builder = workers(gpu::cluster(), &[Role::Prefill, Role::Decode]);
        let builder = builder.worker_program(gpu::worker(), &[("BATON_DOUBLE_NO_IPC", "1".into())]);
        let cluster = builder.transport(without).handoff_min_tokens(16).start().await;
        for salt in 0..2 {
            answer(&cluster.api, &request(salt, 100, 2)).await;
        }
        let status = cluster.only(Role::Decode).status().await;
        assert_eq!((status.handoff_requests, status.handoff_failures), (2, 0), "{status:?}");
        for (name, came) in came(&status) {
            assert_eq!(came > 0, name == used, "{without}: {name}: {status:?}");
        }
        cluster.finish().await;
    }
}

/// A prefill worker is killed while blocks cross: the answer is as it would have been.
async fn the_peer_dies(transport: &str) {
    let alone = workers(gpu::cluster(), &[Role::Unified]).start().await;
    let long = request(1, 480, 8);
    let expected = answer(&alone.api, &long).await;
    alone.finish().await;
    let builder = workers(gpu::cluster(), &[Role::Prefill, Role::Decode]);
    // A step for each block: the hand-off has begun long before the prompt is done.
    let builder = builder.worker_arg("--max-batch-tokens", "16").transport(transport);
    let mut cluster = builder.handoff_min_tokens(16).start().await;
    let decode = cluster.only(Role::Decode).address.clone();
    let call = tokio::spawn({
        let (api, long) = (cluster.api.clone(), long.clone());
        async move { answer(&api, &long).await }
    });
    let what = "blocks arrive";
    eventually(what, Duration::from_secs(30), async || {
        let status = grpc::status(&decode).await;
        if grpc::handoff_bytes(&status) > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    cluster.kill_worker(0);
    let got = call.await.expect("an answer");
    agree(&expected, &got, 0.1);
    let (after, _) = grpc::until_unowned(&decode, "no block stays", Duration::from_secs(5)).await;
    assert!(after.handoff_failures >= 1, "the hand-off was over before the peer died: {after:?}");
    // A new one is used again.
    let model = qwen3();
    let flags = [("--model", model.to_str().expect("UTF-8"))];
    cluster.add_worker_with(Role::Prefill, &flags).await;
    let salt = std::cell::Cell::new(10);
    eventually("the new prefill worker is used", Duration::from_secs(20), async || {
        salt.set(salt.get() + 1);
        answer(&cluster.api, &request(salt.get(), 64, 2)).await;
        let status = grpc::status(&decode).await;
        let used = grpc::handoff_bytes(&status) > grpc::handoff_bytes(&after);
        if used { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn the_answer_is_right_when_the_peer_dies_while_blocks_cross_by_cuda_ipc() {
    the_peer_dies("cuda-ipc").await;
}

#[tokio::test]
async fn the_answer_is_right_when_the_peer_dies_while_blocks_cross_by_nccl() {
    the_peer_dies("nccl").await;
}

/// Clients leave while blocks cross: no block stays, and what was under way for them is not taken for
/// the next one's.
#[tokio::test]
async fn a_hand_off_that_is_given_up_leaves_nothing() {
    let alone = workers(gpu::cluster(), &[Role::Unified]).start().await;
    for transport in ["cuda-ipc", "nccl"] {
        let builder = workers(gpu::cluster(), &[Role::Prefill, Role::Decode]);
        let builder = builder.worker_arg("--max-batch-tokens", "16").transport(transport);
        let cluster = builder.handoff_min_tokens(16).start().await;
        let decode = cluster.only(Role::Decode);
        // A link that was kept is there to be used by those that follow.
        answer(&cluster.api, &request(0, 64, 2)).await;
        for salt in 1..4 {
            let before = decode.status().await;
            let call = tokio::spawn({
                let (api, long) = (cluster.api.clone(), request(salt, 480, 4));
                async move { answer(&api, &long).await }
            });
            eventually("blocks arrive", Duration::from_secs(30), async || {
                let status = decode.status().await;
                let came = grpc::handoff_bytes(&status) > grpc::handoff_bytes(&before);
                if came { Ok(()) } else { Err(format!("{status:?}")) }
            })
            .await;
            call.abort();
            assert!(call.await.is_err(), "it was answered before the client left");
            cluster.at_rest().await;
            let after = decode.status().await;
            assert_eq!(after.generation_tokens, before.generation_tokens, "{after:?}");
            let next = request(10 + salt, 300, 8);
            let (expected, got) =
                tokio::join!(answer(&alone.api, &next), answer(&cluster.api, &next));
            agree(&expected, &got, 0.05);
            let end = decode.status().await;
            assert!(grpc::handoff_bytes(&end) > grpc::handoff_bytes(&after), "{end:?}");
        }
        cluster.finish().await;
    }
    alone.finish().await;
}

/// A worker that drains hands its sequences over with their KV.
#[tokio::test]
async fn sequences_of_a_worker_that_drains_move_from_gpu_to_gpu() {
    for transport in ["cuda-ipc", "nccl"] {
        let builder = workers(gpu::cluster(), &[Role::Unified, Role::Unified]);
        let cluster = builder.transport(transport).start().await;
        let request = request(3, 200, 250);
        let expected = answer(&cluster.api, &request).await;
        let moved = async || {
            let mut bytes = 0;
            for worker in &cluster.workers {
                bytes += grpc::handoff_bytes(&worker.status().await);
            }
            bytes
        };
        let mut salted = request.clone();
        salted["cache_salt"] = "another".into();
        let call = tokio::spawn({
            let api = cluster.api.clone();
            async move { answer(&api, &salted).await }
        });
        let running = || async {
            for worker in &cluster.workers {
                if worker.status().await.running > 0 {
                    return Ok(worker.address.clone());
                }
            }
            Err("nobody computes".to_owned())
        };
        let (busy, _) = eventually("one computes", Duration::from_secs(20), running).await;
        let drain = DrainRequest { timeout_ms: 20_000 };
        grpc::worker(&busy).await.drain(drain).await.expect("it drains");
        let got = call.await.expect("an answer");
        assert_eq!(got.ids, expected.ids, "{transport}");
        assert!(moved().await > 0, "{transport}: nothing was moved");
        cluster.finish().await;
    }
}

/// Their KV means something else: nothing crosses, and the prompt is computed where it is needed.
#[tokio::test]
async fn a_gpu_and_a_processor_do_not_share_kv() {
    let builder = workers(gpu::cluster(), &[Role::Prefill]).transport("grpc");
    let mut cluster = builder.handoff_min_tokens(16).start().await;
    let model = qwen3();
    let flags = [("--model", model.to_str().expect("UTF-8")), ("--device", "cpu")];
    cluster.add_worker_with(Role::Decode, &flags).await;
    cluster.all_found().await;
    let alone = workers(Cluster::builder(), &[Role::Unified]).start().await;
    let request = request(0, 100, 4);
    let (expected, got) =
        tokio::join!(answer(&alone.api, &request), answer(&cluster.api, &request));
    assert_eq!(expected.ids, got.ids);
    let status = cluster.only(Role::Decode).status().await;
    // The gateway does not even bring them together.
    assert_eq!((status.handoff_requests, grpc::handoff_bytes(&status)), (0, 0), "{status:?}");
    assert_eq!(cluster.only(Role::Prefill).status().await.requests, 0);
    cluster.finish().await;
    alone.finish().await;
}

/// Runs a worker that must not start; gives its exit code and what it says.
async fn refused(
    program: PathBuf,
    env: &[(&str, String)],
    model: &Path,
    more: &[&str],
) -> (i32, String) {
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = Etcd::start(dir.path()).await;
    let model = model.to_str().expect("UTF-8");
    let args = ["--role", "unified", "--etcd", etcd.url(), "--model", model, "--device", "cuda"];
    let mut spec = Spec::new("baton-worker", program, args.iter().chain(more));
    spec.env = env.iter().map(|(name, value)| (name.into(), value.into())).collect();
    let mut process = Process::start(&spec, dir.path());
    let status = process.end(Duration::from_secs(10)).await;
    let stderr = process.stderr();
    assert!(!stderr.contains("panicked"), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("no single error line:\n{stderr}") };
    (status.code().expect("an exit code"), error.to_owned())
}

#[tokio::test]
async fn what_cannot_be_is_said_at_the_start() {
    let (code, error) = refused(program("baton-worker"), &[], &model(), &[]).await;
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("--device cuda:0") && error.contains("feature `cuda`"), "{error}");
    if !gpu::real() {
        let (code, error) = refused(gpu::worker(), &[], &model(), &[]).await;
        assert_eq!(code, 2, "{error}");
        assert!(error.contains("--device") && error.contains("driver"), "{error}");
    }
    let env = gpu::environment();
    let (code, error) = refused(gpu::worker(), &env, &other_model(), &[]).await;
    assert_eq!(code, 65, "{error}");
    assert!(error.contains("sliding-window attention"), "{error}");
    for flags in [
        ["--kv-cache-dtype", "int8"],
        ["--activation-bits", "8"],
        ["--lora-modules", "a=/a"],
        ["--transports", "shm"],
    ] {
        let (code, error) = refused(gpu::worker(), &env, &qwen3(), &flags).await;
        assert_eq!(code, 2, "{error}");
        assert!(
            error.contains(flags[0]) && error.contains("GPU") || error.contains("--device"),
            "{error}"
        );
    }
    let (code, error) = refused(gpu::worker(), &env, &qwen3(), &["--kv-memory", "900GiB"]).await;
    assert_eq!(code, 69, "{error}");
    assert!(error.contains("--kv-memory"), "{error}");
}
