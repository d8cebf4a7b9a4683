//! Pools that grow and shrink: under load, while coordinators die, and when it goes wrong.

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_coordinator::election::Leadership;
use baton_coordinator::launch::local::{LocalProcesses, Settings};
use baton_coordinator::launch::template::Templates;
use baton_coordinator::launch::{LaunchError, Launcher as _, WorkerSpec};
use baton_coordinator::scale::record::{Phase, Record};
use baton_coordinator::scale::store::{Advanced, Begun, ScaleStore};
use baton_membership::{EtcdAccess, EtcdSettings};
use baton_proto::InstanceRole;
use baton_proto::v1::CancelScaleRequest;
use baton_tests::binaries::{MODEL_NAME, program};
use baton_tests::elastic::{Elastic, command, worker};
use baton_tests::http::{RawClient, ids, streamed_ids};
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, eventually, grpc};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Requests whose answers depend on every token before, long enough to be handed off.
fn requests() -> Vec<Value> {
    let request = |i: usize| {
        json!({
            "model": MODEL_NAME,
            "prompt": format!("Story {i}. {} And then", "The sea is wide and blue. ".repeat(12)),
            "max_tokens": 24,
            "temperature": if i.is_multiple_of(2) { 0.0 } else { 1.0 },
            "seed": i,
            "ignore_eos": true,
            "return_token_ids": true,
        })
    };
    (0..6).map(request).collect()
}

/// Steady traffic, every answer of which must be the right one.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<usize>>,
}

impl Load {
    /// Two clients that stream and two that do not, one request after the other.
    async fn start(api: &Api) -> Self {
        let mut expected = Vec::new();
        for request in requests() {
            let reply = api.ok("/v1/completions", &request).await;
            let answer = ids(&reply["choices"][0]["token_ids"]);
            assert_eq!(answer.len(), 24, "{reply}");
            expected.push((request, answer));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let expected = Arc::new(expected);
        let client = |number: usize| {
            let (api, stop, expected) = (api.clone(), stop.clone(), expected.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while !stop.load(Relaxed) {
                    let (request, answer) = &expected[(number + done) % expected.len()];
                    let got = match number % 2 {
                        0 => {
                            let reply = api.ok("/v1/completions", request).await;
                            ids(&reply["choices"][0]["token_ids"])
                        }
                        _ => {
                            let mut request = request.clone();
                            request["stream"] = true.into();
                            let stream = api.stream("/v1/completions", &request).await;
                            streamed_ids(&stream.collect().await, 0)
                        }
                    };
                    assert_eq!(&got, answer, "client {number}, request {done}");
                    done += 1;
                }
                done
            })
        };
        let clients = (0..4).map(client).collect();
        Self { stop, clients }
    }

    /// Ends the traffic; says how many requests there were.
    async fn stop(self) -> usize {
        self.stop.store(true, Relaxed);
        let mut all = 0;
        for client in self.clients {
            all += client.await.expect("every answer is right");
        }
        all
    }
}

fn both(etcd: &baton_tests::etcd::Etcd) -> Vec<Value> {
    vec![worker("prefill", etcd), worker("decode", etcd)]
}

#[tokio::test]
async fn pools_grow_and_shrink_under_load_and_every_token_is_right() {
    let cluster = Elastic::start(1, &[], both).await;
    cluster.scaled("decode", 1).await;
    cluster.scaled("prefill", 1).await;
    let load = Load::start(&cluster.api).await;
    let first = cluster.pid("decode-1");
    for (pool, size) in [("decode", 3), ("prefill", 2), ("decode", 1), ("prefill", 1)] {
        let since = Instant::now();
        cluster.scaled(pool, size).await;
        println!("{pool} to {size}: {:?}", since.elapsed());
    }
    let answered = load.stop().await;
    println!("{answered} requests meanwhile");
    assert!(answered > 8, "there was traffic: {answered}");
    assert_eq!(cluster.launched().len(), 2, "{:?}", cluster.launched());
    if cluster.launched().contains(&"decode-1".to_owned()) {
        assert_eq!(cluster.pid("decode-1"), first, "who stays is not touched");
    }
    // Without a pool, the one that generates is meant; its size is what it is.
    let since = Instant::now();
    let reply = cluster.api.ok("/scale_elastic_ep", &json!({"new_data_parallel_size": 1})).await;
    assert_eq!(reply["message"], "Scaled to 1 data parallel engines");
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    let history = cluster.operations().await;
    let last = history.last().expect("a history");
    assert_eq!((last.pool.as_str(), last.from, last.size), ("decode", 1, 1));
    assert!(history.iter().all(|operation| operation.phase == "done"), "{history:#?}");
    cluster.finish().await;
}

