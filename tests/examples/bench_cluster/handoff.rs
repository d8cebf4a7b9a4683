//! What a hand-off adds to the time to the first token, on workers that do nothing else.

use baton_tests::bench::direct::{first_token, prompt};
use baton_tests::bench::report::{Row, Target, median_ratio};
use baton_tests::load::stats::median;
use baton_tests::{Cluster, Role};
use indicatif::ProgressBar;

use crate::Settings;

const PROMPT: usize = 1024;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let threads = settings.threads.to_string();
    let rounds = settings.rounds;
    progress.set_length(2 * rounds as u64);
    let mut rows = Vec::new();
    for (transport, most) in [("shm", 3.0), ("grpc", 8.0)] {
        let builder = Cluster::builder().prefill(1).decode(1).transport(transport);
        let cluster = builder.worker_arg("--threads", &threads).start().await;
        let decode = &cluster.only(Role::Decode).address;
        let prefill = &cluster.only(Role::Prefill).address;
        let (mut here, mut handed) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            for (samples, peer) in [(&mut here, None), (&mut handed, Some(prefill.as_str()))] {
                let took = first_token(decode, peer, prompt(PROMPT)).await;
                // The first round warms up.
                if round > 0 {
                    samples.push(took.as_secs_f64() * 1e3);
                }
            }
            progress.inc(u64::from(round > 0));
        }
        let added = (median_ratio(&handed, &here) - 1.0) * 100.0;
        let what = format!("TTFT added by a hand-off of {PROMPT} tokens, {transport}");
        let note = format!("{:.1} ms against {:.1} ms", median(&handed), median(&here));
        let row = Row::new("handoff", what, (added, "%"), Target::AtMost(most)).note(note);
        rows.push(row.samples("here_ms", &here).samples("handed_off_ms", &handed));
    }
    rows
}
