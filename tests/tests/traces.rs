//! One trace for one request, over all processes that work on it.

use std::time::{Duration, Instant};

use baton_tests::binaries::{EMBEDDER_NAME, MODEL_NAME, WHISPER_NAME};
use baton_tests::collector::{Collector, Seen, hex};
use baton_tests::http::streamed_text;
use baton_tests::speech::say;
use baton_tests::{Api, Cluster, Reply, Role, eventually};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The client's own span, in these traces.
const CLIENT: &str = "00f067aa0ba902b7";
const ONE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const TWO: &str = "0af7651916cd43dd8448eb211c80319c";

/// What is exported of a request whose prompt is handed over, beside the request's own span.
const HANDED_OVER: [&str; 9] = [
    "tokenize",
    "route",
    "baton.v1.Worker/Generate",
    "baton.v1.Worker/Generate",
    "handoff",
    "baton.v1.Worker/Prefill",
    "baton.v1.Worker/Prefill",
    "prefill",
    "decode",
];

async fn post(api: &Api, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
    let headers = [&[("content-type", "application/json")], headers].concat();
    api.send_with(Method::POST, path, &headers, &body.to_string()).await
}

fn traceparent(trace: &str, sampled: bool) -> String {
    format!("00-{trace}-{CLIENT}-{:02x}", u8::from(sampled))
}

/// The only span of a name and kind: 1 internal, 2 server, 3 client.
fn only<'a>(spans: &'a [Seen], name: &str, kind: i32) -> &'a Seen {
    let mut found = spans.iter().filter(|it| it.span.name == name && it.span.kind == kind);
    let first = found.next().unwrap_or_else(|| panic!("no {name} of kind {kind}: {spans:#?}"));
    assert!(found.next().is_none(), "several {name} of kind {kind}: {spans:#?}");
    first
}

fn prompt(word: &str) -> String {
    format!("Tell of the {word}. {}", "Once upon a time in a town by the sea, ".repeat(6))
}

/// Asserts who called whom, and who says so.
fn assert_handed_over(spans: &[Seen], request: &Seen) {
    let child = |name: &str, kind: i32, of: &Seen, role: &str| {
        let span = only(spans, name, kind);
        assert_eq!(span.parent(), of.id(), "{name} of kind {kind}: {spans:#?}");
        assert_eq!(span.of_process("baton.role"), role, "{name} of kind {kind}");
        let (parent, own) = (&of.span, &span.span);
        assert!(own.start_time_unix_nano >= parent.start_time_unix_nano, "{name} began too early");
        assert!(own.end_time_unix_nano >= own.start_time_unix_nano, "{name} ended too early");
        assert!(!span.failed(), "{name}: {span:?}");
        span.clone()
    };
    child("tokenize", 1, request, "gateway");
    let route = child("route", 1, request, "gateway");
    let call = child("baton.v1.Worker/Generate", 3, request, "gateway");
    let generate = child("baton.v1.Worker/Generate", 2, &call, "decode");
    let handoff = child("handoff", 1, &generate, "decode");
    let ask = child("baton.v1.Worker/Prefill", 3, &handoff, "decode");
    let prefill = child("baton.v1.Worker/Prefill", 2, &ask, "prefill");
    let computing = child("prefill", 1, &prefill, "prefill");
    let decode = child("decode", 1, &generate, "decode");

    assert_eq!(route.get("baton.worker.id"), generate.of_process("service.instance.id"));
    assert_eq!(route.get("baton.prefill.worker.id"), prefill.of_process("service.instance.id"));
    assert_eq!(handoff.get("baton.peer.id"), prefill.of_process("service.instance.id"));
    let tokens = &request.get("gen_ai.usage.prompt_tokens");
    assert_eq!(handoff.get("baton.handed_off_tokens"), *tokens);
    assert_eq!(handoff.get("baton.transport"), "TRANSPORT_SHARED_MEMORY");
    assert!(handoff.get("baton.bytes").as_i64() > Some(0), "{handoff:?}");
    assert!(handoff.get("baton.blocks").as_i64() > Some(0), "{handoff:?}");
    assert_eq!(prefill.get("baton.cached_tokens"), 0);
    assert_eq!(computing.get("baton.computed_tokens"), *tokens);
    assert!(prefill.get("gen_ai.latency.time_in_queue").is_f64(), "{prefill:?}");
    let drawn = request.get("gen_ai.usage.completion_tokens");
    assert_eq!(decode.get("baton.output_tokens"), drawn);
    assert_eq!(call.get("rpc.method"), "Generate");
    for (of, service) in [(request, "baton-gateway"), (&generate, "baton-worker")] {
        assert_eq!(of.of_process("service.name"), service);
        assert_eq!(of.of_process("baton.cluster"), "default");
    }
}

