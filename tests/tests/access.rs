//! Who may call what, how much, and under which id. None of it needs a worker but where one is
//! asked for.

use std::time::{Duration, Instant};

use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Api, Cluster, Reply, eventually};
use reqwest::Method;
use serde_json::{Value, json};

const ORIGIN: &str = "https://page.example";

async fn get(api: &Api, path: &str, headers: &[(&str, &str)]) -> Reply {
    api.send_with(Method::GET, path, headers, "").await
}

/// What a browser asks before it sends a request with a key.
async fn preflight(api: &Api, path: &str, origin: &str) -> Reply {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    api.send_with(Method::OPTIONS, path, &headers, "").await
}

#[tokio::test]
async fn admin_routes_take_an_admin_key_and_api_keys_are_told_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("admins");
    std::fs::write(&file, "# operators\nadmin-from-file\n").expect("write");
    let cluster = Cluster::builder()
        .api_key("api")
        .gateway_arg("--admin-key", "admin")
        .gateway_arg("--admin-key-file", file.to_str().expect("a path in UTF-8"))
        .start()
        .await;
    let api = |key| cluster.api.with_key(key);
    // Also routes that are not there, and other spellings of those that are.
    for path in ["/server_info", "/server%5Finfo", "/%73erver_info", "/drain", "/scale_elastic_ep"]
    {
        api(None).get(path).await.error(401).unwrap_or_else(|e| panic!("{path}: {e}"));
        let reply = api(Some("api")).get(path).await;
        let error = reply.error(403).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(error["message"].as_str().is_some_and(|text| text.contains("admin key")));
        for key in ["admin", "admin-from-file"] {
            let status = api(Some(key)).get(path).await.status;
            assert!(status != 401 && status != 403, "{path} with {key}: {status}");
        }
    }
    for key in ["api", "admin", "admin-from-file"] {
        api(Some(key)).get("/v1/models").await.ok();
        get(&api(None), "/v1/models", &[("x-api-key", key)]).await.ok();
    }
    let reply = api(Some("nobody")).get("/v1/models").await;
    reply.error(401).expect("a 401");
    assert!(reply.header("www-authenticate").starts_with("Bearer"), "{:?}", reply.headers);
    // Neither does a method that asks nothing reach a handler.
    let options = api(None).send_with(Method::OPTIONS, "/server_info", &[], "").await;
    options.error(405).expect("a 405");
    cluster.finish().await;
}

