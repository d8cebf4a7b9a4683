//! Workers that are drained or stopped under load: sequences move with their KV, and their clients
//! see neither a gap nor a token twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::{DrainRequest, UndrainRequest, WorkerStatus};
use baton_tests::binaries::{MODEL_NAME, WHISPER_NAME};
use baton_tests::prometheus::Scrape;
use baton_tests::speech::{SENTENCES, say};
use baton_tests::{Api, Cluster, Role, Worker, eventually, grpc, lora};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A request of each kind, whose answers depend on every token before. Every round has a cache of
/// its own: what moves is not found where it goes.
fn requests(tokens: usize, round: &str) -> Vec<Value> {
    let kinds = [
        json!({"temperature": 0}),
        json!({"temperature": 1, "seed": 7}),
        json!({"temperature": 0, "logprobs": 3}),
        json!({"temperature": 1, "seed": 8, "n": 2}),
        json!({
            "temperature": 0.8, "seed": 9, "repetition_penalty": 1.1, "presence_penalty": 0.5,
            "frequency_penalty": 0.3, "bad_words": ["sea"], "stop": ["never said"],
        }),
        json!({
            "temperature": 1, "seed": 10, "ignore_eos": false,
            "structured_outputs": {"json": {
                "type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 90,
            }},
        }),
    ];
    let request = |(i, kind): (usize, &Value)| {
        let mut request = json!({
            "model": MODEL_NAME,
            "prompt": format!("Story number {i}: {}", "once upon a time in a town by the sea, ".repeat(6)),
            "max_tokens": tokens,
            "ignore_eos": true,
            "return_token_ids": true,
            "stream": true,
            "stream_options": {"include_usage": true},
            "cache_salt": round,
        });
        for (key, value) in kind.as_object().expect("fields") {
            request[key] = value.clone();
        }
        request
    };
    kinds.iter().enumerate().map(request).collect()
}

/// What a client has of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    /// Of each choice.
    choices: BTreeMap<u64, Choice>,
    usage: Value,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Choice {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<Value>,
    end: Value,
}

impl Answer {
    fn add(&mut self, event: &Value) {
        if event["usage"].is_object() {
            self.usage = event["usage"].clone();
        }
        for part in event["choices"].as_array().into_iter().flatten() {
            let choice = self.choices.entry(part["index"].as_u64().expect("an index")).or_default();
            choice.text.push_str(part["text"].as_str().expect("a text"));
            choice.ids.extend(baton_tests::http::ids(&part["token_ids"]));
            choice.logprobs.extend(
                part["logprobs"]["token_logprobs"].as_array().into_iter().flatten().cloned(),
            );
            if !part["finish_reason"].is_null() {
                choice.end = part["finish_reason"].clone();
            }
        }
    }

    /// Tokens of the choice that has fewest.
    fn least(&self, choices: usize) -> usize {
        let least = self.choices.values().map(|choice| choice.ids.len()).min().unwrap_or(0);
        if self.choices.len() < choices { 0 } else { least }
    }
}

/// A client that reads all the time.
struct Client {
    tokens: watch::Receiver<usize>,
    task: JoinHandle<(Answer, Duration)>,
}

impl Client {
    fn start(api: &Api, request: &Value) -> Self {
        let (api, request) = (api.clone(), request.clone());
        let (sender, tokens) = watch::channel(0);
        let choices = request["n"].as_u64().unwrap_or(1) as usize;
        let task = tokio::spawn(async move {
            let mut stream = api.stream("/v1/completions", &request).await;
            let mut answer = Answer::default();
            let (mut gap, mut last) = (Duration::ZERO, None);
            while let Some(event) = stream.next().await {
                assert!(event["error"].is_null(), "{event}");
                answer.add(&event);
                let now = Instant::now();
                gap = gap.max(last.map_or(Duration::ZERO, |last| now - last));
                last = Some(now);
                sender.send_replace(answer.least(choices));
            }
            (answer, gap)
        });
        Self { tokens, task }
    }

    fn start_all(api: &Api, requests: &[Value]) -> Vec<Self> {
        requests.iter().map(|request| Self::start(api, request)).collect()
    }

