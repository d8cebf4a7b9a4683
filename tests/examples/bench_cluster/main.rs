//! The cluster against its targets: each is measured on a real cluster, in rounds.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_cluster
//! ```
//!
//! Writes `cluster.json`, with every sample, and `cluster.md` to `docs/benchmarks`.
//! `tests/bench/README.md` says what each part does.

#![forbid(unsafe_code)]

mod gateway;
mod handoff;
mod interference;
mod memory;
mod prefix;
mod start;

use std::path::PathBuf;

use baton_tests::bench::report::{Row, machine, table, write};
use baton_tests::binaries::{model, repository};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Measures a Baton cluster against its targets.
#[derive(Debug, Parser)]
struct Settings {
    /// Measure only this part; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Part>,

    /// Rounds of each part; values are medians over them.
    #[arg(long, default_value_t = 9)]
    rounds: usize,

    /// Threads of a worker that has the machine to itself.
    #[arg(long, default_value_t = 2)]
    threads: usize,

    /// Seconds of each round of a part that measures under load.
    #[arg(long, default_value_t = 10)]
    seconds: u64,

    /// Core that the gateway gets in the part `gateway`; its load runs on the others.
    #[arg(long, default_value_t = 1)]
    gateway_core: usize,

    /// Connections of the load on the gateway.
    #[arg(long, default_value_t = 32)]
    connections: usize,

    /// Folder to write to.
    #[arg(long, default_value_os_t = repository().join("docs/benchmarks"))]
    out: PathBuf,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The time to the first token of a prompt whose prefix is cached.
    Prefix,
    /// From a worker's start to its first token.
    Start,
    /// A worker's memory.
    Memory,
    /// The cost of a hand-off.
    Handoff,
    /// Running streams while long prompts arrive.
    Interference,
    /// The gateway's own share.
    Gateway,
}

/// One thread: the load must leave the cores to what is measured.
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let settings = Settings::parse();
    let chosen: Vec<Part> = match settings.only.is_empty() {
        true => Part::value_variants().to_vec(),
        false => settings.only.clone(),
    };
    let mut rows = Vec::new();
    for part in chosen {
        let progress = progress(part, settings.rounds);
        rows.extend(match part {
            Part::Prefix => prefix::measure(&settings, &progress).await,
            Part::Start => start::measure(&settings, &progress).await,
            Part::Memory => memory::measure(&settings, &progress).await,
            Part::Handoff => handoff::measure(&settings, &progress).await,
            Part::Interference => interference::measure(&settings, &progress).await,
            Part::Gateway => gateway::measure(&settings, &progress).await,
        });
        progress.finish_and_clear();
    }
    let text = markdown(&settings, &rows);
    println!("{text}");
    let report = json!({
        "machine": machine(),
        "model": model().file_name().and_then(|name| name.to_str()),
        "rounds": settings.rounds,
        "threads": settings.threads,
        "rows": rows,
    });
    write(&settings.out, "cluster", &report, &text);
}

fn progress(part: Part, rounds: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:12} {bar:30} {pos}/{len}");
    let name = part.to_possible_value().map(|value| value.get_name().to_owned());
    ProgressBar::new(rounds as u64)
        .with_style(style.expect("a template"))
        .with_prefix(name.unwrap_or_default())
}

fn markdown(settings: &Settings, rows: &[Row]) -> String {
    let machine = machine();
    format!(
        "# A Baton cluster against its targets\n\nMade by `tests/examples/bench_cluster`: \
         SmolLM2-135M Q4_1, {} threads a worker, medians of {} rounds on {} ({} cores). Ratios \
         are medians over pairs of neighbouring runs.\n\n{}",
        settings.threads,
        settings.rounds,
        machine["cpu"].as_str().unwrap_or("?"),
        machine["cores"],
        table(rows)
    )
}
