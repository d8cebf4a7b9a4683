//! Several models in one cluster, and several names for one.

use std::time::Duration;

use baton_tests::binaries::{MODEL_NAME, other_model};
use baton_tests::http::ids;
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, Role, eventually};
use serde_json::{Value, json};

const OTHER: &str = "gemma3";

fn request(model: &str) -> Value {
    // Token ids that both models have, enough of them for a hand-off.
    let prompt: Vec<u32> = (0..80).map(|i| 2000 + i * 5).collect();
    json!({
        "model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true,
    })
}

async fn answer(api: &Api, model: &str, replied: &str) -> Vec<u32> {
    let reply = api.ok("/v1/completions", &request(model)).await;
    assert_eq!(reply["model"], replied);
    ids(&reply["choices"][0]["token_ids"])
}

async fn model_ids(api: &Api) -> Vec<String> {
    let models = api.get("/v1/models").await.ok();
    let cards = models["data"].as_array().expect("cards").iter();
    cards.map(|card| card["id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn two_models_share_a_cluster_and_never_each_others_workers() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(32);
    let mut cluster = builder.worker_arg("--kv-memory", "256MiB").start().await;
    let api = cluster.api.clone();
    let own = answer(&api, MODEL_NAME, MODEL_NAME).await;
    api.post("/v1/completions", &request(OTHER)).await.error(404).expect("not there yet");

    let other = other_model().display().to_string();
    let flags = [("--model", other.as_str()), ("--served-model-name", "gemma3,gemma")];
    cluster.add_worker_with(Role::Prefill, &flags).await;
    cluster.add_worker_with(Role::Decode, &flags).await;
    cluster.all_found().await;
    eventually("both models are listed", Duration::from_secs(10), async || {
        let ids = model_ids(&api).await;
        if ids == [OTHER, "gemma", MODEL_NAME] { Ok(()) } else { Err(format!("{ids:?}")) }
    })
    .await;

    let calls = (0..8).map(|i| {
        let api = api.clone();
        async move {
            let model = [MODEL_NAME, OTHER][i % 2];
            (model, answer(&api, model, model).await)
        }
    });
    let all = futures::future::join_all(calls).await;
    let gemma = answer(&api, "gemma", OTHER).await;
    assert_ne!(own, gemma);
    for (model, tokens) in all {
        assert_eq!(tokens, if model == OTHER { gemma.clone() } else { own.clone() }, "{model}");
    }
    // Each model's prompts were computed by its own prefill worker, and no hand-off was refused.
    for worker in &cluster.workers {
        let status = worker.status().await;
        match worker.role {
            Role::Prefill => assert!(status.prompt_tokens > 0, "{status:?}"),
            _ => {
                assert!(status.handoff_requests > 0, "{status:?}");
                assert_eq!(status.handoff_failures, 0, "{status:?}");
            }
        }
    }
    let metrics = Scrape::parse(&api.get("/metrics").await.text).expect("metrics");
    for model in [MODEL_NAME, OTHER] {
        let tokens = metrics.sum("vllm:generation_tokens_total", &[("model_name", model)]);
        assert!(tokens >= Some(12.0), "{model}: {tokens:?}");
    }
    let alias = metrics.sum("vllm:generation_tokens_total", &[("model_name", "gemma")]);
    assert_eq!(alias.unwrap_or(0.0), 0.0, "an alias is no label of its own");

    // Without workers of a model, its requests wait for none of the other.
    let ours = cluster.workers.iter().position(|worker| worker.role == Role::Decode);
    cluster.kill_worker(ours.expect("the first model's decode worker"));
    let error = api.post("/v1/completions", &request(MODEL_NAME)).await;
    assert!([404, 503].contains(&error.status.as_u16()), "{}", error.text);
    assert_eq!(answer(&api, OTHER, OTHER).await, gemma);
    cluster.finish().await;
}

#[tokio::test]
async fn a_model_answers_to_all_its_names_and_replies_with_the_first() {
    let builder = Cluster::builder().unified(1).worker_arg("--lora-modules", "[]");
    let cluster =
        builder.worker_arg("--served-model-name", "smollm2,org/small,small").start().await;
    let api = &cluster.api;
    assert_eq!(model_ids(api).await, ["smollm2", "org/small", "small"]);
    let first = answer(api, "smollm2", "smollm2").await;
    assert_eq!(answer(api, "org/small", "smollm2").await, first);
    assert_eq!(answer(api, "small", "smollm2").await, first);
    assert_eq!(answer(api, "", "smollm2").await, first);

    let card = api.get("/v1/models/org/small").await.ok();
    assert_eq!((&card["id"], &card["object"]), (&json!("org/small"), &json!("model")));
    assert_eq!(card["parent"], Value::Null);
    let error = api.get("/v1/models/org/large").await.error(404).expect("no such model");
    assert_eq!((&error["type"], &error["param"]), (&json!("NotFoundError"), &json!("model")));
    let error = api.post("/v1/completions", &request("large")).await.error(404).expect("none");
    assert_eq!(error["message"], "The model `large` does not exist.");
    cluster.finish().await;
}
