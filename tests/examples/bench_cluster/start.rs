//! From a worker's start to its first token, with the model's file in the page cache.

use std::time::Instant;

use baton_tests::bench::direct::{first_token, prompt};
use baton_tests::bench::report::{Row, Target};
use baton_tests::load::stats::median;
use baton_tests::{Cluster, Role};
use indicatif::ProgressBar;

use crate::Settings;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let threads = settings.threads.to_string();
    let mut cluster = Cluster::builder().worker_arg("--threads", &threads).start().await;
    let (mut ready, mut token) = (Vec::new(), Vec::new());
    for round in 0..=settings.rounds {
        let start = Instant::now();
        let address = cluster.add_worker(Role::Unified).await.address.clone();
        let registered = start.elapsed();
        first_token(&address, None, prompt(16)).await;
        // The first round reads the file.
        if round > 0 {
            token.push(start.elapsed().as_secs_f64());
            ready.push(registered.as_secs_f64());
            progress.inc(1);
        }
        cluster.kill_worker(0);
    }
    let what = "from a worker's start to its first token";
    let note = format!("ready after {:.2} s; 16 tokens asked by gRPC", median(&ready));
    let row = Row::new("start", what, (median(&token), "s"), Target::AtMost(1.0));
    vec![row.note(note).samples("ready_s", &ready).samples("first_token_s", &token)]
}
