//! What routing by KV blocks gains: conversations of several turns over pools of several sizes,
//! against routing in turn and by load.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_routing
//! ```
//!
//! Three equal clusters, one for each policy, take turns; the others are idle meanwhile. A
//! conversation is one of some that share a system prompt; each turn sends all that was said and
//! something new, after a pause of random length, as people do: conversations that kept their order
//! would meet the same worker at every turn where routing in turn has a divisor of their number.
//! Counted are prompt tokens found in prefix caches, by the workers' own counters, and the time to
//! the first token, by the client. Writes `routing.json` and `routing.md` to `docs/benchmarks`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

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
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Workers of each cluster, of one thread each: one comparison for each number.
    #[arg(long, value_delimiter = ',', default_value = "4,8")]
    workers: Vec<usize>,
    /// Conversations of a round.
    #[arg(long, default_value_t = 18)]
    conversations: usize,
    /// Conversations that share a system prompt.
    #[arg(long, default_value_t = 6)]
    sharing: usize,
    /// Turns of a conversation.
    #[arg(long, default_value_t = 8)]
    turns: usize,
    /// Longest pause before a turn, in seconds: as many are as long as short.
    #[arg(long, default_value_t = 4.0)]
    pause: f64,
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

/// All rounds of a number of workers, by policy.
type Outcomes = BTreeMap<&'static str, Vec<Outcome>>;

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    let tokens = Tokens::of(&settings);
    let mut sizes = Vec::new();
    for &workers in &settings.workers {
        sizes.push((workers, compare(&settings, &tokens, workers).await));
    }
    report(&settings, &tokens, &sizes);
}

/// Tokens of the parts of a prompt.
struct Tokens {
    system: usize,
    new: usize,
    answer: usize,
}

impl Tokens {
    fn of(settings: &Settings) -> Self {
        let [system, new, answer] = settings.tokens[..] else {
            panic!("--tokens takes three numbers")
        };
        Self { system, new, answer }
    }

    /// The share of prompt tokens that were in a prompt before.
    fn seen_before(&self, settings: &Settings) -> f64 {
        let turns = settings.turns;
        let said = turns * self.new + (turns - 1) * self.answer;
        let sent: usize =
            (1..=turns).map(|t| self.system + t * self.new + (t - 1) * self.answer).sum();
        let groups = settings.conversations.div_ceil(settings.sharing);
        let first = settings.conversations * said + groups * self.system;
        1.0 - first as f64 / (settings.conversations * sent) as f64
    }
}

/// Every policy's rounds on a cluster of its own of that many workers.
async fn compare(settings: &Settings, tokens: &Tokens, workers: usize) -> Outcomes {
    let mut clusters = Vec::new();
    for policy in POLICIES {
        let builder = Cluster::builder().unified(workers).worker_arg("--threads", "1");
        clusters.push(builder.gateway_arg("--routing-policy", policy).start().await);
    }
    let mut outcomes = Outcomes::new();
    for round in 0..=settings.rounds {
        for (cluster, policy) in clusters.iter().zip(POLICIES) {
            let outcome = converse(cluster, settings, tokens).await;
            // The first round warms up.
            if round > 0 {
                let ttft = mean(&outcome.ttft);
                eprintln!("{workers} workers, {policy}: {ttft:.0} ms, {:.2}", outcome.hits);
                outcomes.entry(policy).or_default().push(outcome);
            }
        }
    }
    outcomes
}

async fn converse(cluster: &Cluster, settings: &Settings, tokens: &Tokens) -> Outcome {
    let &Tokens { system, new, answer } = tokens;
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
        let mut said = systems[i / settings.sharing].clone();
        let (turns, pause) = (settings.turns, settings.pause);
        tokio::spawn(async move {
            let mut times = Vec::new();
            for _ in 0..turns {
                tokio::time::sleep(Duration::from_secs_f64(pause * rand::random::<f64>())).await;
                said.extend(prompt(new));
                // First come, first served.
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

fn report(settings: &Settings, tokens: &Tokens, sizes: &[(usize, Outcomes)]) {
    let mut text = format!(
        "# Routing\n\nMade by `tests/examples/bench_routing.rs`: {} conversations of {} turns, {} of \
         them with the same system prompt of {} tokens, {} new tokens a turn, answers of {}; unified \
         workers of one thread, {} requests at a time, medians of {} rounds in turns. Of the prompt \
         tokens {:.1} % were in a prompt before: more no policy can find. Targets: twice the hits of \
         the others, and a mean TTFT of at most 0.7 of theirs.\n\n\
         | workers | policy | prompt tokens found in a cache | kv-aware's hits to these | mean TTFT, \
         ms | kv-aware's TTFT to this |\n| --- | --- | --- | --- | --- | --- |\n",
        settings.conversations,
        settings.turns,
        settings.sharing,
        tokens.system,
        tokens.new,
        tokens.answer,
        settings.clients,
        settings.rounds,
        100.0 * tokens.seen_before(settings),
    );
    let mut samples = BTreeMap::new();
    for (workers, outcomes) in sizes {
        let ttft = |policy: &str| -> Vec<f64> {
            outcomes[policy].iter().map(|outcome| mean(&outcome.ttft)).collect()
        };
        let hits = |policy: &str| -> Vec<f64> {
            outcomes[policy].iter().map(|outcome| outcome.hits).collect()
        };
        let own = (hits(POLICIES[0]), ttft(POLICIES[0]));
        let mut policies = BTreeMap::new();
        for policy in POLICIES {
            let (hits, ttft) = (hits(policy), ttft(policy));
            text += &format!(
                "| {workers} | {policy} | {:.1} % | {:.2} | {:.0} | {:.2} |\n",
                100.0 * median(&hits),
                median_ratio(&own.0, &hits),
                median(&ttft),
                median_ratio(&own.1, &ttft),
            );
            policies.insert(policy, json!({"hits": hits, "mean_ttft_ms": ttft}));
        }
        samples.insert(workers.to_string(), policies);
    }
    let value = json!({
        "machine": machine(),
        "settings": format!("{settings:?}"),
        "workers": samples,
    });
    let folder = settings.out.clone().unwrap_or_else(|| repository().join("docs/benchmarks"));
    write(&folder, "routing", &value, &text);
    println!("{text}");
}