#[tokio::test]
async fn a_request_is_one_trace_from_the_gateway_over_prefill_and_hand_off_to_decoding() {
    let collector = Collector::start().await;
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16);
    let cluster = builder.traces(collector.url()).verbose().start().await;

    // Plain, with an id of its client's.
    let body = json!({
        "model": MODEL_NAME, "prompt": prompt("heron"), "max_tokens": 12, "temperature": 0,
        "ignore_eos": true,
    });
    let parent = traceparent(ONE, true);
    let headers = [("traceparent", &*parent), ("tracestate", "a=1"), ("x-request-id", "first")];
    let reply = post(&cluster.api, "/v1/completions", &headers, &body).await;
    let (answer, id) = (reply.ok(), reply.header("x-request-id").to_owned());
    assert_eq!(id, "first");
    let names = [&HANDED_OVER[..], &["POST /v1/completions"]].concat();
    let spans = collector.trace(ONE, &names).await;
    let request = only(&spans, "POST /v1/completions", 2);
    assert_eq!(request.parent(), CLIENT);
    assert_eq!(request.span.trace_state, "a=1");
    let usage = &answer["usage"];
    for (name, value) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/v1/completions")),
        ("http.response.status_code", json!(200)),
        ("gen_ai.request.id", json!(id)),
        ("gen_ai.request.model", json!(MODEL_NAME)),
        ("gen_ai.request.max_tokens", json!(12)),
        ("gen_ai.request.n", json!(1)),
        ("gen_ai.request.temperature", json!(0.0)),
        ("gen_ai.usage.prompt_tokens", usage["prompt_tokens"].clone()),
        ("gen_ai.usage.completion_tokens", usage["completion_tokens"].clone()),
    ] {
        assert_eq!(request.get(name), value, "{name}");
    }
    let seconds = |name: &str| request.get(name).as_f64().unwrap_or(-1.0);
    let (first, whole) =
        (seconds("gen_ai.latency.time_to_first_token"), seconds("gen_ai.latency.e2e"));
    assert!(0.0 < first && first < whole, "{first} {whole}");
    assert!(seconds("gen_ai.latency.time_in_queue") >= 0.0, "{request:?}");
    assert_handed_over(&spans, request);

    // The logs of all three processes name trace and request.
    let logged = |log: &str, id: &str| {
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .map(|line| line["span"].clone())
            .any(|span| span["trace_id"] == ONE && span["request_id"] == id)
    };
    assert!(logged(&cluster.gateway().stderr(), "first"));
    for worker in &cluster.workers {
        assert!(logged(&worker.process.stderr(), "cmpl-first"), "{}", worker.process.name());
    }

    // Streamed, with an id of the gateway's.
    let body = json!({
        "model": MODEL_NAME, "max_tokens": 8, "temperature": 0, "stream": true, "ignore_eos": true,
        "messages": [{"role": "user", "content": prompt("osprey")}],
    });
    let parent = traceparent(TWO, true);
    let path = "/v1/chat/completions";
    let reply = post(&cluster.api, path, &[("traceparent", &parent)], &body).await;
    assert!(reply.text.trim_end().ends_with("[DONE]"), "{}", reply.text);
    let names = [&HANDED_OVER[..], &["render", "POST /v1/chat/completions"]].concat();
    let spans = collector.trace(TWO, &names).await;
    let request = only(&spans, "POST /v1/chat/completions", 2);
    assert_eq!(request.parent(), CLIENT);
    assert_eq!(request.get("gen_ai.request.id"), reply.header("x-request-id"));
    assert_eq!(request.get("gen_ai.usage.completion_tokens"), 8);
    assert_handed_over(&spans, request);

    // Without a client's trace it is a root; an error is a client's own.
    let bad = json!({"model": MODEL_NAME, "prompt": "heron", "max_tokens": -1});
    let reply = post(&cluster.api, "/v1/completions", &[("x-request-id", "bad")], &bad).await;
    reply.error(400).expect("a 400");
    eventually("the refused request is exported", Duration::from_secs(10), async || {
        let spans = collector.spans();
        let Some(bad) = spans.iter().find(|it| it.get("gen_ai.request.id") == "bad") else {
            return Err(format!("{spans:#?}"));
        };
        assert_eq!((bad.parent().as_str(), bad.failed()), ("", false));
        assert_eq!(bad.get("http.response.status_code"), 400);
        Ok(())
    })
    .await;

    cluster.finish().await;
    // Nothing of what was asked or answered, and nothing for those who only look.
    let answers = [answer["choices"][0]["text"].as_str().expect("a text").trim().to_owned()];
    let exported = String::from_utf8_lossy(&collector.bytes()).into_owned();
    for said in ["heron", "osprey", "town by", "Once upon"].into_iter().chain([&*answers[0]]) {
        assert!(!exported.contains(said), "{said:?} was exported");
    }
    assert!(!exported.contains("/metrics"), "a look at the metrics was exported");
}

