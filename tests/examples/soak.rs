//! A cluster under steady load for a long time: memory, file handles and KV blocks must not grow.
//!
//! Measures what the cluster can do, then sends at a share of that, open loop, and samples every
//! process. Writes `soak.json` and `soak.md`. Needs `haproxy` from Debian.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_tests::bench::{procfs, report};
use baton_tests::chaos::bed::{Bed, Needs, POOLS};
use baton_tests::chaos::traffic::{Ending, Traffic};
use baton_tests::load::stats::median;
use clap::Parser;
use serde::Serialize;
use serde_json::json;

/// Clients that fill the cluster, to see what it can do, and for how long.
const FILL: (usize, Duration) = (16, Duration::from_secs(30));
/// Clients that each gateway alone has before, and for how long: requests that come however it goes
/// are as many at a time now and then, when the machine is slow for a while.
const WARMING: (usize, Duration) = (64, Duration::from_secs(30));
/// Between two samples.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// Of the time, the part after which caches are full: growth is counted from there.
const WARM: f64 = 0.2;
/// How much more memory the last fifth may show than the fifth after the warm-up.
const MEMORY_GROWTH: f64 = 1.05;

#[derive(Parser)]
struct Args {
    /// Minutes under load.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Share of what the cluster can do.
    #[arg(long, default_value_t = 0.8)]
    load: f64,
    /// Where the results go.
    #[arg(long, default_value = "docs/benchmarks")]
    out: PathBuf,
}

/// One look at a process.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    /// Seconds since the load began.
    at: f64,
    /// Its own memory, in MiB: without the model's file and the KV pool, which are mapped.
    memory: f64,
    /// Open files and sockets.
    handles: f64,
}

// One thread, the first: the processes that it starts die with it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let bed = Bed::start(Needs::default()).await;
    // Gateways and workers keep what the most requests at a time have needed: they have had them
    // before growth is counted.
    for gateway in &bed.gateways {
        let warming = Traffic::learn(&gateway.address).await.clients(WARMING.0, 0..1);
        tokio::time::sleep(WARMING.1).await;
        warming.stop().await;
    }
    let filling = Traffic::learn(bed.url()).await.clients(FILL.0, 0..1);
    tokio::time::sleep(FILL.1).await;
    let capacity = filling.so_far().0 as f64 / FILL.1.as_secs_f64();
    filling.stop().await;
    eprintln!("the cluster answers {capacity:.1} requests a second");

    let span = Duration::from_secs_f64(args.minutes * 60.0);
    let rate = capacity * args.load;
    let traffic = Traffic::learn(bed.url()).await.arrivals(rate, span);
    let processes = processes(&bed);
    let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
    let mut blocks = Vec::new();
    let began = Instant::now();
    while began.elapsed() < span {
        tokio::time::sleep(SAMPLE_EVERY).await;
        let at = began.elapsed().as_secs_f64();
        for (name, pid) in &processes {
            let memory = procfs::resident(*pid).anonymous as f64 / f64::from(1 << 20);
            let handles = procfs::handles(*pid) as f64;
            samples.entry(name).or_default().push(Sample { at, memory, handles });
        }
        blocks.push(bed.owned_blocks().await as f64);
        eprintln!("{at:.0} s: {}", traffic.summary());
    }
    let sent = traffic.stop().await;
    let wrong: Vec<_> = sent.iter().filter(|it| it.ending != Ending::Right).collect();
    let at_rest = bed.owned_blocks().await;
    bed.finish().await;

    let mut flat = wrong.is_empty() && at_rest == 0;
    let mut table = "| process | memory, MiB | at the end | handles | at the end |\n\
                     | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for (name, samples) in &samples {
        let memory = ends(samples.iter().map(|it| it.memory).collect());
        let handles = ends(samples.iter().map(|it| it.handles).collect());
        // A connection more or less is no leak.
        flat &= memory.1 <= memory.0 * MEMORY_GROWTH && handles.1 <= handles.0 + 4.0;
        table += &format!(
            "| {name} | {:.1} | {:.1} | {} | {} |\n",
            memory.0, memory.1, handles.0, handles.1
        );
    }
    let owned = ends(blocks.clone());
    let text = format!(
        "{:.0} minutes at {:.0} % of {capacity:.1} requests a second: {} requests, {} not right. \
         KV blocks owned by requests, median: {} after the warm-up, {} at the end, {at_rest} at \
         rest.\n\n{table}",
        args.minutes,
        args.load * 100.0,
        sent.len(),
        wrong.len(),
        owned.0,
        owned.1,
    );
    let value = json!({
        "machine": report::machine(), "minutes": args.minutes, "capacity": capacity,
        "rate": rate, "requests": sent.len(), "failures": wrong.iter().map(|it| format!("{it:?}"))
            .collect::<Vec<_>>(), "flat": flat, "owned_blocks": blocks, "samples": samples,
    });
    report::write(&args.out, "soak", &value, &text);
    println!("{text}\n{}", if flat { "flat" } else { "NOT FLAT" });
    if flat { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The medians of the fifth after the warm-up and of the last fifth.
fn ends(values: Vec<f64>) -> (f64, f64) {
    let fifth = (values.len() / 5).max(1);
    let warm = (values.len() as f64 * WARM) as usize;
    (median(&values[warm..warm + fifth]), median(&values[values.len() - fifth..]))
}

/// All processes of Baton.
fn processes(bed: &Bed) -> Vec<(String, u32)> {
    let mut all = Vec::new();
    for (n, gateway) in bed.gateways.iter().enumerate() {
        all.push((format!("gateway-{n}"), gateway.process.pid()));
    }
    for (n, coordinator) in bed.coordinators.iter().enumerate() {
        all.push((format!("coordinator-{n}"), coordinator.process.pid()));
    }
    for pool in POOLS {
        for (n, pid) in bed.workers(pool).into_iter().enumerate() {
            all.push((format!("{pool}-{n}"), pid.as_raw().unsigned_abs()));
        }
    }
    all
}
