//! Injects faults into a running cluster and counts what came of the requests.
//!
//! Writes `chaos.json` and `chaos.md`. Needs root (namespaces, a small disk) and, from Debian,
//! `haproxy`, `faketime`, `iproute2` and `python3`.

use std::path::PathBuf;
use std::process::ExitCode;

use baton_tests::bench::report;
use baton_tests::chaos::fault::Fault;
use baton_tests::chaos::{self, Row};
use clap::Parser;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// How often each fault is injected.
    #[arg(long, default_value_t = 20)]
    times: usize,
    /// Kinds of faults; all by default.
    #[arg(long, value_delimiter = ',')]
    faults: Vec<String>,
    /// Where the dice start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the results go.
    #[arg(long, default_value = "docs/benchmarks")]
    out: PathBuf,
}

// One thread, the first: the processes that it starts die with it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let wanted = |fault: &Fault| {
        args.faults.is_empty() || args.faults.iter().any(|name| name == fault.name())
    };
    let mut rows: Vec<Row> = Vec::new();
    let mut held = true;
    for fault in Fault::ALL.into_iter().filter(wanted) {
        let row = chaos::run(fault, args.times, args.seed, |line| eprintln!("{line}")).await;
        held &= row.held(fault);
        rows.push(row);
        let value = json!({"machine": report::machine(), "seed": args.seed, "faults": rows});
        report::write(&args.out, "chaos", &value, &chaos::table(&rows));
    }
    println!("{}", chaos::table(&rows));
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
