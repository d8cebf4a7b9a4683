//! From which prompt length a hand-off pays.
//!
//! One prefill and one decode worker, asked directly. For each length, prompts are computed on the
//! decode worker and handed off from the prefill worker in turn, with nothing cached, first on an
//! idle decode worker and then while it generates for others. Printed are medians: the time to the
//! first token of the prompt, and the longest gap that the other streams saw meanwhile.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_handoff
//! ```

use std::time::Duration;

use baton_tests::bench::direct::{background, first_token, prompt};
use baton_tests::load::stats::median;
use baton_tests::{Cluster, Role};

const LENGTHS: [usize; 8] = [16, 32, 64, 128, 256, 512, 1024, 2048];
const ROUNDS: usize = 9;
/// Streams that the decode worker serves beside, when it is busy.
const OTHERS: usize = 4;

#[tokio::main]
async fn main() {
    let transports = std::env::args().nth(1).unwrap_or_else(|| "shm,grpc".to_owned());
    let threads = std::env::args().nth(2).unwrap_or_else(|| "2".to_owned());
    let builder = Cluster::builder().prefill(1).decode(1).kv_memory("2GiB");
    let cluster = builder.transport(&transports).worker_arg("--threads", &threads).start().await;
    let decode = cluster.only(Role::Decode).address.clone();
    let prefill = cluster.only(Role::Prefill).address.clone();
    println!("transports {transports}, {threads} threads a worker, medians of {ROUNDS}, ms");
    println!("| others | prompt | TTFT here | TTFT hand-off | ratio | gap here | gap hand-off |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for others in [0, OTHERS] {
        let mut gaps = Vec::new();
        for i in 0..others {
            gaps.push(background(&decode, 64 + i).await);
        }
        for length in LENGTHS {
            let (mut here, mut handed) = (Samples::default(), Samples::default());
            for _ in 0..ROUNDS {
                for (samples, peer) in [(&mut here, None), (&mut handed, Some(prefill.as_str()))] {
                    gaps.iter_mut().for_each(|gaps| while gaps.try_recv().is_ok() {});
                    samples.ttft.push(millis(first_token(&decode, peer, prompt(length)).await));
                    let seen = gaps.iter_mut().flat_map(|gaps| {
                        std::iter::from_fn(|| gaps.try_recv().ok()).collect::<Vec<_>>()
                    });
                    samples.gap.push(millis(seen.max().unwrap_or_default()));
                }
            }
            let ratio = median(&handed.ttft) / median(&here.ttft);
            println!(
                "| {others} | {length} | {:.1} | {:.1} | {ratio:.2} | {:.1} | {:.1} |",
                median(&here.ttft),
                median(&handed.ttft),
                median(&here.gap),
                median(&handed.gap)
            );
        }
    }
}

#[derive(Default)]
struct Samples {
    ttft: Vec<f64>,
    gap: Vec<f64>,
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
