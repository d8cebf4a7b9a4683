//! What routing by KV blocks gains: conversations of several turns over four workers, against
//! routing in turn and by load.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_routing
//! ```
//!
//! Three equal clusters, one for each policy, take turns; the others are idle meanwhile. A
//! conversation is one of some that share a system prompt; each turn sends all that was said and
//! something new. Counted are prompt tokens found in prefix caches, by the workers' own counters,
//! and the time to the first token, by the client. Writes `routing.json` and `routing.md` to `docs/benchmarks`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use baton_tests::Cluster;
use baton_tests::bench::direct::prompt;
use baton_tests::bench::report::{machine, median_ratio, write};
use baton_tests::binaries::repository;
use baton_tests::load::client::{Sent, send_prompt};
use baton_tests::load::stats::median;
use clap::Parser;
use serde_json::json;
use tokio::sync::Semaphore;

const POLICIES: [&str; 3] = ["kv-aware", "least-loaded", "round-robin"];

/// Compares the gateway's routing policies.
#[derive(Clone, Debug, Parser)]
struct Settings {
    /// Rounds; in each, every policy has conversations of its own.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Workers of each cluster, of one thread each.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Conversations of a round.
    #[arg(long, default_value_t = 24)]
    conversations: usize,
    /// Conversations that share a system prompt.
    #[arg(long, default_value_t = 6)]
    sharing: usize,
    /// Turns of a conversation.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Tokens of a system prompt, of what is new in a turn, and of an answer.
    #[arg(long, value_delimiter = ',', default_value = "128,96,8")]
    tokens: Vec<usize>,
    /// Requests at a time.
    #[arg(long, default_value_t = 3)]
    clients: usize,
    /// Where the results go.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What a policy's conversations of a round came to.
struct Outcome {
    /// Times to the first token, in milliseconds.
    ttft: Vec<f64>,
    /// Share of prompt tokens found in a cache.
    hits: f64,
}

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    let [system, new, answer] = settings.tokens[..] else { panic!("--tokens takes three numbers") };
    let mut clusters = Vec::new();
    for policy in POLICIES {
        let builder = Cluster::builder().unified(settings.workers).worker_arg("--threads", "1");
        clusters.push(builder.gateway_arg("--routing-policy", policy).start().await);
    }
    let mut outcomes: BTreeMap<&str, Vec<Outcome>> = BTreeMap::new();
    for round in 0..=settings.rounds {
        for (cluster, policy) in clusters.iter().zip(POLICIES) {
            let outcome = converse(cluster, &settings, (system, new, answer)).await;
            // The first round warms up.
            if round > 0 {
                eprintln!("{policy}: {:.0} ms, {:.2}", mean(&outcome.ttft), outcome.hits);
                outcomes.entry(policy).or_default().push(outcome);
            }
        }
    }
    report(&settings, &outcomes);
}

async fn converse(
    cluster: &Cluster,
    settings: &Settings,
    (system, new, answer): (usize, usize, usize),
) -> Outcome {
    let before = counters(cluster).await;
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let room = Arc::new(Semaphore::new(settings.clients));
    let mut systems = Vec::new();
    for _ in 0..settings.conversations.div_ceil(settings.sharing) {
        systems.push(prompt(system));
    }
    let conversations = (0..settings.conversations).map(|i| {
        let (client, room) = (client.clone(), room.clone());
        let base = cluster.api.base().to_owned();
        let (mut said, turns) = (systems[i / settings.sharing].clone(), settings.turns);
        tokio::spawn(async move {
            let mut times = Vec::new();
            for _ in 0..turns {
                said.extend(prompt(new));
                // First come, first served: others speak between two turns.
                let _turn = room.acquire().await.expect("open");
                match send_prompt(&client, &base, &said, answer).await {
                    Sent::Answered(answered) => times.push(answered.ttft * 1e3),
                    Sent::Failed(status) => panic!("a request failed with status {status}"),
                }
                // What was answered, as far as a cache is concerned.
                said.extend(prompt(answer));
            }
            times
        })
    });
    let conversations: Vec<_> = conversations.collect();
    let mut ttft = Vec::new();
    for conversation in conversations {
        ttft.extend(conversation.await.expect("a conversation"));
    }
    let after = counters(cluster).await;
    Outcome { ttft, hits: (after.0 - before.0) as f64 / (after.1 - before.1) as f64 }
}

/// Prompt tokens found in caches, and all that were looked up.
async fn counters(cluster: &Cluster) -> (u64, u64) {
    let (mut hits, mut queries) = (0, 0);
    for worker in &cluster.workers {
        let status = worker.status().await;
        hits += status.prefix_cache_hits;
        queries += status.prefix_cache_queries;
    }
    (hits, queries)
}

fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

fn report(settings: &Settings, outcomes: &BTreeMap<&str, Vec<Outcome>>) {
    let [system, new, answer] = settings.tokens[..] else { return };
    let ttft = |policy: &str| outcomes[policy].iter().map(|o| mean(&o.ttft)).collect::<Vec<_>>();
    let hits = |policy: &str| outcomes[policy].iter().map(|o| o.hits).collect::<Vec<_>>();
    let mut text = format!(
        "# Routing\n\nMade by `tests/examples/bench_routing.rs`: {} conversations of {} turns, {} of \
         them with the same system prompt of {system} tokens, {new} new tokens a turn, answers of \
         {answer}; {} unified workers of one thread, {} requests at a time, medians of {} rounds in \
         turns. Targets: twice the hits of the others, and a mean TTFT of at most 0.7 of theirs.\n\n\
         | policy | prompt tokens found in a cache | kv-aware's hits to these | mean TTFT, ms | \
         kv-aware's TTFT to this |\n| --- | --- | --- | --- | --- |\n",
        settings.conversations,
        settings.turns,
        settings.sharing,
        settings.workers,
        settings.clients,
        settings.rounds,
    );
    let own = (hits("kv-aware"), ttft("kv-aware"));
    for policy in POLICIES {
        text += &format!(
            "| {policy} | {:.1} % | {:.2} | {:.0} | {:.2} |\n",
            100.0 * median(&hits(policy)),
            median_ratio(&own.0, &hits(policy)),
            median(&ttft(policy)),
            median_ratio(&own.1, &ttft(policy)),
        );
    }
    let samples: BTreeMap<_, _> = POLICIES
        .iter()
        .map(|policy| (*policy, json!({"hits": hits(policy), "mean_ttft_ms": ttft(policy)})))
        .collect();
    let value = json!({
        "machine": machine(),
        "settings": format!("{settings:?}"),
        "policies": samples,
    });
    let folder = settings.out.clone().unwrap_or_else(|| repository().join("docs/benchmarks"));
    write(&folder, "routing", &value, &text);
    println!("{text}");
}
