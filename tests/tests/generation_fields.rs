//! Fields of the generation routes, on the default model.

use baton_tests::Cluster;
use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::{ids, streamed_text};
use reqwest::Method;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

fn with(mut base: Value, fields: Value) -> Value {
    let (base_fields, fields) =
        (base.as_object_mut().expect("an object"), fields.as_object().expect("an object"));
    base_fields.extend(fields.clone());
    base
}

fn completion(fields: Value) -> Value {
    let base = json!({"model": MODEL_NAME, "prompt": "The capital of France is",
        "max_tokens": 8, "temperature": 0});
    with(base, fields)
}

fn chat(text: &str, fields: Value) -> Value {
    let base = json!({"model": MODEL_NAME, "max_tokens": 60, "temperature": 0,
        "messages": [{"role": "user", "content": text}]});
    with(base, fields)
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"},
        }, "required": ["city", "days"], "additionalProperties": false}}})
}

fn content(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().expect("text")
}

#[tokio::test]
async fn the_prompt_has_logprobs_by_either_name() {
    let cluster = Cluster::builder().unified(1).start().await;
    let api = &cluster.api;
    let fields = json!({"echo": true, "logprobs": 2, "max_tokens": 0, "return_token_ids": true});
    let scored = api.ok(COMPLETION, &completion(fields)).await;
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], "The capital of France is");
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let prompt = ids(&choice["prompt_token_ids"]);
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), prompt.len());
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);

    let asked = api.ok(COMPLETION, &completion(json!({"prompt_logprobs": 2}))).await;
    let listed = asked["choices"][0]["prompt_logprobs"].as_array().unwrap().clone();
    assert_eq!(listed.len(), prompt.len());
    assert_eq!(listed[0], Value::Null);
    for (at, entry) in listed.iter().enumerate().skip(1) {
        let own = &entry[prompt[at].to_string()];
        assert_eq!(own["logprob"], logprobs["token_logprobs"][at], "token {at}");
        assert_eq!(own["decoded_token"], logprobs["tokens"][at]);
        let better = entry.as_object().unwrap().values();
        let better = better.filter(|it| it["logprob"].as_f64() > own["logprob"].as_f64()).count();
        assert!(own["rank"].as_u64().unwrap() as usize > better, "{entry}");
    }
    // The answer's own logprobs follow those of the prompt, also in a stream, and after a prefix
    // that is cached by now.
    let both = completion(json!({"echo": true, "logprobs": 1, "max_tokens": 3}));
    let whole = api.ok(COMPLETION, &both).await["choices"][0]["logprobs"].clone();
    assert_eq!(whole["tokens"].as_array().unwrap().len(), prompt.len() + 3);
    let streamed =
        api.stream(COMPLETION, &with(both, json!({"stream": true}))).await.collect().await;
    for key in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
        let joined: Vec<Value> = streamed
            .iter()
            .filter_map(|event| event["choices"][0]["logprobs"][key].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(whole[key], Value::from(joined), "{key}");
    }
    let chatted = api.ok(CHAT, &chat("Hi", json!({"prompt_logprobs": 0, "max_tokens": 1}))).await;
    assert!(chatted["prompt_logprobs"].as_array().unwrap().len() > 5);
    let refused = completion(json!({"prompt_logprobs": 1, "stream": true}));
    assert_eq!(
        api.post(COMPLETION, &refused).await.error(400).unwrap()["param"],
        "prompt_logprobs"
    );
    cluster.finish().await;
}