#[tokio::test]
async fn what_the_client_does_not_sample_is_not_exported_and_the_rest_by_ratio() {
    let collector = Collector::start().await;
    let cluster = Cluster::builder()
        .prefill(1)
        .decode(1)
        .handoff_min_tokens(16)
        .traces(collector.url())
        .env("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        .env("OTEL_TRACES_SAMPLER_ARG", "0")
        .start()
        .await;
    let body = json!({"model": MODEL_NAME, "prompt": prompt("tern"), "max_tokens": 2});
    let ask = async |headers: &[(&str, &str)]| {
        post(&cluster.api, "/v1/completions", headers, &body).await.ok();
    };
    ask(&[("traceparent", &traceparent(ONE, false))]).await;
    ask(&[]).await;
    ask(&[("traceparent", &traceparent(TWO, true))]).await;
    eventually("the sampled request is exported", Duration::from_secs(10), async || {
        let spans = collector.spans();
        let done = spans.iter().any(|it| it.span.name == "POST /v1/completions");
        if done { Ok(()) } else { Err(format!("{spans:#?}")) }
    })
    .await;
    // What is left is sent before the processes end.
    cluster.finish().await;
    let spans = collector.spans();
    let other = spans.iter().find(|it| hex(&it.span.trace_id) != TWO);
    assert!(other.is_none(), "{other:#?}");
    for role in ["gateway", "decode", "prefill"] {
        let of_role = |it: &Seen| it.of_process("baton.role") == role;
        assert!(role == "prefill" || spans.iter().any(of_role), "{role}");
    }
}

#[tokio::test]
async fn a_request_whose_worker_dies_shows_both_calls_and_which_failed() {
    let collector = Collector::start().await;
    let mut cluster = Cluster::builder().unified(2).traces(collector.url()).start().await;
    let body = json!({
        "model": MODEL_NAME, "prompt": prompt("gannet"), "max_tokens": 400, "ignore_eos": true,
        "stream": true, "request_id": "moved",
    });
    let mut stream = cluster.api.stream("/v1/completions", &body).await;
    let mut events = Vec::new();
    for _ in 0..4 {
        events.push(stream.next().await.expect("an event"));
    }
    let mut busy = None;
    for (at, worker) in cluster.workers.iter().enumerate() {
        if worker.status().await.running > 0 {
            busy = Some(at);
        }
    }
    cluster.kill_worker(busy.expect("a worker that runs the stream"));
    events.extend(stream.collect().await);
    assert!(!streamed_text(&events, 0).is_empty());
    let (calls, _) = eventually("both calls are exported", Duration::from_secs(10), async || {
        let spans = collector.spans();
        let request = spans.iter().find(|it| it.get("gen_ai.request.id") == "moved");
        let Some(request) = request else { return Err(format!("{spans:#?}")) };
        assert_eq!(request.get("gen_ai.usage.completion_tokens"), 400);
        assert!(!request.failed(), "the client got its answer");
        let mut calls: Vec<Seen> = spans
            .iter()
            .filter(|it| it.span.name == "baton.v1.Worker/Generate" && it.span.kind == 3)
            .filter(|it| it.parent() == request.id())
            .cloned()
            .collect();
        calls.sort_by_key(|it| it.span.start_time_unix_nano);
        Ok(calls)
    })
    .await;
    let [first, second] = &calls[..] else { panic!("{calls:#?}") };
    assert!(first.failed() && !second.failed(), "{calls:#?}");
    assert!(first.get("error.type").is_string(), "{first:#?}");
    assert_eq!(first.get("baton.resumed_tokens"), 0);
    assert!(second.get("baton.resumed_tokens").as_i64() > Some(0), "{second:#?}");
    assert_ne!(first.get("server.port"), second.get("server.port"));
    cluster.finish().await;
}

#[tokio::test]
async fn texts_that_are_embedded_and_recordings_have_traces_too() {
    let collector = Collector::start().await;
    let builder = Cluster::builder().pooling(1).audio(1).traces(collector.url());
    let cluster = builder.start().await;
    let body = json!({"model": EMBEDDER_NAME, "input": ["A puffin.", "Another puffin."]});
    let headers = [("traceparent", &*traceparent(ONE, true))];
    post(&cluster.api, "/v1/embeddings", &headers, &body).await.ok();
    let pool = "baton.v1.Worker/Pool";
    let spans = collector.trace(ONE, &["POST /v1/embeddings", "tokenize", pool, pool]).await;
    let request = only(&spans, "POST /v1/embeddings", 2);
    let (call, serving) = (only(&spans, pool, 3), only(&spans, pool, 2));
    assert_eq!((call.parent(), serving.parent()), (request.id(), call.id()));
    assert_eq!((call.get("baton.texts"), serving.get("baton.texts")), (2.into(), 2.into()));
    assert_eq!(serving.of_process("baton.role"), "pooling");
    assert_eq!(request.get("gen_ai.usage.prompt_tokens"), serving.get("baton.computed_tokens"));

    let recording = say("The train to Paris leaves early in the evening.", "en-us");
    let fields = [
        ("model", WHISPER_NAME),
        ("language", "en"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "word"),
    ];
    let reply = cluster.api.form("/v1/audio/transcriptions", &fields, Some(&recording)).await;
    let (id, heard) = (reply.header("x-request-id").to_owned(), reply.ok());
    let (found, _) = eventually("the request is exported", Duration::from_secs(10), async || {
        let of_request = |it: &Seen| it.get("gen_ai.request.id") == *id;
        let request = collector.spans().into_iter().find(of_request);
        request.ok_or_else(|| format!("{:#?}", collector.spans()))
    })
    .await;
    let (generate, align) = ("baton.v1.Worker/Generate", "baton.v1.Worker/Align");
    let route = "POST /v1/audio/transcriptions";
    let names = [route, "route", generate, generate, "prefill", "decode", align, align];
    let spans = collector.trace(&hex(&found.span.trace_id), &names).await;
    let request = only(&spans, route, 2);
    assert_eq!(request.parent(), "");
    assert_eq!(only(&spans, generate, 2).parent(), only(&spans, generate, 3).id());
    assert_eq!(only(&spans, align, 3).parent(), request.id());
    assert_eq!(request.get("gen_ai.request.model"), WHISPER_NAME);
    cluster.finish().await;
    let exported = String::from_utf8_lossy(&collector.bytes()).into_owned();
    for said in ["puffin", "Paris", heard["text"].as_str().expect("a text").trim()] {
        assert!(!exported.contains(said), "{said:?} was exported");
    }
}

#[tokio::test]
async fn a_collector_that_is_away_or_silent_costs_no_request_anything() {
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent_url = format!("http://{}", silent.local_addr().expect("an address"));
    for (url, said) in [
        ("http://127.0.0.1:1", "the collector does not take spans"),
        (silent_url.as_str(), "BatchSpanProcessor dropped a Span due to queue full"),
    ] {
        let builder = Cluster::builder().unified(1).traces(url);
        let cluster = builder.env("OTEL_BSP_MAX_QUEUE_SIZE", "4").start().await;
        let body = json!({"model": MODEL_NAME, "prompt": "One two", "max_tokens": 2});
        for _ in 0..20 {
            let asked = Instant::now();
            cluster.api.ok("/v1/completions", &body).await;
            assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        }
        eventually("the log says that spans are lost", Duration::from_secs(15), async || {
            let log = cluster.gateway().stderr();
            if log.contains(said) { Ok(()) } else { Err(log) }
        })
        .await;
        for _ in 0..10 {
            cluster.api.ok("/v1/completions", &body).await;
        }
        for process in [cluster.gateway(), &cluster.only(Role::Unified).process] {
            let log = process.stderr();
            assert!(log.matches(said).count() <= 1, "{log}");
        }
        // The processes end in time.
        cluster.finish().await;
    }
}
