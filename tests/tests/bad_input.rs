//! What clients may send by mistake or malice: each gets a status, an error object and a message
//! that names the field, and the cluster goes on serving.

use std::time::{Duration, Instant};

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::ids;
use baton_tests::{Api, Cluster, Reply};
use reqwest::Method;
use serde_json::{Value, json};

const ROUTES: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

/// A sound request of either route, with `field` set to `value`.
fn with(route: &str, field: &str, value: &Value) -> Value {
    let mut body = json!({"model": MODEL_NAME, "max_tokens": 2});
    if route == "/v1/completions" {
        body["prompt"] = "Hello".into();
    } else {
        body["messages"] = json!([{"role": "user", "content": "Hello"}]);
    }
    body[field] = value.clone();
    body
}

/// Collects what is wrong, so that one run shows all of it.
#[derive(Default)]
struct Verdict {
    checked: usize,
    wrong: Vec<String>,
}

impl Verdict {
    /// The reply must be the error object with this status; its message must hold all of `names`.
    fn error(&mut self, what: &str, reply: &Reply, status: u16, names: &[&str]) {
        self.checked += 1;
        match reply.error(status) {
            Err(e) => self.wrong.push(format!("{what}: {e}")),
            Ok(error) => {
                let message = error["message"].as_str().unwrap_or_default();
                for name in names.iter().filter(|name| !message.contains(**name)) {
                    self.wrong.push(format!("{what}: {name:?} is not in {message:?}"));
                }
            }
        }
    }

    fn check(self) {
        assert!(self.checked > 0);
        let count = self.wrong.len();
        assert!(count == 0, "{count} of {} are wrong:\n{}", self.checked, self.wrong.join("\n"));
        println!("{} bad requests, all answered well", self.checked);
    }
}

async fn raw(api: &Api, route: &str, body: impl Into<reqwest::Body>) -> Reply {
    let reply = api.send(Method::POST, route, Some("application/json"), body).await;
    reply.unwrap_or_else(|e| panic!("{route}: {e:?}"))
}

