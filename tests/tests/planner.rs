//! The planner on real workers: load makes a pool grow, its end makes it shrink, and a dry run only
//! talks.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use baton_proto::v1::{CancelScaleRequest, ListPlansRequest, ScaleOperation, ScaleRequest};
use baton_tests::binaries::{MODEL_NAME, program};
use baton_tests::elastic::{Elastic, command, worker};
use baton_tests::{eventually, grpc};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Decisions every second, and short memories.
const FLAGS: [&str; 14] = [
    "--planner-ttft-ms",
    "1000",
    "--planner-itl-ms",
    "1000",
    "--planner-interval",
    "1",
    "--planner-startup",
    "5",
    "--planner-down-window",
    "5",
    "--planner-cooldown",
    "2",
    "--planner-pool",
    "unified=1..2",
];

/// How long a decision and what follows from it may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn unified(etcd: &baton_tests::etcd::Etcd) -> Vec<Value> {
    vec![worker("unified", etcd)]
}

/// Clients that ask again as soon as they are answered: more than one worker can compute.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<usize>>,
}

impl Load {
    async fn start(cluster: &Elastic) -> Self {
        let body = json!({"model": MODEL_NAME, "prompt": "One", "max_tokens": 1});
        eventually("the gateway has found the worker", PATIENCE, async || {
            let reply = cluster.api.post("/v1/completions", &body).await;
            if reply.status == 200 { Ok(()) } else { Err(reply.status.to_string()) }
        })
        .await;
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..8).map(|client| {
            let (api, stop) = (cluster.api.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(Relaxed) {
                    // Nothing of it is in a cache.
                    let text = format!("{client} {answered} ").repeat(60);
                    let body = json!({"model": MODEL_NAME, "prompt": text, "max_tokens": 4});
                    api.ok("/v1/completions", &body).await;
                    answered += 1;
                }
                answered
            })
        });
        Self { clients: clients.collect(), stop }
    }

    async fn stop(self) -> usize {
        self.stop.store(true, Relaxed);
        let mut all = 0;
        for client in self.clients {
            all += client.await.expect("every request is answered");
        }
        all
    }
}

async fn plans(cluster: &Elastic) -> (String, Vec<Value>) {
    let (_, address) = cluster.coordinators.last().expect("a coordinator");
    let asked = grpc::coordinator(address).await.list_plans(ListPlansRequest {}).await;
    let plans = asked.expect("the decisions").into_inner();
    let parsed = plans.decisions.iter().map(|it| serde_json::from_str(it).expect("JSON"));
    (plans.mode, parsed.collect())
}

fn size(cluster: &Elastic, expected: usize) -> Result<(), String> {
    let registered = cluster.registered("unified");
    let (workers, launched) = (registered.len(), cluster.launched());
    if workers == expected && launched.len() == expected {
        Ok(())
    } else {
        Err(format!("{workers} workers; {launched:?}"))
    }
}

#[tokio::test]
async fn load_makes_a_pool_grow_and_its_end_makes_it_shrink() {
    let flags = [&["--planner", "on"][..], &FLAGS].concat();
    let cluster = Elastic::start(1, &flags, unified).await;
    // Nobody has asked for it: the pool's least size is one.
    eventually("there is a worker", PATIENCE, async || size(&cluster, 1)).await;
    let load = Load::start(&cluster).await;
    eventually("the pool grows", PATIENCE, async || size(&cluster, 2)).await;
    let answered = load.stop().await;
    eventually("the pool shrinks", PATIENCE, async || size(&cluster, 1)).await;
    println!("{answered} requests answered");

    // Its process may be gone before the operation knows.
    cluster.phase("done").await;
    let operations = cluster.operations().await;
    let sizes: Vec<u32> = operations.iter().map(|it| it.size).collect();
    assert_eq!(sizes, [1, 2, 1], "{operations:#?}");
    assert!(operations.iter().all(|it| it.planned), "{operations:#?}");
    let (mode, decisions) = plans(&cluster).await;
    assert_eq!(mode, "on");
    let grown = decisions.iter().find(|it| it["operations"] == json!([operations[1].id]));
    let pool = &grown.expect("the decision that asked for it")["decision"]["pools"][0];
    assert_eq!((&pool["size"], &pool["target"]), (&json!(1), &json!(2)), "{pool}");
    assert!(pool["inputs"]["requests"].as_f64() > Some(0.0), "{pool}");
    assert!(pool["inputs"]["prompt_token"].as_f64() > Some(0.0), "{pool}");

    // What an operator says stands, although one worker would do.
    cluster.scaled("unified", 2).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    size(&cluster, 2).expect("it is left alone");
    let (_, decisions) = plans(&cluster).await;
    let last = &decisions.last().expect("a decision")["decision"]["pools"][0];
    let reason = last["reason"].as_str().expect("a reason");
    assert!(reason.contains("an operator has set the size"), "{last}");
    cluster.finish().await;
}

