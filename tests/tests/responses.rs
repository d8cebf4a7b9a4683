//! The Responses API: answers, streams, the store, responses in the background.

use std::time::{Duration, Instant};

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::Named;
use baton_tests::postgres::Postgres;
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, Reply, eventually};
use reqwest::Method;
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";

/// Longer than it takes to notice that a gateway is silent.
const NOTICED: Duration = Duration::from_secs(40);

fn ask(input: impl Into<Value>) -> Value {
    json!({"model": MODEL_NAME, "input": input.into(), "temperature": 0, "max_output_tokens": 12})
}

/// `body` with more fields.
fn with(mut body: Value, fields: Value) -> Value {
    let more = fields.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(more);
    body
}

/// A response that runs in the background until somebody ends it.
fn endless() -> Value {
    with(
        ask("Count to a thousand."),
        json!({"background": true, "ignore_eos": true, "max_output_tokens": 1800}),
    )
}

fn text(response: &Value) -> String {
    let items = response["output"].as_array().expect("output");
    let parts = items.iter().filter(|item| item["type"] == "message");
    parts.map(|item| item["content"][0]["text"].as_str().expect("text")).collect()
}

fn path(id: &Value) -> String {
    format!("{PATH}/{}", id.as_str().expect("an id"))
}

async fn stream(api: &Api, body: Value) -> Vec<Value> {
    let body = with(body, json!({"stream": true}));
    checked(api.named(Method::POST, PATH, Some(&body)).await).await
}

/// All events; they count from 0.
async fn numbered(stream: Named) -> Vec<Value> {
    let events = stream.collect().await;
    for (at, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], at, "{event}");
    }
    events
}

/// The same of a response that came to its end: each item is opened and closed.
async fn checked(stream: Named) -> Vec<Value> {
    let events = numbered(stream).await;
    let count = |kind: &str| events.iter().filter(|event| event["type"] == kind).count();
    assert_eq!(count("response.output_item.added"), count("response.output_item.done"));
    events
}

async fn delete(api: &Api, path: &str) -> Reply {
    api.send(Method::DELETE, path, None, "").await.expect("a reply")
}

async fn cancel(api: &Api, id: &Value) -> Reply {
    api.send(Method::POST, &format!("{}/cancel", path(id)), None, "").await.expect("a reply")
}

/// Waits until the response has a status.
async fn reaches(api: &Api, id: &Value, status: &str, within: Duration) -> Value {
    let (response, _) = eventually(&format!("{id} is {status}"), within, async || {
        let response = api.get(&path(id)).await.ok();
        if response["status"] == status { Ok(response) } else { Err(response.to_string()) }
    })
    .await;
    response
}