#[tokio::test]
async fn with_everything_guarded_probes_alone_need_no_key() {
    let cluster = Cluster::builder().api_key("api").gateway_switch("--guard-all").start().await;
    let open = cluster.api.with_key(None);
    for path in ["/metrics", "/load", "/version", "/docs", "/docs/x", "/openapi.json", "/"] {
        open.get(path).await.error(401).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    for path in ["/health", "/ping"] {
        assert_eq!(open.get(path).await.status, 503, "{path}: there is no worker");
    }
    assert_eq!(open.get("/live").await.status, 200, "it answers all the same");
    assert_eq!(cluster.api.get("/version").await.status, 200);
    cluster.finish().await;
}

#[tokio::test]
async fn the_settings_are_shown_to_operators_without_secrets() {
    let cluster = Cluster::builder()
        .unified(1)
        .api_key("hush-api")
        .gateway_arg("--admin-key", "hush-admin")
        .api_key_from_env("hush-env")
        .start()
        .await;
    let admin = cluster.api.with_key(Some("hush-admin"));
    let info = admin.get("/server_info?config_format=json").await;
    assert!(!info.text.contains("hush"), "{}", info.text);
    let info = info.ok();
    assert_eq!(info["vllm_config"]["api_keys"], 1, "{info}");
    assert_eq!(info["vllm_config"]["request_timeout"], 600, "{info}");
    assert_eq!(info["vllm_env"]["VLLM_API_KEY"], "***", "{info}");
    assert_eq!(info["system_env"]["os"], "linux", "{info}");
    let [worker] = &info["baton"]["workers"].as_array().expect("workers")[..] else {
        panic!("{info}")
    };
    assert_eq!((&worker["role"], &worker["state"]), (&json!("unified"), &json!("up")), "{info}");
    assert!(worker["kv_blocks"]["total"].as_u64() > Some(0), "{info}");
    let text = admin.get("/server_info").await.ok();
    assert!(text["vllm_config"].as_str().is_some_and(|text| text.contains("request_timeout=600")));
    let reply = admin.get("/server_info?config_format=yaml").await;
    assert_eq!(reply.error(400).expect("a 400")["param"], "config_format");
    cluster.finish().await;
}

#[tokio::test]
async fn every_reply_has_the_id_of_its_request() {
    let cluster = Cluster::builder().unified(1).verbose().api_key("key").start().await;
    let (api, open) = (&cluster.api, cluster.api.with_key(None));
    let made = |reply: &Reply| {
        let id = reply.header("x-request-id").to_owned();
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id:?}");
        id
    };
    let first = made(&api.get("/v1/models").await);
    assert_ne!(first, made(&api.get("/v1/models").await));
    // Errors of all layers, and what CORS answers.
    made(&open.get("/v1/models").await);
    made(&api.get("/no/such/route").await);
    made(&api.get("/v1/completions").await);
    made(&api.post("/v1/completions", &json!({"n": "many"})).await);
    made(&preflight(&open, "/v1/completions", ORIGIN).await);
    assert_eq!(
        get(&open, "/health", &[("x-request-id", "mine")]).await.header("x-request-id"),
        "mine"
    );
    for odd in ["two words", "é", "", &"x".repeat(257)] {
        made(&get(api, "/v1/models", &[("x-request-id", odd)]).await);
    }

    let body = |fields: Value| {
        let mut body = json!({"model": MODEL_NAME, "prompt": "One two", "max_tokens": 2});
        fields.as_object().expect("an object").iter().for_each(|(k, v)| body[k] = v.clone());
        body.to_string()
    };
    let complete = async |headers: &[(&str, &str)], fields: Value| {
        let json = [("content-type", "application/json")];
        let headers = [&json[..], headers].concat();
        api.send_with(Method::POST, "/v1/completions", &headers, &body(fields)).await
    };
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [("x-request-id", "head-1"), ("traceparent", traceparent)];
    let reply = complete(&headers, json!({"request_id": "body-1"})).await;
    assert_eq!(reply.header("x-request-id"), "head-1");
    assert_eq!(reply.ok()["id"], "cmpl-head-1");
    let reply = complete(&[], json!({"request_id": "body-2"})).await;
    assert_eq!(reply.header("x-request-id"), "body-2");
    assert_eq!(reply.ok()["id"], "cmpl-body-2");
    let reply = complete(&[], json!({})).await;
    assert_eq!(reply.ok()["id"], format!("cmpl-{}", made(&reply)));
    let reply = complete(&[("x-request-id", "stream-1")], json!({"stream": true})).await;
    assert_eq!(reply.header("x-request-id"), "stream-1");
    assert!(reply.text.contains("\"id\":\"cmpl-stream-1\""), "{}", reply.text);

    // Both processes log the request under its id.
    eventually("both logs name the request", Duration::from_secs(5), async || {
        let gateway = cluster.gateway().stderr();
        let line =
            gateway.lines().find(|line| line.contains("answered") && line.contains("head-1"));
        let Some(line) = line else { return Err(gateway) };
        let line: Value = serde_json::from_str(line).expect("a log line in JSON");
        assert_eq!(line["span"]["request_id"], "head-1", "{line}");
        assert_eq!(line["span"]["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736", "{line}");
        assert!(gateway.contains("\"own_id\":\"body-2\""), "{gateway}");
        let worker = cluster.workers[0].process.stderr();
        let line = worker.lines().find(|line| line.contains("cmpl-head-1"));
        let Some(line) = line else { return Err(worker) };
        let line: Value = serde_json::from_str(line).expect("a log line in JSON");
        assert_eq!(line["span"]["request_id"], "cmpl-head-1", "{line}");
        Ok(())
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_key_has_so_many_requests_a_minute_and_is_told_when_there_are_more() {
    let cluster = Cluster::builder()
        .api_key("a")
        .api_key("b")
        .gateway_arg("--key-requests-per-minute", "3")
        .start()
        .await;
    let a = cluster.api.with_key(Some("a"));
    for left in ["2", "1", "0"] {
        let reply = a.get("/v1/models").await;
        reply.ok();
        assert_eq!(reply.header("x-ratelimit-limit-requests"), "3");
        assert_eq!(reply.header("x-ratelimit-remaining-requests"), left);
        assert!(reply.header("x-ratelimit-reset-requests").ends_with('s'), "{:?}", reply.headers);
    }
    let reply = a.get("/v1/models").await;
    let error = reply.error(429).expect("a 429");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("--key-requests-per-minute")));
    let after: u64 = reply.header("retry-after").parse().expect("seconds");
    assert!((1..=20).contains(&after), "{after}");
    assert_eq!(reply.header("x-ratelimit-remaining-requests"), "0");
    // The same key by the other header is the same client; another key is another.
    let same = get(&cluster.api.with_key(None), "/v1/models", &[("x-api-key", "a")]).await;
    same.error(429).expect("a 429");
    cluster.api.with_key(Some("b")).get("/v1/models").await.ok();
    // Open routes and wrong keys are not counted.
    for _ in 0..5 {
        assert_eq!(a.get("/version").await.status, 200);
        cluster.api.with_key(Some("c")).get("/v1/models").await.error(401).expect("a 401");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn without_keys_the_rate_is_an_address_s() {
    let cluster = Cluster::builder().gateway_arg("--key-requests-per-minute", "1").start().await;
    cluster.api.get("/v1/models").await.ok();
    let started = Instant::now();
    cluster.api.get("/v1/models").await.error(429).expect("a 429");
    assert!(started.elapsed() < Duration::from_secs(5));
    cluster.finish().await;
}

/// Two keys, each for one request at a time.
async fn one_at_a_time() -> Cluster {
    Cluster::builder()
        .unified(1)
        .api_key("a")
        .api_key("b")
        .gateway_arg("--key-max-concurrent", "1")
        .start()
        .await
}

/// Waits until the key's place is free.
async fn frees(api: &Api, within: Duration) {
    eventually("the place is free", within, async || {
        let status = api.get("/v1/models").await.status;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn a_stream_holds_its_key_s_place_until_its_client_leaves() {
    let cluster = one_at_a_time().await;
    let long = json!({
        "model": MODEL_NAME, "prompt": "One two", "max_tokens": 4000, "ignore_eos": true,
        "stream": true,
    });
    let mut stream = cluster.api.stream("/v1/completions", &long).await;
    stream.next().await.expect("an event");
    let reply = cluster.api.get("/v1/models").await;
    let error = reply.error(429).expect("a 429");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("--key-max-concurrent")));
    assert_eq!(reply.header("retry-after"), "1");
    cluster.api.with_key(Some("b")).get("/v1/models").await.ok();
    drop(stream);
    frees(&cluster.api, Duration::from_secs(5)).await;
    // A stream that ends by itself gives its place back too.
    let short = json!({"model": MODEL_NAME, "prompt": "One", "max_tokens": 2, "stream": true});
    for _ in 0..3 {
        cluster.api.stream("/v1/completions", &short).await.collect().await;
        frees(&cluster.api, Duration::from_secs(5)).await;
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_response_in_the_background_holds_its_key_s_place_until_it_ends() {
    let cluster = one_at_a_time().await;
    let api = &cluster.api;
    let path = "/v1/responses";
    let long = json!({
        "model": MODEL_NAME, "input": "Count to a thousand.", "max_output_tokens": 1800,
        "ignore_eos": true, "background": true,
    });
    let begun = api.ok(path, &long).await;
    let error = api.post(path, &long).await.error(429).expect("a 429");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("--key-max-concurrent")));
    api.get("/v1/models").await.error(429).expect("a 429");
    cluster.api.with_key(Some("b")).get("/v1/models").await.ok();
    // Its client may ask after it, and end it; to follow it is a request like others.
    let there = format!("{path}/{}", begun["id"].as_str().expect("an id"));
    assert_eq!(api.get(&there).await.ok()["id"], begun["id"]);
    api.get(&format!("{there}?stream=true")).await.error(429).expect("a 429");
    let cancel = format!("{there}/cancel");
    let cancelled = api.send(Method::POST, &cancel, None, "").await.expect("a reply");
    assert_eq!(cancelled.ok()["status"], "cancelled");
    frees(api, Duration::from_secs(30)).await;
    // One that ends by itself gives its place back too.
    let short = json!({
        "model": MODEL_NAME, "input": "One", "max_output_tokens": 2, "background": true,
    });
    for _ in 0..3 {
        api.ok(path, &short).await;
        frees(api, Duration::from_secs(30)).await;
    }
    cluster.finish().await;
}

#[tokio::test]
async fn any_page_may_call_and_read_errors_unless_told_otherwise() {
    let cluster = Cluster::builder()
        .api_key("a")
        .gateway_arg("--key-requests-per-minute", "2")
        .gateway_arg("--max-body-bytes", "100")
        .start()
        .await;
    let (api, open) = (&cluster.api, cluster.api.with_key(None));
    let asked = preflight(&open, "/v1/chat/completions", ORIGIN).await;
    assert_eq!((asked.status.as_u16(), &*asked.text), (200, ""));
    assert_eq!(asked.header("access-control-allow-origin"), "*");
    assert!(asked.header("access-control-allow-methods").contains("POST"));
    assert!(asked.header("access-control-allow-headers").contains("authorization"));

    let origin = ("origin", ORIGIN);
    let json = ("content-type", "application/json");
    let large = "x".repeat(200);
    let errors = [
        (401, get(&open, "/v1/models", &[origin]).await),
        (404, get(api, "/no/such/route", &[origin]).await),
        (413, api.send_with(Method::POST, "/tokenize", &[origin, json], &large).await),
        (429, get(api, "/v1/models", &[origin]).await),
    ];
    for (status, reply) in errors {
        reply.error(status).unwrap_or_else(|e| panic!("{status}: {e}"));
        assert_eq!(reply.header("access-control-allow-origin"), "*", "{status}");
        let readable = reply.header("access-control-expose-headers").to_lowercase();
        assert!(
            readable.contains("x-request-id") && readable.contains("retry-after"),
            "{readable}"
        );
    }
    cluster.finish().await;
}

#[tokio::test]
async fn only_the_pages_that_are_named_may_call() {
    let cluster = Cluster::builder()
        .gateway_arg("--allowed-origins", r#"["https://page.example", "http://localhost:3000"]"#)
        .gateway_arg("--allowed-methods", "POST")
        .gateway_arg("--allowed-headers", r#"["authorization", "content-type"]"#)
        .gateway_switch("--allow-credentials")
        .start()
        .await;
    let api = &cluster.api;
    for origin in [ORIGIN, "http://localhost:3000"] {
        let asked = preflight(api, "/v1/completions", origin).await;
        assert_eq!(asked.status, 200, "{origin}: {}", asked.text);
        assert_eq!(asked.header("access-control-allow-origin"), origin);
        assert_eq!(asked.header("access-control-allow-credentials"), "true");
    }
    let other = "https://other.example";
    assert_eq!(preflight(api, "/v1/completions", other).await.status, 400);
    let reply = get(api, "/v1/models", &[("origin", other)]).await;
    assert_eq!(reply.header("access-control-allow-origin"), "", "{:?}", reply.headers);
    let mut wrong_method = vec![("origin", ORIGIN), ("access-control-request-method", "DELETE")];
    let reply = api.send_with(Method::OPTIONS, "/v1/models", &wrong_method, "").await;
    assert_eq!(reply.status, 400);
    wrong_method[1].1 = "POST";
    wrong_method.push(("access-control-request-headers", "x-odd"));
    let reply = api.send_with(Method::OPTIONS, "/v1/models", &wrong_method, "").await;
    assert_eq!(reply.status, 400);
    cluster.finish().await;
}
