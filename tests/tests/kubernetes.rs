//! Pools that are StatefulSets: the coordinator's launcher against a scripted API server, with
//! real workers as its pods, while it refuses, forgets, breaks off and is away.

use std::time::Duration;

use baton_proto::v1::CancelScaleRequest;
use baton_tests::binaries::MODEL_NAME;
use baton_tests::elastic::{Elastic, worker};
use baton_tests::kubernetes::Behaviour;
use baton_tests::{Reply, eventually, grpc};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::task::JoinHandle;

/// A cluster with a pool that works, of so many pods.
async fn cluster(coordinators: usize, flags: &[&str], pods: u64) -> Elastic {
    let mut cluster = Elastic::on_kubernetes(coordinators, flags).await;
    let works = works(&cluster, Duration::ZERO);
    cluster.kubernetes().add_pool("decode", MODEL_NAME, works);
    cluster.kubernetes().kubectl_scale("decode", pods);
    eventually("the pods serve", Duration::from_secs(60), async || {
        let there = cluster.registered("decode").len() as u64;
        if there == pods { Ok(()) } else { Err(format!("{there} of {pods}")) }
    })
    .await;
    cluster
}

fn works(cluster: &Elastic, after: Duration) -> Behaviour {
    Behaviour::works(&worker("decode", &cluster.etcd), after)
}

fn ask(cluster: &Elastic, size: u32) -> JoinHandle<Reply> {
    let api = cluster.api.clone();
    tokio::spawn(async move {
        let body = json!({"new_data_parallel_size": size, "pool": "decode"});
        api.post("/scale_elastic_ep", &body).await
    })
}

async fn refused(cluster: &Elastic, pool: &str, size: u32) -> String {
    let error = cluster.scale(pool, size).await.error(500).expect("it fails");
    error["message"].as_str().expect("a text").to_owned()
}

fn stop(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal a worker");
}

#[tokio::test]
async fn a_pool_grows_and_shrinks_by_its_last_pods_which_are_drained_first() {
    let mut cluster = cluster(1, &[], 1).await;
    // Others write at the same time.
    cluster.kubernetes().conflicts(3);
    cluster.scaled("decode", 3).await;
    assert_eq!(cluster.kubernetes().pods(), ["decode-0", "decode-1", "decode-2"]);
    let body = json!({"model": MODEL_NAME, "prompt": "One two three", "max_tokens": 2});
    cluster.api.ok("/v1/completions", &body).await;
    // Operators see pods by their names.
    let view = grpc::cluster_view(&cluster.coordinators[0].1).await;
    let mut names: Vec<_> = view.instances.iter().map(|it| it.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names.split_off(names.len() - 3), ["decode-0", "decode-1", "decode-2"]);

    cluster.scaled("decode", 1).await;
    assert_eq!(cluster.kubernetes().pods(), ["decode-0"]);
    let ends = cluster.kubernetes().ends();
    let mut names: Vec<_> = ends.iter().map(|end| end.pod.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["decode-1", "decode-2"]);
    assert!(ends.iter().all(|end| end.told == Some((true, 0))), "drained before: {ends:?}");
    cluster.api.ok("/v1/completions", &body).await;

    let operation = cluster.operations().await.pop().expect("a history");
    assert_eq!(operation.retired, ["decode-2", "decode-1"]);
    let requests = cluster.kubernetes().requests();
    let patches: Vec<_> = requests.iter().filter(|it| it.starts_with("patch")).collect();
    assert!(patches.len() >= 3 + 3, "each conflict is tried again: {patches:?}");
    assert!(patches.iter().all(|it| it.starts_with("patch statefulsets/scale decode ")));
    cluster.finish().await;
}

/// A watch that is cut goes on where it was; one whose version is forgotten begins with a list.
#[tokio::test]
async fn watches_that_are_cut_or_forgotten_miss_nothing() {
    let mut cluster = cluster(1, &[], 1).await;
    let lists = |requests: &[String]| requests.iter().filter(|it| it.starts_with("list")).count();
    let watches =
        |requests: &[String]| requests.iter().filter(|it| it.starts_with("watch")).count();
    let before = cluster.kubernetes().requests();
    cluster.kubernetes().cut_watches();
    eventually("it watches again", Duration::from_secs(10), async || {
        let requests = cluster.kubernetes().requests();
        let more = watches(&requests) - watches(&before);
        if more >= 2 { Ok(()) } else { Err(format!("{more} more")) }
    })
    .await;
    cluster.scaled("decode", 2).await;
    let after = cluster.kubernetes().requests();
    assert_eq!(lists(&after), lists(&before), "it went on from its version: {after:#?}");

    cluster.kubernetes().forget_versions();
    cluster.kubernetes().cut_watches();
    cluster.scaled("decode", 1).await;
    assert_eq!(cluster.kubernetes().pods(), ["decode-0"]);
    let last = cluster.kubernetes().requests();
    assert!(lists(&last) > lists(&after), "it listed anew: {last:#?}");
    cluster.finish().await;
}