/// Waits until the only worker runs this many sequences.
async fn runs(cluster: &Cluster, count: u32, within: Duration) {
    eventually(&format!("{count} run"), within, async || {
        let status = cluster.workers[0].status().await;
        if status.running + status.waiting == count { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_response_is_given_whole_and_as_a_stream_and_is_kept() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let logprobs = json!({
        "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"},
        "instructions": "Be brief.", "user": "u",
    });
    let body = with(ask("Say hello."), logprobs);
    let whole = api.ok(PATH, &body).await;
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"), "{whole}");
    for (field, expected) in [
        ("object", json!("response")),
        ("error", json!(null)),
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"a": "b"})),
        ("model", json!(MODEL_NAME)),
        ("max_output_tokens", json!(12)),
        ("previous_response_id", json!(null)),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("text", json!({"format": {"type": "text"}})),
        ("store", json!(true)),
        ("background", json!(false)),
        ("truncation", json!("disabled")),
        ("top_logprobs", json!(2)),
        ("user", json!("u")),
    ] {
        assert_eq!(whole[field], expected, "{field}");
    }
    let message = &whole["output"][0];
    assert_eq!((&message["type"], &message["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(message["content"][0]["annotations"], json!([]));
    let usage = &whole["usage"];
    let tokens = usage["output_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], usage["input_tokens"].as_u64().unwrap() + tokens);
    let entries = message["content"][0]["logprobs"].as_array().unwrap();
    assert!(!entries.is_empty() && entries.len() as u64 <= tokens, "{entries:?}");
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    // The same as the chat that it stands for.
    let chat = json!({
        "model": MODEL_NAME, "temperature": 0, "max_tokens": 12,
        "messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "Say hello."}],
    });
    let chat = api.ok("/v1/chat/completions", &chat).await;
    assert_eq!(chat["choices"][0]["message"]["content"], text(&whole));

    let events = stream(api, body).await;
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let begin = ["created", "in_progress", "output_item.added", "content_part.added"];
    for (kind, expected) in kinds.iter().zip(begin) {
        assert_eq!(*kind, format!("response.{expected}"));
    }
    let last = &events.last().unwrap()["response"];
    assert_eq!(text(last), text(&whole));
    let deltas = events.iter().filter_map(|event| event["delta"].as_str());
    assert_eq!(deltas.collect::<String>(), text(&whole));
    let streamed: Vec<Value> = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .flat_map(|event| event["logprobs"].as_array().unwrap().clone())
        .collect();
    let tokens = |list: &[Value]| list.iter().map(|one| one["token"].clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&streamed), tokens(entries));
    // A stream's end is told when the response is kept.
    for response in [&whole, last] {
        assert_eq!(api.get(&path(&response["id"])).await.ok(), *response);
    }
    // Cut answers say so, in the object and in the last event.
    let short = with(ask("Tell me a long story."), json!({"max_output_tokens": 3}));
    let cut = api.ok(PATH, &short).await;
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(stream(api, short).await.last().unwrap()["type"], "response.incomplete");
    cluster.finish().await;
}

#[tokio::test]
async fn a_conversation_goes_on_from_a_response_also_after_a_restart() {
    let mut cluster = Cluster::unified().await;
    let first =
        cluster.api.ok(PATH, &with(ask("My name is Ann."), json!({"instructions": "Hi"}))).await;
    let second = ask(json!([{"role": "user", "content": "What is my name?"}]));
    let second = with(second, json!({"previous_response_id": first["id"]}));
    let before = cluster.api.ok(PATH, &second).await;
    let chat = json!({
        "model": MODEL_NAME, "temperature": 0, "max_tokens": 12,
        "messages": [
            {"role": "user", "content": "My name is Ann."},
            {"role": "assistant", "content": text(&first)},
            {"role": "user", "content": "What is my name?"},
        ],
    });
    let chat = cluster.api.ok("/v1/chat/completions", &chat).await;
    assert_eq!(chat["choices"][0]["message"]["content"], text(&before));
    assert_eq!(chat["usage"]["prompt_tokens"], before["usage"]["input_tokens"]);
    for graceful in [true, false] {
        cluster.restart_gateway(graceful).await;
        assert_eq!(cluster.api.get(&path(&first["id"])).await.ok(), first);
        assert_eq!(text(&cluster.api.ok(PATH, &second).await), text(&before));
    }
    let third = with(ask("And?"), json!({"previous_response_id": before["id"]}));
    let longer = cluster.api.ok(PATH, &third).await;
    assert!(longer["usage"]["input_tokens"].as_u64() > before["usage"]["input_tokens"].as_u64());

    let items = cluster.api.get(&format!("{}/input_items", path(&first["id"]))).await.ok();
    assert_eq!(items["data"][0]["content"][0]["text"], "My name is Ann.");
    assert_eq!((&items["has_more"], &items["object"]), (&json!(false), &json!("list")));
    // A conversation that has lost its beginning is not silently shorter.
    let deleted = delete(&cluster.api, &path(&first["id"])).await.ok();
    assert_eq!(deleted, json!({"id": first["id"], "object": "response", "deleted": true}));
    cluster.api.get(&path(&first["id"])).await.error(404).unwrap();
    delete(&cluster.api, &path(&first["id"])).await.error(404).unwrap();
    let error = cluster.api.post(PATH, &second).await.error(404).unwrap();
    assert_eq!(error["param"], "previous_response_id");
    let error = cluster.api.post(PATH, &third).await.error(404).unwrap();
    assert!(error["message"].as_str().unwrap().contains(first["id"].as_str().unwrap()), "{error}");
    cluster.finish().await;
}

#[tokio::test]
async fn functions_are_called_and_structures_are_kept_to() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let schema = json!({
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"], "additionalProperties": false,
    });
    let tool =
        json!({"type": "function", "name": "weather", "description": "d", "parameters": schema});
    let body = with(
        ask("How is the weather in Paris?"),
        json!({"tools": [tool], "tool_choice": "required", "parallel_tool_calls": false,
               "max_output_tokens": 120}),
    );
    let whole = api.ok(PATH, &body).await;
    let call = whole["output"].as_array().unwrap().iter().find(|it| it["type"] == "function_call");
    let call = call.unwrap_or_else(|| panic!("{whole}"));
    assert_eq!((&call["name"], &call["status"]), (&json!("weather"), &json!("completed")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["city"].is_string());
    let events = stream(api, body.clone()).await;
    let of = |kind: &str| -> Vec<&Value> {
        events.iter().filter(|event| event["type"] == format!("response.{kind}")).collect()
    };
    let deltas = of("function_call_arguments.delta").into_iter();
    let streamed: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!(streamed, call["arguments"].as_str().unwrap());
    let done = of("function_call_arguments.done");
    assert_eq!((done.len(), &done[0]["arguments"]), (1, &call["arguments"]));
    // The result goes back, after the call that is kept or with it.
    let output =
        json!({"type": "function_call_output", "call_id": call["call_id"], "output": "sun"});
    let next = with(ask(json!([output])), json!({"previous_response_id": whole["id"]}));
    let kept = api.ok(PATH, &next).await;
    let user = json!({"role": "user", "content": "How is the weather in Paris?"});
    let own = api.ok(PATH, &ask(json!([user, call, output]))).await;
    assert_eq!(text(&kept), text(&own));
    assert_eq!(kept["usage"]["input_tokens"], own["usage"]["input_tokens"]);

    let format = json!({"type": "json_schema", "name": "place", "schema": schema, "strict": true});
    let body =
        with(ask("Name a city."), json!({"text": {"format": format}, "max_output_tokens": 60}));
    let structured = api.ok(PATH, &body).await;
    let place: Value = serde_json::from_str(&text(&structured)).unwrap();
    assert!(place["city"].is_string(), "{structured}");
    assert_eq!(structured["text"]["format"]["name"], "place");
    cluster.finish().await;
}

#[tokio::test]
async fn what_is_wrong_is_named_in_the_words_of_the_request() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let tool = json!({"type": "function", "name": "a b"});
    for (fields, status, param) in [
        (json!({"input": null}), 400, json!("input")),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), 400, json!("input[0].type")),
        (json!({"tools": [{"type": "web_search"}]}), 400, json!("tools[0].type")),
        (json!({"tools": [tool]}), 400, json!("tools[0].name")),
        (json!({"prompt": {"id": "x"}}), 400, json!("prompt")),
        (json!({"temperature": 9}), 400, json!("temperature")),
        (json!({"metadata": {"a": 1}}), 400, json!("metadata.a")),
        (json!({"max_output_tokens": 0}), 400, json!("max_output_tokens")),
        (json!({"model": "gpt-17"}), 404, json!("model")),
        (json!({"previous_response_id": "resp_x"}), 404, json!("previous_response_id")),
        (json!({"background": true, "store": false}), 400, json!("background")),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n",
                    "schema": {"type": "object", "properties": {"a": {"$ref": "#/none"}}}}}}),
            400,
            json!("text.format"),
        ),
    ] {
        let error = api.post(PATH, &with(ask("x"), fields.clone())).await.error(status);
        assert_eq!(error.unwrap()["param"], param, "{fields}");
    }
    for id in ["resp_x", "%00", "a%20b"] {
        let error = api.get(&format!("{PATH}/{id}")).await.error(404).unwrap();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"], "response_id");
    }
    cancel(api, &json!("resp_x")).await.error(404).unwrap();
    // Wishes for too much are clipped.
    let much = with(ask("Say hello."), json!({"max_output_tokens": 1_000_000}));
    let clipped = api.ok(PATH, &much).await;
    assert!(clipped["max_output_tokens"].as_u64().unwrap() < 1_000_000, "{clipped}");
    // An id of one's own is taken once.
    let own = with(ask("x"), json!({"request_id": "mine"}));
    assert_eq!(api.ok(PATH, &own).await["id"], "mine");
    assert_eq!(api.post(PATH, &own).await.error(400).unwrap()["param"], "request_id");
    // What is not to be kept is not.
    let passing = api.ok(PATH, &with(ask("x"), json!({"store": false}))).await;
    assert_eq!(passing["store"], false);
    api.get(&path(&passing["id"])).await.error(404).unwrap();
    // One that was not in the background has no events, and is not cancelled.
    let error = cancel(api, &json!("mine")).await.error(400).unwrap();
    assert_eq!(error["message"], "Cannot cancel a synchronous response.");
    assert_eq!(error["type"], "invalid_request_error");
    let error = api.get(&format!("{PATH}/mine?stream=true")).await.error(400).unwrap();
    assert_eq!(error["param"], "response_id");
    cluster.finish().await;
}

