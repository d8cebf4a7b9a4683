//! How pools are sized, simulated: promises kept against worker-hours.
//!
//! ```text
//! cargo run --release -p baton-tests --example simulate -- \
//!     --azure-code AzureLLMInferenceTrace_code.csv --azure-conv AzureLLMInferenceTrace_conv.csv \
//!     --mooncake conversation_trace.jsonl
//! python3 tests/bench/plot_planner.py
//! ```
//!
//! Writes `planner.json` and `planner.md` to `docs/benchmarks`. `tests/bench/README.md` says where
//! the traces come from and what is simulated.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use baton_coordinator::planner::capacity::StepTime;
use baton_coordinator::planner::sizing::{Demand, Worker, size};
use baton_coordinator::planner::{Limits, PlannerSettings, PoolId, Slo};
use baton_proto::InstanceRole::{Decode, Prefill};
use baton_tests::bench::report::write;
use baton_tests::binaries::repository;
use baton_tests::load::trace::{Timed, read_timed};
use baton_tests::sim::cluster::{Cluster, Outcomes};
use baton_tests::sim::policy::{Planned, Policy, Static, Utilization};
use baton_tests::sim::worker::Spec;
use baton_tests::sim::workload::{Arrival, day, multiplied};
use clap::Parser;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::json;

/// Simulates policies that size prefill and decode pools.
#[derive(Debug, Parser)]
struct Settings {
    /// Azure's trace of 2023 of a service for code: `AzureLLMInferenceTrace_code.csv`.
    #[arg(long, value_name = "FILE")]
    azure_code: Option<PathBuf>,

    /// Azure's trace of 2023 of a conversation service: `AzureLLMInferenceTrace_conv.csv`.
    #[arg(long, value_name = "FILE")]
    azure_conv: Option<PathBuf>,

    /// Mooncake's trace of a conversation service: `conversation_trace.jsonl`.
    #[arg(long, value_name = "FILE")]
    mooncake: Option<PathBuf>,

    /// Each request of a trace comes so many times.
    #[arg(long, default_value_t = 8.0)]
    rate: f64,

    /// Requests a second of the day that is made up of Azure's conversations, in the mean.
    #[arg(long, default_value_t = 20.0)]
    day_rate: f64,

    /// Promised time to the first token.
    #[arg(long, default_value_t = 2000.0)]
    ttft_ms: f64,

    /// Promised mean time between the tokens of an answer.
    #[arg(long, default_value_t = 50.0)]
    itl_ms: f64,

    /// Seconds from a worker's launch until it serves.
    #[arg(long, default_value_t = 60.0)]
    startup: f64,

    /// A worker's step, in milliseconds: of any, for each sequence in it, for each prompt token.
    #[arg(long, value_delimiter = ',', default_value = "15,0.4,0.15")]
    step_ms: Vec<f64>,

    /// Sequences that a worker can decode at a time.
    #[arg(long, default_value_t = 128)]
    slots: usize,

    /// Seed of the copies' times and of the day.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Run each policy at one setting.
    #[arg(long)]
    quick: bool,

    /// Folder to write to.
    #[arg(long, default_value_os_t = repository().join("docs/benchmarks"))]
    out: PathBuf,

    /// Write nothing.
    #[arg(long)]
    dry: bool,
}

#[derive(Debug, Serialize)]
struct Run {
    workload: String,
    policy: String,
    /// Its setting: a size's factor, a utilization, an attainment.
    setting: f64,
    requests: usize,
    good: f64,
    good_ttft: f64,
    good_itl: f64,
    worker_hours: f64,
    changes: u32,
    converted: u32,
    most: u32,
    /// Sizes of the prefill and the decode pool, each so many minutes; of a few runs.
    every_minutes: usize,
    sizes: Vec<Vec<u32>>,
}

