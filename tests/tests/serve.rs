//! The HTTP routes, when all goes well: bodies, streams, sampling, tokenizing, operation.

use std::collections::HashSet;

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::{choices, ids, streamed_ids, streamed_text};
use baton_tests::prometheus::Scrape;
use baton_tests::{Cluster, Role, grpc, reference};
use reqwest::Method;
use serde_json::{Value, json};

const PROMPT: &str = "The quick brown fox jumps over";

fn completion(fields: Value) -> Value {
    with(json!({"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}), fields)
}

fn chat(fields: Value) -> Value {
    let messages = json!([
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Name three colours."},
    ]);
    with(
        json!({"model": MODEL_NAME, "messages": messages, "max_tokens": 24, "temperature": 0}),
        fields,
    )
}

/// `base` with `fields` put over it.
fn with(mut base: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().expect("a completion's text")
}

fn content(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().expect("a chat's content")
}

/// The keys of an object, for a check that none is missing and none is made up.
fn keys(object: &Value) -> HashSet<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[tokio::test]
async fn a_completion_has_the_body_of_the_contract() {
    let cluster = Cluster::unified().await;
    let reply = cluster.api.ok("/v1/completions", &completion(json!({}))).await;
    assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")), "{reply}");
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["model"], MODEL_NAME);
    assert!(reply["created"].as_u64().is_some_and(|at| at > 1_700_000_000), "{reply}");
    let expected = ["id", "object", "created", "model", "choices", "usage"];
    let missing: Vec<_> = expected.iter().filter(|key| !keys(&reply).contains(**key)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let choice = &reply["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "length");
    // Nulls are kept in whole replies.
    assert!(keys(choice).is_superset(&["text", "logprobs", "stop_reason"].into()), "{choice}");
    let usage = &reply["usage"];
    assert_eq!(usage["completion_tokens"], 16);
    let total = usage["prompt_tokens"].as_u64().expect("prompt tokens") + 16;
    assert_eq!(usage["total_tokens"], total);
    let tokens = cluster.api.ok("/tokenize", &json!({"prompt": PROMPT})).await;
    assert_eq!(usage["prompt_tokens"], tokens["count"]);
    // The default length of a completion.
    let mut body = completion(json!({"ignore_eos": true}));
    body.as_object_mut().expect("an object").remove("max_tokens");
    let reply = cluster.api.ok("/v1/completions", &body).await;
    assert_eq!(reply["usage"]["completion_tokens"], 16);
    cluster.finish().await;
}

#[tokio::test]
async fn a_chat_has_the_body_of_the_contract() {
    let cluster = Cluster::unified().await;
    let reply = cluster.api.ok("/v1/chat/completions", &chat(json!({}))).await;
    assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{reply}");
    assert_eq!(reply["object"], "chat.completion");
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    assert!(!content(&reply).is_empty());
    assert!(keys(message).contains("refusal"), "nulls are kept: {message}");
    let tokens =
        cluster.api.ok("/tokenize", &json!({"messages": chat(json!({}))["messages"]})).await;
    assert_eq!(reply["usage"]["prompt_tokens"], tokens["count"]);
    // max_completion_tokens wins over max_tokens, and content may come in parts.
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]);
    let whole = json!([{"role": "user", "content": "Say hello."}]);
    let fields = json!({"messages": parts, "max_completion_tokens": 3, "ignore_eos": true});
    let in_parts = cluster.api.ok("/v1/chat/completions", &chat(fields)).await;
    assert_eq!(in_parts["usage"]["completion_tokens"], 3);
    let fields = json!({"messages": whole, "max_tokens": 3, "ignore_eos": true});
    let in_one = cluster.api.ok("/v1/chat/completions", &chat(fields)).await;
    assert_eq!(content(&in_parts), content(&in_one));
    assert_eq!(in_parts["usage"], in_one["usage"]);
    // The system message is read.
    let other = json!({"messages": [{"role": "user", "content": "Name three colours."}]});
    let other = cluster.api.ok("/v1/chat/completions", &chat(other)).await;
    assert_ne!(other["usage"]["prompt_tokens"], reply["usage"]["prompt_tokens"]);
    cluster.finish().await;
}

#[tokio::test]
async fn a_stream_gives_what_the_whole_answer_gives() {
    let cluster = Cluster::unified().await;
    let sampled = json!({"temperature": 0.8, "seed": 7, "max_tokens": 48});
    let unicode = json!({"prompt": "Emoji: 😀 日本語 —", "max_tokens": 48});
    for fields in [json!({}), sampled.clone(), unicode] {
        let fields = with(fields, json!({"return_token_ids": true}));
        let whole = cluster.api.ok("/v1/completions", &completion(fields.clone())).await;
        let options = json!({"stream": true, "stream_options": {"include_usage": true}});
        let body = completion(with(fields, options));
        let mut events = cluster.api.stream("/v1/completions", &body).await.collect().await;
        let last = events.pop().expect("a usage event");
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"], whole["usage"]);
        assert_eq!(streamed_text(&events, 0), text(&whole));
        assert_eq!(streamed_ids(&events, 0), ids(&whole["choices"][0]["token_ids"]));
        let id = &events[0]["id"];
        for event in &events {
            assert_eq!(event["object"], "text_completion");
            assert_eq!(&event["id"], id);
            assert!(event["usage"].is_null() && keys(event).contains("usage"), "{event}");
        }
        let ends: Vec<_> = choices(&events, 0)
            .map(|choice| &choice["finish_reason"])
            .filter(|r| !r.is_null())
            .collect();
        assert_eq!(ends, [&whole["choices"][0]["finish_reason"]]);
        assert!(events.len() > 8, "tokens come one by one: {} events", events.len());
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_chat_stream_gives_what_the_whole_answer_gives() {
    let cluster = Cluster::unified().await;
    let whole = cluster.api.ok("/v1/chat/completions", &chat(json!({}))).await;
    let body = chat(json!({"stream": true}));
    let events = cluster.api.stream("/v1/chat/completions", &body).await.collect().await;
    assert_eq!(streamed_text(&events, 0), content(&whole));
    let first = &events[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["finish_reason"], Value::Null);
    for event in &events {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert!(!keys(event).contains("usage"), "usage was not asked for: {event}");
    }
    let last = events.last().expect("an event");
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);

    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = chat(json!({"stream": true, "stream_options": options}));
    let events = cluster.api.stream("/v1/chat/completions", &body).await.collect().await;
    let counts: Vec<u64> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().expect("running usage"))
        .collect();
    assert!(counts.is_sorted() && counts[0] == 0, "{counts:?}");
    assert_eq!(events.last().expect("an event")["usage"], whole["usage"]);
    cluster.finish().await;
}

#[tokio::test]
async fn several_prompts_and_several_choices_are_indexed() {
    let cluster = Cluster::unified().await;
    let fields = json!({"prompt": ["One", "Two two"], "n": 3, "temperature": 1, "seed": 1});
    let reply = cluster.api.ok("/v1/completions", &completion(fields.clone())).await;
    let indexes: Vec<u64> = reply["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|choice| choice["index"].as_u64().expect("an index"))
        .collect();
    assert_eq!(indexes, [0, 1, 2, 3, 4, 5]);
    let texts: HashSet<&str> = reply["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|choice| choice["text"].as_str().expect("a text"))
        .collect();
    assert!(texts.len() >= 5, "the choices of one prompt differ: {texts:?}");
    // Each prompt counts once, each choice's tokens count.
    assert_eq!(reply["usage"]["completion_tokens"], 6 * 16);
    let one = cluster.api.ok("/tokenize", &json!({"prompt": "One"})).await;
    let two = cluster.api.ok("/tokenize", &json!({"prompt": "Two two"})).await;
    let prompts = one["count"].as_u64().zip(two["count"].as_u64()).map(|(a, b)| a + b);
    assert_eq!(reply["usage"]["prompt_tokens"].as_u64(), prompts);

    let body = completion(with(fields, json!({"stream": true})));
    let events = cluster.api.stream("/v1/completions", &body).await.collect().await;
    for (index, choice) in reply["choices"].as_array().expect("choices").iter().enumerate() {
        assert_eq!(streamed_text(&events, index as u64), choice["text"], "choice {index}");
    }
    // Token ids as the prompt, alone and in a list, equal to the text that they are of.
    let words = cluster.api.ok("/v1/completions", &completion(json!({}))).await;
    let tokens = cluster.api.ok("/tokenize", &json!({"prompt": PROMPT})).await["tokens"].clone();
    for prompt in [tokens.clone(), json!([tokens])] {
        let reply = cluster.api.ok("/v1/completions", &completion(json!({"prompt": prompt}))).await;
        assert_eq!(text(&reply), text(&words));
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_seed_makes_sampling_reproducible_on_any_path() {
    let cluster = Cluster::builder().prefill(1).decode(1).unified(1).handoff_min_tokens(4).start();
    let cluster = cluster.await;
    let body = |seed: u64| {
        completion(json!({"temperature": 1.0, "top_p": 0.95, "seed": seed, "max_tokens": 24}))
    };
    let first = cluster.api.ok("/v1/completions", &body(1)).await;
    // Whichever worker it lands on, with or without a hand-off, alone or among others.
    let (api, same) = (&cluster.api, body(1));
    let replies = futures::future::join_all((0..8).map(|_| api.ok("/v1/completions", &same))).await;
    for reply in &replies {
        assert_eq!(text(reply), text(&first));
    }
    for role in [Role::Decode, Role::Unified] {
        let status = cluster.only(role).status().await;
        assert!(status.generation_tokens > 0, "{role:?} took no part: {status:?}");
    }
    let mut others = HashSet::new();
    for seed in 2..6 {
        let reply = cluster.api.ok("/v1/completions", &body(seed)).await;
        others.insert(text(&reply).to_owned());
    }
    assert!(others.len() >= 3, "other seeds give other texts: {others:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn sampling_parameters_do_what_they_say() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let complete = async |fields: Value| api.ok("/v1/completions", &completion(fields)).await;
    let prompt = json!("la la la la la la la la la la la la la");
    let base =
        json!({"prompt": prompt, "max_tokens": 32, "return_token_ids": true, "ignore_eos": true});
    let tokens = async |fields: Value| {
        ids(&complete(with(base.clone(), fields)).await["choices"][0]["token_ids"])
    };
    let distinct = |tokens: &[u32]| tokens.iter().collect::<HashSet<_>>().len();

    let plain = tokens(json!({})).await;
    assert_eq!(plain.len(), 32);
    for penalty in [
        json!({"repetition_penalty": 1.8}),
        json!({"frequency_penalty": 2.0}),
        json!({"presence_penalty": 2.0}),
    ] {
        let other = tokens(penalty.clone()).await;
        assert_ne!(other, plain, "{penalty}");
        assert!(distinct(&other) > distinct(&plain), "{penalty}: {other:?} against {plain:?}");
    }
    // Filters that leave one token are greedy at any temperature.
    for one in [json!({"top_k": 1}), json!({"top_p": 1e-6}), json!({"min_p": 1.0})] {
        let hot = with(one.clone(), json!({"temperature": 2.0, "seed": 3}));
        assert_eq!(tokens(hot).await, plain, "{one}");
    }
    let hot = tokens(json!({"temperature": 2.0, "seed": 3})).await;
    assert_ne!(hot, plain, "a temperature of 2");
    // A bias that no logit outweighs.
    let biased = tokens(json!({"logit_bias": {"100": 100.0}})).await;
    assert_eq!(biased, [100; 32]);
    let stop = tokens(json!({"logit_bias": {"100": 100.0}, "stop_token_ids": [100]})).await;
    assert!(stop.len() <= 1, "{stop:?}");
    let stop = complete(with(
        base.clone(),
        json!({"logit_bias": {"100": 100.0}, "stop_token_ids": [100], "min_tokens": 5}),
    ))
    .await;
    assert!(stop["usage"]["completion_tokens"].as_u64() > Some(5), "{stop}");
    assert_eq!(stop["choices"][0]["stop_reason"], 100);
    assert_eq!(stop["choices"][0]["finish_reason"], "stop");
    cluster.finish().await;
}

#[tokio::test]
async fn stop_strings_end_the_text_before_them() {
    let cluster = Cluster::unified().await;
    let fields = json!({"prompt": "Count: one, two, three,", "max_tokens": 40});
    let whole = cluster.api.ok("/v1/completions", &completion(fields.clone())).await;
    let whole = text(&whole).to_owned();
    // Stop strings from the middle of the answer, across token borders.
    let middle = whole.char_indices().nth(11).expect("a long answer").0;
    for len in [1, 4, 9] {
        let stop: String = whole[middle..].chars().take(len).collect();
        let before = &whole[..whole.find(&stop).expect("the stop string is in the answer")];
        let with_stop = with(fields.clone(), json!({"stop": ["never said", stop]}));
        let reply = cluster.api.ok("/v1/completions", &completion(with_stop.clone())).await;
        assert_eq!(text(&reply), before, "stop {stop:?}");
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        assert_eq!(reply["choices"][0]["stop_reason"], stop);
        let body = completion(with(with_stop.clone(), json!({"stream": true})));
        let events = cluster.api.stream("/v1/completions", &body).await.collect().await;
        assert_eq!(streamed_text(&events, 0), before, "nothing of {stop:?} is streamed");
        let kept = with(with_stop, json!({"include_stop_str_in_output": true}));
        let reply = cluster.api.ok("/v1/completions", &completion(kept)).await;
        assert_eq!(text(&reply), format!("{before}{stop}"));
    }
    // What is held back as the start of a stop string is given out when it was none.
    let almost = format!("{}¶", &whole[middle..].chars().take(6).collect::<String>());
    let body = completion(with(fields, json!({"stop": almost, "stream": true})));
    let events = cluster.api.stream("/v1/completions", &body).await.collect().await;
    assert_eq!(streamed_text(&events, 0), whole);
    cluster.finish().await;
}

#[tokio::test]
async fn logprobs_are_those_of_the_tokens_chosen() {
    let cluster = Cluster::unified().await;
    let fields =
        json!({"logprobs": 4, "return_tokens_as_token_ids": true, "return_token_ids": true});
    let reply = cluster.api.ok("/v1/completions", &completion(fields)).await;
    let choice = &reply["choices"][0];
    let chosen = ids(&choice["token_ids"]);
    let logprobs = &choice["logprobs"];
    for (i, id) in chosen.iter().enumerate() {
        assert_eq!(logprobs["tokens"][i], format!("token_id:{id}"));
        let chosen = logprobs["token_logprobs"][i].as_f64().expect("a logprob");
        let top = logprobs["top_logprobs"][i].as_object().expect("the top ones");
        assert_eq!(top.len(), 4, "{top:?}");
        let best = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert!(chosen <= 0.0 && chosen == best, "greedy takes the best: {chosen} of {top:?}");
        let mass: f64 = top.values().filter_map(Value::as_f64).map(f64::exp).sum();
        assert!(mass <= 1.0001, "{mass}");
    }
    let fields = json!({"logprobs": true, "top_logprobs": 2});
    let reply = cluster.api.ok("/v1/chat/completions", &chat(fields)).await;
    let items = reply["choices"][0]["logprobs"]["content"].as_array().expect("logprobs");
    let joined: String = items.iter().filter_map(|item| item["token"].as_str()).collect();
    assert!(joined.starts_with(content(&reply)), "{joined:?} spells {:?}", content(&reply));
    for item in items {
        assert_eq!(item["top_logprobs"].as_array().map(Vec::len), Some(2), "{item}");
        assert!(item["bytes"].is_array() && item["logprob"].as_f64() <= Some(0.0), "{item}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_prefix_that_is_cached_is_not_computed_again() {
    let cluster = Cluster::unified().await;
    let worker = cluster.only(Role::Unified);
    let prompt: Vec<u32> = (0..400).map(|i| 1000 + i * 7).collect();
    let body = completion(json!({"prompt": prompt, "max_tokens": 4}));
    let first = cluster.api.ok("/v1/completions", &body).await;
    let before = worker.status().await;
    let again = cluster.api.ok("/v1/completions", &body).await;
    let after = worker.status().await;
    assert_eq!(text(&first), text(&again));
    let hits = after.prefix_cache_hits - before.prefix_cache_hits;
    assert!((384..400).contains(&hits), "{hits} of 400 tokens were cached");
    assert!(after.kv_blocks_cached >= 25, "{after:?}");
    // Another salt shares nothing.
    let salted = completion(json!({"prompt": prompt, "max_tokens": 4, "cache_salt": "other"}));
    assert_eq!(text(&cluster.api.ok("/v1/completions", &salted).await), text(&first));
    assert_eq!(worker.status().await.prefix_cache_hits, after.prefix_cache_hits);
    cluster.finish().await;
}

/// More sequences than the KV cache holds: some are put back and computed again, all are right.
#[tokio::test]
async fn sequences_that_do_not_fit_together_are_preempted_and_still_right() {
    let roomy = Cluster::unified().await;
    let body = |i: u32| {
        let prompt: Vec<u32> = (0..100).map(|k| 1000 + (i * 131 + k * 17) % 9000).collect();
        completion(json!({"prompt": prompt, "max_tokens": 160, "ignore_eos": true}))
    };
    let mut expected = Vec::new();
    for i in 0..6 {
        expected.push(text(&roomy.api.ok("/v1/completions", &body(i)).await).to_owned());
    }
    let block_bytes = {
        let mut client = grpc::worker(&roomy.workers[0].address).await;
        let described = client.describe(baton_proto::v1::DescribeRequest {}).await;
        described.expect("a description").into_inner().kv_layout.expect("a layout").block_bytes
    };
    roomy.finish().await;
    // Room for about two of the six sequences of 260 tokens, in blocks of 16.
    let memory = format!("{}", block_bytes * 40);
    let tight =
        Cluster::builder().unified(1).kv_memory(&memory).worker_arg("--max-model-len", "512");
    let tight = tight.start().await;
    let bodies: Vec<Value> = (0..6).map(body).collect();
    let calls = bodies.iter().map(|body| tight.api.ok("/v1/completions", body));
    for (i, reply) in futures::future::join_all(calls).await.iter().enumerate() {
        assert_eq!(text(reply), expected[i], "request {i}");
    }
    let status = tight.workers[0].status().await;
    assert!(status.preemptions > 0, "nothing was preempted: {status:?}");
    tight.finish().await;
}

#[tokio::test]
async fn tokenize_and_detokenize_agree_with_the_reference() {
    let cluster = Cluster::unified().await;
    for case in reference::tokenize() {
        let body =
            json!({"prompt": case.text, "add_special_tokens": false, "return_token_strs": true});
        let reply = cluster.api.ok("/tokenize", &body).await;
        assert_eq!(ids(&reply["tokens"]), case.ids, "{:?}", case.text);
        assert_eq!(reply["count"], case.ids.len());
        assert_eq!(reply["token_strs"].as_array().map(Vec::len), Some(case.ids.len()));
        assert!(reply["max_model_len"].as_u64() > Some(0));
        let reply = cluster.api.ok("/detokenize", &json!({"tokens": case.ids})).await;
        assert_eq!(reply["prompt"], case.decoded(), "{:?}", case.ids);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn the_chat_template_agrees_with_the_reference() {
    let cluster = Cluster::unified().await;
    for case in reference::chat_template() {
        let body = json!({
            "messages": case.messages,
            "add_generation_prompt": case.add_generation_prompt,
        });
        let reply = cluster.api.ok("/tokenize", &body).await;
        assert_eq!(ids(&reply["tokens"]), case.ids, "{}", case.messages);
        // Only what the template makes of the messages may differ from its text as a prompt.
        let body = json!({"prompt": case.rendered, "add_special_tokens": false});
        assert_eq!(cluster.api.ok("/tokenize", &body).await["tokens"], reply["tokens"]);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn operational_routes_answer() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    for (method, path) in [
        (Method::GET, "/health"),
        (Method::GET, "/ping"),
        (Method::POST, "/ping"),
        (Method::GET, "/live"),
    ] {
        let reply = api.send(method.clone(), path, None, "").await.expect("a reply");
        assert_eq!((reply.status.as_u16(), &*reply.text), (200, ""), "{method} {path}");
    }
    assert!(api.get("/version").await.ok()["version"].is_string());
    assert_eq!(api.get("/load").await.ok(), json!({"server_load": 0}));

    let models = api.get("/v1/models").await.ok();
    assert_eq!(models["object"], "list");
    let [card] = &models["data"].as_array().expect("cards")[..] else { panic!("{models}") };
    assert_eq!((&card["id"], &card["object"]), (&json!(MODEL_NAME), &json!("model")));
    assert!(card["max_model_len"].as_u64() >= Some(2048), "{card}");
    assert!(card["root"].as_str().is_some_and(|root| root.ends_with(".gguf")), "{card}");
    assert_eq!(card["permission"][0]["object"], "model_permission");

    // An empty or absent model is the served one.
    for model in [json!(""), Value::Null] {
        let reply = api.ok("/v1/completions", &completion(json!({"model": model}))).await;
        assert_eq!(reply["model"], MODEL_NAME);
    }
    // Unknown fields are let through, and named.
    let reply = api.post("/v1/completions", &completion(json!({"temprature": 1}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(reply.header("warning").contains("temprature"), "{:?}", reply.headers);
    // A request's own id is in the answer's.
    let own = completion(json!({"request_id": "my-own-id"}));
    assert_eq!(api.ok("/v1/completions", &own).await["id"], "cmpl-my-own-id");
    cluster.finish().await;
}

#[tokio::test]
async fn the_load_counts_requests_until_their_streams_end() {
    let cluster = Cluster::unified().await;
    let body = completion(json!({"stream": true, "max_tokens": 2000, "ignore_eos": true}));
    let mut stream = cluster.api.stream("/v1/completions", &body).await;
    stream.next().await.expect("an event");
    assert_eq!(cluster.api.get("/load").await.ok(), json!({"server_load": 1}));
    drop(stream);
    cluster.at_rest().await;
    baton_tests::eventually("the load is gone", std::time::Duration::from_secs(2), async || {
        let load = cluster.api.get("/load").await.ok();
        if load == json!({"server_load": 0}) { Ok(()) } else { Err(load.to_string()) }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn metrics_are_sound_and_count_what_happened() {
    let cluster = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16).start().await;
    let scrape = async || {
        let reply = cluster.api.get("/metrics").await;
        let media = reply.header("content-type");
        assert!(media.starts_with("text/plain; version=0.0.4"), "{media}");
        Scrape::parse(&reply.text).unwrap_or_else(|e| panic!("{e}\n{}", reply.text))
    };
    let before = scrape().await;
    let prompt: Vec<u32> = (0..100).map(|i| 2000 + i).collect();
    let fields = json!({"prompt": prompt, "max_tokens": 10, "ignore_eos": true});
    cluster.api.ok("/v1/completions", &completion(fields.clone())).await;
    let body = completion(with(fields, json!({"stream": true})));
    cluster.api.stream("/v1/completions", &body).await.collect().await;
    let expected = [
        ("vllm:prompt_tokens_total", vec![], 200.0),
        ("vllm:generation_tokens_total", vec![], 20.0),
        ("vllm:request_success_total", vec![("finished_reason", "length")], 2.0),
        ("vllm:time_to_first_token_seconds_count", vec![], 2.0),
        ("vllm:e2e_request_latency_seconds_count", vec![], 2.0),
    ];
    // What workers count reaches the gateway with their next status.
    baton_tests::eventually("all is counted", std::time::Duration::from_secs(5), async || {
        let after = scrape().await;
        for (name, labels, grown) in &expected {
            let of = |scrape: &Scrape| scrape.sum(name, labels).unwrap_or(0.0);
            if of(&after) - of(&before) != *grown {
                return Err(format!("{name}: {} then {}", of(&before), of(&after)));
            }
        }
        for name in
            ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        {
            let labelled = after.sum(name, &[("model_name", MODEL_NAME)]);
            if labelled != Some(0.0) {
                return Err(format!("{name} at rest is {labelled:?}"));
            }
        }
        Ok(())
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_key_guards_what_the_contract_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys");
    std::fs::write(&file, "# operators\nkey-from-file\n\n  key-with-spaces-around  \n")
        .expect("write");
    let cluster = Cluster::builder()
        .unified(1)
        .api_key("first-key")
        .api_key("second-key")
        .gateway_arg("--api-key-file", file.to_str().expect("a path in UTF-8"))
        .start()
        .await;
    let body = completion(json!({"max_tokens": 1}));
    for key in ["first-key", "second-key", "key-from-file", "key-with-spaces-around"] {
        let reply = cluster.api.with_key(Some(key)).post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{key}: {}", reply.text);
    }
    let guarded = [
        (Method::POST, "/v1/completions"),
        (Method::POST, "/v1/chat/completions"),
        (Method::POST, "/tokenize"),
        (Method::POST, "/detokenize"),
        (Method::GET, "/v1/models"),
        (Method::GET, "/no/such/route"),
    ];
    let wrong = [None, Some(""), Some("first"), Some("first-key2"), Some("# operators")];
    for (method, path) in guarded {
        for key in wrong {
            let api = cluster.api.with_key(key);
            let reply = api.send(method.clone(), path, Some("application/json"), body.to_string());
            let reply = reply.await.expect("a reply");
            reply.error(401).unwrap_or_else(|e| panic!("{path} with {key:?}: {e}"));
            assert!(reply.header("www-authenticate").starts_with("Bearer"), "{:?}", reply.headers);
        }
    }
    let open = ["/health", "/ping", "/live", "/version", "/metrics", "/load"];
    for path in open {
        let reply = cluster.api.with_key(None).get(path).await;
        assert_eq!(reply.status, 200, "{path}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_key_may_come_from_the_environment() {
    let cluster = Cluster::builder().unified(1).api_key_from_env("from-env").start().await;
    cluster.api.with_key(None).get("/v1/models").await.error(401).expect("a 401");
    cluster.still_serves().await;
    cluster.finish().await;
}
