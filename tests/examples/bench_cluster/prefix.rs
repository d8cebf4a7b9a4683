//! The time to the first token of a prompt whose prefix is cached, against one that has nothing
//! cached, as a client of the gateway sees it.

use baton_tests::Cluster;
use baton_tests::bench::direct::prompt;
use baton_tests::bench::report::{Row, Target, median_ratio};
use baton_tests::load::client::{Sent, send_prompt};
use baton_tests::load::stats::median;
use indicatif::ProgressBar;

use crate::Settings;

const PREFIX: usize = 1024;
const TAIL: usize = 8;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let threads = settings.threads.to_string();
    let cluster = Cluster::builder().unified(1).worker_arg("--threads", &threads).start().await;
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let base = cluster.api.base();
    let first_token = async |prompt: &[u32]| match send_prompt(&client, base, prompt, 1).await {
        Sent::Answered(answered) => answered.ttft * 1e3,
        Sent::Failed(status) => panic!("a prompt failed with status {status}"),
    };
    let (mut cold, mut hit) = (Vec::new(), Vec::new());
    for round in 0..=settings.rounds {
        let prefix = prompt(PREFIX);
        let with_tail = || [prefix.clone(), prompt(TAIL)].concat();
        let (first, second) = (first_token(&with_tail()).await, first_token(&with_tail()).await);
        // The first round warms up.
        if round > 0 {
            cold.push(first);
            hit.push(second);
            progress.inc(1);
        }
    }
    let ratio = median_ratio(&hit, &cold) * 100.0;
    let what = format!("TTFT with {PREFIX} tokens cached, of the TTFT with none");
    let note = format!("{:.1} ms of {:.1} ms; {TAIL} more tokens", median(&hit), median(&cold));
    let row = Row::new("prefix", what, (ratio, "%"), Target::AtMost(8.0));
    vec![row.note(note).samples("cold_ms", &cold).samples("hit_ms", &hit)]
}