    /// Waits until it has so many tokens of each choice.
    async fn has(&mut self, tokens: usize) {
        let wait = self.tokens.wait_for(|have| *have >= tokens);
        let wait = tokio::time::timeout(Duration::from_secs(60), wait).await;
        wait.expect("tokens in time").expect("the stream goes on");
    }

    /// The answer, and the longest wait between two events of it.
    async fn answer(self) -> (Answer, Duration) {
        self.task.await.expect("an answer")
    }
}

async fn all_have(clients: &mut [Client], tokens: usize) {
    for client in clients {
        client.has(tokens).await;
    }
}

/// The answers of a cluster that nobody disturbs.
async fn undisturbed(cluster: &Cluster, tokens: usize) -> Vec<Answer> {
    let clients = Client::start_all(&cluster.api, &requests(tokens, "undisturbed"));
    answers(clients).await
}

async fn answers(clients: Vec<Client>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for client in clients {
        answers.push(client.answer().await.0);
    }
    answers
}

fn assert_equal(got: &[Answer], expected: &[Answer]) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        for (index, choice) in &expected.choices {
            let other = got.choices.get(index).expect("the choice");
            let differ = other.ids.iter().zip(&choice.ids).position(|(a, b)| a != b);
            assert_eq!(other.ids, choice.ids, "request {i}, choice {index}, token {differ:?}");
        }
        assert_eq!(got, expected, "request {i}");
    }
}

async fn drain(worker: &Worker, timeout: Duration) {
    let timeout_ms = timeout.as_millis() as u64;
    let answered = grpc::worker(&worker.address).await.drain(DrainRequest { timeout_ms }).await;
    answered.expect("it drains");
    assert!(worker.status().await.draining);
}

async fn undrain(worker: &Worker) {
    let answered = grpc::worker(&worker.address).await.undrain(UndrainRequest {}).await;
    answered.expect("it serves again");
}

/// Waits until nothing is left on a worker.
async fn drained(worker: &Worker) -> (WorkerStatus, Duration) {
    eventually("the worker is drained", Duration::from_secs(30), async || {
        let status = worker.status().await;
        let left = status.running + status.waiting;
        if left == 0 { Ok(status) } else { Err(format!("{status:?}")) }
    })
    .await
}

