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

use std::time::{Duration, Instant};

use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{GenerateRequest, PrefillPeer, SamplingParams};
use baton_tests::{Cluster, Role, grpc};
use tokio::sync::mpsc;

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
            gaps.push(background(&decode, i).await);
        }
        for length in LENGTHS {
            let (mut here, mut handed) = (Samples::default(), Samples::default());
            for _ in 0..ROUNDS {
                for (samples, peer) in [(&mut here, None), (&mut handed, Some(&prefill))] {
                    gaps.iter_mut().for_each(|gaps| while gaps.try_recv().is_ok() {});
                    samples.ttft.push(first_token(&decode, peer, length).await);
                    let seen = gaps.iter_mut().flat_map(|gaps| {
                        std::iter::from_fn(|| gaps.try_recv().ok()).collect::<Vec<_>>()
                    });
                    samples.gap.push(seen.max().unwrap_or_default());
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
    ttft: Vec<Duration>,
    gap: Vec<Duration>,
}

fn median(samples: &[Duration]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2].as_secs_f64() * 1e3
}

/// A prompt that shares no block with any other.
fn request(length: usize, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "bench".into(),
        prompt_token_ids: (0..length).map(|_| rand::random_range(1000..40_000)).collect(),
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        handoff_min_tokens: 1,
        timeout_ms: 600_000,
        ..GenerateRequest::default()
    }
}

async fn first_token(decode: &str, peer: Option<&String>, length: usize) -> Duration {
    let mut client = grpc::worker(decode).await;
    let mut request = request(length, 1);
    let address = peer.cloned();
    request.prefill = address.map(|address| PrefillPeer { instance_id: "peer".into(), address });
    let start = Instant::now();
    let mut events = client.generate(request).await.expect("accepted").into_inner();
    let mut took = None;
    while let Some(event) = events.message().await.expect("an event") {
        match event.event {
            Some(Event::Started(started)) => {
                assert_eq!(started.handed_off_tokens > 0, peer.is_some(), "{started:?}");
            }
            Some(Event::Tokens(_)) => took = took.or(Some(start.elapsed())),
            _ => {}
        }
    }
    took.expect("a token")
}

/// A long stream; yields the time between its tokens.
async fn background(decode: &str, index: usize) -> mpsc::UnboundedReceiver<Duration> {
    let (sender, mut gaps) = mpsc::unbounded_channel();
    let decode = decode.to_owned();
    tokio::spawn(async move {
        loop {
            let mut client = grpc::worker(&decode).await;
            let reply = client.generate(request(64 + index, 4000)).await;
            let mut events = reply.expect("accepted").into_inner();
            let mut last = Instant::now();
            while let Ok(Some(event)) = events.message().await {
                if matches!(event.event, Some(Event::Tokens(_)))
                    && sender.send(last.elapsed()).is_err()
                {
                    return;
                }
                last = Instant::now();
            }
        }
    });
    gaps.recv().await;
    gaps
}