/// Workers go from one pool to the other and back, under load, and stay the processes that they
/// are. One that dies afterwards is started as what it has become.
#[tokio::test]
async fn workers_change_their_role_under_load_and_keep_their_model() {
    let cluster = Elastic::start(1, &[], both).await;
    cluster.scaled("decode", 1).await;
    cluster.scaled("prefill", 3).await;
    let pids = ["prefill-1", "prefill-2", "prefill-3"].map(|name| cluster.pid(name));
    let load = Load::start(&cluster.api).await;
    let convert = async |pool: &str, from: &str, size: u32| {
        let body = json!({"new_data_parallel_size": size, "pool": pool, "from_pool": from});
        let since = Instant::now();
        cluster.api.ok("/scale_elastic_ep", &body).await;
        println!("{from} to {pool}: {:?}", since.elapsed());
        let operation = cluster.operations().await.pop().expect("a history");
        assert_eq!((operation.from_pool.as_str(), operation.launched.len()), (from, 0));
        operation.converted
    };
    let converted = convert("decode", "prefill", 3).await;
    assert_eq!(converted.len(), 2);
    assert_eq!((cluster.registered("prefill").len(), cluster.registered("decode").len()), (1, 3));
    // New instances, with counts of their own.
    for record in cluster.registered("decode") {
        assert!(record.id.starts_with("decode-"), "{record:?}");
        let status = grpc::status(&record.address).await;
        assert!(!status.draining, "{status:?}");
    }
    let killed = converted[0].as_str();
    kill(Pid::from_raw(cluster.pid(killed)), Signal::SIGKILL).expect("it runs");
    eventually("it is started as a decode worker", Duration::from_secs(60), async || {
        let there = cluster.registered("decode");
        let ours = cluster.status(killed)["address"].as_str().unwrap_or_default().to_owned();
        match there.iter().any(|it| it.address == ours) {
            true => Ok(()),
            false => Err(format!("{there:?}")),
        }
    })
    .await;
    // Nobody takes them for what they were: neither the changed nor the one that was killed.
    eventually("the gateway knows each worker once", Duration::from_secs(20), async || {
        let metrics = Scrape::parse(&cluster.api.get("/metrics").await.text)?;
        let of = |role| metrics.sum("baton_workers", &[("role", role)]);
        match (of("prefill"), of("decode")) {
            (Some(1.0), Some(3.0)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // On a quiet machine a change takes less time than an answer.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let back = convert("prefill", "decode", 2).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((cluster.registered("prefill").len(), cluster.registered("decode").len()), (2, 2));
    let answered = load.stop().await;
    println!("{answered} requests meanwhile; {converted:?}, then {back:?}");
    assert!(answered > 8, "there was traffic: {answered}");
    let now = ["prefill-1", "prefill-2", "prefill-3"].map(|name| cluster.pid(name));
    let restarted = pids.iter().zip(now).filter(|(before, now)| **before != *now).count();
    assert_eq!(restarted, 1, "only the one that was killed: {pids:?}, {now:?}");

    let body = json!({"new_data_parallel_size": 4, "pool": "prefill", "from_pool": "decode"});
    let error = cluster.api.post("/scale_elastic_ep", &body).await.error(500).expect("one stays");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("one must stay")), "{error}");
    let body = json!({"new_data_parallel_size": 3, "pool": "prefill", "from_pool": "audio"});
    let error = cluster.api.post("/scale_elastic_ep", &body).await.error(400).expect("refused");
    assert_eq!(error["param"], "from_pool", "{error}");
    cluster.finish().await;
}

/// A change of role that takes too long, or that somebody takes back, leaves workers as they were.
#[tokio::test]
async fn a_change_of_role_that_is_not_made_is_taken_back() {
    let cluster = Elastic::start(1, &[], both).await;
    cluster.scaled("decode", 1).await;
    cluster.scaled("prefill", 2).await;
    // They cannot be told anything.
    let pids = ["prefill-1", "prefill-2"].map(|name| Pid::from_raw(cluster.pid(name)));
    let api = cluster.api.clone();
    let body = json!({"new_data_parallel_size": 2, "pool": "decode", "from_pool": "prefill"});
    let asked = tokio::spawn(async move { api.post("/scale_elastic_ep", &body).await });
    let operation = cluster.phase("convert").await;
    for pid in pids {
        kill(pid, Signal::SIGSTOP).expect("it runs");
    }
    let mut client = grpc::coordinator(&cluster.coordinators[0].1).await;
    let request = CancelScaleRequest { id: operation.id, pool: String::new() };
    let cancelled = client.cancel_scale(request).await;
    for pid in pids {
        kill(pid, Signal::SIGCONT).expect("it runs");
    }
    let reply = asked.await.expect("a reply");
    // It may have been done before.
    let expected = if cancelled.is_ok() { (2, 1) } else { (1, 2) };
    assert_eq!(reply.status, if cancelled.is_ok() { 409 } else { 200 }, "{}", reply.text);
    eventually("each is of its pool", Duration::from_secs(20), async || {
        let there = (cluster.registered("prefill").len(), cluster.registered("decode").len());
        if there == expected { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .await;
    let body = json!({"model": MODEL_NAME, "prompt": "One two three", "max_tokens": 2});
    cluster.api.ok("/v1/completions", &body).await;
    cluster.finish().await;
}

/// A worker that was killed and serves again is one worker, although its old record is still there.
#[tokio::test]
async fn the_record_of_a_killed_worker_is_no_worker() {
    let cluster = Elastic::start(1, &[], both).await;
    cluster.scaled("decode", 1).await;
    let before = cluster.pid("decode-1");
    kill(Pid::from_raw(before), Signal::SIGKILL).expect("it runs");
    eventually("it serves again", Duration::from_secs(20), async || {
        let status = cluster.status("decode-1");
        let again = status["state"] == "ready" && status["pid"] != before;
        if again { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    println!("records: {:?}", cluster.registered("decode"));
    cluster.scale("decode", 1).await.ok();
    let last = cluster.operations().await.pop().expect("a history");
    assert_eq!((last.from, last.retired.len()), (1, 0), "{last:?}");
    assert_eq!(cluster.launched(), ["decode-1"]);
    cluster.finish().await;
}

/// One that is told to end does not leave the others to wait for its lease.
#[tokio::test]
async fn a_leader_that_is_stopped_hands_over_at_once() {
    let mut cluster = Elastic::start(2, &[], both).await;
    let leader = cluster.leader().await;
    eventually("the other stands too", Duration::from_secs(10), async || {
        let standing = cluster.etcd.candidates();
        if standing.len() == 2 { Ok(()) } else { Err(format!("{standing:?}")) }
    })
    .await;
    let standing = cluster.etcd.candidates();
    cluster.coordinators[leader].0.stop().await;
    assert_eq!(cluster.etcd.candidates(), standing[1..], "gone before its process is");
    cluster.coordinators.remove(leader);
    assert_eq!(cluster.leader().await, 0);
    cluster.scaled("decode", 1).await;
    cluster.finish().await;
}

/// The leader is killed while workers start, and the next one while they drain.
#[tokio::test]
async fn another_coordinator_finishes_what_a_killed_leader_began() {
    let mut cluster = Elastic::start(2, &[], both).await;
    cluster.scaled("decode", 1).await;
    let survivor = cluster.pid("decode-1");
    let api = cluster.api.clone();
    let up = tokio::spawn(async move {
        let body = json!({"new_data_parallel_size": 3, "pool": "decode"});
        api.post("/scale_elastic_ep", &body).await
    });
    cluster.phase("join").await;
    let leader = cluster.leader().await;
    cluster.coordinators.remove(leader).0.kill();
    up.await.expect("a reply").ok();
    assert_eq!(cluster.launched(), ["decode-1", "decode-2", "decode-3"]);
    assert_eq!(cluster.registered("decode").len(), 3);
    assert_eq!(cluster.pid("decode-1"), survivor, "workers outlive the coordinator");

    // One that is to go falls silent, so that its drain takes until it speaks again.
    cluster.add_coordinator().await;
    let silent = Pid::from_raw(cluster.pid("decode-2"));
    kill(silent, Signal::SIGSTOP).expect("stop a worker");
    let api = cluster.api.clone();
    let down = tokio::spawn(async move {
        let body = json!({"new_data_parallel_size": 2, "pool": "decode"});
        api.post("/scale_elastic_ep", &body).await
    });
    let operation = cluster.phase("drain").await;
    assert_eq!(operation.retired, ["decode-2"]);
    let leader = cluster.leader().await;
    cluster.coordinators.remove(leader).0.kill();
    kill(silent, Signal::SIGCONT).expect("let it go on");
    down.await.expect("a reply").ok();
    assert_eq!(cluster.launched(), ["decode-1", "decode-3"]);
    cluster.finish().await;
}

/// A leader that sleeps through its lease and wakes up finds that it does not lead any more.
#[tokio::test]
async fn a_leader_that_slept_changes_nothing() {
    let idle = |_: &_| vec![command("pooling", "none", Path::new("sleep"), &["1000"])];
    let mut cluster = Elastic::start(2, &["--launch-timeout", "60"], idle).await;
    let leader = cluster.leader().await;
    let sleeper = cluster.coordinators.remove(leader);
    let api = cluster.api.clone();
    let request = tokio::spawn(async move {
        let body = json!({"new_data_parallel_size": 2, "pool": "pooling"});
        api.post("/scale_elastic_ep", &body).await
    });
    let running = cluster.phase("join").await;
    sleeper.0.signal(Signal::SIGSTOP);
    let other = &cluster.coordinators[0].1;
    eventually("the other leads", Duration::from_secs(20), async || {
        let view = grpc::cluster_view(other).await;
        let leads = view.instances.iter().any(|it| it.id == view.leader && it.address == *other);
        if leads { Ok(()) } else { Err(format!("{view:?}")) }
    })
    .await;
    let cancel = CancelScaleRequest { id: running.id, pool: String::new() };
    grpc::coordinator(other).await.cancel_scale(cancel).await.expect("it may be cancelled");
    request.await.expect("a reply").error(409).expect("it was cancelled");
    assert!(cluster.launched().is_empty(), "{:?}", cluster.launched());
    sleeper.0.signal(Signal::SIGCONT);
    // Long enough for whatever it had in mind.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(cluster.launched().is_empty(), "{:?}", cluster.launched());
    let last = cluster.operations().await.pop().expect("a history");
    assert_eq!(last.phase, "cancelled", "{last:?}");
    cluster.coordinators.push(sleeper);
    cluster.finish().await;
}

/// Workers inherit the environment, but not where the coordinator itself is.
#[tokio::test]
async fn workers_do_not_take_the_coordinators_place_for_their_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    // The workers end when it is not held.
    let owner = File::create(path("owner")).expect("a file to lock");
    owner.lock().expect("lock it");
    // As a coordinator that has these starts it.
    let supervisor = path("supervisor");
    let script = format!(
        "#!/bin/sh\n\
         export BATON_LISTEN=127.0.0.1:1 BATON_ADVERTISE=http://10.0.0.5:1 BATON_CLUSTER=ours\n\
         exec '{}' \"$@\"\n",
        program("baton-coordinator").display()
    );
    std::fs::write(&supervisor, script).expect("write it");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&supervisor, executable).expect("make it a program");
    let tells = command(
        "pooling",
        "none",
        Path::new("sh"),
        &["-c", "env >&2; echo told >&2; exec sleep 1000"],
    );
    let templates: Templates = serde_json::from_value(json!({"pools": [tells]})).expect("commands");
    let settings = Settings {
        dir: path("workers"),
        logs: path("logs"),
        supervisor,
        owner: Some(path("owner")),
        grace: Duration::from_secs(1),
    };
    let launcher = LocalProcesses::new(settings, templates).expect("a launcher");
    let (name, model) = ("a".to_owned(), "none".to_owned());
    let spec = WorkerSpec { name, pool: InstanceRole::Pooling, model };
    launcher.launch(1, &spec).await.expect("launched");
    let environment = async || {
        let log = std::fs::read_to_string(path("logs/a.log")).unwrap_or_default();
        if log.ends_with("told\n") { Ok(log) } else { Err(log) }
    };
    let (log, _) = eventually("it has told", Duration::from_secs(10), environment).await;
    assert!(log.contains("BATON_CLUSTER=ours\n"), "{log}");
    assert!(!log.contains("BATON_LISTEN") && !log.contains("BATON_ADVERTISE"), "{log}");
    launcher.retire(1, "a").await.expect("told");
    eventually("it ends", Duration::from_secs(5), async || {
        let left = launcher.list().await.map_err(|error| error.to_string())?;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

/// The same in the two places that refuse it: etcd, and the launcher.
#[tokio::test]
async fn the_writes_and_the_orders_of_a_stale_leader_are_refused() {
    let idle = |_: &_| vec![command("pooling", "none", Path::new("sleep"), &["1000"])];
    // Nobody but us works on the records.
    let cluster = Elastic::start(0, &[], idle).await;
    let settings = EtcdSettings {
        endpoints: vec![cluster.etcd.url().to_owned()],
        cluster: "default".into(),
        lease_ttl: Duration::from_secs(2),
        start_timeout: Duration::from_secs(10),
        access: EtcdAccess::default(),
    };
    let mut client = baton_membership::connect(&settings).await.expect("etcd");
    let mut elect = async |id: &str| {
        let lease = client.lease_grant(60, None).await.expect("a lease").id();
        let name = baton_proto::instance::election_name("default");
        let mut won = client.campaign(name, id, lease).await.expect("elected");
        let key = won.take_leader().expect("a key");
        (lease, Leadership { key: key.key().into(), revision: key.rev() })
    };
    let (lease, old) = elect("old").await;
    let store = ScaleStore::connect(&settings).await.expect("etcd");
    let request = Record::new(InstanceRole::Pooling, "none".into(), 1, 1000);
    let begun = store.begin(request.clone()).await.expect("etcd");
    assert!(matches!(begun, Begun::Runs(_)), "{begun:?}");
    let again = Record { size: 2, ..request.clone() };
    assert!(matches!(store.begin(again).await, Ok(Begun::Conflict(_))));
    let running = async || store.list().await.expect("etcd").running.remove(0);
    let next = Record { phase: Phase::Launch, launched: vec!["a".into()], ..request };
    let before = running().await;
    let written = store.advance(&old, &before, &next).await.expect("etcd");
    assert!(matches!(written, Advanced::Written(_)), "{written:?}");
    assert_eq!(store.advance(&old, &before, &next).await.expect("etcd"), Advanced::Changed);

    let mut revoke = baton_membership::connect(&settings).await.expect("etcd");
    revoke.lease_revoke(lease).await.expect("the old leader's lease runs out");
    let (_, new) = elect("new").await;
    assert!(new.revision > old.revision);
    let now = running().await;
    let step = Record { phase: Phase::Join, ..next };
    assert_eq!(store.advance(&old, &now, &step).await.expect("etcd"), Advanced::Deposed);
    assert_eq!(running().await, now, "nothing is written");
    let written = store.advance(&new, &now, &step).await.expect("etcd");
    assert!(matches!(written, Advanced::Written(_)), "{written:?}");
    let done = Record { phase: Phase::Done, ..step };
    let now = running().await;
    assert!(matches!(store.advance(&new, &now, &done).await, Ok(Advanced::Written(_))));
    let all = store.list().await.expect("etcd");
    assert!(all.running.is_empty() && all.ended == [done], "{all:?}");

    let dir = cluster.dir().join("launcher");
    let settings = Settings {
        logs: dir.join("logs"),
        dir,
        supervisor: program("baton-coordinator"),
        owner: Some(cluster.dir().join("owner")),
        grace: Duration::from_secs(1),
    };
    let templates: Templates =
        serde_json::from_value(json!({"pools": idle(&cluster.etcd)})).expect("commands");
    let launcher = LocalProcesses::new(settings, templates).expect("a launcher");
    let spec = |name: &str| WorkerSpec {
        name: name.into(),
        pool: InstanceRole::Pooling,
        model: "none".into(),
    };
    launcher.launch(new.revision, &spec("a")).await.expect("launched");
    for refused in
        [launcher.launch(old.revision, &spec("b")).await, launcher.retire(old.revision, "a").await]
    {
        assert!(matches!(refused, Err(LaunchError::Stale { .. })), "{refused:?}");
    }
    assert_eq!(launcher.list().await.expect("a list").len(), 1);
    launcher.launch(new.revision, &spec("a")).await.expect("again is as good as once");
    assert_eq!(launcher.list().await.expect("a list").len(), 1);
    launcher.retire(new.revision, "a").await.expect("told");
    eventually("it ends", Duration::from_secs(5), async || {
        let left = launcher.list().await.map_err(|error| error.to_string())?;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    cluster.finish().await;
}

/// Whatever keeps new workers from serving, they are taken away again, and the reason is theirs.
#[tokio::test]
async fn a_launch_that_fails_is_rolled_back_with_the_workers_own_reason() {
    let pools = |etcd: &baton_tests::etcd::Etcd| {
        let mut missing = worker("prefill", etcd);
        missing["args"][9] = "/no/such/model.gguf".into();
        vec![
            worker("decode", etcd),
            missing,
            command("unified", "crash", Path::new("sh"), &["-c", "echo oh dear >&2; exit 3"]),
            command("pooling", "late", Path::new("sleep"), &["1000"]),
            command("audio", "gone", Path::new("/no/such/program"), &[]),
        ]
    };
    let cluster = Elastic::start(1, &["--launch-timeout", "8"], pools).await;
    cluster.scaled("decode", 1).await;
    for (pool, reason) in [
        ("prefill", "/no/such/model.gguf"),
        ("unified", "oh dear"),
        ("pooling", "does not serve after 8 s"),
        ("audio", "/no/such/program"),
    ] {
        let reply = cluster.scale(pool, 2).await;
        let error = reply.error(500).unwrap_or_else(|e| panic!("{pool}: {e}"));
        assert_eq!(error["type"], "Internal Server Error");
        let message = error["message"].as_str().expect("a text");
        assert!(message.starts_with("Scale failed") && message.contains(reason), "{message}");
        assert_eq!(cluster.launched(), ["decode-1"], "after {pool}");
    }
    eventually("the metrics tell which pool failed", Duration::from_secs(20), async || {
        let metrics = Scrape::parse(&cluster.api.get("/metrics").await.text)?;
        let failed = |pool| metrics.sum("baton_scale_failed", &[("pool", pool)]);
        let told = ["prefill", "audio", "decode"].map(failed);
        let coordinators = metrics.sum("baton_coordinators", &[]);
        match (told, coordinators) {
            ([Some(1.0), Some(1.0), Some(0.0)], Some(1.0)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let body = json!({"model": MODEL_NAME, "prompt": "One two three", "max_tokens": 2});
    cluster.api.ok("/v1/completions", &body).await;
    cluster.finish().await;
}

/// An operation that takes its time, and what may be asked meanwhile.
#[tokio::test]
async fn the_same_request_joins_another_is_refused_and_a_running_one_can_be_cancelled() {
    let pools = |_: &_| {
        vec![
            command("pooling", "late", Path::new("sleep"), &["1000"]),
            command("audio", "late", Path::new("sleep"), &["1000"]),
        ]
    };
    let cluster = Elastic::start(1, &[], pools).await;
    let is_scaling = async || {
        let reply = cluster.api.send(Method::POST, "/is_scaling_elastic_ep", None, "").await;
        reply.expect("a reply").ok()
    };
    assert_eq!(is_scaling().await, json!({"is_scaling_elastic_ep": false}));
    let body = json!({"new_data_parallel_size": 2, "pool": "pooling"});
    let request = || {
        let (api, body) = (cluster.api.clone(), body.clone());
        tokio::spawn(async move { api.post("/scale_elastic_ep", &body).await })
    };
    let first = request();
    let running = cluster.phase("join").await;
    let second = request();
    // One that leaves at once stops nothing.
    let _ = RawClient::post(&cluster.api, "/scale_elastic_ep", &body).await.leave();
    assert_eq!(is_scaling().await, json!({"is_scaling_elastic_ep": true}));
    let conflict = cluster.scale("pooling", 3).await.error(409).expect("another size");
    let message = conflict["message"].as_str().expect("a text");
    assert!(message.contains(&running.id) && message.contains("join"), "{message}");
    assert_eq!(conflict["type"], "Conflict");
    // Another pool is another matter, and everything else goes on being served.
    let elsewhere = cluster.scale("decode", 1).await;
    elsewhere.error(400).expect("no such pool here");
    assert_eq!(cluster.api.get("/metrics").await.status, 200);
    assert_eq!(cluster.operations().await.len(), 1, "all joined the first");

    let (_, coordinator) = &cluster.coordinators[0];
    let mut client = grpc::coordinator(coordinator).await;
    let cancel = CancelScaleRequest { id: String::new(), pool: "pooling".into() };
    client.cancel_scale(cancel.clone()).await.expect("it may be cancelled");
    for waiting in [first, second] {
        let error = waiting.await.expect("a reply").error(409).expect("cancelled");
        assert!(error["message"].as_str().is_some_and(|it| it.contains("was cancelled")));
    }
    assert!(cluster.launched().is_empty(), "{:?}", cluster.launched());
    assert_eq!(is_scaling().await, json!({"is_scaling_elastic_ep": false}));
    let late = client.cancel_scale(cancel).await.expect_err("there is none");
    assert_eq!(late.code(), tonic::Code::NotFound, "{late:?}");
    let over = CancelScaleRequest { id: running.id, pool: String::new() };
    let over = client.cancel_scale(over).await.expect_err("it is over");
    assert_eq!(over.code(), tonic::Code::FailedPrecondition, "{over:?}");
    cluster.finish().await;
}

/// A worker that does not get rid of its requests in time goes on serving.
#[tokio::test]
async fn a_drain_that_takes_too_long_fails_and_the_workers_stay() {
    let cluster = Elastic::start(1, &[], both).await;
    cluster.scaled("decode", 2).await;
    let silent = Pid::from_raw(cluster.pid("decode-2"));
    kill(silent, Signal::SIGSTOP).expect("stop a worker");
    // It must be seen to be silent, or the other is as good a choice.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let body = json!({"new_data_parallel_size": 1, "pool": "decode", "drain_timeout": 3});
    let reply = cluster.api.post("/scale_elastic_ep", &body).await;
    let error = reply.error(408).expect("out of time");
    assert_eq!(error["type"], "Request Timeout");
    let message = error["message"].as_str().expect("a text");
    let contract = "Scale failed due to request drain timeout after 3 seconds";
    assert!(message.starts_with(contract) && message.contains("decode-2"), "{message}");
    kill(silent, Signal::SIGCONT).expect("let it go on");
    assert_eq!(cluster.launched(), ["decode-1", "decode-2"]);
    let address = cluster.status("decode-2")["address"].as_str().expect("an address").to_owned();
    eventually("it serves again", Duration::from_secs(10), async || {
        let status = grpc::status(&address).await;
        if status.draining { Err(format!("{status:?}")) } else { Ok(()) }
    })
    .await;
    // What could not be done then can be done now.
    cluster.scaled("decode", 1).await;
    cluster.finish().await;
}

#[tokio::test]
async fn bad_bodies_are_answered_in_the_contracts_words() {
    let idle = |_: &_| vec![command("pooling", "none", Path::new("sleep"), &["1000"])];
    let cluster = Elastic::start(1, &[], idle).await;
    let post = async |body: &str, media: &str| {
        let path = "/scale_elastic_ep";
        let reply = cluster.api.send(Method::POST, path, Some(media), body.to_owned()).await;
        reply.expect("a reply").error(400).unwrap_or_else(|e| panic!("{body}: {e}"))
    };
    let size = "new_data_parallel_size must be a positive integer";
    let seconds = "drain_timeout must be a positive integer";
    for (body, message) in [
        ("", "Invalid JSON format"),
        ("{", "Invalid JSON format"),
        ("[1]", "Invalid JSON format"),
        ("{}", "new_data_parallel_size is required"),
        (r#"{"new_data_parallel_size": null}"#, "new_data_parallel_size is required"),
        (r#"{"new_data_parallel_size": 0}"#, size),
        (r#"{"new_data_parallel_size": -1}"#, size),
        (r#"{"new_data_parallel_size": 1.5}"#, size),
        (r#"{"new_data_parallel_size": "2"}"#, size),
        (r#"{"new_data_parallel_size": 1, "drain_timeout": 0}"#, seconds),
        (r#"{"new_data_parallel_size": 1, "drain_timeout": "soon"}"#, seconds),
    ] {
        let error = post(body, "application/json").await;
        assert_eq!((&error["message"], &error["type"]), (&message.into(), &"Bad Request".into()));
        assert_eq!(error["param"], Value::Null);
    }
    let error = post(r#"{"new_data_parallel_size": 1}"#, "text/plain").await;
    assert!(error["message"].as_str().is_some_and(|it| it.contains("application/json")));
    for (body, param) in [
        (json!({"new_data_parallel_size": 1, "pool": "gateway"}), "pool"),
        (json!({"new_data_parallel_size": 1, "pool": 7}), "pool"),
        (json!({"new_data_parallel_size": 1, "pool": "decode"}), "pool"),
        (json!({"new_data_parallel_size": 1, "pool": "pooling", "model": "other"}), "model"),
        (json!({"new_data_parallel_size": 100_000, "pool": "pooling"}), "new_data_parallel_size"),
    ] {
        let error = post(&body.to_string(), "application/json").await;
        assert_eq!(error["param"], param, "{error}");
    }
    assert!(cluster.operations().await.is_empty(), "nothing was begun");
    let mut cluster = cluster;
    cluster.coordinators.remove(0).0.stop().await;
    let body = json!({"new_data_parallel_size": 1, "pool": "pooling"});
    let reply = cluster.api.post("/scale_elastic_ep", &body).await;
    reply.error(503).expect("no coordinator");
    cluster.finish().await;
}