async fn holds(worker: &Worker) {
    eventually("a sequence is released", Duration::from_secs(30), async || {
        let status = worker.status().await;
        if status.held > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}

/// Sequences that went on elsewhere, by what became of their KV.
async fn migrations(cluster: &Cluster, kv: &str) -> f64 {
    let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text).expect("metrics");
    scrape.sum("baton_migrations_total", &[("kv", kv)]).unwrap_or(0.0)
}

/// A worker is stopped by SIGTERM: it ends long before its requests would have, and well.
async fn a_stop_moves_all(transport: &str) {
    let mut cluster = Cluster::builder().decode(3).transport(transport).start().await;
    let expected = undisturbed(&cluster, 150).await;
    let mut clients = Client::start_all(&cluster.api, &requests(150, "moved"));
    all_have(&mut clients, 12).await;
    let (at, _) =
        eventually("a worker has several sequences", Duration::from_secs(10), async || {
            for (i, worker) in cluster.workers.iter().enumerate() {
                if worker.status().await.running > 1 {
                    return Ok(i);
                }
            }
            Err("nobody".to_owned())
        })
        .await;
    let mut stopped = cluster.workers.remove(at);
    let start = Instant::now();
    stopped.process.stop().await;
    println!("{transport}: stopped after {:?}", start.elapsed());
    assert_equal(&answers(clients).await, &expected);
    let (pulled, computed) =
        (migrations(&cluster, "pulled").await, migrations(&cluster, "computed").await);
    println!("{transport}: {pulled} sequences moved with their KV, {computed} without");
    assert!(pulled >= 2.0 && computed == 0.0, "pulled {pulled}, computed {computed}");
    let mut bytes = 0;
    for worker in &cluster.workers {
        let status = worker.status().await;
        assert_eq!(status.handoff_failures, 0, "{status:?}");
        bytes += grpc::handoff_bytes(&status);
    }
    assert!(bytes > 0);
    cluster.finish().await;
}

#[tokio::test]
async fn a_worker_that_is_stopped_hands_its_sequences_over_by_shared_memory() {
    a_stop_moves_all("shm").await;
}

#[tokio::test]
async fn a_worker_that_is_stopped_hands_its_sequences_over_by_grpc() {
    a_stop_moves_all("grpc").await;
}

/// A rolling drain, as an upgrade does it: each worker in turn, and back.
#[tokio::test]
async fn workers_drained_one_after_the_other_lose_no_token() {
    let cluster = Cluster::builder().decode(2).unified(1).start().await;
    let expected = undisturbed(&cluster, 250).await;
    let mut clients = Client::start_all(&cluster.api, &requests(250, "moved"));
    all_have(&mut clients, 5).await;
    for worker in &cluster.workers {
        drain(worker, Duration::from_secs(30)).await;
        let (status, took) = drained(worker).await;
        println!("{}: {} released, drained in {took:?}", worker.process.name(), status.released);
        assert_eq!(grpc::owned_blocks(&status), 0, "{status:?}");
        undrain(worker).await;
        cluster.all_found().await;
    }
    assert_equal(&answers(clients).await, &expected);
    assert!(migrations(&cluster, "pulled").await >= 6.0);
    assert_eq!(migrations(&cluster, "computed").await, 0.0);
    cluster.finish().await;
}

/// The worker that computes, once it has drawn so many tokens from now on.
async fn busy(cluster: &Cluster, tokens: u64) -> &Worker {
    let mut before = Vec::new();
    for worker in &cluster.workers {
        before.push(worker.status().await.generation_tokens);
    }
    let (at, _) = eventually("a worker computes", Duration::from_secs(60), async || {
        for (at, worker) in cluster.workers.iter().enumerate() {
            let status = worker.status().await;
            if status.running > 0 && status.generation_tokens >= before[at] + tokens {
                return Ok(at);
            }
        }
        Err("nobody".to_owned())
    })
    .await;
    &cluster.workers[at]
}

#[tokio::test]
async fn a_sequence_with_an_adapter_moves() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = lora::write(dir.path(), "one", 1);
    let modules = lora::modules(&[("one", &folder)]);
    let builder = Cluster::builder().decode(2).worker_arg("--lora-modules", &modules);
    let cluster = builder.start().await;
    let mut request = requests(150, "undisturbed").swap_remove(1);
    let base = Client::start(&cluster.api, &request).answer().await.0;
    request["model"] = "one".into();
    let expected = Client::start(&cluster.api, &request).answer().await.0;
    assert_ne!(base.choices, expected.choices, "the adapter changes the answer");
    request["cache_salt"] = "moved".into();
    let client = Client::start(&cluster.api, &request);
    let source = busy(&cluster, 12).await;
    drain(source, Duration::from_secs(30)).await;
    assert_equal(&answers(vec![client]).await, &[expected]);
    assert_eq!(migrations(&cluster, "pulled").await, 1.0);
    undrain(source).await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_recording_that_is_being_heard_moves() {
    let wav = say(&SENTENCES[..6].join(" "), "en-us");
    let form = [("model", WHISPER_NAME), ("language", "en"), ("temperature", "0")];
    let hear = async |api: &Api| api.form("/v1/audio/transcriptions", &form, Some(&wav)).await.ok();
    let alone = Cluster::builder().audio(1).start().await;
    let expected = hear(&alone.api).await;
    alone.finish().await;
    let cluster = Cluster::builder().audio(2).start().await;
    let (reply, source) = tokio::join!(hear(&cluster.api), async {
        let source = busy(&cluster, 5).await;
        drain(source, Duration::from_secs(60)).await;
        source
    });
    assert_eq!(reply, expected);
    assert!(migrations(&cluster, "pulled").await >= 1.0);
    assert_eq!(migrations(&cluster, "computed").await, 0.0);
    let (status, _) = drained(source).await;
    assert!(status.released >= 1, "{status:?}");
    undrain(source).await;
    cluster.finish().await;
}

/// With nowhere to go, sequences finish where they are; new requests are refused.
#[tokio::test]
async fn the_only_worker_finishes_what_it_has() {
    let cluster = Cluster::unified().await;
    let worker = cluster.only(Role::Unified);
    let expected = undisturbed(&cluster, 200).await;
    let mut clients = Client::start_all(&cluster.api, &requests(200, "stayed"));
    all_have(&mut clients, 5).await;
    drain(worker, Duration::from_secs(120)).await;
    let refused = cluster.api.post("/v1/completions", &json!({"prompt": "One"})).await;
    refused.error(503).expect("a refusal");
    let got = answers(clients).await;
    assert_equal(&got, &expected);
    let (status, _) = drained(worker).await;
    assert!(status.released >= 6, "{status:?}");
    undrain(worker).await;
    cluster.all_found().await;
    cluster.finish().await;
}

/// A supervisor, or a person, that does not want to wait.
#[tokio::test]
async fn a_second_signal_ends_a_worker_at_once() {
    let mut cluster = Cluster::unified().await;
    let mut client = Client::start(&cluster.api, &requests(1000, "cut").swap_remove(0));
    client.has(5).await;
    let mut worker = cluster.workers.remove(0);
    worker.process.signal(Signal::SIGTERM);
    eventually("it drains", Duration::from_secs(10), async || {
        let status = worker.status().await;
        if status.draining { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(worker.process.exited().is_none(), "it has a request, and nobody takes it");
    worker.process.signal(Signal::SIGTERM);
    assert!(worker.process.end(Duration::from_secs(5)).await.success());
    client.task.abort();
    cluster.finish().await;
}

#[tokio::test]
async fn a_gateway_that_is_stopped_lets_its_streams_end() {
    let cluster = Cluster::unified().await;
    let mut all = requests(150, "undisturbed");
    let expected = Client::start(&cluster.api, &all[0]).answer().await.0;
    let (mut gateway, api) = cluster.add_gateway().await;
    eventually("the second gateway serves", Duration::from_secs(10), async || {
        let status = api.get("/health").await.status;
        if status.is_success() { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    all[0]["cache_salt"] = "gateway".into();
    let mut client = Client::start(&api, &all[0]);
    client.has(5).await;
    gateway.signal(Signal::SIGTERM);
    eventually("it is out of the balancer", Duration::from_secs(5), async || {
        let status = api.get("/health").await.status.as_u16();
        if status == 503 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let refused = api.post("/v1/completions", &json!({"prompt": "One"})).await;
    refused.error(503).expect("a refusal");
    assert_equal(&[client.answer().await.0], &[expected]);
    assert!(gateway.end(Duration::from_secs(5)).await.success());
    cluster.finish().await;
}

/// When the time is up what is left is computed elsewhere, once there is somewhere.
#[tokio::test]
async fn what_is_left_when_the_time_is_up_goes_on_elsewhere() {
    let mut cluster = Cluster::unified().await;
    let expected = undisturbed(&cluster, 200).await;
    let mut clients = Client::start_all(&cluster.api, &requests(200, "late"));
    all_have(&mut clients, 5).await;
    drain(&cluster.workers[0], Duration::from_millis(1)).await;
    let (status, took) = drained(&cluster.workers[0]).await;
    println!("given up in {took:?}: {status:?}");
    cluster.add_worker(Role::Unified).await;
    assert_equal(&answers(clients).await, &expected);
    assert!(migrations(&cluster, "computed").await >= 1.0);
    cluster.workers.remove(0).process.stop().await;
    cluster.finish().await;
}

/// One worker with all sequences, and others that hang: whoever is chosen takes a sequence and
/// does not go on.
async fn hanging(others: usize) -> (Cluster, Vec<Answer>, Vec<Client>) {
    let mut cluster = Cluster::builder().decode(1).start().await;
    let expected = undisturbed(&cluster, 200).await;
    for _ in 0..others {
        cluster.add_worker(Role::Decode).await;
    }
    // They must not be chosen yet.
    for other in &cluster.workers[1..] {
        drain(other, Duration::from_secs(3600)).await;
    }
    eventually("the gateway knows", Duration::from_secs(10), async || {
        let up = Scrape::parse(&cluster.api.get("/metrics").await.text)?;
        let up = up.sum("baton_workers", &[("state", "up")]).unwrap_or(0.0);
        if up == 1.0 { Ok(()) } else { Err(format!("{up} are up")) }
    })
    .await;
    let mut clients = Client::start_all(&cluster.api, &requests(200, "moved"));
    all_have(&mut clients, 12).await;
    for other in &cluster.workers[1..] {
        undrain(other).await;
    }
    cluster.all_found().await;
    for other in &cluster.workers[1..] {
        other.process.signal(Signal::SIGSTOP);
    }
    drain(&cluster.workers[0], Duration::from_secs(60)).await;
    holds(&cluster.workers[0]).await;
    (cluster, expected, clients)
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_move_frees_everything() {
    let (cluster, _, clients) = hanging(1).await;
    clients.iter().for_each(|client| client.task.abort());
    let (status, took) = drained(&cluster.workers[0]).await;
    println!("freed after {took:?}");
    assert_eq!((status.held, grpc::owned_blocks(&status)), (0, 0), "{status:?}");
    cluster.workers[1].process.signal(Signal::SIGCONT);
    cluster.finish().await;
}

#[tokio::test]
async fn a_target_that_dies_in_the_middle_of_a_move_is_replaced_by_another() {
    let (mut cluster, expected, clients) = hanging(2).await;
    cluster.kill_worker(1);
    cluster.workers[1].process.signal(Signal::SIGCONT);
    assert_equal(&answers(clients).await, &expected);
    assert!(migrations(&cluster, "pulled").await >= 1.0);
    drained(&cluster.workers[0]).await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_source_that_dies_in_the_middle_of_a_move_costs_a_recompute() {
    let (mut cluster, expected, clients) = hanging(1).await;
    cluster.kill_worker(0);
    cluster.workers[0].process.signal(Signal::SIGCONT);
    assert_equal(&answers(clients).await, &expected);
    assert!(migrations(&cluster, "computed").await >= 1.0);
    cluster.finish().await;
}

/// Prompts on their way from a prefill worker that is stopped arrive.
#[tokio::test]
async fn a_prefill_worker_that_is_stopped_ends_its_hand_offs_first() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(32);
    let mut cluster = builder.worker_arg("--max-batch-tokens", "64").start().await;
    let prompt: Vec<u32> = (0..1500).map(|i| 1000 + (i * 37) % 20_000).collect();
    let request = json!({
        "model": MODEL_NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true,
    });
    let request = Arc::new(request);
    let call = tokio::spawn({
        let (api, request) = (cluster.api.clone(), request.clone());
        async move { api.ok("/v1/completions", &request).await }
    });
    let decode = cluster.only(Role::Decode).address.clone();
    eventually("blocks arrive", Duration::from_secs(30), async || {
        let status = grpc::status(&decode).await;
        if grpc::handoff_bytes(&status) > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    cluster.workers.remove(0).process.stop().await;
    let reply = call.await.expect("an answer");
    let status = grpc::status(&decode).await;
    assert_eq!((status.handoff_requests, status.handoff_failures), (1, 0), "{status:?}");
    // Alone it computes the same.
    let mut again = (*request).clone();
    again["cache_salt"] = "alone".into();
    let alone = cluster.api.ok("/v1/completions", &again).await;
    assert_eq!(reply["choices"], alone["choices"]);
    cluster.finish().await;
}

/// What a client sees of a move: the longest wait between two tokens, of a long sequence, when its
/// worker drains and when it dies.
#[tokio::test]
async fn a_move_is_shorter_than_computing_again() {
    let prompt: Vec<u32> = (0..3000).map(|i| 1000 + (i * 37) % 20_000).collect();
    let request = |round: &str| {
        json!({
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": 60, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true, "stream": true, "cache_salt": round,
        })
    };
    let mut cluster = Cluster::builder().decode(3).start().await;
    let mut gaps = Vec::new();
    for round in ["drained", "killed"] {
        let mut client = Client::start(&cluster.api, &request(round));
        client.has(20).await;
        let mut at = None;
        for (i, worker) in cluster.workers.iter().enumerate() {
            if worker.status().await.running > 0 {
                at = Some(i);
            }
        }
        let at = at.expect("a worker that computes");
        match round {
            "drained" => cluster.workers.remove(at).process.stop().await,
            _ => cluster.kill_worker(at),
        }
        let (answer, gap) = client.answer().await;
        assert_eq!(answer.choices[&0].ids.len(), 60);
        gaps.push(gap);
    }
    println!("3,000 tokens: a pause of {:?} with the KV, of {:?} without", gaps[0], gaps[1]);
    assert!(gaps[0] < gaps[1], "{gaps:?}");
    cluster.finish().await;
}
