//! LoRA adapters: in one batch, at run time, across hand-offs, deaths and gateways.

use std::path::Path;
use std::time::Duration;

use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{
    AdapterRef, GenerateRequest, ListAdaptersRequest, PrefillPeer, SamplingParams,
    UnloadAdapterRequest,
};
use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::{ids, streamed_ids};
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, Role, Worker, eventually, grpc, lora};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// More than six blocks, fewer than seven.
fn prompt() -> Vec<u32> {
    (0..100).map(|i| 1000 + i * 7).collect()
}

fn request(model: &str, tokens: usize) -> Value {
    json!({
        "model": model, "prompt": prompt(), "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true,
    })
}

async fn answer(api: &Api, model: &str, tokens: usize) -> Vec<u32> {
    let reply = api.ok("/v1/completions", &request(model, tokens)).await;
    assert_eq!(reply["model"], model);
    ids(&reply["choices"][0]["token_ids"])
}

async fn answers(api: &Api, tokens: usize) -> [Vec<u32>; 3] {
    [
        answer(api, MODEL_NAME, tokens).await,
        answer(api, "one", tokens).await,
        answer(api, "two", tokens).await,
    ]
}

fn two_adapters() -> (TempDir, String) {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (lora::write(dir.path(), "one", 1), lora::write(dir.path(), "two", 2));
    let modules = lora::modules(&[("one", &one), ("two", &two)]);
    (dir, modules)
}

async fn load(api: &Api, name: &str, path: &Path) {
    let reply =
        api.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).await;
    let expected = format!("Success: LoRA adapter '{name}' added successfully.");
    assert_eq!((reply.status.as_u16(), &*reply.text), (200, &*expected));
    assert!(reply.header("content-type").starts_with("text/plain"));
}

async fn names(worker: &Worker) -> Vec<String> {
    let mut client = grpc::worker(&worker.address).await;
    let list = client.list_adapters(ListAdaptersRequest {}).await.expect("a list").into_inner();
    list.adapters.into_iter().map(|adapter| adapter.name).collect()
}

