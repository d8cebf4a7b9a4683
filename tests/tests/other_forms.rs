//! The same requests through other doors: SageMaker's route, Anthropic's errors, and what the
//! tokenizer says of itself.

use baton_tests::{Cluster, MODEL_NAME};
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn invocations_are_answered_by_the_route_that_takes_their_body() {
    let cluster = Cluster::unified().await;
    let api = &cluster.api;
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let chat = json!({"messages": messages, "max_tokens": 4, "temperature": 0});
    let direct = api.ok("/v1/chat/completions", &chat).await;
    let invoked = api.ok("/invocations", &chat).await;
    assert_eq!(invoked["object"], "chat.completion");
    assert_eq!(invoked["choices"], direct["choices"]);

    let completion = json!({"prompt": "One two three", "max_tokens": 4, "temperature": 0});
    let direct = api.ok("/v1/completions", &completion).await;
    let invoked = api.ok("/invocations", &completion).await;
    assert_eq!(invoked["object"], "text_completion");
    assert_eq!(invoked["choices"], direct["choices"]);

    // Routes of what the model does not do, and bodies of none.
    for body in [
        json!({"input": "Hi"}),
        json!({"text_1": "a", "text_2": "b"}),
        json!({"queries": "a", "documents": ["b"]}),
        json!({"query": "a", "documents": ["b"]}),
        json!({}),
    ] {
        let error = api.post("/invocations", &body).await.error(400).unwrap();
        assert_eq!(error["type"], "BadRequestError", "{body}");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("Cannot find suitable handler for request."), "{message}");
    }
    let broken = api.send(Method::POST, "/invocations", Some("application/json"), "{").await;
    let error = broken.unwrap().error(400).unwrap();
    assert!(error["message"].as_str().unwrap().starts_with("JSON decode error"), "{error}");
    let text = api.send(Method::POST, "/invocations", Some("text/plain"), "{}").await;
    text.unwrap().error(400).expect("only JSON is taken");

    let asked = |model: &str| {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.post(format!("{}/invocations", api.base()));
        request.header("X-Amzn-SageMaker-Adapter-Identifier", model).json(&completion).send()
    };
    assert_eq!(asked(MODEL_NAME).await.unwrap().status(), 200);
    assert_eq!(asked("no-such-adapter").await.unwrap().status(), 404);
    cluster.finish().await;
}

#[tokio::test]
async fn all_errors_of_messages_have_anthropics_shape() {
    let cluster = Cluster::builder().unified(1).api_key("key").start().await;
    let api = &cluster.api;
    let json = Some("application/json");
    for (method, path, key, media, body, status, kind) in [
        (Method::POST, "/v1/messages", Some("key"), json, "{", 400, "invalid_request_error"),
        (Method::POST, "/v1/messages", Some("key"), None, "{}", 400, "invalid_request_error"),
        (Method::POST, "/v1/messages", Some("bad"), json, "{}", 401, "authentication_error"),
        (Method::POST, "/v1/messages/count_tokens", None, json, "{}", 401, "authentication_error"),
        (Method::GET, "/v1/messages", Some("key"), None, "", 405, "invalid_request_error"),
    ] {
        let reply = api.with_key(key).send(method, path, media, body).await.unwrap();
        assert_eq!(reply.status, status, "{}", reply.text);
        let error = reply.json();
        assert_eq!(error["type"], "error", "{error}");
        assert_eq!(error["error"]["type"], kind, "{error}");
        assert!(!error["error"]["message"].as_str().unwrap().is_empty(), "{error}");
        match status {
            401 => assert_eq!(reply.header("www-authenticate"), "Bearer"),
            405 => assert_eq!(reply.header("allow"), "POST"),
            _ => {}
        }
    }
    // An unknown field is named, as on all routes.
    let body = json!({"model": MODEL_NAME, "max_tokens": 1, "max_token": 1, "metadata": {},
                      "messages": [{"role": "user", "content": "Hi"}]});
    let reply = api.post("/v1/messages", &body).await;
    reply.ok();
    assert_eq!(reply.header("warning"), "299 - \"unknown fields ignored: max_token\"");
    cluster.finish().await;
}

#[tokio::test]
async fn the_tokenizer_tells_its_class_and_its_chat_template() {
    let cluster = Cluster::unified().await;
    let info = cluster.api.get("/tokenizer_info").await.ok();
    assert!(info["tokenizer_class"].is_string(), "{info}");
    assert!(info["chat_template"].as_str().unwrap().contains("<|im_start|>"), "{info}");
    let named = cluster.api.get(&format!("/tokenizer_info?model={MODEL_NAME}")).await.ok();
    assert_eq!(named, info);
    cluster.api.get("/tokenizer_info?model=gpt-17").await.error(404).unwrap();
    cluster.finish().await;
}
