//! The gateway's own share of a request, before workers that compute nothing.
//!
//! The gateway has one core to itself; the load and the null worker share the others. So the rate
//! is the gateway's own only while its core is busy: the requests that it serves in a second of
//! its processor time are reported, and the rate that was reached beside them.

use std::time::{Duration, Instant};

use baton_tests::bench::null::NullCluster;
use baton_tests::bench::procfs::{cpu_time, pin};
use baton_tests::bench::report::{Row, Target};
use baton_tests::bench::wire::{Wire, post};
use baton_tests::load::stats::median;
use baton_tests::{Cluster, MODEL_NAME, grpc};
use indicatif::ProgressBar;
use serde_json::json;

use crate::Settings;

/// Requests of a round, one after the other.
const ALONE: usize = 500;
const PROMPT: &str = "The capital of France is";
const TOKENS: usize = 5;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let builder = Cluster::builder().gateway_arg("--http-threads", "1");
    let NullCluster { cluster, worker: mut null, address: worker } =
        NullCluster::start(builder).await;
    let gateway = cluster.gateway().pid();
    pin(gateway, &[settings.gateway_core]);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let all: Vec<usize> = (0..cores).collect();
    let others: Vec<usize> =
        all.iter().copied().filter(|core| *core != settings.gateway_core).collect();
    if !others.is_empty() {
        pin(null.pid(), &others);
        pin(std::process::id(), &others);
    }
    let host = cluster.api.base().trim_start_matches("http://").to_owned();
    let body = json!({"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 1, "temperature": 0});
    let http = post(&host, "/v1/completions", &body.to_string());

    let mut added = Vec::new();
    let (mut through, mut straight) = (Vec::new(), Vec::new());
    let mut rates = Vec::new();
    for round in 0..=settings.rounds {
        let (a, b) = (by_gateway(&host, &http).await, by_grpc(&worker).await);
        let span = if round == 0 { Duration::from_secs(1) } else { round_span(settings) };
        let rate =
            under_load(&host, &http, settings.connections, span, [gateway, null.pid()]).await;
        // The first round warms up.
        if round > 0 {
            added.push(a - b);
            through.push(a);
            straight.push(b);
            rates.push(rate);
            progress.inc(1);
        }
    }
    null.stop().await;
    pin(std::process::id(), &all);
    let of = |value: fn(&Rate) -> f64| -> Vec<f64> { rates.iter().map(value).collect() };
    let (per_core, reached) = (of(|rate| rate.per_core), of(|rate| rate.reached));
    let busy = of(|rate| rate.gateway);
    let note = format!("{:.3} ms against {:.3} ms by gRPC", median(&through), median(&straight));
    let latency = Row::new(
        "gateway",
        "latency added by the gateway, p50",
        (median(&added), "ms"),
        Target::AtMost(0.3),
    )
    .note(note)
    .samples("by_gateway_ms", &through)
    .samples("by_grpc_ms", &straight);
    let note = format!(
        "{:.0} a second reached by {} connections; busy: gateway {:.0} %, null worker {:.0} %, load {:.0} % of a core",
        median(&reached),
        settings.connections,
        median(&busy) * 100.0,
        median(&of(|rate| rate.null)) * 100.0,
        median(&of(|rate| rate.load)) * 100.0
    );
    let what = "requests in a second of the gateway's processor time";
    let rate = Row::new("gateway", what, (median(&per_core), "/s"), Target::AtLeast(15_000.0))
        .note(note)
        .samples("per_core", &per_core)
        .samples("reached", &reached)
        .samples("gateway_busy", &busy);
    vec![latency, rate]
}

fn round_span(settings: &Settings) -> Duration {
    Duration::from_secs((settings.seconds / 2).max(1))
}

/// The median of requests one after the other through the gateway, in milliseconds.
async fn by_gateway(host: &str, request: &[u8]) -> f64 {
    let mut wire = Wire::connect(host).await.expect("connect to the gateway");
    let mut samples = Vec::with_capacity(ALONE);
    for _ in 0..ALONE {
        let start = Instant::now();
        let (status, body) = wire.call(request).await.expect("a reply");
        samples.push(start.elapsed().as_secs_f64() * 1e3);
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(body));
    }
    median(&samples)
}

/// The same, asked of the worker itself.
async fn by_grpc(worker: &str) -> f64 {
    let mut client = grpc::worker(worker).await;
    let mut samples = Vec::with_capacity(ALONE);
    for _ in 0..ALONE {
        let start = Instant::now();
        NullCluster::ask(&mut client, TOKENS).await;
        samples.push(start.elapsed().as_secs_f64() * 1e3);
    }
    median(&samples)
}

/// One round under load.
struct Rate {
    /// Requests a second.
    reached: f64,
    /// Requests in a second of the gateway's processor time.
    per_core: f64,
    /// How busy each process was, in cores.
    gateway: f64,
    null: f64,
    load: f64,
}

async fn under_load(
    host: &str,
    request: &[u8],
    connections: usize,
    span: Duration,
    [gateway, null]: [u32; 2],
) -> Rate {
    let before = [gateway, null, std::process::id()].map(cpu_time);
    let start = Instant::now();
    let one = async || {
        let mut wire = Wire::connect(host).await.expect("connect to the gateway");
        let mut count = 0.0;
        while start.elapsed() < span {
            let (status, body) = wire.call(request).await.expect("a reply");
            assert_eq!(status, 200, "{}", String::from_utf8_lossy(body));
            count += 1.0;
        }
        count
    };
    let counts: Vec<f64> = futures::future::join_all((0..connections).map(|_| one())).await;
    let took = start.elapsed().as_secs_f64();
    let after = [gateway, null, std::process::id()].map(cpu_time);
    let used = [0, 1, 2].map(|i| (after[i] - before[i]).as_secs_f64());
    let all: f64 = counts.iter().sum();
    Rate {
        reached: all / took,
        per_core: all / used[0],
        gateway: used[0] / took,
        null: used[1] / took,
        load: used[2] / took,
    }
}