/// A cluster whose planner has begun an operation, which a worker that never serves keeps under way.
async fn begun() -> (Elastic, ScaleOperation) {
    let flags = [&["--planner", "on"][..], &FLAGS].concat();
    let never = |_: &baton_tests::etcd::Etcd| {
        vec![command("unified", MODEL_NAME, Path::new("sleep"), &["1000"])]
    };
    let cluster = Elastic::start(1, &flags, never).await;
    let planned = cluster.phase("join").await;
    assert!(planned.planned && planned.size == 1, "{planned:?}");
    (cluster, planned)
}

fn wanted(size: u32) -> ScaleRequest {
    ScaleRequest { pool: "unified".into(), size, ..Default::default() }
}

#[tokio::test]
async fn an_operators_request_takes_back_what_the_planner_has_begun() {
    let (cluster, planned) = begun().await;
    let (_, address) = cluster.coordinators.last().expect("a coordinator");
    let mut client = grpc::coordinator(address).await;
    let asked = client.scale(wanted(2)).await.expect("the planner gives way").into_inner();
    assert!(!asked.planned && asked.size == 2, "{asked:?}");
    let operations = cluster.operations().await;
    let taken = operations.iter().find(|it| it.id == planned.id).expect("its record");
    assert_eq!(taken.phase, "cancelled", "{taken:?}");
    // The planner lets it be, also once it is over.
    cluster.phase("join").await;
    let cancel = CancelScaleRequest { id: asked.id.clone(), pool: String::new() };
    client.cancel_scale(cancel).await.expect("it can be taken back");
    cluster.phase("cancelled").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let last = cluster.operations().await.pop().expect("a history");
    assert_eq!(last.id, asked.id, "{last:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn an_operator_who_asks_for_what_the_planner_does_is_an_operator() {
    let (cluster, planned) = begun().await;
    let (_, address) = cluster.coordinators.last().expect("a coordinator");
    let mut client = grpc::coordinator(address).await;
    let asked = client.scale(wanted(1)).await.expect("it joins").into_inner();
    assert_eq!((asked.id, asked.planned), (planned.id.clone(), false));
    // Another operator's wish does not take it back.
    let refused = client.scale(wanted(2)).await.expect_err("an operation runs");
    assert_eq!(refused.code(), tonic::Code::AlreadyExists, "{refused:?}");
    let running = cluster.operations().await.pop().expect("it runs");
    assert_eq!((running.id, running.phase.as_str(), running.planned), (planned.id, "join", false));
    cluster.finish().await;
}

/// A pool lacks a worker, and another has one that it can do without.
#[tokio::test]
async fn a_pool_grows_by_what_another_has_to_spare() {
    let pools =
        |etcd: &baton_tests::etcd::Etcd| vec![worker("prefill", etcd), worker("decode", etcd)];
    let mut flags = vec!["--planner", "on", "--planner-hold", "0", "--planner-down-window", "600"];
    flags.extend(["--planner-ttft-ms", "60000", "--planner-itl-ms", "10000"]);
    flags.extend(["--planner-interval", "1", "--planner-startup", "5", "--planner-cooldown", "2"]);
    flags.extend(["--planner-pool", "prefill=1..3", "--planner-pool", "decode=2..2"]);
    let cluster = Elastic::start(1, &flags, pools).await;
    let sizes = |expected: [usize; 2]| {
        let there = ["prefill", "decode"].map(|pool| cluster.registered(pool).len());
        if there == expected { Ok(()) } else { Err(format!("{there:?}")) }
    };
    eventually("each pool has its least size", PATIENCE, async || sizes([1, 2])).await;
    cluster.phase("done").await;
    cluster.scaled("prefill", 3).await;
    // What nobody has asked anything of is not known to be too large.
    let load = Load::start(&cluster).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    load.stop().await;
    eventually("a prefill worker can be spared", PATIENCE, async || {
        let (_, decisions) = plans(&cluster).await;
        let pools = decisions.last().map(|it| it["decision"]["pools"].clone());
        let prefill = |it: &Value| it["pool"].as_str().is_some_and(|it| it.starts_with("prefill"));
        let pool = pools.iter().filter_map(Value::as_array).flatten().find(|it| prefill(it));
        match pool.and_then(|pool| pool["spare"].as_u64()) {
            Some(1..) => Ok(()),
            _ => Err(format!("{pool:?}")),
        }
    })
    .await;
    cluster.scale("decode", 1).await.ok();
    eventually("it serves as a decode worker", PATIENCE, async || sizes([2, 2])).await;
    cluster.phase("done").await;
    let operations = cluster.operations().await;
    let last = operations.last().expect("a history");
    assert!(last.planned && last.launched.is_empty(), "{last:?}");
    assert_eq!((last.pool.as_str(), last.from_pool.as_str()), ("decode", "prefill"));
    assert_eq!((last.from, last.size, last.converted.len()), (1, 2, 1), "{last:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn a_dry_run_tells_what_it_would_do_and_does_nothing() {
    let flags = [&["--planner", "dry-run", "--planner-hold", "0"][..], &FLAGS].concat();
    let cluster = Elastic::start(1, &flags, unified).await;
    cluster.scaled("unified", 1).await;
    let load = Load::start(&cluster).await;
    eventually("it would have two", PATIENCE, async || {
        let (mode, decisions) = plans(&cluster).await;
        assert_eq!(mode, "dry-run");
        let last = decisions.last().map(|it| it["decision"]["pools"][0].clone());
        match last {
            Some(pool) if pool["target"] == 2 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    load.stop().await;
    size(&cluster, 1).expect("nothing was done");
    let operations = cluster.operations().await;
    assert!(operations.iter().all(|it| !it.planned), "{operations:#?}");

    let (_, coordinator) = cluster.coordinators.last().expect("a coordinator");
    let baton = async |flags: &[&str]| {
        let mut command = tokio::process::Command::new(program("baton"));
        command.args(["plan", "--coordinator", coordinator]).args(flags);
        let output = command.output().await.expect("run baton");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let table = baton(&["--last", "3"]).await;
    assert!(table.contains("dry-run") && table.contains("unified/"), "{table}");
    let lines = baton(&["--json", "--last", "2"]).await;
    let lines: Vec<Value> =
        lines.lines().map(|it| serde_json::from_str(it).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["mode"], "dry-run");
    cluster.finish().await;
}

/// Where the mistake is one of flags, the coordinator says so and ends.
#[tokio::test]
async fn a_planner_without_a_pool_or_workers_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = baton_tests::etcd::Etcd::start(dir.path()).await;
    let start = async |flags: &[&str]| {
        let mut command = tokio::process::Command::new(program("baton-coordinator"));
        command.args(["--listen", "127.0.0.1:0", "--etcd", etcd.url(), "--planner", "on"]);
        let ended = command.args(flags).kill_on_drop(true).output();
        let output = tokio::time::timeout(Duration::from_secs(30), ended).await;
        let output = output.expect("it ends").expect("run it");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = start(&["--planner-pool", "decode=1..2"]).await;
    assert!(said.contains("--workers FILE"), "{said}");
    let workers = dir.path().join("workers.json");
    std::fs::write(&workers, json!({"pools": unified(&etcd)}).to_string()).expect("write it");
    let folder = dir.path().join("workers");
    let paths = [&workers, &folder].map(|path| path.to_str().expect("UTF-8"));
    let workers = ["--workers", paths[0], "--workers-dir", paths[1]];
    let said = start(&[&workers[..], &["--planner-pool", "decode=1..2"]].concat()).await;
    assert!(said.contains("no worker of this pool can be launched"), "{said}");
    let said = start(&workers).await;
    assert!(said.contains("--planner-pool"), "{said}");
}
