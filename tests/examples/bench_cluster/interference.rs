//! Running streams while long prompts keep arriving: one prefill and one decode worker against
//! one unified worker that has the threads of both.

use std::time::{Duration, Instant};

use baton_tests::bench::direct::prompt;
use baton_tests::bench::report::{Row, Target, median_ratio};
use baton_tests::load::client::send_prompt;
use baton_tests::load::stats::{median, percentile};
use baton_tests::{Cluster, MODEL_NAME};
use indicatif::ProgressBar;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Settings;

const STREAMS: usize = 8;
const PROMPT: usize = 1500;

pub(crate) async fn measure(settings: &Settings, progress: &ProgressBar) -> Vec<Row> {
    let (mut apart, mut together) = (Vec::new(), Vec::new());
    let each = (settings.threads / 2).max(1);
    for _ in 0..settings.rounds {
        let clusters = [
            (&mut apart, Cluster::builder().prefill(1).decode(1), each),
            (&mut together, Cluster::builder().unified(1), 2 * each),
        ];
        for (samples, builder, threads) in clusters {
            let builder = builder.worker_arg("--threads", &threads.to_string());
            let cluster = builder.kv_memory("1GiB").start().await;
            samples.push(under_load(&cluster, Duration::from_secs(settings.seconds)).await);
        }
        progress.inc(1);
    }
    let of = |samples: &[Seen], value: fn(&Seen) -> f64| -> Vec<f64> {
        samples.iter().map(value).collect()
    };
    let (p99_apart, p99_together) = (of(&apart, |seen| seen.p99), of(&together, |seen| seen.p99));
    let ratio = median_ratio(&p99_apart, &p99_together);
    let what =
        format!("ITL p99 of {STREAMS} streams beside prompts of {PROMPT} tokens, of unified");
    let side = |samples: &[Seen]| {
        format!(
            "p99 {:.0} ms, p50 {:.0} ms, {:.1} prompts/s",
            median(&of(samples, |seen| seen.p99)),
            median(&of(samples, |seen| seen.p50)),
            median(&of(samples, |seen| seen.prompts))
        )
    };
    let note = format!(
        "apart ({each} + {each} threads): {}; unified ({} threads): {}",
        side(&apart),
        2 * each,
        side(&together)
    );
    let row = Row::new("interference", what, (ratio, "×"), Target::AtMost(0.5)).note(note);
    vec![row.samples("apart_p99_ms", &p99_apart).samples("unified_p99_ms", &p99_together)]
}

/// What the streams of one run saw: times between tokens in milliseconds, and the prompts answered
/// beside them, a second.
struct Seen {
    p50: f64,
    p99: f64,
    prompts: f64,
}

async fn under_load(cluster: &Cluster, span: Duration) -> Seen {
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let (sender, mut gaps) = mpsc::unbounded_channel();
    // Dropping the set ends the streams.
    let mut streams = JoinSet::new();
    for index in 0..STREAMS {
        streams.spawn(stream(cluster.api.clone(), index, sender.clone()));
    }
    // All streams run before the first prompt comes.
    for _ in 0..4 * STREAMS {
        gaps.recv().await;
    }
    while gaps.try_recv().is_ok() {}
    let start = Instant::now();
    let mut prompts = 0.0;
    // One after the other: always one is being computed, as fast as the cluster can.
    while start.elapsed() < span {
        send_prompt(&client, cluster.api.base(), &prompt(PROMPT), 1).await;
        prompts += 1.0;
    }
    let took = start.elapsed().as_secs_f64();
    let seen: Vec<f64> = std::iter::from_fn(|| gaps.try_recv().ok()).collect();
    assert!(!seen.is_empty(), "no stream brought a token within {took:.1} s");
    Seen { p50: percentile(&seen, 0.5), p99: percentile(&seen, 0.99), prompts: prompts / took }
}

/// A stream that begins anew when it ends; sends the milliseconds between its tokens.
async fn stream(api: baton_tests::Api, index: usize, sender: mpsc::UnboundedSender<f64>) {
    loop {
        let body = json!({
            "model": MODEL_NAME,
            // Short enough to be computed where it is generated.
            "prompt": prompt(16 + index),
            "max_tokens": 1500,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
        });
        let mut events = api.stream("/v1/completions", &body).await;
        let mut last: Option<Instant> = None;
        while events.next().await.is_some() {
            let now = Instant::now();
            if let Some(last) = last.replace(now)
                && sender.send((now - last).as_secs_f64() * 1e3).is_err()
            {
                return;
            }
        }
    }
}
