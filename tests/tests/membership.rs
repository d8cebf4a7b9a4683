//! Workers that die, workers that join, and an etcd that goes away.

use std::time::{Duration, Instant};

use baton_tests::bench::null::NullCluster;
use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::{Sse, choices, ids, streamed_ids};
use baton_tests::{Cluster, Reply, Role, eventually, grpc};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Requests whose answers depend on every token before: greedy ones and seeded ones.
fn requests(count: usize, max_tokens: usize) -> Vec<Value> {
    let request = |i: usize| {
        json!({
            "model": MODEL_NAME,
            "prompt": format!("Story number {i}: once upon a time, in a town by the sea,"),
            "max_tokens": max_tokens,
            "temperature": if i.is_multiple_of(2) { 0.0 } else { 1.0 },
            "seed": i,
            "ignore_eos": true,
            "return_token_ids": true,
        })
    };
    (0..count).map(request).collect()
}

fn streaming(request: &Value) -> Value {
    let mut request = request.clone();
    request["stream"] = true.into();
    request
}

/// The answers of an undisturbed cluster, token by token.
async fn undisturbed(cluster: &Cluster, requests: &[Value]) -> Vec<Vec<u32>> {
    let mut answers = Vec::new();
    for request in requests {
        let reply = cluster.api.ok("/v1/completions", request).await;
        answers.push(ids(&reply["choices"][0]["token_ids"]));
    }
    answers
}

/// Reads a stream until it has given `tokens` tokens.
async fn read_tokens(stream: &mut Sse, tokens: usize) -> Vec<Value> {
    let mut events = Vec::new();
    while streamed_ids(&events, 0).len() < tokens {
        events.push(stream.next().await.expect("the stream goes on"));
    }
    events
}

/// Starts a stream for each request, and then reads `tokens` tokens of each.
async fn begin(cluster: &Cluster, requests: &[Value], tokens: usize) -> Vec<(Sse, Vec<Value>)> {
    let mut streams = Vec::new();
    for request in requests {
        streams.push(cluster.api.stream("/v1/completions", &streaming(request)).await);
    }
    let mut begun = Vec::new();
    for mut stream in streams {
        let events = read_tokens(&mut stream, tokens).await;
        begun.push((stream, events));
    }
    begun
}

#[tokio::test]
async fn streams_survive_the_death_of_their_decode_worker_token_for_token() {
    let ttl = 3;
    let mut cluster = Cluster::builder()
        .prefill(1)
        .decode(2)
        .coordinator()
        .lease_ttl(ttl)
        .handoff_min_tokens(8)
        .start()
        .await;
    let requests = requests(8, 96);
    let expected = undisturbed(&cluster, &requests).await;

    let streams = begin(&cluster, &requests, 4).await;
    let (first, second) = (cluster.workers[1].status().await, cluster.workers[2].status().await);
    assert!(first.running > 0 && second.running > 0, "load on both: {first:?} {second:?}");

    let victim = cluster.workers[1].address.clone();
    cluster.kill_worker(1);
    let killed = Instant::now();
    let fresh = json!({"model": MODEL_NAME, "prompt": "A new request", "max_tokens": 1});
    for _ in 0..4 {
        cluster.api.ok("/v1/completions", &fresh).await;
    }
    let failover = killed.elapsed();

    // The lease may have just been renewed, and etcd looks for expired ones twice a second.
    let lease = Duration::from_secs(ttl + 1);
    let coordinator = cluster.coordinator().to_owned();
    eventually("the coordinator drops the dead worker", lease, async || {
        let view = grpc::cluster_view(&coordinator).await;
        let gone = view.instances.iter().all(|instance| instance.address != victim);
        if gone { Ok(()) } else { Err(format!("{view:?}")) }
    })
    .await;
    let gone = killed.elapsed();

    for (i, (stream, mut events)) in streams.into_iter().enumerate() {
        events.extend(stream.collect().await);
        assert_eq!(streamed_ids(&events, 0), expected[i], "request {i}");
        let ends = choices(&events, 0).filter(|choice| choice["finish_reason"] == "length");
        assert_eq!(ends.count(), 1, "request {i} ends once");
    }
    println!("4 new requests after the death: {failover:?}; gone from the view: {gone:?}");
    assert!(failover < Duration::from_secs(3), "new requests fail over at once: {failover:?}");
    cluster.finish().await;
}