#[tokio::test]
async fn tokens_are_allowed_forbidden_and_cut() {
    let cluster = Cluster::builder().unified(1).start().await;
    let api = &cluster.api;
    let free = api.ok(COMPLETION, &completion(json!({"return_token_ids": true}))).await;
    let free_text = free["choices"][0]["text"].as_str().unwrap();
    assert!(free_text.contains("Paris"), "{free_text}");
    let fields = json!({"bad_words": ["Paris"]});
    let other = api.ok(COMPLETION, &completion(fields)).await;
    assert!(!other["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{other}");
    let first_two = &ids(&free["choices"][0]["token_ids"])[..2];
    let fields = json!({"allowed_token_ids": first_two, "return_token_ids": true});
    let few = api.ok(COMPLETION, &completion(fields)).await;
    assert!(ids(&few["choices"][0]["token_ids"]).iter().all(|id| first_two.contains(id)), "{few}");

    let prompt: Vec<u32> = (100..140).collect();
    let base = completion(json!({"prompt": prompt, "return_token_ids": true, "max_tokens": 1}));
    for (fields, kept) in [
        (json!({"truncate_prompt_tokens": 10}), &prompt[30..]),
        (json!({"truncate_prompt_tokens": 10, "truncation_side": "right"}), &prompt[..10]),
        (json!({"truncate_prompt_tokens": -1}), &prompt[..]),
    ] {
        let reply = api.ok(COMPLETION, &with(base.clone(), fields)).await;
        assert_eq!(ids(&reply["choices"][0]["prompt_token_ids"]), kept);
    }
    let fields = json!({"truncate_prompt_tokens": 1_000_000});
    let error = api.post(COMPLETION, &with(base, fields)).await.error(400).unwrap();
    assert_eq!(error["param"], "truncate_prompt_tokens");
    cluster.finish().await;
}

#[tokio::test]
async fn what_only_passes_through_comes_out() {
    let cluster = Cluster::builder().unified(1).start().await;
    let api = &cluster.api;
    let params = json!({"do_remote_decode": false, "tag": [1, {"a": null}]});
    let fields = json!({"kv_transfer_params": params, "priority": -3, "max_tokens": 2});
    let reply = api.ok(CHAT, &chat("Hi", fields.clone())).await;
    assert_eq!(reply["kv_transfer_params"], params);
    let reply = api.ok(COMPLETION, &completion(fields)).await;
    assert_eq!(reply["kv_transfer_params"], params);
    // The last message is put before its own continuation.
    let fields = json!({"echo": true, "continue_final_message": true,
        "add_generation_prompt": false, "max_tokens": 4, "messages": [
            {"role": "user", "content": "Name a city."},
            {"role": "assistant", "content": "My favourite city is"},
    ]});
    let body = chat("", fields);
    let whole = api.ok(CHAT, &body).await;
    assert!(content(&whole).starts_with("My favourite city is "), "{whole}");
    let events = api.stream(CHAT, &with(body, json!({"stream": true}))).await.collect().await;
    assert_eq!(streamed_text(&events, 0), content(&whole));
    let error = api.post(COMPLETION, &completion(json!({"suffix": "x"}))).await;
    assert_eq!(error.error(400).unwrap()["param"], "suffix");
    // Balancers are told how busy the workers are, if they ask.
    let (chat, completion) = (chat("Hi", json!({"max_tokens": 2})), completion(json!({})));
    for (path, body, format, begins) in [
        (CHAT, &chat, "json", "JSON {\"named_metrics\": {\"kv_cache_usage_perc\": "),
        (COMPLETION, &completion, "TEXT", "TEXT named_metrics.kv_cache_usage_perc="),
        (CHAT, &chat, "XML", ""),
        (CHAT, &with(chat.clone(), json!({"stream": true})), "JSON", ""),
    ] {
        let json = ("Content-Type", "application/json");
        let headers = [json, ("endpoint-load-metrics-format", format)];
        let reply = api.send_with(Method::POST, path, &headers, &body.to_string()).await;
        let told = reply.header("endpoint-load-metrics");
        assert!(told.starts_with(begins) && told.is_empty() == begins.is_empty(), "{told}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn answers_keep_to_their_structure() {
    let cluster = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16).start().await;
    let api = &cluster.api;
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120},
    }, "required": ["name", "age"], "additionalProperties": false});
    let format = json!({"type": "json_schema",
        "json_schema": {"name": "person", "schema": schema, "strict": true}});
    let body = chat(
        "Invent a person and describe them at length.",
        json!({"response_format": format, "max_tokens": 200}),
    );
    let reply = api.ok(CHAT, &body).await;
    let person: Value = serde_json::from_str(content(&reply)).expect("JSON");
    assert!(person["name"].is_string() && person["age"].is_i64(), "{person}");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let events = api.stream(CHAT, &with(body, json!({"stream": true}))).await.collect().await;
    assert_eq!(streamed_text(&events, 0), content(&reply));

    for (outputs, fits) in [
        (json!({"choice": ["yes, of course", "no"]}), &["yes, of course", "no"][..]),
        (json!({"regex": "(Paris|Rome)!{2}"}), &["Paris!!", "Rome!!"]),
        (
            json!({"grammar": "root ::= greeting \" \" [a-b]{1,1}\ngreeting ::= \"hi\" | \"ho\"\n"}),
            &["hi a", "hi b", "ho a", "ho b"],
        ),
        (json!({"grammar": "start: \"x\" (\"y\" | \"z\")\n"}), &["xy", "xz"]),
    ] {
        let reply = api.ok(CHAT, &chat("Well?", json!({"structured_outputs": outputs}))).await;
        assert!(fits.contains(&content(&reply)), "{outputs}: {reply}");
    }
    let choice = json!({"guided_choice": ["north", "south"]});
    let reply = api.ok(COMPLETION, &completion(choice)).await;
    assert!(["north", "south"].contains(&reply["choices"][0]["text"].as_str().unwrap()));
    let object = json!({"response_format": {"type": "json_object"}, "max_tokens": 150,
        "stop": ["\n\n\n"]});
    let reply = api.ok(CHAT, &chat("Give JSON with one short field.", object)).await;
    assert!(content(&reply).trim_start().starts_with('{'), "{reply}");

    for (fields, param) in [
        (
            json!({"response_format": {"type": "json_schema", "json_schema":
            {"name": "n", "schema": {"type": "nonsense"}}}}),
            "response_format",
        ),
        (json!({"structured_outputs": {"regex": "(["}}), "structured_outputs"),
        (json!({"structured_outputs": {"grammar": "start: undefined_rule"}}), "structured_outputs"),
    ] {
        let reply = api.post(CHAT, &chat("Hi", fields.clone())).await;
        let error = reply.error(400).unwrap_or_else(|what| panic!("{fields}: {what}"));
        assert_eq!(error["param"], param, "{error}");
        let stream = with(chat("Hi", fields), json!({"stream": true}));
        api.post(CHAT, &stream).await.error(400).expect("refused before the stream");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn tools_are_called_when_they_must_be() {
    let builder = Cluster::builder().unified(1).gateway_arg("--tool-call-parser", "hermes");
    let cluster = builder.start().await;
    let api = &cluster.api;
    let tools = json!([tool("get_weather"), tool("get_time")]);
    let body = chat(
        "What is the weather in Paris?",
        json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false,
            "max_tokens": 200}),
    );
    let reply = api.ok(CHAT, &body).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{reply}");
    assert_eq!(choice["message"]["content"], "");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1);
    let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(arguments["city"].is_string() && arguments["days"].is_i64(), "{arguments}");

    let events = api.stream(CHAT, &with(body, json!({"stream": true}))).await.collect().await;
    let (name, streamed) = streamed_call(&events);
    assert_eq!(name, calls[0]["function"]["name"]);
    assert_eq!(streamed, calls[0]["function"]["arguments"]);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    let named = json!({"type": "function", "function": {"name": "get_time"}});
    // What is called goes before the form of an answer.
    let format = json!({"type": "json_object"});
    let fields = json!({"tools": tools, "tool_choice": named, "response_format": format});
    let body = chat("Hi", with(fields, json!({"max_tokens": 200})));
    let reply = api.ok(CHAT, &body).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "get_time");
    assert_eq!(choice["finish_reason"], "stop");

    // Left to itself this model calls nothing; held to a call's syntax, it is read as one.
    let call = r#"Wait\.<tool_call>\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]{2,8}", "days": [1-9]\}\}</tool_call>"#;
    let fields = json!({"tools": tools, "structured_outputs": {"regex": call}, "max_tokens": 100});
    let body = chat("What is the weather in Paris?", fields);
    let reply = api.ok(CHAT, &body).await;
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["content"], "Wait.", "{reply}");
    assert_eq!(message["tool_calls"][0]["function"]["name"], "get_weather");
    assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls");
    let events = api.stream(CHAT, &with(body, json!({"stream": true}))).await.collect().await;
    assert_eq!(streamed_text(&events, 0), "Wait.");
    let (_, streamed) = streamed_call(&events);
    assert_eq!(streamed, message["tool_calls"][0]["function"]["arguments"]);

    for (fields, param) in [
        (json!({"tools": []}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": tools, "tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tools": tools, "tool_choice": named, "guided_regex": "a"}), "tool_choice"),
    ] {
        let error = api.post(CHAT, &chat("Hi", fields)).await.error(400).unwrap();
        assert_eq!(error["param"], param, "{error}");
    }
    cluster.finish().await;
}

/// Name and arguments of the call that a stream brings.
fn streamed_call(events: &[Value]) -> (Value, String) {
    let calls = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"][0]["function"].as_object());
    let mut name = Value::Null;
    let mut arguments = String::new();
    for call in calls {
        if let Some(it) = call.get("name") {
            name = it.clone();
        }
        arguments.push_str(call["arguments"].as_str().expect("text"));
    }
    (name, arguments)
}

#[tokio::test]
async fn reasoning_is_told_from_the_answer() {
    let builder = Cluster::builder().unified(1).gateway_arg("--reasoning-parser", "deepseek_r1");
    let cluster = builder.start().await;
    let api = &cluster.api;
    // The model is held to the answer; what it thinks before is free.
    let shown = |q: &str, a: &str| {
        json!([{"role": "user", "content": q},
            {"role": "assistant", "content": format!("It is well known.</think>{a}")}])
    };
    let mut messages: Vec<Value> = Vec::new();
    for (q, a) in [
        ("Capital of Italy?", "Rome"),
        ("Capital of Spain?", "Madrid"),
        ("Capital of Japan?", "Tokyo"),
    ] {
        messages.extend(shown(q, a).as_array().unwrap().clone());
    }
    messages.push(json!({"role": "user", "content": "Capital of France?"}));
    let fields = json!({"messages": messages, "structured_outputs": {"choice": ["Paris", "Lima"]}});
    let body = chat("", fields);
    let reply = api.ok(CHAT, &body).await;
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["content"], "Paris", "{reply}");
    assert!(message["reasoning"].as_str().unwrap().contains("known"), "{reply}");
    let events =
        api.stream(CHAT, &with(body.clone(), json!({"stream": true}))).await.collect().await;
    let thought: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["reasoning"].as_str())
        .collect();
    assert_eq!(thought, message["reasoning"]);
    assert_eq!(streamed_text(&events, 0), "Paris");
    // Nor can it be read from tokens then.
    let hidden = json!({"include_reasoning": false, "logprobs": true, "return_token_ids": true});
    let body = with(body, hidden);
    let silent = api.ok(CHAT, &body).await;
    let choice = &silent["choices"][0];
    assert_eq!(choice["message"]["reasoning"], Value::Null);
    assert_eq!((&choice["logprobs"], &choice["token_ids"]), (&Value::Null, &Value::Null));
    assert!(silent["prompt_token_ids"].is_array(), "{silent}");
    let events = api.stream(CHAT, &with(body, json!({"stream": true}))).await.collect().await;
    assert_eq!(streamed_text(&events, 0), "Paris");
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        assert_eq!(choice["logprobs"], Value::Null, "{choice}");
        assert_eq!(choice.get("token_ids"), None, "{choice}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn templates_come_from_requests_only_when_trusted() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tone }}";
    let body = json!({"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}],
        "chat_template": template, "chat_template_kwargs": {"tone": "!"}});
    let cluster = Cluster::builder().unified(1).start().await;
    let error = cluster.api.post("/tokenize", &body).await.error(400).unwrap();
    assert_eq!(error["param"], "chat_template");
    cluster.finish().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let own = "{% for m in messages %}<{{ m.role }}>{% endfor %}{{ tools | length }}";
    std::fs::write(file.path(), own).expect("write the template");
    let path = file.path().to_str().unwrap();
    let builder = Cluster::builder().unified(1).worker_arg("--chat-template", path);
    let cluster = builder.gateway_switch("--trust-request-chat-template").start().await;
    let text = async |body: &Value| {
        let tokens = cluster.api.ok("/tokenize", body).await["tokens"].clone();
        cluster.api.ok("/detokenize", &json!({"tokens": tokens})).await["prompt"].clone()
    };
    assert_eq!(text(&body).await, "Hi!");
    let mut body = body;
    body.as_object_mut().unwrap().remove("chat_template");
    body["tools"] = json!([tool("f")]);
    assert_eq!(text(&body).await, "<user>1");
    body["chat_template"] = "{{ oops".into();
    let error = cluster.api.post("/tokenize", &body).await.error(400).unwrap();
    assert_eq!(error["param"], "chat_template");
    cluster.finish().await;
}