async fn serves(api: &Api, name: &str, expected: bool) {
    eventually("the gateway knows the adapter", Duration::from_secs(10), async || {
        let models = api.get("/v1/models").await.ok();
        let found = models["data"].as_array().expect("cards").iter().any(|it| it["id"] == name);
        if found == expected { Ok(()) } else { Err(models.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn adapters_in_one_batch_answer_as_alone_and_share_no_cache() {
    let (_dir, modules) = two_adapters();
    let cluster =
        Cluster::builder().unified(1).worker_arg("--lora-modules", &modules).start().await;
    let api = &cluster.api;
    let worker = cluster.only(Role::Unified);

    // One after the other: nothing of another's cache is found.
    let alone = answers(api, 24).await;
    assert_eq!(worker.status().await.prefix_cache_hits, 0, "a prefix crossed between adapters");
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2], "{alone:?}");
    // Their own is.
    assert_eq!(answers(api, 24).await, alone);
    assert_eq!(worker.status().await.prefix_cache_hits, 3 * 96);

    // All at once, each twice, new prompts among them.
    let calls = (0..12).map(|i| async move {
        let model = [MODEL_NAME, "one", "two"][i % 3];
        let mut request = request(model, 24);
        if i >= 6 {
            // Computes the whole prompt again.
            request["cache_salt"] = format!("salt {i}").into();
        }
        let reply = api.ok("/v1/completions", &request).await;
        (i % 3, ids(&reply["choices"][0]["token_ids"]))
    });
    for (which, tokens) in futures::future::join_all(calls).await {
        assert_eq!(tokens, alone[which], "adapter {which} in a batch with others");
    }

    let models = api.get("/v1/models").await.ok();
    let cards = models["data"].as_array().expect("cards");
    let ids: Vec<&str> = cards.iter().filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, [MODEL_NAME, "one", "two"]);
    assert_eq!((&cards[0]["parent"], &cards[1]["parent"]), (&Value::Null, &json!(MODEL_NAME)));
    assert_eq!(cards[1]["max_model_len"], Value::Null);
    assert!(cards[1]["root"].as_str().is_some_and(|root| root.ends_with("/one")), "{models}");
    assert_eq!(api.get("/v1/models/two").await.ok()["root"], cards[2]["root"]);

    // A chat names the adapter too.
    let chat = json!({
        "model": "one", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2,
    });
    assert_eq!(api.ok("/v1/chat/completions", &chat).await["model"], "one");
    cluster.finish().await;
}

#[tokio::test]
async fn a_hand_off_with_an_adapter_equals_unified() {
    let (_dir, modules) = two_adapters();
    let flags = |builder: baton_tests::cluster::Builder| {
        builder.worker_arg("--lora-modules", &modules).handoff_min_tokens(32)
    };
    let unified = flags(Cluster::builder().unified(1)).start().await;
    let expected = answers(&unified.api, 16).await;
    unified.finish().await;

    let cluster = flags(Cluster::builder().prefill(1).decode(1)).start().await;
    assert_eq!(answers(&cluster.api, 16).await, expected);
    let status = cluster.only(Role::Decode).status().await;
    assert_eq!((status.handoff_requests, status.handoff_failures), (3, 0), "{status:?}");
    // The peer's cache is not shared between adapters either.
    assert_eq!(cluster.only(Role::Prefill).status().await.prefix_cache_hits, 0);

    // A peer that has lost the adapter is of no use, and no harm.
    let (prefill, decode) = (cluster.only(Role::Prefill), cluster.only(Role::Decode));
    let mut client = grpc::worker(&decode.address).await;
    let list = client.list_adapters(ListAdaptersRequest {}).await.expect("a list").into_inner();
    let one = list.adapters.iter().find(|adapter| adapter.name == "one").expect("the adapter");
    let gone = UnloadAdapterRequest { name: "one".into() };
    grpc::worker(&prefill.address).await.unload_adapter(gone).await.expect("unloaded");
    let direct = GenerateRequest {
        prompt_token_ids: prompt(),
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens: 16,
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        prefill: Some(PrefillPeer {
            instance_id: "p".into(),
            address: prefill.address.clone(),
            ..Default::default()
        }),
        handoff_min_tokens: 1,
        timeout_ms: 60_000,
        cache_salt: "of its own".into(),
        adapter: Some(AdapterRef { name: "one".into(), digest: one.digest.clone() }),
        ..GenerateRequest::default()
    };
    let mut events = client.generate(direct.clone()).await.expect("accepted").into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = events.message().await.expect("an event") {
        if let Some(Event::Tokens(some)) = event.event {
            tokens.extend(some.tokens.into_iter().map(|token| token.id));
        }
    }
    assert_eq!(tokens, expected[1]);
    assert_eq!(decode.status().await.handoff_failures, 1);
    // The gateway does not name such a peer: no failure more.
    let salted = |salt: &str| {
        let mut request = request("one", 16);
        request["cache_salt"] = salt.into();
        request
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    let reply = cluster.api.ok("/v1/completions", &salted("another")).await;
    assert_eq!(ids(&reply["choices"][0]["token_ids"]), expected[1]);
    assert_eq!(decode.status().await.handoff_failures, 1);
    // Nor is another adapter taken for the one that is meant.
    let other = AdapterRef { name: "one".into(), digest: "0".repeat(64) };
    let refused = client.generate(GenerateRequest { adapter: Some(other), ..direct }).await;
    assert_eq!(refused.expect_err("refused").code(), tonic::Code::NotFound);
    cluster.finish().await;
}

#[tokio::test]
async fn adapters_load_and_unload_at_run_time_on_all_workers_and_gateways() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (lora::write(dir.path(), "one", 1), lora::write(dir.path(), "two", 2));
    let mut cluster = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(32).start().await;
    let api = cluster.api.clone();
    let post = async |path: &str, body: Value| api.post(path, &body).await;
    let (loads, unloads) = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter");

    api.post("/v1/completions", &request("one", 1)).await.error(404).expect("not there yet");
    let missing = dir.path().join("missing");
    for (body, status, kind, names) in [
        (json!({"lora_name": "one"}), 400, "InvalidUserInput", "lora_path"),
        (json!({"lora_path": one}), 400, "InvalidUserInput", "lora_name"),
        (json!({"lora_name": "a b", "lora_path": one}), 400, "InvalidUserInput", "lora_name"),
        (json!({"lora_name": MODEL_NAME, "lora_path": one}), 400, "InvalidUserInput", "model"),
        (json!({"lora_name": "one", "lora_path": missing}), 404, "NotFoundError", "missing"),
        (json!({"lora_name": "one", "lora_path": 5}), 400, "Bad Request", "lora_path"),
    ] {
        let reply = post(loads, body.clone()).await;
        let error = reply.error(status).unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!(error["type"], kind, "{error}");
        assert!(error["message"].as_str().is_some_and(|text| text.contains(names)), "{error}");
    }
    let reply = post(unloads, json!({"lora_name": "one"})).await;
    assert_eq!(reply.error(404).expect("unknown")["type"], "NotFoundError");
    let reply = post(unloads, json!({})).await;
    assert_eq!(reply.error(400).expect("no name")["type"], "InvalidUserInput");
    for worker in &cluster.workers {
        assert!(names(worker).await.is_empty(), "a refused load has left something");
    }

    load(&api, "one", &one).await;
    let expected = answer(&api, "one", 32).await;
    assert_ne!(expected, answer(&api, MODEL_NAME, 32).await);
    assert_eq!(cluster.only(Role::Decode).status().await.handoff_requests, 2);
    let again = post(loads, json!({"lora_name": "one", "lora_path": one})).await;
    assert_eq!(again.error(400).expect("a duplicate")["type"], "InvalidUserInput");

    // A worker and a gateway that come later have it too.
    cluster.add_worker(Role::Decode).await;
    let joined = cluster.workers.last().expect("the worker that joined");
    eventually("the new worker has the adapter", Duration::from_secs(10), async || {
        let names = names(joined).await;
        if names == ["one"] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
    let (mut second, other) = cluster.add_gateway().await;
    serves(&other, "one", true).await;
    assert_eq!(answer(&other, "one", 32).await, expected);

    // In place: another adapter under the name, at once.
    let body = json!({"lora_name": "one", "lora_path": two, "load_inplace": true});
    assert_eq!(post(loads, body).await.status, 200);
    let replaced = answer(&api, "one", 32).await;
    assert_ne!(replaced, expected);
    // A replacement that fails leaves what was there.
    let body = json!({"lora_name": "one", "lora_path": missing, "load_inplace": true});
    post(loads, body).await.error(404).expect("nothing there");
    assert_eq!(answer(&api, "one", 32).await, replaced);

    // What runs goes on to its end; nothing new begins.
    let mut long = request("one", 200);
    long["stream"] = true.into();
    let mut stream = api.stream("/v1/completions", &long).await;
    let mut events = vec![stream.next().await.expect("the stream begins")];
    let metrics = Scrape::parse(&api.get("/metrics").await.text).expect("metrics");
    let labels =
        [("max_lora", "8"), ("waiting_lora_adapters", ""), ("running_lora_adapters", "one")];
    assert!(metrics.sum("vllm:lora_requests_info", &labels) > Some(0.0), "no adapter runs");
    let reply = other.post(unloads, &json!({"lora_name": "one"})).await;
    let text = "Success: LoRA adapter 'one' removed successfully.";
    assert_eq!((reply.status.as_u16(), &*reply.text), (200, text));
    other.post("/v1/completions", &request("one", 1)).await.error(404).expect("gone");
    serves(&api, "one", false).await;
    let error = api.post("/v1/completions", &request("one", 1)).await.error(404).expect("gone");
    assert_eq!((&error["type"], &error["param"]), (&json!("NotFoundError"), &json!("model")));
    events.extend(stream.collect().await);
    let tokens = streamed_ids(&events, 0);
    assert_eq!((tokens.len(), &tokens[..32]), (200, &replaced[..]));
    for worker in &cluster.workers {
        assert!(names(worker).await.is_empty());
        let status = worker.status().await;
        assert_eq!(status.adapter_bytes, 0, "memory of an unloaded adapter: {status:?}");
    }
    second.stop().await;
    cluster.finish().await;
}

/// A gateway that dies in the middle of a load: within seconds what it did is undone, and another
/// gateway may load what it likes under the name.
#[tokio::test]
async fn a_load_whose_gateway_is_killed_blocks_no_other_for_long() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (lora::write(dir.path(), "one", 1), lora::write(dir.path(), "two", 2));
    // Its lease is 5 s.
    let cluster = Cluster::builder().unified(2).start().await;
    let (mut dying, other) = cluster.add_gateway().await;
    eventually("the other gateway finds both workers", Duration::from_secs(20), async || {
        let metrics = Scrape::parse(&other.get("/metrics").await.text)?;
        let up = metrics.sum("baton_workers", &[("state", "up")]);
        if up == Some(2.0) { Ok(()) } else { Err(format!("{up:?}")) }
    })
    .await;
    // The load cannot end: one worker does not answer.
    let (quick, stuck) = (&cluster.workers[0], &cluster.workers[1]);
    stuck.process.signal(Signal::SIGSTOP);
    let body = json!({"lora_name": "it", "lora_path": one});
    let loading = tokio::spawn(async move { other.post("/v1/load_lora_adapter", &body).await });
    eventually("one worker has it", Duration::from_secs(10), async || {
        if names(quick).await == ["it"] { Ok(()) } else { Err("not yet".into()) }
    })
    .await;
    assert!(!loading.is_finished(), "the load has ended before the gateway is killed");
    // Nobody knows it yet, and nobody else may load under its name.
    cluster.api.post("/v1/completions", &request("it", 1)).await.error(404).expect("not loaded");
    let body = json!({"lora_name": "it", "lora_path": two});
    let post = async || cluster.api.post("/v1/load_lora_adapter", &body).await;
    let error = post().await.error(503).expect("the name is claimed");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("Another gateway")), "{error}");
    dying.kill();
    stuck.process.signal(Signal::SIGCONT);
    loading.abort();
    eventually("what it did is undone", Duration::from_secs(15), async || {
        let all = [names(quick).await, names(stuck).await].concat();
        if all.is_empty() { Ok(()) } else { Err(format!("{all:?}")) }
    })
    .await;
    // At once: the claim is gone, or it would not have been undone.
    cluster.all_found().await;
    load(&cluster.api, "it", &two).await;
    let expected = answer(&cluster.api, "it", 16).await;
    assert_ne!(expected, answer(&cluster.api, MODEL_NAME, 16).await);
    for worker in [quick, stuck] {
        assert_eq!(names(worker).await, ["it"]);
    }
    eventually("the dead gateway's lease is over", Duration::from_secs(10), async || {
        let left = cluster.etcd.instances();
        if left.len() == 3 { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn without_etcd_adapters_serve_and_do_not_change() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (lora::write(dir.path(), "one", 1), lora::write(dir.path(), "two", 2));
    let mut cluster = Cluster::builder().unified(2).start().await;
    let api = cluster.api.clone();
    load(&api, "one", &one).await;
    let expected = answer(&api, "one", 16).await;
    cluster.etcd.kill();
    let changes = [
        ("/v1/load_lora_adapter", json!({"lora_name": "two", "lora_path": two})),
        (
            "/v1/load_lora_adapter",
            json!({"lora_name": "one", "lora_path": two, "load_inplace": true}),
        ),
        ("/v1/unload_lora_adapter", json!({"lora_name": "one"})),
    ];
    for (path, body) in &changes {
        let error = api.post(path, body).await.error(503).unwrap_or_else(|e| panic!("{body}: {e}"));
        let message = error["message"].as_str().unwrap_or_default();
        assert!(message.contains("cannot be changed while etcd is away"), "{error}");
        // Comparisons have nothing to compare with, and leave all as it is.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(answer(&api, "one", 16).await, expected);
    }
    api.post("/v1/completions", &request("two", 1)).await.error(404).expect("not loaded");
    for worker in &cluster.workers {
        assert_eq!(names(worker).await, ["one"]);
    }
    // It comes back with nothing: what serves is recorded again.
    std::fs::remove_dir_all(cluster.dir().join("etcd-0")).expect("lose the data");
    cluster.etcd.restart().await;
    eventually("the adapter is recorded", Duration::from_secs(20), async || {
        let recorded = cluster.etcd.adapters();
        if recorded == ["one"] { Ok(()) } else { Err(format!("{recorded:?}")) }
    })
    .await;
    // By the second comparison a stray would be gone.
    let joined = cluster.add_worker(Role::Unified).await.address.clone();
    eventually("a worker that joins gets it", Duration::from_secs(10), async || {
        let worker = cluster.workers.iter().find(|it| it.address == joined).expect("it is there");
        let names = names(worker).await;
        if names == ["one"] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
    assert_eq!(answer(&api, "one", 16).await, expected);
    for worker in &cluster.workers {
        assert_eq!(names(worker).await, ["one"]);
    }
    // As soon as it is back, changes are made.
    let (path, body) = &changes[1];
    eventually("the change is made", Duration::from_secs(20), async || {
        let reply = api.post(path, body).await;
        if reply.status == 200 { Ok(()) } else { Err(reply.text) }
    })
    .await;
    assert_ne!(answer(&api, "one", 16).await, expected);
    cluster.finish().await;
}

#[tokio::test]
async fn an_adapter_is_loaded_on_all_workers_or_on_none() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (lora::write(dir.path(), "one", 1), lora::write(dir.path(), "two", 2));
    let mut cluster = Cluster::builder().unified(1).start().await;
    // Full from the start.
    let own = lora::modules(&[("own", &two)]);
    let flags = [("--lora-modules", own.as_str()), ("--max-loras", "1")];
    cluster.add_worker_with(Role::Unified, &flags).await;
    cluster.all_found().await;
    serves(&cluster.api, "own", true).await;
    let body = json!({"lora_name": "one", "lora_path": one});
    let error = cluster.api.post("/v1/load_lora_adapter", &body).await.error(400).expect("full");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("--max-loras")), "{error}");
    assert!(names(&cluster.workers[0]).await.is_empty(), "left on the other worker");
    assert_eq!(names(&cluster.workers[1]).await, ["own"]);
    cluster.api.post("/v1/completions", &request("one", 1)).await.error(404).expect("nowhere");
    // The one that only one worker has is routed there, every time.
    let expected = answer(&cluster.api, "own", 8).await;
    for _ in 0..4 {
        assert_eq!(answer(&cluster.api, "own", 8).await, expected);
    }
    assert_eq!(cluster.workers[0].status().await.generation_tokens, 0);
    // Records of nobody's flags do not touch it: comparisons have run by now.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(names(&cluster.workers[1]).await, ["own"]);
    cluster.finish().await;
}

#[tokio::test]
async fn a_stream_with_an_adapter_survives_the_death_of_its_worker() {
    let (_dir, modules) = two_adapters();
    let builder = Cluster::builder().unified(2).worker_arg("--lora-modules", &modules);
    let mut cluster = builder.start().await;
    let expected = answer(&cluster.api, "one", 120).await;
    let mut long = request("one", 120);
    long["stream"] = true.into();
    let mut stream = cluster.api.stream("/v1/completions", &long).await;
    let mut events = Vec::new();
    while streamed_ids(&events, 0).len() < 8 {
        events.push(stream.next().await.expect("the stream goes on"));
    }
    let mut busy = None;
    for (i, worker) in cluster.workers.iter().enumerate() {
        if worker.status().await.running > 0 {
            busy = Some(i);
        }
    }
    cluster.kill_worker(busy.expect("a worker that runs the stream"));
    events.extend(stream.collect().await);
    assert_eq!(streamed_ids(&events, 0), expected);
    cluster.finish().await;
}