#[tokio::test]
async fn values_that_no_field_takes_are_400_and_name_the_field() {
    let cluster = Cluster::unified().await;
    let mut verdict = Verdict::default();
    let fields = [
        ("temperature", vec![json!(-1), json!("hot"), json!([]), json!(1e300)]),
        ("top_p", vec![json!(0), json!(-0.1), json!(1.1), json!({})]),
        ("top_k", vec![json!(-2), json!(1.5), json!("many")]),
        ("min_p", vec![json!(-0.1), json!(1.1)]),
        ("max_tokens", vec![json!(0), json!(-1), json!(1.5), json!("few"), json!(u64::MAX)]),
        ("min_tokens", vec![json!(-1), json!(3)]),
        ("n", vec![json!(0), json!(-1), json!("two"), json!(1_000_000)]),
        ("seed", vec![json!("x"), json!(1.5), json!(1e30)]),
        ("presence_penalty", vec![json!(2.1), json!(-2.1), json!("x")]),
        ("frequency_penalty", vec![json!(2.1), json!(-2.1)]),
        ("repetition_penalty", vec![json!(0), json!(-1)]),
        ("stop", vec![json!(""), json!([""]), json!(5), json!([1])]),
        ("stop_token_ids", vec![json!([-1]), json!([10_000_000]), json!("x"), json!(["x"])]),
        ("logit_bias", vec![json!({"10000000": 1}), json!({"x": 1}), json!([]), json!({"1": "x"})]),
        ("stream", vec![json!("maybe"), json!(7), json!([])]),
        ("stream_options", vec![json!({"include_usage": true}), json!(5)]),
        ("model", vec![json!(5), json!(["a"])]),
        ("cache_salt", vec![json!(""), json!("s".repeat(2000))]),
        ("stop", vec![json!(vec!["x"; 1000]), json!("x".repeat(2000))]),
    ];
    for route in ROUTES {
        for (field, values) in &fields {
            for value in values {
                let body = with(route, field, value);
                let reply = cluster.api.post(route, &body).await;
                verdict.error(&format!("{route} {field} {value}"), &reply, 400, &[field]);
            }
        }
        // The same before a stream has begun.
        let mut body = with(route, "temperature", &json!(-1));
        body["stream"] = true.into();
        let reply = cluster.api.post(route, &body).await;
        verdict.error(&format!("{route} as a stream"), &reply, 400, &["temperature"]);
    }
    let logprobs = [
        ("/v1/completions", "logprobs", json!(-2)),
        ("/v1/completions", "logprobs", json!(1000)),
        ("/v1/completions", "logprobs", json!("x")),
        ("/v1/chat/completions", "logprobs", json!("x")),
        ("/v1/chat/completions", "top_logprobs", json!(5)),
    ];
    for (route, field, value) in logprobs {
        let reply = cluster.api.post(route, &with(route, field, &value)).await;
        verdict.error(&format!("{route} {field} {value}"), &reply, 400, &[field]);
    }
    // More than a completion has that does not say.
    let mut body = with("/v1/completions", "min_tokens", &json!(17));
    body.as_object_mut().expect("an object").remove("max_tokens");
    let reply = cluster.api.post("/v1/completions", &body).await;
    verdict.error("min_tokens over the default", &reply, 400, &["min_tokens"]);
    // Greedy decoding has one answer.
    let mut body = with("/v1/completions", "n", &json!(2));
    body["temperature"] = 0.into();
    let reply = cluster.api.post("/v1/completions", &body).await;
    verdict.error("n 2, greedy", &reply, 400, &["n"]);
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

#[tokio::test]
async fn messages_and_prompts_that_make_no_sense_are_400() {
    let cluster = Cluster::unified().await;
    let mut verdict = Verdict::default();
    let chat = "/v1/chat/completions";
    let messages = [
        json!([]),
        json!("hello"),
        json!(null),
        json!([5]),
        json!(["hello"]),
        json!([{"content": "no role"}]),
        json!([{"role": 5, "content": "x"}]),
        json!([{"role": "user", "content": 5}]),
        json!([{"role": "user", "content": [{"type": "text"}]}]),
        json!([{"role": "user", "content": [{"type": "hologram", "text": "x"}]}]),
    ];
    for value in &messages {
        let reply = cluster.api.post(chat, &with(chat, "messages", value)).await;
        verdict.error(&format!("messages {value}"), &reply, 400, &["messages"]);
    }
    let mut missing = with(chat, "messages", &Value::Null);
    missing.as_object_mut().expect("an object").remove("messages");
    let reply = cluster.api.post(chat, &missing).await;
    verdict.error("no messages", &reply, 400, &["messages"]);

    let completions = "/v1/completions";
    let prompts = [
        json!([]),
        json!(null),
        json!(5),
        json!({}),
        json!([[]]),
        json!([1, "two"]),
        json!([1.5]),
        json!([-1]),
        json!([10_000_000]),
        json!([u64::MAX]),
        json!([[1, 2], [10_000_000]]),
    ];
    for value in &prompts {
        let reply = cluster.api.post(completions, &with(completions, "prompt", value)).await;
        verdict.error(&format!("prompt {value}"), &reply, 400, &["prompt"]);
    }
    // The first id that the vocabulary does not have is refused, the last that it has is not.
    let vocabulary = 49_152;
    let reply =
        cluster.api.post(completions, &with(completions, "prompt", &json!([vocabulary]))).await;
    verdict.error("a token id out of range", &reply, 400, &["prompt", "49152"]);
    let last = with(completions, "prompt", &json!([vocabulary - 1]));
    cluster.api.ok(completions, &last).await;

    for (route, field, value) in [
        ("/tokenize", "prompt", json!(5)),
        ("/tokenize", "tools", json!({})),
        ("/tokenize", "messages", json!([{"role": "user", "content": [{"type": "text"}]}])),
        ("/tokenize", "messages", json!([])),
        ("/tokenize", "messages", json!("x")),
        ("/detokenize", "tokens", json!("x")),
        ("/detokenize", "tokens", json!([-1])),
        ("/detokenize", "tokens", json!([1.5])),
        ("/detokenize", "tokens", json!([10_000_000])),
        ("/detokenize", "tokens", json!(null)),
    ] {
        // A prompt wins over messages; wrong ones are wrong all the same.
        let mut body = json!({"prompt": "Hello"});
        body[field] = value.clone();
        let reply = cluster.api.post(route, &body).await;
        verdict.error(&format!("{route} {field} {value}"), &reply, 400, &[field]);
    }
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

#[tokio::test]
async fn bodies_that_are_not_json_are_400() {
    let cluster = Cluster::unified().await;
    let mut verdict = Verdict::default();
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: [(&str, Vec<u8>); 9] = [
        ("empty", Vec::new()),
        ("cut off", b"{\"model\": \"smollm2\", \"prompt\": \"He".to_vec()),
        ("a stray comma", b"{\"prompt\": \"x\",}".to_vec()),
        ("not JSON", b"prompt=hello".to_vec()),
        ("something after", b"{\"prompt\": \"x\"} {}".to_vec()),
        ("a list", b"[]".to_vec()),
        ("a string", b"\"hello\"".to_vec()),
        ("endless nesting", deep.into_bytes()),
        ("invalid UTF-8", b"{\"prompt\": \"\xff\xfe\", \"max_tokens\": 1}".to_vec()),
    ];
    for route in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        for (what, body) in &bodies {
            let reply = raw(&cluster.api, route, body.clone()).await;
            verdict.error(&format!("{route}: {what}"), &reply, 400, &[]);
        }
        for media in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
            let body = with("/v1/completions", "n", &json!(1)).to_string();
            let reply = cluster.api.send(Method::POST, route, media, body).await;
            let reply = reply.expect("a reply");
            verdict.error(&format!("{route} as {media:?}"), &reply, 400, &["application/json"]);
        }
    }
    // A lone surrogate is valid in JSON's grammar, but no text.
    let reply =
        raw(&cluster.api, "/v1/completions", r#"{"prompt": "\ud800", "max_tokens": 1}"#).await;
    verdict.error("a lone surrogate", &reply, 400, &[]);
    // A charset after the media type is fine.
    let sound = with("/v1/completions", "n", &json!(1)).to_string();
    let media = Some("Application/JSON; charset=utf-8");
    let reply = cluster.api.send(Method::POST, "/v1/completions", media, sound).await;
    reply.expect("a reply").ok();
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

#[tokio::test]
async fn a_body_of_50_mb_is_413_at_once() {
    let cluster = Cluster::unified().await;
    let body = with("/v1/completions", "prompt", &"x".repeat(50_000_000).into()).to_string();
    let mut verdict = Verdict::default();
    for route in ["/v1/completions", "/v1/chat/completions", "/tokenize"] {
        let start = Instant::now();
        let sent =
            cluster.api.send(Method::POST, route, Some("application/json"), body.clone()).await;
        // The server may close while the client still sends: the client then sees the close or
        // the reply, whichever it looks at first.
        match sent {
            Ok(reply) => verdict.error(route, &reply, 413, &["bytes"]),
            Err(e) => assert!(e.is_request() || e.is_body(), "{route}: {e:?}"),
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    // Told beforehand how much would come, the server refuses before it comes.
    let reply = announce(&cluster.api, 50_000_000).await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply:?}");
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

/// Sends a request's head with this `Content-Length`, and no body; returns the reply's head.
async fn announce(api: &Api, length: usize) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let host = api.base().strip_prefix("http://").expect("an http address");
    let mut stream = tokio::net::TcpStream::connect(host).await.expect("connect");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("send the head");
    let mut reply = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut reply)).await;
    let n = read.expect("a reply in time").expect("a reply");
    String::from_utf8_lossy(&reply[..n]).into_owned()
}

#[tokio::test]
async fn an_unknown_model_is_404_and_named() {
    let cluster = Cluster::unified().await;
    let mut verdict = Verdict::default();
    for route in ROUTES {
        let reply = cluster.api.post(route, &with(route, "model", &"gpt-17".into())).await;
        verdict.error(route, &reply, 404, &["gpt-17", "does not exist"]);
        assert_eq!(reply.json()["error"]["type"], "NotFoundError");
    }
    for (route, field, value) in
        [("/tokenize", "prompt", json!("x")), ("/detokenize", "tokens", json!([1]))]
    {
        let reply = cluster.api.post(route, &json!({"model": "gpt-17", field: value})).await;
        verdict.error(route, &reply, 404, &["gpt-17"]);
    }
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

#[tokio::test]
async fn an_unknown_route_is_404_and_a_wrong_method_405() {
    let cluster = Cluster::unified().await;
    let mut verdict = Verdict::default();
    for path in ["/chat", "/v1", "/v1/nothing", "/v1/completions/x", "/../etc/passwd"] {
        let reply = cluster.api.get(path).await;
        verdict.error(path, &reply, 404, &[]);
    }
    for (method, path) in [
        (Method::GET, "/v1/completions"),
        (Method::DELETE, "/v1/chat/completions"),
        (Method::POST, "/v1/models"),
        (Method::GET, "/tokenize"),
        (Method::PUT, "/ping"),
    ] {
        let reply = cluster.api.send(method.clone(), path, None, "").await.expect("a reply");
        verdict.error(&format!("{method} {path}"), &reply, 405, &[]);
    }
    cluster.finish().await;
    verdict.check();
}

/// The context is a hard limit: prompt and answer together must fit into it.
#[tokio::test]
async fn a_prompt_over_the_context_is_400_and_says_by_how_much() {
    let cluster = Cluster::builder().unified(1).worker_arg("--max-model-len", "256").start().await;
    let mut verdict = Verdict::default();
    let completions = "/v1/completions";
    let prompt = |tokens: u32| json!((1000..1000 + tokens).collect::<Vec<_>>());
    for tokens in [256, 257, 5000] {
        let reply =
            cluster.api.post(completions, &with(completions, "prompt", &prompt(tokens))).await;
        verdict.error(&format!("{tokens} tokens"), &reply, 400, &["256", &tokens.to_string()]);
    }
    let words = "word ".repeat(3000);
    let reply =
        cluster.api.post(completions, &with(completions, "prompt", &words.clone().into())).await;
    verdict.error("3,000 words", &reply, 400, &["256"]);
    let chat = "/v1/chat/completions";
    let messages = json!([{"role": "user", "content": words}]);
    let reply = cluster.api.post(chat, &with(chat, "messages", &messages)).await;
    verdict.error("3,000 words of chat", &reply, 400, &["256"]);
    // A prompt that fits, but not with the answer that is asked for.
    let mut body = with(completions, "prompt", &prompt(200));
    body["max_tokens"] = 57.into();
    let reply = cluster.api.post(completions, &body).await;
    verdict.error("200 + 57 tokens", &reply, 400, &["256"]);
    // The exact fit is served.
    body["max_tokens"] = 56.into();
    body["ignore_eos"] = true.into();
    body["return_token_ids"] = true.into();
    let reply = cluster.api.ok(completions, &body).await;
    assert_eq!(ids(&reply["choices"][0]["token_ids"]).len(), 56);
    // A chat without max_tokens takes what is left.
    let mut body = with(chat, "ignore_eos", &true.into());
    body.as_object_mut().expect("an object").remove("max_tokens");
    let reply = cluster.api.ok(chat, &body).await;
    assert_eq!(reply["usage"]["total_tokens"], 256, "{reply}");
    // /tokenize has no limit.
    let reply = cluster.api.ok("/tokenize", &json!({"prompt": "word ".repeat(3000)})).await;
    assert!(reply["count"].as_u64() > Some(2999), "{}", reply["count"]);
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}

/// Fits the context, but not the KV cache of any worker, even alone: it would wait for ever.
#[tokio::test]
async fn a_request_that_no_worker_has_room_for_is_refused_at_once() {
    let cluster = Cluster::builder().unified(1).kv_memory("8MiB").start().await;
    let completions = "/v1/completions";
    let mut body = with(completions, "prompt", &json!((1000..5000).collect::<Vec<u32>>()));
    body["max_tokens"] = 16.into();
    let start = Instant::now();
    let reply = cluster.api.post(completions, &body).await;
    reply.error(400).expect("the error object");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    cluster.still_serves().await;
    cluster.finish().await;
}

/// Slow and broken clients hold nothing up.
#[tokio::test]
async fn clients_that_send_half_a_request_disturb_nobody() {
    use tokio::io::AsyncWriteExt;
    let cluster = Cluster::unified().await;
    let host = cluster.api.base().strip_prefix("http://").expect("an http address").to_owned();
    let mut open = Vec::new();
    for i in 0..100 {
        let mut stream = tokio::net::TcpStream::connect(&host).await.expect("connect");
        let bytes: &[u8] = match i % 4 {
            0 => b"",
            1 => b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le",
            2 => b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"pro",
            _ => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS, or is it",
        };
        stream.write_all(bytes).await.expect("send");
        open.push(stream);
    }
    cluster.still_serves().await;
    drop(open);
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_gateway_without_workers_says_so() {
    let cluster = Cluster::builder().start().await;
    let mut verdict = Verdict::default();
    for route in ROUTES {
        let reply = cluster.api.post(route, &with(route, "n", &json!(1))).await;
        verdict.error(route, &reply, 503, &["worker"]);
        assert!(!reply.header("retry-after").is_empty(), "{route}: {:?}", reply.headers);
    }
    assert_eq!(cluster.api.get("/v1/models").await.ok()["data"], json!([]));
    let health = cluster.api.get("/health").await;
    assert_eq!((health.status.as_u16(), &*health.text), (503, ""));
    cluster.finish().await;
    verdict.check();
}

#[tokio::test]
async fn a_wrong_key_is_401_before_the_body_is_read() {
    let cluster = Cluster::builder().unified(1).api_key("right").start().await;
    let mut verdict = Verdict::default();
    for key in [None, Some("wrong"), Some("righ"), Some("right-and-more"), Some("RIGHT")] {
        let api = cluster.api.with_key(key);
        let reply = raw(&api, "/v1/completions", "not even JSON").await;
        verdict.error(&format!("key {key:?}"), &reply, 401, &[]);
    }
    let reply = announce(&cluster.api.with_key(None), 1_000_000).await;
    assert!(reply.starts_with("HTTP/1.1 401"), "{reply:?}");
    cluster.still_serves().await;
    cluster.finish().await;
    verdict.check();
}
