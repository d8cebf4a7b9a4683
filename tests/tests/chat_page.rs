//! The chat page in a real Chromium, driven by `chat_page/drive.py`, and the route that it draws.

use std::time::Duration;

use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Cluster, Role, eventually, grpc, python};
use serde_json::{Value, json};

/// The browser's driver that this test was written against.
const SELENIUM: &str = "selenium==4.51.0";

async fn drive(cluster: &Cluster, scenario: &str, key: Option<&str>) {
    let mut arguments = vec![scenario, cluster.api.base()];
    arguments.extend(key);
    println!("{}", python::drive(SELENIUM, "chat_page/drive.py", &arguments).await);
}

async fn disaggregated() -> Cluster {
    Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16).start().await
}

#[tokio::test]
async fn the_page_answers_and_shows_who_computed_the_answer() {
    let cluster = disaggregated().await;
    drive(&cluster, "answers", None).await;
    cluster.finish().await;
}

#[tokio::test]
async fn what_a_model_writes_stays_text_in_whatever_pieces_it_arrives() {
    let cluster = disaggregated().await;
    drive(&cluster, "text_stays_text", None).await;
    cluster.finish().await;
}

#[tokio::test]
async fn stopping_an_answer_ends_it_on_the_workers() {
    let cluster = disaggregated().await;
    drive(&cluster, "stops", None).await;
    cluster.finish().await;
}

#[tokio::test]
async fn the_page_says_errors_in_words_and_chats_without_its_picture() {
    let cluster = Cluster::unified().await;
    drive(&cluster, "errors", None).await;
    cluster.finish().await;
}

#[tokio::test]
async fn the_page_asks_for_the_key_and_keeps_it() {
    let cluster = Cluster::builder().prefill(1).decode(1).api_key("page-key").start().await;
    let stranger = cluster.api.with_key(None);
    assert_eq!(stranger.get("/").await.status, 200);
    stranger.get("/cluster").await.error(401).expect("a 401");
    drive(&cluster, "asks_for_the_key", Some("page-key")).await;
    cluster.finish().await;
}

/// The newest entry of `recent` whose id is this one.
fn placed(view: &Value, id: &Value) -> Value {
    let recent = view["recent"].as_array().expect("a list");
    recent.iter().find(|entry| entry["id"] == *id).expect("the request is remembered").clone()
}

#[tokio::test]
async fn the_cluster_route_says_what_the_workers_say() {
    let mut cluster = Cluster::builder().prefill(1).decode(2).handoff_min_tokens(32).start().await;
    let body = json!({
        "model": MODEL_NAME, "prompt": (0..100).map(|i| 1000 + 37 * i).collect::<Vec<u32>>(),
        "max_tokens": 4, "temperature": 0,
    });
    let first = cluster.api.ok("/v1/completions", &body).await;
    let again = cluster.api.ok("/v1/completions", &body).await;
    let view = cluster.api.get("/cluster").await.ok();
    let (one, two) = (placed(&view, &first["id"]), placed(&view, &again["id"]));
    assert_eq!(view["recent"].as_array().map(Vec::len), Some(2));
    assert_eq!(view["recent"][0]["id"], again["id"], "newest first");
    let workers = view["workers"].as_array().expect("a list");
    let role = |id: &Value| &workers.iter().find(|it| it["id"] == *id).expect("listed")["role"];
    assert_eq!(
        (role(&one["prefill"]), role(&one["decode"])),
        (&json!("prefill"), &json!("decode"))
    );
    assert_eq!(one["transport"], "shm");
    assert_eq!((&one["cached_tokens"], &one["handed_off_tokens"]), (&json!(0), &json!(100)));
    let ttft = one["ttft_us"].as_u64().expect("a time");
    let at_worker = one["queue_us"].as_u64().zip(one["prefill_us"].as_u64());
    let at_worker = at_worker.map(|(queue, prefill)| queue + prefill).expect("times");
    assert!(at_worker > 0 && ttft >= at_worker && ttft < 60_000_000, "{one}");
    // Cached on the worker that has just had it, so nothing crosses.
    assert_eq!((&two["decode"], &two["prefill"]), (&one["decode"], &Value::Null));
    assert_eq!((&two["cached_tokens"], &two["handed_off_tokens"]), (&json!(96), &json!(0)));

    // The bytes are those that the workers count.
    let mut arrived = 0;
    for worker in &cluster.workers {
        arrived += grpc::handoff_bytes(&worker.status().await);
    }
    assert_eq!(one["handed_off_bytes"], arrived, "{one}");
    eventually("the gauges follow", Duration::from_secs(5), async || {
        let view = cluster.api.get("/cluster").await.ok();
        let workers = view["workers"].as_array().ok_or("no list")?;
        let generated: u64 = workers
            .iter()
            .filter(|worker| worker["role"] == "decode")
            .filter_map(|worker| worker["status"]["generation_tokens"].as_u64())
            .sum();
        if generated == 8 { Ok(()) } else { Err(view.to_string()) }
    })
    .await;

    // A request whose worker dies shows where it went on.
    let mut stream = cluster
        .api
        .stream(
            "/v1/completions",
            &json!({
                "model": MODEL_NAME, "prompt": "One two three", "max_tokens": 400,
                "temperature": 0, "ignore_eos": true, "stream": true,
            }),
        )
        .await;
    let event = stream.next().await.expect("an event");
    let before = placed(&cluster.api.get("/cluster").await.ok(), &event["id"]);
    let index = busy(&cluster).await;
    cluster.kill_worker(index);
    while stream.next().await.is_some() {}
    let view = cluster.api.get("/cluster").await.ok();
    let after = placed(&view, &event["id"]);
    assert_eq!((&before["migrations"], &after["migrations"]), (&json!(0), &json!(1)));
    assert_ne!(before["decode"], after["decode"]);
    assert_eq!(before["ttft_us"], after["ttft_us"], "the first token came once");
    cluster.finish().await;
}

/// The decode worker that runs a sequence.
async fn busy(cluster: &Cluster) -> usize {
    for (index, worker) in cluster.workers.iter().enumerate() {
        if worker.role == Role::Decode && worker.status().await.running > 0 {
            return index;
        }
    }
    panic!("no decode worker runs anything");
}
