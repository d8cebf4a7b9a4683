//! Embeddings, classes, scores and ranks, on real workers.

mod faults;
mod forms;
mod pairs;

use baton_tests::binaries::{EMBEDDER_NAME, MODEL_NAME};
use baton_tests::reference::{Tensors, embedded_texts};
use baton_tests::{Cluster, Role};
use serde_json::{Value, json};

/// Numbers of a JSON list.
fn numbers(list: &Value) -> Vec<f32> {
    let list = list.as_array().unwrap_or_else(|| panic!("no list: {list}"));
    list.iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

/// The vectors of a reply of embeddings, in order.
fn vectors(reply: &Value) -> Vec<Vec<f32>> {
    let data = reply["data"].as_array().unwrap_or_else(|| panic!("{reply}"));
    let each = data.iter().enumerate().map(|(at, item)| {
        assert_eq!(item["index"], at);
        assert_eq!(item["object"], "embedding");
        numbers(&item["embedding"])
    });
    each.collect()
}

fn cosine(one: &[f32], two: &[f32]) -> f64 {
    let dot = |one: &[f32], two: &[f32]| -> f64 {
        one.iter().zip(two).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(one, two) / (dot(one, one) * dot(two, two)).sqrt()
}

/// The most by which two vectors differ.
fn difference(one: &[f32], two: &[f32]) -> f32 {
    assert_eq!(one.len(), two.len());
    one.iter().zip(two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A text of the reference.
struct Case {
    text: String,
    tokens: Vec<u32>,
    vector: Vec<f32>,
}

/// The texts of the reference that are not empty.
fn reference() -> Vec<Case> {
    let tensors = Tensors::load("pooling/minilm.safetensors");
    let (mut tokens, vectors) = (tensors.numbers("tokens").into_iter(), tensors.floats("vectors"));
    let rows = tensors.numbers("lengths").into_iter().zip(vectors.chunks(384));
    let cases = embedded_texts().into_iter().zip(rows).map(|(text, (length, vector))| Case {
        text,
        tokens: tokens.by_ref().take(length as usize).collect(),
        vector: vector.to_vec(),
    });
    let mut cases: Vec<Case> = cases.collect();
    cases.retain(|case| !case.text.is_empty());
    cases
}

#[tokio::test]
async fn embeddings_are_those_of_the_reference() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let cases = reference();
    assert!(cases.len() > 150);
    let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();
    let tokens: Vec<&[u32]> = cases.iter().map(|case| &case.tokens[..]).collect();
    let body = json!({"model": EMBEDDER_NAME, "input": texts, "truncate_prompt_tokens": -1});
    let of_texts = cluster.api.ok("/v1/embeddings", &body).await;
    let count: usize = tokens.iter().map(|tokens| tokens.len()).sum();
    assert_eq!(of_texts["usage"]["prompt_tokens"], count);
    assert_eq!(of_texts["usage"]["total_tokens"], count);
    assert!(of_texts["id"].as_str().is_some_and(|id| id.starts_with("embd-")));
    let of_tokens = json!({"model": EMBEDDER_NAME, "input": tokens});
    let of_tokens = vectors(&cluster.api.ok("/v1/embeddings", &of_tokens).await);
    let of_texts = vectors(&of_texts);
    for (at, case) in cases.iter().enumerate() {
        let cosine = cosine(&of_texts[at], &case.vector);
        assert!(cosine > 0.9999, "{:?}: {cosine}", case.text);
        // However they came, and whoever was in their batch.
        let apart = difference(&of_texts[at], &of_tokens[at]);
        assert!(apart < 1e-4, "{:?}: {apart}", case.text);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_model_is_asked_for_what_it_does() {
    let cluster = Cluster::builder().unified(1).pooling(1).start().await;
    let api = &cluster.api;
    let cards = api.get("/v1/models").await.ok();
    let tasks = |name: &str| {
        let cards = cards["data"].as_array().expect("cards").iter();
        cards.clone().find(|card| card["id"] == name).map(|card| card["tasks"].clone())
    };
    assert_eq!(tasks(MODEL_NAME), Some(json!(["generate"])));
    let of_embedder = tasks(EMBEDDER_NAME).expect("a card");
    assert_eq!(of_embedder[0], "embed", "{of_embedder}");

    let hello = json!([{"role": "user", "content": "Hello"}]);
    for (path, api_name, body) in [
        ("/v1/chat/completions", "Chat Completions", json!({"messages": hello})),
        ("/v1/completions", "Completions", json!({"prompt": "Hello"})),
        ("/v1/responses", "Responses", json!({"input": "Hello"})),
        ("/classify", "Classification", json!({"input": "Hello"})),
    ] {
        let mut body = body;
        body["model"] = EMBEDDER_NAME.into();
        let error = api.post(path, &body).await.error(400).expect(path);
        let message = error["message"].as_str().expect("a message");
        let says = format!("The model does not support {api_name} API");
        assert!(message.contains(&says) && message.contains("embeds texts"), "{message}");
        assert!(message.contains("/v1/embeddings"), "{message}");
        assert_eq!(error["param"], "model");
    }
    for (path, api_name, body) in [
        ("/v1/embeddings", "Embeddings", json!({"input": "Hello"})),
        ("/v2/embed", "Embeddings", json!({"texts": ["Hello"]})),
        ("/pooling", "Pooling", json!({"input": "Hello"})),
        ("/classify", "Classification", json!({"input": "Hello"})),
        ("/score", "Score", json!({"text_1": "a", "text_2": "b"})),
        ("/rerank", "Rerank (Score)", json!({"query": "a", "documents": ["b"]})),
    ] {
        let mut body = body;
        body["model"] = MODEL_NAME.into();
        let error = api.post(path, &body).await.error(400).expect(path);
        let message = error["message"].as_str().expect("a message");
        let says = format!("The model does not support {api_name} API");
        assert!(message.contains(&says) && message.contains("/v1/chat/completions"), "{message}");
        body["model"] = "nobody".into();
        assert_eq!(api.post(path, &body).await.error(404).expect(path)["param"], "model");
    }
    // Without a name, each goes to the model that can.
    for model in [json!(null), json!("")] {
        let embed = json!({"input": "Hello", "model": model});
        assert_eq!(api.ok("/v1/embeddings", &embed).await["model"], EMBEDDER_NAME);
        let chat = json!({"messages": hello, "model": model, "max_tokens": 2});
        assert_eq!(api.ok("/v1/chat/completions", &chat).await["model"], MODEL_NAME);
    }
    // Tokens are every model's.
    let body = json!({"model": EMBEDDER_NAME, "prompt": "hello world"});
    assert_eq!(api.ok("/tokenize", &body).await["tokens"], json!([101, 7592, 2088, 102]));
    let view = api.get("/cluster").await.ok();
    let pooling = view["workers"].as_array().expect("workers").iter().find(|worker| {
        worker["role"] == "pooling" && worker["model"] == EMBEDDER_NAME && worker["state"] == "up"
    });
    assert!(pooling.is_some_and(|worker| worker["status"]["pooled"]["texts"].is_u64()), "{view}");
    cluster.finish().await;
}

#[tokio::test]
async fn a_cluster_that_only_embeds_is_healthy_and_says_so_to_chats() {
    let cluster = Cluster::builder().pooling(1).start().await;
    for path in ["/health", "/ping"] {
        assert_eq!(cluster.api.get(path).await.status, 200, "{path}");
    }
    let chat = json!({"messages": [{"role": "user", "content": "Hello"}]});
    let error = cluster.api.post("/v1/chat/completions", &chat).await.error(400).expect("400");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("embeds texts")), "{error}");
    cluster.finish().await;
}

#[tokio::test]
async fn texts_that_cannot_be_served_are_refused_by_name() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let long = "river stone ".repeat(300);
    let many = vec!["a"; 100_000];
    for (path, body, param, says) in [
        ("/v1/embeddings", json!({}), "input", "required"),
        ("/v1/embeddings", json!({"input": ""}), "input", "empty"),
        ("/v1/embeddings", json!({"input": []}), "input", "empty"),
        ("/v1/embeddings", json!({"input": ["a", ""]}), "input[1]", "empty"),
        ("/v1/embeddings", json!({"input": [[101], []]}), "input[1]", "empty"),
        ("/v1/embeddings", json!({"input": [1, 99_999]}), "input", "99999"),
        ("/v1/embeddings", json!({"input": {"a": 1}}), "input", "string"),
        ("/v1/embeddings", json!({"input": many}), "input", "2048"),
        ("/v1/embeddings", json!({"input": ["a", long]}), "input_tokens", "256"),
        ("/v1/embeddings", json!({"input": "a".repeat(1_000_000)}), "input_text", "256"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 64}), "dimensions", "384"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 0}), "dimensions", "384"),
        (
            "/v1/embeddings",
            json!({"input": "a", "encoding_format": "hex"}),
            "encoding_format",
            "hex",
        ),
        (
            "/v1/embeddings",
            json!({"input": "a", "truncate_prompt_tokens": 257}),
            "truncate_prompt_tokens",
            "256",
        ),
        ("/v1/embeddings", json!({"input": "a", "truncate_prompt_tokens": 0}), "input", "no token"),
        ("/v1/embeddings", json!({"input": "a", "priority": 1e30}), "priority", ""),
        (
            "/v1/embeddings",
            json!({"messages": [{"role": "user", "content": "a"}]}),
            "messages",
            "chat template",
        ),
        ("/pooling", json!({"input": "a", "dimensions": 64}), "dimensions", "/v1/embeddings"),
        ("/pooling", json!({"input": "a", "task": "classify"}), "task", "embed"),
        ("/score", json!({"text_1": "a"}), "queries", "text_2"),
        (
            "/score",
            json!({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}),
            "text_1",
            "1:1, 1:N or N:N",
        ),
        ("/score", json!({"text_1": "a", "text_2": []}), "text_2", "empty"),
        ("/score", json!({"text_1": "a", "text_2": ["b", long]}), "input_tokens", "text_2[1]"),
        ("/rerank", json!({"query": "a", "documents": many}), "documents", "2048"),
        ("/rerank", json!({"query": "a", "documents": ["b"], "top_n": -1}), "top_n", "0"),
        ("/v2/embed", json!({"texts": ["a", long], "truncate": "NONE"}), "input_tokens", "256"),
        ("/v2/embed", json!({"texts": ["a"], "images": ["data:"]}), "images", "not supported"),
    ] {
        let shown: String = body.to_string().chars().take(100).collect();
        let error = cluster.api.post(path, &body).await.error(400);
        let error = error.unwrap_or_else(|e| panic!("{path} {shown}: {e}"));
        assert_eq!(error["param"], param, "{path} {shown}: {error}");
        assert!(error["message"].as_str().is_some_and(|it| it.contains(says)), "{shown}: {error}");
    }
    // What is too long is taken when it is cut.
    for (cut, tokens) in [
        (json!({"truncate_prompt_tokens": -1}), 256),
        (json!({"truncate_prompt_tokens": 9}), 9),
        (json!({"truncate": true}), 256),
    ] {
        let mut body = json!({"input": long});
        body.as_object_mut().expect("fields").extend(cut.as_object().expect("fields").clone());
        let reply = cluster.api.ok("/v1/embeddings", &body).await;
        assert_eq!(reply["usage"]["prompt_tokens"], tokens, "{cut}");
    }
    // The right end goes, unless it is the left one; special tokens stay.
    let of = async |body: Value| vectors(&cluster.api.ok("/v1/embeddings", &body).await).remove(0);
    let text = "one two three four five six";
    let right = of(json!({"input": text, "truncate_prompt_tokens": 4})).await;
    assert!(difference(&right, &of(json!({"input": "one two"})).await) < 1e-4);
    let cut = json!({"input": text, "truncate_prompt_tokens": 4, "truncation_side": "left"});
    assert!(difference(&of(cut).await, &of(json!({"input": "five six"})).await) < 1e-4);
    cluster.finish().await;
}

#[tokio::test]
async fn many_texts_come_back_in_order_from_all_workers() {
    let cluster = Cluster::builder().pooling(2).start().await;
    let texts: Vec<String> = (0..2048).map(|i| format!("Text number {i} of {}.", i * 7)).collect();
    let body = json!({"input": texts, "encoding_format": "float"});
    let reply = cluster.api.ok("/v1/embeddings", &body).await;
    let all = vectors(&reply);
    assert_eq!(all.len(), texts.len());
    for at in [0, 1, 255, 256, 1023, 2047] {
        let one = cluster.api.ok("/v1/embeddings", &json!({"input": texts[at]})).await;
        let apart = difference(&all[at], &vectors(&one)[0]);
        assert!(apart < 1e-4, "{at}: {apart}");
    }
    for worker in &cluster.workers {
        assert_eq!(worker.role, Role::Pooling);
        assert!(worker.status().await.pooled_inputs >= 256, "{}", worker.process.name());
    }
    cluster.finish().await;
}