#[tokio::test]
async fn a_response_in_the_background_is_followed_from_anywhere_and_by_many() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let body = with(ask("Tell me a story."), json!({"background": true, "max_output_tokens": 40}));
    let queued = api.ok(PATH, &body).await;
    assert_eq!((&queued["status"], &queued["output"]), (&json!("queued"), &json!([])));
    let (response, _) = eventually("the response ends", Duration::from_secs(60), async || {
        let response = api.get(&path(&queued["id"])).await.ok();
        let live = ["queued", "in_progress"].contains(&response["status"].as_str().unwrap());
        if live { Err(response.to_string()) } else { Ok(response) }
    })
    .await;
    let direct = api.ok(PATH, &with(body.clone(), json!({"background": false}))).await;
    assert_eq!(text(&response), text(&direct));
    // Without a stream there are no events; an end is final.
    api.get(&format!("{}?stream=true", path(&queued["id"]))).await.error(400).unwrap();
    cancel(api, &queued["id"]).await.error(400).unwrap();

    // The one who asked leaves after a few events; others follow from where they like.
    let body = with(body, json!({"stream": true}));
    let mut first = api.named(Method::POST, PATH, Some(&body)).await;
    let created = first.next().await.expect("an event");
    assert_eq!(created["response"]["status"], "queued");
    for _ in 0..5 {
        first.next().await.expect("an event");
    }
    drop(first);
    let id = &created["response"]["id"];
    let whole = format!("{}?stream=true", path(id));
    let followers =
        (0..3).map(|_| async { checked(api.named(Method::GET, &whole, None).await).await });
    let followed = futures::future::join_all(followers).await;
    let events = &followed[0];
    let kinds: Vec<&Value> = events.iter().map(|event| &event["type"]).take(3).collect();
    assert_eq!(kinds, ["response.created", "response.queued", "response.in_progress"]);
    let last = events.last().unwrap();
    assert_eq!(text(&last["response"]), text(&direct));
    assert!(followed.iter().all(|other| other == events));
    assert_eq!(api.get(&path(id)).await.ok(), last["response"]);
    let tail = format!("{whole}&starting_after={}", events.len() - 3);
    assert_eq!(
        api.named(Method::GET, &tail, None).await.collect().await,
        events[events.len() - 2..]
    );
    api.get(&format!("{whole}&starting_after=x")).await.error(400).unwrap();
    cluster.finish().await;
}