/// What was applied a moment ago can be scaled.
#[tokio::test]
async fn a_pool_is_found_before_a_watch_tells_of_it() {
    let mut cluster = cluster(1, &[], 1).await;
    cluster.kubernetes().tell_late(Duration::from_secs(3));
    let works = Behaviour::works(&worker("prefill", &cluster.etcd), Duration::ZERO);
    cluster.kubernetes().add_pool("prefill", MODEL_NAME, works);
    cluster.scaled("prefill", 1).await;
    assert_eq!(cluster.kubernetes().pods(), ["decode-0", "prefill-0"]);
    cluster.finish().await;
}

/// Pods are slow, the API server goes away and comes back, and the leader dies meanwhile.
#[tokio::test]
async fn another_coordinator_finishes_although_the_api_server_was_away() {
    let mut cluster = cluster(2, &[], 1).await;
    let slow = works(&cluster, Duration::from_secs(6));
    cluster.kubernetes().behave("decode", slow);
    let up = ask(&cluster, 2);
    cluster.phase("join").await;
    cluster.kubernetes().go_away().await;
    let leader = cluster.leader().await;
    cluster.coordinators.remove(leader).0.kill();
    // Longer than it takes the other to lead.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(cluster.phase("join").await.launched, ["decode-1"], "nothing is undone unseen");
    cluster.kubernetes().come_back().await;
    up.await.expect("a reply").ok();
    assert_eq!(cluster.kubernetes().pods(), ["decode-0", "decode-1"]);

    // The pod that is to go falls silent, so that its drain takes until it speaks again.
    cluster.add_coordinator().await;
    let silent = cluster.kubernetes().pid("decode-1");
    stop(silent, Signal::SIGSTOP);
    let down = ask(&cluster, 1);
    assert_eq!(cluster.phase("drain").await.retired, ["decode-1"]);
    let leader = cluster.leader().await;
    cluster.coordinators.remove(leader).0.kill();
    stop(silent, Signal::SIGCONT);
    down.await.expect("a reply").ok();
    assert_eq!(cluster.kubernetes().pods(), ["decode-0"]);
    let ends = cluster.kubernetes().ends();
    assert_eq!(ends[0].told, Some((true, 0)), "{ends:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn a_launch_that_fails_is_rolled_back_with_the_pods_own_reason() {
    let mut cluster = cluster(1, &["--launch-timeout", "8"], 1).await;
    let kubernetes = cluster.kubernetes();
    let image = "Back-off pulling image \"baton:typo\": ErrImagePull: baton:typo: not found";
    let nodes = "0/3 nodes are available: 3 Insufficient memory.";
    let waits = Behaviour::Waits { reason: "ImagePullBackOff", message: image };
    kubernetes.add_pool("prefill", "typo", waits);
    kubernetes.add_pool("unified", "large", Behaviour::Unschedulable(nodes));
    let crashes = Behaviour::Crashes { reason: "OOMKilled", exit_code: 137, message: "" };
    kubernetes.add_pool("pooling", "greedy", crashes);
    let hopeless =
        Behaviour::Crashes { reason: "Error", exit_code: 66, message: "error: no model at /m" };
    kubernetes.add_pool("audio", "gone", hopeless);
    for (pool, reason) in [
        ("prefill", image),
        ("unified", nodes),
        ("pooling", "OOMKilled, exit code 137"),
        ("audio", "no model at /m"),
    ] {
        let message = refused(&cluster, pool, 2).await;
        assert!(message.contains(reason), "{pool}: {message}");
        assert_eq!(cluster.kubernetes().replicas(pool), 0, "{pool}");
        assert_eq!(cluster.kubernetes().pods(), ["decode-0"], "after {pool}");
    }
    // A pod that would come, but not in time.
    let slow = works(&cluster, Duration::from_secs(600));
    cluster.kubernetes().behave("decode", slow);
    let message = refused(&cluster, "decode", 2).await;
    assert!(message.contains("decode-1 does not serve after 8 s"), "{message}");
    assert_eq!(cluster.kubernetes().pods(), ["decode-0"]);
    cluster.finish().await;
}

#[tokio::test]
async fn what_the_role_does_not_allow_is_told_by_verb_and_resource() {
    let mut cluster = cluster(1, &[], 1).await;
    for (verb, resource) in [
        ("patch", "statefulsets/scale"),
        ("get", "statefulsets/scale"),
        ("watch", "pods"),
        ("watch", "statefulsets"),
    ] {
        let tried = |cluster: &mut Elastic| {
            let asked = format!("{verb} {resource}");
            let requests = cluster.kubernetes().requests();
            requests.iter().filter(|it| it.starts_with(&asked)).count()
        };
        let before = tried(&mut cluster);
        cluster.kubernetes().forbid(verb, resource);
        if verb == "watch" {
            // The second try comes after the first was refused.
            eventually("it has noticed", Duration::from_secs(10), async || {
                let tries = tried(&mut cluster) - before;
                if tries >= 2 { Ok(()) } else { Err(format!("{tries} tries")) }
            })
            .await;
        }
        let message = refused(&cluster, "decode", 2).await;
        let said = format!("cannot {verb} {resource}");
        assert!(message.contains(&said) && message.contains("403"), "{message}");
        assert!(message.contains("coordinator-rbac.yaml"), "it names the Role: {message}");
        assert_eq!(cluster.kubernetes().replicas("decode"), 1);
        cluster.kubernetes().allow_all();
    }
    // What was forbidden is allowed now, and needs no restart.
    cluster.scaled("decode", 2).await;
    cluster.finish().await;
}

/// The later wish stands, and whoever asked first is told.
#[tokio::test]
async fn replicas_that_somebody_else_sets_meanwhile_are_left_and_told() {
    let mut cluster = cluster(1, &[], 2).await;
    let slow = works(&cluster, Duration::from_secs(3));
    cluster.kubernetes().behave("decode", slow);
    let up = ask(&cluster, 3);
    cluster.phase("join").await;
    cluster.kubernetes().kubectl_scale("decode", 4);
    let error = up.await.expect("a reply").error(500).expect("it fails");
    let message = error["message"].as_str().expect("a text");
    let told = "StatefulSet `decode` has 4 replicas, last set by kubectl at 2026-02-03";
    assert!(message.contains(told), "{message}");
    eventually("both pods serve", Duration::from_secs(60), async || {
        let there = cluster.registered("decode").len();
        if there == 4 { Ok(()) } else { Err(format!("{there}")) }
    })
    .await;

    // While one drains, somebody wants it to stay, and another one more.
    let silent = cluster.kubernetes().pid("decode-3");
    stop(silent, Signal::SIGSTOP);
    let down = ask(&cluster, 2);
    assert_eq!(cluster.phase("drain").await.retired, ["decode-3", "decode-2"]);
    cluster.kubernetes().kubectl_scale("decode", 5);
    stop(silent, Signal::SIGCONT);
    let error = down.await.expect("a reply").error(500).expect("it fails");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("5 replicas")), "{error}");
    assert_eq!(cluster.kubernetes().replicas("decode"), 5);
    eventually("nobody drains", Duration::from_secs(30), async || {
        let view = grpc::cluster_view(&cluster.coordinators[0].1).await;
        let drain = |it: &&_| matches!(it, baton_proto::v1::Instance { status: Some(status), .. } if status.draining);
        let left: Vec<_> = view.instances.iter().filter(drain).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_pool_without_a_statefulset_is_refused_and_a_cancelled_growth_is_taken_back() {
    let mut cluster = cluster(1, &[], 1).await;
    let reply = cluster.scale("prefill", 1).await;
    let error = reply.error(400).expect("there is no such pool");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("StatefulSet")), "{error}");
    let slow = works(&cluster, Duration::from_secs(600));
    cluster.kubernetes().behave("decode", slow);
    let up = ask(&cluster, 3);
    let running = cluster.phase("join").await;
    let cancel = CancelScaleRequest { id: running.id, pool: String::new() };
    let mut client = grpc::coordinator(&cluster.coordinators[0].1).await;
    client.cancel_scale(cancel).await.expect("it may be cancelled");
    up.await.expect("a reply").error(409).expect("it was cancelled");
    assert_eq!(cluster.kubernetes().replicas("decode"), 1);
    assert_eq!(cluster.kubernetes().pods(), ["decode-0"]);
    cluster.finish().await;
}
