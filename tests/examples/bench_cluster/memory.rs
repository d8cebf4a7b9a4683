//! A worker's memory when its KV pool is full.

use baton_proto::v1::DescribeRequest;
use baton_tests::bench::direct::{first_token, prompt};
use baton_tests::bench::procfs::{Resident, resident};
use baton_tests::bench::report::{Row, Target};
use baton_tests::binaries::model;
use baton_tests::grpc::worker;
use baton_tests::load::stats::median;
use baton_tests::{Cluster, Role};
use indicatif::ProgressBar;

use crate::Settings;

/// The KV pool. Small, so that a few prompts touch all of it.
const POOL: usize = 64 << 20;
const PROMPT: usize = 1500;
/// What a worker may have beside weights and KV.
const ALLOWED_MB: f64 = 150.0;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let threads = settings.threads.to_string();
    let builder = Cluster::builder().kv_memory(&POOL.to_string()).worker_arg("--threads", &threads);
    let mut cluster = builder.start().await;
    let weights = std::fs::metadata(model()).expect("the model's file").len();
    let mut seen = Vec::new();
    // Memory hardly varies: a few starts show it.
    for _ in 0..settings.rounds.min(3) {
        let address = cluster.add_worker(Role::Unified).await.address.clone();
        let mut client = worker(&address).await;
        let description = client.describe(DescribeRequest {}).await.expect("a description");
        let layout = description.into_inner().kv_layout.expect("a layout");
        let blocks = POOL as u64 / layout.block_bytes;
        // Each prompt is new, so its blocks are; once around, and a prompt more.
        let prompts = blocks * u64::from(layout.block_size) / PROMPT as u64 + 2;
        for _ in 0..prompts {
            first_token(&address, None, prompt(PROMPT)).await;
        }
        seen.push(resident(cluster.only(Role::Unified).process.pid()));
        cluster.kill_worker(0);
        progress.inc(1);
    }
    let mb = |of: fn(&Resident) -> u64| -> Vec<f64> {
        seen.iter().map(|resident| of(resident) as f64 / 1e6).collect()
    };
    let parts = [
        mb(|resident| resident.total),
        mb(|resident| resident.anonymous),
        mb(|resident| resident.file),
        mb(|resident| resident.shared),
    ];
    let [total, anonymous, file, shared] = parts.each_ref().map(|samples| median(samples));
    let (weights, pool) = (weights as f64 / 1e6, POOL as f64 / 1e6);
    let what = "a worker's resident memory beyond weights and KV pool";
    let note = format!(
        "{total:.0} MB: {anonymous:.0} own, {file:.0} of files, {shared:.0} shared; weights \
         {weights:.0} MB, pool {pool:.0} MB, all touched"
    );
    let value = (total - weights - pool, "MB");
    let row = Row::new("memory", what, value, Target::AtMost(ALLOWED_MB)).note(note);
    let names = ["total_mb", "anonymous_mb", "file_mb", "shared_mb"];
    vec![names.iter().zip(&parts).fold(row, |row, (name, samples)| row.samples(name, samples))]
}
