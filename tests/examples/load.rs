//! Open-loop load on whole clusters, at rising rates: what a pool of workers keeps up with.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example load
//! ```
//!
//! Requests arrive as a Poisson process and are sent whether or not earlier ones are answered.
//! Writes `load.json` and `load.md` to `docs/benchmarks`; `tests/bench/plot_load.py` draws them.
//! `tests/bench/README.md` says where the lengths of the requests come from.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use baton_tests::Cluster;
use baton_tests::bench::report::{machine, write};
use baton_tests::binaries::{model, repository};
use baton_tests::load::arrivals::poisson;
use baton_tests::load::client::{self, Sent};
use baton_tests::load::lengths::{ANSWERS, Lengths, PROMPTS, Source};
use baton_tests::load::outcome::{Outcome, Slo};
use baton_tests::load::trace;
use clap::{Parser, ValueEnum};
use indicatif::ProgressBar;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::json;

/// Sends open-loop load to clusters of equal size and different kind.
#[derive(Debug, Parser)]
struct Settings {
    /// Clusters to run, each of two workers.
    #[arg(long, value_delimiter = ',', default_value = "unified,disaggregated")]
    pools: Vec<Pool>,

    /// Requests a second, one run for each. A pool's sweep ends when few requests keep the SLO.
    #[arg(long, value_delimiter = ',', default_value = "0.25,0.5,1,1.5,2,3,4,6,8")]
    rates: Vec<f64>,

    /// Seconds that requests arrive in each run.
    #[arg(long, default_value_t = 60)]
    seconds: u64,

    /// Threads of each worker.
    #[arg(long, default_value_t = 1)]
    threads: usize,

    /// A trace to draw lengths from: Azure's CSV or Mooncake's JSON lines.
    #[arg(long)]
    trace: Option<PathBuf>,

    /// Lengths are multiplied by this, to fit a small model on a small machine.
    #[arg(long, default_value_t = 0.25)]
    scale: f64,

    /// Longest prompt, in tokens.
    #[arg(long, default_value_t = 1536)]
    max_prompt: usize,

    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 256)]
    max_answer: usize,

    /// Longest time to the first token of a good request.
    #[arg(long, default_value_t = 2000.0)]
    slo_ttft_ms: f64,

    /// Longest mean time between the tokens of a good request.
    #[arg(long, default_value_t = 100.0)]
    slo_itl_ms: f64,

    /// A sweep goes on while at least this share of the requests is good.
    #[arg(long, default_value_t = 0.2)]
    stop_below: f64,

    /// Seed of arrivals and lengths: every pool gets the same requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Folder to write to.
    #[arg(long, default_value_os_t = repository().join("docs/benchmarks"))]
    out: PathBuf,
}

/// A kind of cluster, of two workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Pool {
    /// Two workers that do both.
    Unified,
    /// One prefill and one decode worker.
    Disaggregated,
}

impl Pool {
    fn name(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Disaggregated => "disaggregated",
        }
    }

    async fn start(self, threads: usize) -> Cluster {
        let builder = match self {
            Self::Unified => Cluster::builder().unified(2),
            Self::Disaggregated => Cluster::builder().prefill(1).decode(1),
        };
        builder.kv_memory("1GiB").worker_arg("--threads", &threads.to_string()).start().await
    }
}

/// One pool at one rate.
#[derive(Debug, Serialize)]
struct Run {
    pool: Pool,
    rate: f64,
    #[serde(flatten)]
    outcome: Outcome,
}

/// One thread: the load must leave the cores to the cluster.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), String> {
    let settings = Settings::parse();
    let source = match &settings.trace {
        Some(path) => Source::Trace(trace::read(path)?),
        None => Source::Drawn(PROMPTS, ANSWERS),
    };
    let progress = ProgressBar::new((settings.pools.len() * settings.rates.len()) as u64);
    let mut runs = Vec::new();
    for &pool in &settings.pools {
        for &rate in &settings.rates {
            // A cluster of its own for each run: nothing is cached, no queue is left.
            let cluster = pool.start(settings.threads).await;
            let outcome = run(&cluster, &settings, &source, rate).await;
            progress.inc(1);
            progress.println(line(pool, rate, &outcome));
            let collapsed = outcome.good < settings.stop_below;
            runs.push(Run { pool, rate, outcome });
            if collapsed {
                break;
            }
        }
    }
    progress.finish_and_clear();
    let text = markdown(&settings, &runs);
    println!("{text}");
    let report = json!({
        "machine": machine(),
        "model": model().file_name().and_then(|name| name.to_str()),
        "lengths": lengths(&settings),
        "seconds": settings.seconds,
        "threads": settings.threads,
        "slo_ttft_ms": settings.slo_ttft_ms,
        "slo_itl_ms": settings.slo_itl_ms,
        "runs": runs,
    });
    write(&settings.out, "load", &report, &text);
    Ok(())
}

