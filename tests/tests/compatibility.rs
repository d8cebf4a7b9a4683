//! Versions side by side: the contract against those that were released, and a cluster whose
//! workers speak an earlier one, as in the middle of an upgrade.

use std::time::Duration;

use baton_tests::binaries::{model, program};
use baton_tests::contract::compare::breaks;
use baton_tests::contract::shim::Earlier;
use baton_tests::contract::{current, read};
use baton_tests::process::{Process, Spec};
use baton_tests::{Cluster, MODEL_NAME, Role, Worker, eventually, grpc, ports};
use prost_types::FileDescriptorSet;
use serde_json::{Value, json};

/// Contracts of releases; what 0.1 has is kept from now on, before it is out.
const RELEASED: [&str; 1] = ["proto/released/0.1"];
/// The contract of 25 November 2026, before workers could be drained, told what their caches hold,
/// and counted for the planner. It was never released, and is further from today's than any that
/// was.
const BEFORE_DRAINING: &str = "tests/contracts/before-draining";

#[test]
fn nothing_that_was_released_is_taken_back() {
    let current = current();
    for earlier in RELEASED.into_iter().chain([BEFORE_DRAINING]) {
        let breaks = breaks(&read(earlier), &current);
        assert!(breaks.is_empty(), "{earlier}:\n{}", breaks.join("\n"));
    }
}

#[tokio::test]
async fn workers_of_before_draining_serve_todays_gateway() {
    let earlier = read(BEFORE_DRAINING);
    for transport in ["shm", "grpc"] {
        let counts = side_by_side(&earlier, transport).await;
        // They were earlier ones: the gateway's and the workers' news did not reach each other.
        let (messages, fields, calls) = counts;
        assert!(messages > 0 && fields > 0 && calls > 0, "{transport}: {counts:?}");
    }
}

#[tokio::test]
async fn workers_of_the_last_release_serve_todays_gateway() {
    let [.., last] = RELEASED;
    let (messages, ..) = side_by_side(&read(last), "grpc").await;
    assert!(messages > 0);
}

/// Asks a cluster with a prefill and a decode worker of an earlier contract, and one of today's.
/// Returns what crossed.
async fn side_by_side(earlier: &FileDescriptorSet, transport: &str) -> (u64, u64, u64) {
    let builder = Cluster::builder().coordinator().transport(transport);
    let mut cluster = builder.handoff_min_tokens(16).start().await;
    let (prefill, decode) = (
        add(&mut cluster, Role::Prefill, earlier, transport).await,
        add(&mut cluster, Role::Decode, earlier, transport).await,
    );
    cluster.all_found().await;

    let story = "The ship left the harbour at dawn and nobody saw it go. ".repeat(8);
    let body = json!({
        "model": MODEL_NAME, "temperature": 0, "max_tokens": 24, "logprobs": true,
        "messages": [{"role": "user", "content": format!("{story} What left the harbour?")}],
    });
    let text = |reply: &Value| reply["choices"][0]["message"]["content"].clone();
    let reply = cluster.api.ok("/v1/chat/completions", &body).await;
    let handed_off = grpc::handoff_bytes(&cluster.workers[1].status().await);
    assert!(handed_off > 0, "the prompt was computed by the prefill worker");
    cluster.still_serves().await;
    let adapters = cluster.api.get("/v1/models").await.ok();
    assert_eq!(adapters["data"].as_array().map(Vec::len), Some(1), "{adapters}");
    let view = grpc::cluster_view(cluster.coordinator()).await;
    let told = view.instances.iter().filter(|it| it.status.is_some()).count();
    assert_eq!(told, 2, "the coordinator sees both: {view:?}");

    // An upgrade: a worker of today comes, the earlier ones go, one after the other.
    let counts = [prefill.counts(), decode.counts()];
    cluster.add_worker(Role::Unified).await;
    cluster.all_found().await;
    let streams: Vec<_> = (0..4)
        .map(|n| {
            let (api, mut body) = (cluster.api.clone(), body.clone());
            body["cache_salt"] = format!("{n}").into();
            tokio::spawn(async move { api.ok("/v1/chat/completions", &body).await })
        })
        .collect();
    eventually("the earlier worker generates", Duration::from_secs(30), async || {
        let status = cluster.workers[1].status().await;
        if status.running > 0 || status.generation_tokens > 60 {
            Ok(())
        } else {
            Err(format!("{status:?}"))
        }
    })
    .await;
    for role in [Role::Decode, Role::Prefill] {
        let index = cluster.workers.iter().position(|it| it.role == role).expect("it is there");
        let mut worker = cluster.workers.remove(index);
        worker.process.stop().await;
    }
    for stream in streams {
        let other = stream.await.expect("an answer");
        assert_eq!(text(&other), text(&reply), "the same model, whoever computes");
    }
    cluster.all_found().await;
    let reply_of_today = cluster.api.ok("/v1/chat/completions", &body).await;
    assert_eq!(text(&reply_of_today), text(&reply));
    cluster.finish().await;
    let [prefill, decode] = counts;
    (prefill.0 + decode.0, prefill.1 + decode.1, prefill.2 + decode.2)
}

/// A worker that speaks the earlier contract, known under the address of its shim alone.
async fn add(
    cluster: &mut Cluster,
    role: Role,
    contract: &FileDescriptorSet,
    transport: &str,
) -> Earlier {
    let listen = format!("127.0.0.1:{}", ports::free());
    let earlier = Earlier::of(contract, &format!("http://{listen}")).await;
    let model = model();
    let args = [
        ["--role", role.as_str()],
        ["--listen", &listen],
        ["--advertise", &earlier.address],
        ["--etcd", cluster.etcd.url()],
        ["--model", model.to_str().expect("UTF-8")],
        ["--served-model-name", MODEL_NAME],
        ["--threads", "2"],
        ["--kv-memory", "512MiB"],
        ["--transports", transport],
    ];
    let spec =
        Spec::new(format!("earlier-{}", role.as_str()), program("baton-worker"), args.concat());
    let mut process = Process::start(&spec, cluster.dir());
    let address = process.ready().await;
    assert_eq!(address, earlier.address);
    cluster.workers.push(Worker { role, process, address });
    earlier
}