#[tokio::test]
async fn a_cancelled_response_frees_its_worker_and_background_work_is_bounded() {
    let builder = Cluster::builder().unified(1).gateway_arg("--max-background-responses", "2");
    let cluster = builder.start().await;
    let api = &cluster.api;
    let silent = api.ok(PATH, &endless()).await;
    let streaming = with(endless(), json!({"stream": true}));
    let mut events = api.named(Method::POST, PATH, Some(&streaming)).await;
    let told = events.next().await.expect("an event")["response"]["id"].clone();
    runs(&cluster, 2, Duration::from_secs(30)).await;
    let refused = api.post(PATH, &endless()).await;
    refused.error(429).unwrap();
    assert!(!refused.header("retry-after").is_empty());
    for (left, id) in [(1, &silent["id"]), (0, &told)] {
        let cancelled = cancel(api, id).await.ok();
        assert_eq!(cancelled["status"], "cancelled");
        runs(&cluster, left, Duration::from_secs(10)).await;
        assert_eq!(cancel(api, id).await.ok(), cancelled);
        assert_eq!(api.get(&path(id)).await.ok(), cancelled);
    }
    // Its stream ends, now and when it is replayed.
    events.collect().await;
    let replayed = api.named(Method::GET, &format!("{}?stream=true", path(&told)), None).await;
    let replayed = numbered(replayed).await;
    assert_ne!(replayed.last().unwrap()["type"], "response.completed");
    // There is room again; one that is deleted stops, too.
    let again = api.ok(PATH, &endless()).await;
    runs(&cluster, 1, Duration::from_secs(30)).await;
    delete(api, &path(&again["id"])).await.ok();
    runs(&cluster, 0, Duration::from_secs(10)).await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_response_in_the_background_waits_for_a_worker_that_has_room() {
    let builder = Cluster::builder().unified(1).worker_arg("--max-running", "1");
    let cluster = builder.worker_arg("--max-waiting", "1").start().await;
    let api = &cluster.api;
    let first = api.ok(PATH, &endless()).await;
    let second = api.ok(PATH, &endless()).await;
    runs(&cluster, 2, Duration::from_secs(30)).await;
    api.post(PATH, &ask("x")).await.error(429).unwrap();
    let third = api.ok(PATH, &with(ask("x"), json!({"background": true}))).await;
    // Longer than a request that somebody waits for would be kept waiting.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(api.get(&path(&third["id"])).await.ok()["status"], "queued");
    for id in [&first["id"], &second["id"]] {
        cancel(api, id).await.ok();
    }
    eventually("the third ends", Duration::from_secs(30), async || {
        let response = api.get(&path(&third["id"])).await.ok();
        let ended = ["completed", "incomplete"].contains(&response["status"].as_str().unwrap());
        if ended { Ok(()) } else { Err(response.to_string()) }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_response_is_its_keys_alone() {
    let cluster = Cluster::builder().unified(1).api_key("one").api_key("two").start().await;
    let (one, two) = (&cluster.api, cluster.api.with_key(Some("two")));
    let response = one.ok(PATH, &ask("x")).await;
    let there = path(&response["id"]);
    one.get(&there).await.ok();
    two.get(&there).await.error(404).unwrap();
    two.get(&format!("{there}/input_items")).await.error(404).unwrap();
    delete(&two, &there).await.error(404).unwrap();
    let next = with(ask("x"), json!({"previous_response_id": response["id"]}));
    two.post(PATH, &next).await.error(404).unwrap();
    let background = one.ok(PATH, &endless()).await;
    cancel(&two, &background["id"]).await.error(404).unwrap();
    cancel(one, &background["id"]).await.ok();
    one.with_key(None).get(&there).await.error(401).unwrap();
    cluster.finish().await;
}

#[tokio::test]
async fn responses_of_a_gateway_that_stops_or_dies_do_not_run_for_ever() {
    let builder = Cluster::builder().unified(1).gateway_arg("--drain-timeout", "2");
    let mut cluster = builder.start().await;
    for (graceful, words) in [(true, "stopped before"), (false, "stopped unexpectedly")] {
        let body = with(endless(), json!({"stream": true}));
        let mut events = cluster.api.named(Method::POST, PATH, Some(&body)).await;
        let id = events.next().await.expect("an event")["response"]["id"].clone();
        reaches(&cluster.api, &id, "in_progress", Duration::from_secs(30)).await;
        drop(events);
        cluster.restart_gateway(graceful).await;
        let failed = reaches(&cluster.api, &id, "failed", NOTICED).await;
        assert_eq!(failed["error"]["code"], "server_error");
        assert!(failed["error"]["message"].as_str().unwrap().contains(words), "{failed}");
        // Whoever follows is told.
        let replayed = format!("{}?stream=true", path(&id));
        let replayed = numbered(cluster.api.named(Method::GET, &replayed, None).await).await;
        let last = replayed.last().unwrap();
        assert_eq!(last["type"], "response.failed");
        assert_eq!(last["response"]["error"], failed["error"]);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn without_a_store_nothing_is_kept_and_what_is_old_goes() {
    let builder = Cluster::builder().unified(1).gateway_arg("--responses-store", "none");
    let cluster = builder.start().await;
    let response = cluster.api.ok(PATH, &ask("x")).await;
    assert_eq!(response["store"], false);
    cluster.api.get(&path(&response["id"])).await.error(404).unwrap();
    let next = with(ask("x"), json!({"previous_response_id": response["id"]}));
    cluster.api.post(PATH, &next).await.error(404).unwrap();
    let error = cluster.api.post(PATH, &endless()).await.error(400).unwrap();
    assert_eq!(error["param"], "background");
    cluster.finish().await;

    let cluster = Cluster::builder().unified(1).gateway_arg("--responses-ttl", "2").start().await;
    let response = cluster.api.ok(PATH, &ask("x")).await;
    cluster.api.get(&path(&response["id"])).await.ok();
    eventually("the response is gone", Duration::from_secs(10), async || {
        cluster.api.get(&path(&response["id"])).await.error(404)
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn gateways_share_responses_through_postgresql() {
    let mut database = Postgres::start().await;
    let builder = Cluster::builder().unified(1).gateway_arg("--responses-store", &database.url());
    let cluster = builder.start().await;
    let one = &cluster.api;
    let (mut gateway, two) = cluster.add_gateway().await;
    eventually("the second gateway serves", Duration::from_secs(30), async || {
        let reply = two.post(PATH, &with(ask("x"), json!({"store": false}))).await;
        if reply.status == 200 { Ok(()) } else { Err(reply.text) }
    })
    .await;
    let first = one.ok(PATH, &ask("My name is Ann.")).await;
    assert_eq!(two.get(&path(&first["id"])).await.ok(), first);
    let next = with(ask("What is my name?"), json!({"previous_response_id": first["id"]}));
    assert_eq!(text(&two.ok(PATH, &next).await), text(&one.ok(PATH, &next).await));

    // Followed live through the other gateway.
    let body = json!({"background": true, "stream": true, "max_output_tokens": 60});
    let body = with(ask("Tell me a story."), body);
    let mut here = one.named(Method::POST, PATH, Some(&body)).await;
    let created = here.next().await.expect("an event");
    let there = format!("{}?stream=true", path(&created["response"]["id"]));
    let there = two.named(Method::GET, &there, None).await;
    let (here, there) = futures::join!(here.collect(), checked(there));
    assert_eq!(there[1..], here[..]);

    // Cancelled through the other gateway.
    let running = one.ok(PATH, &endless()).await;
    runs(&cluster, 1, Duration::from_secs(30)).await;
    let asked = Instant::now();
    let cancelled = cancel(&two, &running["id"]).await.ok();
    runs(&cluster, 0, Duration::from_secs(10)).await;
    println!("cancelled through the other gateway after {:?}", asked.elapsed());
    assert_eq!(one.get(&path(&running["id"])).await.ok(), cancelled);

    // A gateway dies: the other one says so.
    let orphan = two.ok(PATH, &endless()).await;
    runs(&cluster, 1, Duration::from_secs(30)).await;
    gateway.kill();
    reaches(one, &orphan["id"], "failed", NOTICED).await;

    // Without the database what is to be kept is refused; the rest is served.
    database.stop().await;
    let error = one.post(PATH, &ask("x")).await.error(503).unwrap();
    assert!(error["message"].as_str().unwrap().contains("postgres://"), "{error}");
    one.post(PATH, &endless()).await.error(503).unwrap();
    one.ok(PATH, &with(ask("x"), json!({"store": false}))).await;
    let scrape = Scrape::parse(&one.get("/metrics").await.text).expect("metrics");
    let errors = scrape.sum("baton_responses_store_errors_total", &[]);
    assert!(errors.is_some_and(|count| count > 0.0), "{errors:?}");
    database.restart().await;
    eventually("the store is back", Duration::from_secs(30), async || {
        let reply = one.get(&path(&first["id"])).await;
        if reply.status == 200 { Ok(()) } else { Err(reply.text) }
    })
    .await;
    assert_eq!(one.get(&path(&first["id"])).await.ok(), first);
    cluster.finish().await;
}