/// Sends a run's requests and waits for all of them to end.
async fn run(cluster: &Cluster, settings: &Settings, source: &Source, rate: f64) -> Outcome {
    let mut rng = StdRng::seed_from_u64(settings.seed);
    let span = Duration::from_secs(settings.seconds);
    let most = Lengths { prompt: settings.max_prompt, answer: settings.max_answer };
    let arrivals = poisson(rate, span, &mut rng);
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let start = Instant::now();
    let mut tasks = Vec::with_capacity(arrivals.len());
    for arrival in arrivals {
        let lengths = source.draw(settings.scale, most, &mut rng);
        tokio::time::sleep_until((start + arrival).into()).await;
        let (client, base) = (client.clone(), cluster.api.base().to_owned());
        tasks.push(tokio::spawn(async move { client::send(&client, &base, lengths).await }));
    }
    let mut sent = Vec::with_capacity(tasks.len());
    for task in tasks {
        sent.push(task.await.unwrap_or(Sent::Failed(0)));
    }
    let slo = Slo { ttft: settings.slo_ttft_ms / 1e3, itl: settings.slo_itl_ms / 1e3 };
    Outcome::of(&sent, span.as_secs_f64(), start.elapsed().as_secs_f64(), slo)
}

fn lengths(settings: &Settings) -> String {
    let Settings { scale, max_prompt, max_answer, .. } = settings;
    let from = match &settings.trace {
        Some(path) => path.file_name().map_or("?".into(), |name| name.to_string_lossy()),
        None => "log-normal, as the Azure conversation trace of 2023".into(),
    };
    format!("{from}, times {scale}, prompts up to {max_prompt}, answers up to {max_answer} tokens")
}

fn line(pool: Pool, rate: f64, outcome: &Outcome) -> String {
    let failed: Vec<String> =
        outcome.failed.iter().map(|(status, count)| format!("{count} × {status}")).collect();
    let failed = if failed.is_empty() { "–".to_owned() } else { failed.join(", ") };
    let Outcome { throughput, tokens_per_second, goodput, good, ttft, itl, e2e, .. } = outcome;
    format!(
        "| {} | {rate} | {} | {failed} | {throughput:.2} | {tokens_per_second:.0} | \
         {goodput:.2} ({:.0} %) | {:.0} / {:.0} | {:.1} / {:.1} | {:.0} / {:.0} |",
        pool.name(),
        outcome.sent,
        good * 100.0,
        ttft.p50,
        ttft.p99,
        itl.p50,
        itl.p99,
        e2e.p50,
        e2e.p99
    )
}

fn markdown(settings: &Settings, runs: &[Run]) -> String {
    let machine = machine();
    let mut text = format!(
        "# Load on clusters of two workers\n\nMade by `tests/examples/load.rs`: SmolLM2-135M \
         Q4_1, {} thread(s) a worker, {} s of Poisson arrivals a run on {} ({} cores). Lengths: \
         {}. Goodput counts requests whose first token came within {:.0} ms and whose tokens came \
         {:.0} ms apart in the mean. Latencies are p50 / p99.\n\n\
         | pool | rate, 1/s | sent | failed | answered, 1/s | tokens/s | goodput, 1/s | TTFT, ms | \
         ITL, ms | end to end, ms |\n| {} |\n",
        settings.threads,
        settings.seconds,
        machine["cpu"].as_str().unwrap_or("?"),
        machine["cores"],
        lengths(settings),
        settings.slo_ttft_ms,
        settings.slo_itl_ms,
        ["---"; 10].join(" | ")
    );
    for Run { pool, rate, outcome } in runs {
        text += &line(*pool, *rate, outcome);
        text += "\n";
    }
    text
}