/// The same without streaming: the client sees one whole answer and no trace of the death.
#[tokio::test]
async fn whole_answers_survive_the_death_of_their_worker() {
    let mut cluster = Cluster::builder().unified(2).start().await;
    let requests = requests(6, 96);
    let expected = undisturbed(&cluster, &requests).await;
    let calls = requests.iter().map(|request| {
        let (api, request) = (cluster.api.clone(), request.clone());
        tokio::spawn(async move { api.ok("/v1/completions", &request).await })
    });
    let calls: Vec<_> = calls.collect();
    eventually("both workers are busy", Duration::from_secs(10), async || {
        let (a, b) = (cluster.workers[0].status().await, cluster.workers[1].status().await);
        let busy = a.running > 0 && b.running > 0;
        if busy { Ok(()) } else { Err(format!("{a:?} {b:?}")) }
    })
    .await;
    cluster.kill_worker(0);
    for (call, expected) in calls.into_iter().zip(&expected) {
        let reply = call.await.expect("a reply");
        assert_eq!(&ids(&reply["choices"][0]["token_ids"]), expected);
        assert_eq!(reply["usage"]["completion_tokens"], 96);
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_new_worker_is_used_within_a_second() {
    let mut cluster = Cluster::builder().unified(1).start().await;
    // Load for the router to move away from.
    let mut streams = Vec::new();
    for request in requests(4, 1500) {
        let mut stream = cluster.api.stream("/v1/completions", &streaming(&request)).await;
        read_tokens(&mut stream, 1).await;
        streams.push(stream);
    }
    let address = cluster.add_worker(Role::Unified).await.address.clone();
    let (api, next) = (cluster.api.clone(), std::cell::Cell::new(0));
    let (_, took) = eventually("the new worker generates", Duration::from_secs(1), async || {
        next.set(next.get() + 1);
        let prompt = format!("Question {}", next.get());
        let body = json!({"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1});
        api.ok("/v1/completions", &body).await;
        let status = grpc::status(&address).await;
        if status.generation_tokens > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    println!("used {took:?} after its ready line");
    drop(streams);
    cluster.finish().await;
}

#[tokio::test]
async fn a_worker_that_is_stopped_leaves_at_once_and_finishes_its_requests() {
    let mut cluster = Cluster::builder().unified(2).start().await;
    let requests = requests(6, 96);
    let expected = undisturbed(&cluster, &requests).await;
    let streams = begin(&cluster, &requests, 2).await;
    let mut leaving = cluster.workers.remove(0);
    let leave = leaving.process.stop();
    let finish = async {
        let mut answers = Vec::new();
        for (stream, mut events) in streams {
            events.extend(stream.collect().await);
            answers.push(streamed_ids(&events, 0));
        }
        answers
    };
    let ((), answers) = tokio::join!(leave, finish);
    assert_eq!(answers, expected);
    let records = cluster.etcd.instances();
    assert_eq!(records.len(), 2, "the gateway and one worker: {records:?}");
    cluster.still_serves().await;
    cluster.finish().await;
}

/// How long etcd is away. Short for the sake of time; `BATON_TEST_ETCD_OUTAGE=60` is a minute.
fn outage() -> Duration {
    let seconds = std::env::var("BATON_TEST_ETCD_OUTAGE").unwrap_or_else(|_| "20".to_owned());
    Duration::from_secs(seconds.parse().expect("BATON_TEST_ETCD_OUTAGE in seconds"))
}

#[tokio::test]
async fn requests_are_served_while_etcd_is_away_and_all_register_again() {
    let mut cluster = Cluster::builder()
        .prefill(1)
        .decode(1)
        .coordinator()
        .lease_ttl(5)
        .handoff_min_tokens(8)
        .start()
        .await;
    let coordinator = cluster.coordinator().to_owned();
    let registered = cluster.etcd.instances();
    assert_eq!(registered.len(), 4, "{registered:?}");

    cluster.etcd.kill();
    let away = Instant::now();
    let (mut served, mut slowest) = (0, Duration::ZERO);
    while away.elapsed() < outage() {
        // Long enough for a hand-off, and new each time, so that nothing comes from a cache.
        let prompt = format!("Request {served}: {}", "the sea is wide and blue, ".repeat(8));
        let body =
            json!({"model": MODEL_NAME, "prompt": prompt, "max_tokens": 4, "ignore_eos": true});
        let start = Instant::now();
        let reply = cluster.api.ok("/v1/completions", &body).await;
        assert_eq!(reply["usage"]["completion_tokens"], 4);
        slowest = slowest.max(start.elapsed());
        served += 1;
        if served == 1 {
            eventually("the coordinator sees the outage", Duration::from_secs(10), async || {
                let view = grpc::cluster_view(&coordinator).await;
                let instances = view.instances.len();
                if !view.etcd_connected { Ok(()) } else { Err(format!("{instances} instances")) }
            })
            .await;
        }
    }
    let view = grpc::cluster_view(&coordinator).await;
    assert_eq!(view.instances.len(), 4, "the last view is kept: {view:?}");
    assert!(!view.etcd_connected);
    let handed_off = cluster.only(Role::Decode).status().await.handoff_requests;
    assert!(handed_off >= served, "{handed_off} hand-offs in {served} requests");

    cluster.etcd.restart().await;
    let (_, took) = eventually("all register again", Duration::from_secs(30), async || {
        let records = cluster.etcd.instances();
        let view = grpc::cluster_view(&coordinator).await;
        let whole = records == registered && view.etcd_connected && view.instances.len() == 4;
        if whole { Ok(()) } else { Err(format!("{records:?} {view:?}")) }
    })
    .await;
    println!("{served} requests in {:?} without etcd, slowest {slowest:?}", outage());
    println!("all registered {took:?} after etcd answered");

    // Records alone may be the old leases' last seconds: they must be there when those are over.
    let settled = Instant::now();
    while settled.elapsed() < Duration::from_secs(8) {
        cluster.still_serves().await;
        assert_eq!(cluster.etcd.instances(), registered);
    }
    assert_eq!(cluster.workers.len(), 2);
    cluster.finish().await;
}

/// An operator restores etcd from nothing: revisions start again and every lease is gone.
#[tokio::test]
async fn an_etcd_that_lost_its_data_is_filled_again() {
    let mut cluster = Cluster::builder().unified(1).coordinator().lease_ttl(3).start().await;
    let registered = cluster.etcd.instances();
    cluster.etcd.kill();
    std::fs::remove_dir_all(cluster.dir().join("etcd-0")).expect("lose the data");
    cluster.still_serves().await;
    cluster.etcd.restart().await;
    eventually("all register again", Duration::from_secs(30), async || {
        let records = cluster.etcd.instances();
        if records == registered { Ok(()) } else { Err(format!("{records:?}")) }
    })
    .await;
    // The watches follow the new history too: a worker that joins now is used.
    let address = cluster.add_worker(Role::Unified).await.address.clone();
    let coordinator = cluster.coordinator().to_owned();
    eventually("the new worker is seen", Duration::from_secs(10), async || {
        let view = grpc::cluster_view(&coordinator).await;
        let seen = view.instances.iter().any(|instance| instance.address == address);
        if seen { Ok(()) } else { Err(format!("{view:?}")) }
    })
    .await;
    cluster.kill_worker(0);
    cluster.still_serves().await;
    cluster.finish().await;
}

/// etcd may forget every lease at once. Who is known and answers goes on to be asked.
#[tokio::test]
async fn leases_that_are_revoked_cost_no_request() {
    let builder = Cluster::builder().prefill(1).decode(1).coordinator();
    let cluster = builder.handoff_min_tokens(8).start().await;
    let requests = requests(4, 200);
    let expected = undisturbed(&cluster, &requests).await;
    let registered = cluster.etcd.instances();
    let streams = begin(&cluster, &requests, 4).await;
    for _ in 0..2 {
        cluster.etcd.revoke_leases();
        eventually("all are registered again", Duration::from_secs(20), async || {
            let body = json!({"model": MODEL_NAME, "prompt": "Meanwhile", "max_tokens": 1});
            cluster.api.ok("/v1/completions", &body).await;
            let records = cluster.etcd.instances();
            if records == registered { Ok(()) } else { Err(format!("{records:?}")) }
        })
        .await;
    }
    for (i, (stream, mut events)) in streams.into_iter().enumerate() {
        events.extend(stream.collect().await);
        assert_eq!(streamed_ids(&events, 0), expected[i], "request {i}");
    }
    cluster.finish().await;
}

/// It is not dead: its connections stay open, and nothing is refused.
#[tokio::test]
async fn streams_go_on_when_their_decode_worker_hangs_for_good() {
    let cluster = Cluster::builder().prefill(1).decode(2).handoff_min_tokens(8).start().await;
    let requests = requests(4, 96);
    let expected = undisturbed(&cluster, &requests).await;
    let streams = begin(&cluster, &requests, 4).await;
    let status = cluster.workers[1].status().await;
    assert!(status.running > 0, "there is load on it: {status:?}");
    cluster.workers[1].process.signal(Signal::SIGSTOP);
    let hung = Instant::now();
    for (i, (stream, mut events)) in streams.into_iter().enumerate() {
        events.extend(stream.collect().await);
        assert_eq!(streamed_ids(&events, 0), expected[i], "request {i}");
    }
    println!("all had ended {:?} after one of two decode workers hung", hung.elapsed());
    cluster.workers[1].process.signal(Signal::SIGCONT);
    cluster.finish().await;
}

/// Whoever is told 503 may ask another gateway at once: nothing has begun. Here it had.
#[tokio::test]
async fn an_answer_that_nobody_can_go_on_with_is_given_up_as_one_that_had_begun() {
    let mut cluster = Cluster::unified().await;
    let (api, request) = (cluster.api.clone(), requests(1, 2000).remove(0));
    let call = tokio::spawn(async move { api.post("/v1/completions", &request).await });
    eventually("it is under way", Duration::from_secs(10), async || {
        let status = cluster.workers[0].status().await;
        if status.generation_tokens > 4 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    cluster.kill_worker(0);
    let reply = call.await.expect("a reply");
    let error = reply.error(502).expect("given up");
    assert_eq!(error["type"], "BadGatewayError");
    assert_eq!(reply.header("retry-after"), "1");
    let body = json!({"model": MODEL_NAME, "prompt": "One", "max_tokens": 2});
    let reply = cluster.api.post("/v1/completions", &body).await;
    reply.error(503).expect("there may be a worker again");
    cluster.finish().await;
}

/// What fails at once looks idle.
#[tokio::test]
async fn a_worker_that_fails_every_step_gets_few_requests_and_costs_none() {
    let mut null = NullCluster::start(Cluster::builder()).await;
    let (mut failing, address) = null.add(&["--fail"]).await;
    null.found(2).await;
    let api = null.cluster.api.clone();
    let body = json!({"model": MODEL_NAME, "prompt": "One two", "max_tokens": 4});
    for _ in 0..100 {
        let reply = api.ok("/v1/completions", &body).await;
        assert_eq!(reply["usage"]["completion_tokens"], 4, "{reply}");
    }
    // Three steps, and one more every ten seconds.
    let asked = grpc::status(&address).await.requests;
    assert!((3..=8).contains(&asked), "{asked} of 100 requests");
    // The last one is asked, and says why.
    null.worker.stop().await;
    null.found(1).await;
    let error = api.post("/v1/completions", &body).await.error(500).expect("a failure");
    assert_eq!(error["type"], "InternalServerError");
    assert_eq!(error["message"], "The forward pass panicked.");
    assert_eq!(grpc::status(&address).await.requests, asked + 3);
    failing.stop().await;
    null.cluster.finish().await;
}

/// Sends a request that null workers die of, after so many tokens of each, to five of them; returns
/// the reply, and how many have died of it.
async fn deadly(die_after: usize, max_tokens: usize) -> (Reply, usize) {
    const DEADLY: u32 = 4242;
    let (die_of, die_after) = (DEADLY.to_string(), die_after.to_string());
    let flags = ["--die-of", &*die_of, "--die-after", &*die_after];
    let null = NullCluster::start_with(Cluster::builder(), &flags).await;
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(null.add(&flags).await.0);
    }
    null.found(5).await;
    let NullCluster { cluster, worker, .. } = null;
    workers.push(worker);
    let request = |prompt: [u32; 3]| {
        json!({
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true,
        })
    };
    let reply = cluster.api.post("/v1/completions", &request([1000, DEADLY, 1001])).await;
    // A process that has closed its connections may be there for a moment.
    tokio::time::sleep(Duration::from_secs(1)).await;
    workers.retain_mut(|worker| worker.exited().is_none());
    // The others are as they were.
    let body = request([1000, 1001, 1002]);
    for _ in 0..2 * workers.len() {
        let reply = cluster.api.ok("/v1/completions", &body).await;
        assert_eq!(reply["usage"]["completion_tokens"], max_tokens, "{reply}");
    }
    let dead = 5 - workers.len();
    for worker in &mut workers {
        worker.stop().await;
    }
    cluster.finish().await;
    (reply, dead)
}

#[tokio::test]
async fn a_request_that_kills_workers_before_its_first_token_is_given_up_after_the_third() {
    let (reply, dead) = deadly(0, 100).await;
    assert_eq!(reply.error(502).expect("given up")["type"], "BadGatewayError");
    assert_eq!(dead, 3);
}

#[tokio::test]
async fn a_request_that_kills_workers_after_a_token_is_given_up_after_the_third() {
    let (reply, dead) = deadly(1, 100).await;
    assert_eq!(reply.error(502).expect("given up")["type"], "BadGatewayError");
    assert_eq!(dead, 3);
}

/// Not the request's fault, for all that anybody can tell.
#[tokio::test]
async fn an_answer_that_goes_on_outlives_more_than_three_workers() {
    let (reply, dead) = deadly(40, 190).await;
    assert_eq!(reply.ok()["usage"]["completion_tokens"], 190);
    assert_eq!(dead, 4);
}