fn main() -> Result<(), String> {
    let settings = Settings::parse();
    let [fixed, row, token] = settings.step_ms[..] else {
        return Err("--step-ms must be three numbers".into());
    };
    let spec = Spec {
        step: StepTime { fixed: fixed / 1e3, row: row / 1e3, token: token / 1e3 },
        chunk: 2048.0,
        slots: settings.slots,
        startup: settings.startup,
        handoff: 0.02,
    };
    let slo = Slo { ttft: settings.ttft_ms / 1e3, itl: settings.itl_ms / 1e3, attainment: 0.95 };
    let mut rng = StdRng::seed_from_u64(settings.seed);
    let mut workloads: Vec<(&str, Vec<Arrival>)> = Vec::new();
    let read = |path: &Path| read_timed(path);
    for (name, path) in [
        ("Azure code", &settings.azure_code),
        ("Azure conversation", &settings.azure_conv),
        ("Mooncake conversation", &settings.mooncake),
    ] {
        if let Some(path) = path {
            workloads.push((name, multiplied(&read(path)?, settings.rate, &mut rng)));
        }
    }
    if let (Some(path), true) = (&settings.azure_conv, settings.day_rate > 0.0) {
        let trace: Vec<Timed> = read(path)?;
        workloads.push(("a made-up day", day(&trace, settings.day_rate, 24.0, &mut rng)));
    }
    if workloads.is_empty() {
        return Err("name a trace: --azure-code, --azure-conv or --mooncake".into());
    }
    let mut runs = Vec::new();
    for (name, arrivals) in &workloads {
        policies(name, arrivals, &spec, &slo, settings.quick, &mut runs);
    }
    let text = markdown(&settings, &slo, &runs);
    if !settings.dry {
        let report = json!({
            "slo_ttft_ms": settings.ttft_ms, "slo_itl_ms": settings.itl_ms,
            "step_ms": settings.step_ms, "slots": settings.slots, "startup_s": settings.startup,
            "rate": settings.rate, "day_rate": settings.day_rate, "seed": settings.seed,
            "runs": runs,
        });
        write(&settings.out, "planner", &report, &text);
    }
    println!("{text}");
    Ok(())
}

/// Runs all policies over one workload.
fn policies(
    name: &str,
    arrivals: &[Arrival],
    spec: &Spec,
    slo: &Slo,
    quick: bool,
    runs: &mut Vec<Run>,
) {
    let mean = sizes(arrivals, spec, slo, mean_rate(arrivals));
    let peak = sizes(arrivals, spec, slo, peak_rate(arrivals));
    let scaled = |factor: f64| {
        let of = |size: u32| ((f64::from(size) * factor).round() as u32).max(1);
        (of(mean.0), of(mean.1))
    };
    let mut run = |policy: &str, setting: f64, size: (u32, u32), it: &mut dyn Policy| {
        let since = Instant::now();
        let cluster = Cluster::new(*spec, &[(Prefill, size.0), (Decode, size.1)], arrivals);
        let outcomes = cluster.run(it);
        let seconds = since.elapsed().as_secs_f64();
        let run = summary(name, policy, setting, &outcomes, slo);
        eprintln!("{} {seconds:.1} s", line(&run));
        runs.push(run);
    };
    run("static, mean", 1.0, mean, &mut Static);
    run("static, peak", 1.0, peak, &mut Static);
    let utilizations: &[f64] = if quick { &[0.7] } else { &[0.4, 0.5, 0.6, 0.7, 0.8] };
    for target in utilizations {
        let mut policy = Utilization::new(*target, spec, slo);
        run("utilization", *target, mean, &mut policy);
    }
    let attainments: &[f64] = if quick { &[0.95] } else { &[0.8, 0.9, 0.95, 0.98, 0.99] };
    for attainment in attainments {
        let pool = |role| (PoolId { role, model: "m".into() }, Limits { min: 1, max: 100_000 });
        let slo = Slo { attainment: *attainment, ..*slo };
        let settings = PlannerSettings::new(slo, [pool(Prefill), pool(Decode)]);
        let launching = PlannerSettings { convert: false, ..settings.clone() };
        run("planner", *attainment, mean, &mut Planned::new(settings));
        run("planner, launching only", *attainment, mean, &mut Planned::new(launching));
    }
    if !quick {
        for factor in [0.9, 1.2, 1.5, 2.0] {
            run("static", factor, scaled(factor), &mut Static);
        }
    }
}

/// What keeps the promise at a rate, by the true model of a worker: an operator's best guess.
fn sizes(arrivals: &[Arrival], spec: &Spec, slo: &Slo, requests: f64) -> (u32, u32) {
    let mean = |of: fn(&Arrival) -> u32| {
        arrivals.iter().map(|it| f64::from(of(it))).sum::<f64>() / arrivals.len() as f64
    };
    let (prompt, output) = (mean(|it| it.prompt), mean(|it| it.output));
    let prompt_token = spec.step.token + spec.step.fixed / spec.chunk;
    let worker = Worker { step: spec.step, prompt_token, sequences: Some(spec.slots as f64) };
    let of = |prompt: f64, output: f64| {
        let demand = Demand { requests, dispersion: 1.0, prompt, output };
        size(&demand, &worker, slo, (1, 100_000))
    };
    (of(prompt, 0.0), of(0.0, output))
}

fn mean_rate(arrivals: &[Arrival]) -> f64 {
    arrivals.len() as f64 / arrivals.last().map_or(1.0, |it| it.at)
}

