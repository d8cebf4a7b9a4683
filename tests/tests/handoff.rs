//! What crosses from prefill to decode workers, and what does not.

use std::time::{Duration, Instant};

use baton_proto::v1::prefill_event::Event;
use baton_proto::v1::{
    DescribeRequest, PrefillRequest, SamplingParams, Transport, WorkerDescription, WorkerStatus,
};
use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Cluster, Role, Worker, eventually, grpc};
use serde_json::json;
use tonic::Code;

async fn describe(worker: &Worker) -> WorkerDescription {
    let reply = grpc::worker(&worker.address).await.describe(DescribeRequest {}).await;
    reply.expect("a description").into_inner()
}

/// Sends a prompt of these tokens; returns how the decode worker's counters grew.
async fn grown(cluster: &Cluster, prompt: &[u32]) -> WorkerStatus {
    let decode = cluster.only(Role::Decode);
    let before = decode.status().await;
    let body = json!({"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0});
    cluster.api.ok("/v1/completions", &body).await;
    let after = decode.status().await;
    WorkerStatus {
        handoff_requests: after.handoff_requests - before.handoff_requests,
        handoff_failures: after.handoff_failures - before.handoff_failures,
        handoff_bytes_shared_memory: after.handoff_bytes_shared_memory
            - before.handoff_bytes_shared_memory,
        handoff_bytes_grpc: after.handoff_bytes_grpc - before.handoff_bytes_grpc,
        ..after
    }
}

async fn only_missing_blocks_move(transport: &str) {
    let builder = Cluster::builder().prefill(1).decode(1).transport(transport);
    let cluster = builder.handoff_min_tokens(64).start().await;
    let layout = describe(cluster.only(Role::Decode)).await.kv_layout.expect("a layout");
    let (size, bytes) = (layout.block_size as usize, layout.block_bytes);
    let tokens: Vec<u32> = (0..40 * size as u32).map(|i| 1000 + i * 3).collect();

    // All blocks of a new prompt, the part-filled last one among them.
    let first = grown(&cluster, &tokens[..10 * size + 3]).await;
    assert_eq!(first.handoff_requests, 1);
    assert_eq!(grpc::handoff_bytes(&first), 11 * bytes);
    // Of a longer prompt, those that are new.
    let longer = grown(&cluster, &tokens[..30 * size + 3]).await;
    assert_eq!(longer.handoff_requests, 1);
    assert_eq!(grpc::handoff_bytes(&longer), 21 * bytes);
    // With fewer new tokens than the threshold, none: the decode worker computes them itself.
    let same = grown(&cluster, &tokens[..30 * size + 3]).await;
    assert_eq!((same.handoff_requests, grpc::handoff_bytes(&same)), (0, 0));
    let little = grown(&cluster, &tokens[..33 * size]).await;
    assert_eq!((little.handoff_requests, grpc::handoff_bytes(&little)), (0, 0));
    let short = grown(&cluster, &[7; 63]).await;
    assert_eq!((short.handoff_requests, grpc::handoff_bytes(&short)), (0, 0));
    // From the threshold on, all.
    let enough = grown(&cluster, &[8; 64]).await;
    assert_eq!(enough.handoff_requests, 1);
    assert_eq!(grpc::handoff_bytes(&enough), 64_u64.div_ceil(size as u64) * bytes);

    let status = cluster.only(Role::Decode).status().await;
    let unused = match transport {
        "shm" => status.handoff_bytes_grpc,
        _ => status.handoff_bytes_shared_memory,
    };
    assert_eq!((unused, status.handoff_failures), (0, 0), "{status:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn only_blocks_that_the_decode_worker_lacks_move_over_shared_memory() {
    only_missing_blocks_move("shm").await;
}

#[tokio::test]
async fn only_blocks_that_the_decode_worker_lacks_move_over_grpc() {
    only_missing_blocks_move("grpc").await;
}

/// On one host, shared memory is taken when both ends offer both.
#[tokio::test]
async fn shared_memory_is_preferred_on_one_host() {
    let builder = Cluster::builder().prefill(1).decode(1).transport("shm,grpc");
    let cluster = builder.handoff_min_tokens(32).start().await;
    let moved = grown(&cluster, &(1000..1100).collect::<Vec<u32>>()).await;
    assert!(moved.handoff_bytes_shared_memory > 0, "{moved:?}");
    assert_eq!(moved.handoff_bytes_grpc, 0);
    cluster.finish().await;
}

/// A request for 100 tokens, as a decode worker with the same layout would send it.
fn prefill_request(peer: &WorkerDescription) -> PrefillRequest {
    PrefillRequest {
        request_id: "a-test".into(),
        token_ids: (1000..1100).collect(),
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens: 4,
            ..SamplingParams::default()
        }),
        kv_layout: peer.kv_layout,
        weights_digest: peer.model.as_ref().expect("a model").weights_digest.clone(),
        transports: vec![Transport::Grpc.into(), Transport::SharedMemory.into()],
        timeout_ms: 60_000,
        ..PrefillRequest::default()
    }
}

/// A caller that neither fetches nor hangs up: the blocks are its own for a while, not for ever.
#[tokio::test]
async fn blocks_that_nobody_fetches_are_freed_when_their_lease_ends() {
    let builder = Cluster::builder().prefill(1).worker_arg("--hold-lease", "2");
    let cluster = builder.start().await;
    let worker = cluster.only(Role::Prefill);
    let peer = describe(worker).await;
    for transport in [Transport::Grpc, Transport::SharedMemory] {
        let mut request = prefill_request(&peer);
        request.transports = vec![transport.into()];
        let mut client = grpc::worker(&worker.address).await;
        let mut events = client.prefill(request).await.expect("accepted").into_inner();
        let (mut blocks, mut finished) = (0, None);
        while finished.is_none() {
            match events.message().await.expect("an event").expect("an event").event {
                Some(Event::Ready(ready)) => blocks += ready.blocks.len(),
                Some(Event::Block(block)) => {
                    assert_eq!(
                        block.payload.len() as u64,
                        peer.kv_layout.expect("one").block_bytes
                    );
                    blocks += 1;
                }
                Some(Event::Finished(finish)) => finished = finish.first_token,
                Some(Event::Accepted(accepted)) => assert_eq!(accepted.transport(), transport),
                None => panic!("an empty event"),
            }
        }
        assert_eq!(blocks, 7, "100 tokens in blocks of 16");
        // A worker tells its status between two steps.
        eventually("the blocks are pinned", Duration::from_secs(1), async || {
            let held = worker.status().await;
            if held.kv_blocks_handoff >= 7 { Ok(()) } else { Err(format!("{held:?}")) }
        })
        .await;
        let what = "the blocks of a silent caller are freed";
        let within = Duration::from_secs(4);
        let (_, took) = grpc::until_unowned(&worker.address, what, within).await;
        assert!(took > Duration::from_secs(1), "freed before the lease ended: {took:?}");
        drop(events);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_frees_its_blocks_at_once() {
    let cluster = Cluster::builder().prefill(1).start().await;
    let worker = cluster.only(Role::Prefill);
    let peer = describe(worker).await;
    let mut client = grpc::worker(&worker.address).await;
    let mut events = client.prefill(prefill_request(&peer)).await.expect("accepted").into_inner();
    while !matches!(
        events.message().await.expect("an event").expect("an event").event,
        Some(Event::Finished(_))
    ) {}
    let hung_up = Instant::now();
    drop(events);
    let within = Duration::from_secs(1);
    grpc::until_unowned(&worker.address, "the blocks are freed", within).await;
    println!("freed after {:?}", hung_up.elapsed());
    cluster.finish().await;
}

/// KV of another layout or of other weights would be read as garbage: it is refused.
#[tokio::test]
async fn a_peer_that_may_not_share_kv_is_refused() {
    let cluster = Cluster::builder().prefill(1).start().await;
    let worker = cluster.only(Role::Prefill);
    let peer = describe(worker).await;
    let sound = prefill_request(&peer);
    let mut layout = sound.clone();
    layout.kv_layout.as_mut().expect("a layout").block_size *= 2;
    let mut weights = sound.clone();
    weights.weights_digest = "other".into();
    let mut no_transport = sound.clone();
    no_transport.transports.clear();
    let mut no_tokens = sound.clone();
    no_tokens.token_ids.clear();
    let mut range = sound.clone();
    range.token_ids[50] = 10_000_000;
    let mut have = sound.clone();
    have.have_tokens = 5;
    let mut have_more = sound.clone();
    have_more.have_tokens = 1600;
    let refused = [
        ("another layout", layout),
        ("other weights", weights),
        ("no transport", no_transport),
        ("no tokens", no_tokens),
        ("a token id out of range", range),
        ("half a block at the caller", have),
        ("more at the caller than there is", have_more),
    ];
    for (what, request) in refused {
        let mut client = grpc::worker(&worker.address).await;
        // Refused by the call itself or by its stream's first event.
        let status = match client.prefill(request).await {
            Err(status) => status,
            Ok(events) => match events.into_inner().message().await {
                Err(status) => status,
                Ok(event) => panic!("{what}: {event:?}"),
            },
        };
        let code = status.code();
        assert!(
            matches!(code, Code::InvalidArgument | Code::FailedPrecondition),
            "{what}: {status}"
        );
        assert!(!status.message().is_empty(), "{what}");
    }
    let mut client = grpc::worker(&worker.address).await;
    client.prefill(sound).await.expect("the sound request is still served");
    cluster.finish().await;
}