/// Of the busiest minute.
fn peak_rate(arrivals: &[Arrival]) -> f64 {
    let mut minutes = vec![0u32; arrivals.last().map_or(0, |it| it.at as usize / 60) + 1];
    arrivals.iter().for_each(|it| minutes[it.at as usize / 60] += 1);
    f64::from(minutes.into_iter().max().unwrap_or(0)) / 60.0
}

fn summary(workload: &str, policy: &str, setting: f64, outcomes: &Outcomes, slo: &Slo) -> Run {
    let (good, good_ttft, good_itl) = outcomes.attainment(slo);
    let drawn = matches!((policy, setting), ("utilization", 0.7) | ("planner", 0.95));
    let every_minutes = outcomes.sizes.len() / 120 + 1;
    let sizes = outcomes.sizes.iter().step_by(every_minutes).filter(|_| drawn).cloned();
    Run {
        workload: workload.into(),
        policy: policy.into(),
        setting,
        requests: outcomes.requests.len(),
        good,
        good_ttft,
        good_itl,
        worker_hours: outcomes.worker_seconds / 3600.0,
        changes: outcomes.changes,
        converted: outcomes.converted,
        most: outcomes.sizes.iter().map(|sizes| sizes.iter().sum()).max().unwrap_or(0),
        every_minutes,
        sizes: sizes.collect(),
    }
}

fn line(run: &Run) -> String {
    let Run { workload, policy, good, good_ttft, good_itl, worker_hours, most, .. } = run;
    let Run { changes, converted, .. } = run;
    let setting = match policy.as_str() {
        "utilization" | "planner" | "planner, launching only" => {
            format!(" {:.0} %", run.setting * 100.0)
        }
        "static" => format!(", {} × mean", run.setting),
        _ => String::new(),
    };
    format!(
        "| {workload} | {policy}{setting} | {:.1} % | {:.1} % | {:.1} % | {worker_hours:.1} | {most} \
         | {changes} | {converted} |",
        good * 100.0,
        good_ttft * 100.0,
        good_itl * 100.0,
    )
}

fn markdown(settings: &Settings, slo: &Slo, runs: &[Run]) -> String {
    let mut text = format!(
        "# Sizing pools\n\nMade by `tests/examples/simulate.rs`, which simulates prefill and decode \
         workers and drives the coordinator's own planner; see [the program's \
         page](../../tests/bench/README.md#sizing-pools) for what is simulated. Promised: first \
         tokens within {:.0} ms, tokens {:.0} ms apart in the mean of a request. A step takes {} ms, \
         and {} ms for each sequence and {} ms for each prompt token in it; a worker starts in {:.0} \
         s. Traces come at {} times their rate, the day at {} requests a second in the mean.\n\n\
         | workload | policy | both kept | TTFT kept | ITL kept | worker-hours | most workers | \
         changes | changed role |\n| {} |\n",
        slo.ttft * 1e3,
        slo.itl * 1e3,
        settings.step_ms[0],
        settings.step_ms[1],
        settings.step_ms[2],
        settings.startup,
        settings.rate,
        settings.day_rate,
        ["---"; 9].join(" | ")
    );
    for run in runs {
        let _ = writeln!(text, "{}", line(run));
    }
    text + &over_all(runs)
}

/// Policies that have one setting for all workloads: who runs a cluster does not know which one
/// would have been best.
fn over_all(runs: &[Run]) -> String {
    let mut text = "\n## One setting for all workloads\n\nBoth promises kept, in the mean of the \
                    workloads; worker-hours as multiples of those of the fixed pool for the mean \
                    rate, in the geometric mean; changes in all.\n\n\
                    | policy | both kept | worker-hours | changes |\n| --- | --- | --- | --- |\n"
        .to_owned();
    let of =
        |policy: &str| -> Vec<&Run> { runs.iter().filter(|run| run.policy == policy).collect() };
    let fixed: BTreeMap<&str, f64> = of("static, mean")
        .into_iter()
        .map(|run| (run.workload.as_str(), run.worker_hours))
        .collect();
    for policy in ["utilization", "planner"] {
        let mut settings: Vec<f64> = of(policy).iter().map(|run| run.setting).collect();
        settings.sort_by(f64::total_cmp);
        settings.dedup();
        for setting in settings {
            let mut same = of(policy);
            same.retain(|run| run.setting == setting);
            let mean = |value: &dyn Fn(&Run) -> f64| {
                same.iter().map(|run| value(run)).sum::<f64>() / same.len() as f64
            };
            let hours = mean(&|run| (run.worker_hours / fixed[run.workload.as_str()]).ln()).exp();
            let changes: u32 = same.iter().map(|run| run.changes).sum();
            let _ = writeln!(
                text,
                "| {policy} {:.0} % | {:.1} % | {hours:.2} | {changes} |",
                setting * 100.0,
                100.0 * mean(&|run| run.good),
            );
        }
    }
    text
}
