//! What guessing ahead gains, and what it costs where it cannot gain.
//!
//! Two unified workers with the default model, one of which guesses, answer the same chats in turn:
//! one that repeats a text, one that sums it up, one that writes freely. Printed are medians of
//! tokens per second, the prompt being cached, and how many of the guesses were right; the answers
//! are compared token for token.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_speculative
//! ```
//!
//! Arguments, all optional: tokens guessed (4), streams at once (1), rounds (5), threads a worker
//! (2), and a file to write the figures to as JSON.

use std::time::Instant;

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::ids;
use baton_tests::{Api, Cluster, Role};
use serde_json::{Value, json};

const TEXT: &str = "The lighthouse at Cape Aurel was built in 1874 by a crew of forty-one masons, \
    who carried the granite up the cliff by hand. Its lamp burned whale oil for nine years, then \
    paraffin, and from 1921 on electricity. The keeper, Jonas Wik, wrote down every ship that passed: \
    in thirty-two years he counted 18,406 of them and missed, by his own account, only three. When \
    the light was automated in 1966, his notebooks went to the town library, where they can be read \
    on Thursdays.";

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |or: usize| {
        arguments.next().map_or(or, |argument| argument.parse().expect("a whole number"))
    };
    let (guessed, streams, rounds, threads) = (number(4), number(1), number(5), number(2));
    let threads = threads.to_string();
    let builder = Cluster::builder().unified(1).worker_arg("--threads", &threads);
    let plain = builder.clone().start().await;
    let ahead = builder.worker_arg("--speculative-tokens", &guessed.to_string()).start().await;
    let tasks = [
        ("repeat", format!("Repeat the following text word for word.\n\n{TEXT}")),
        ("summarize", format!("Summarize the following text in three sentences.\n\n{TEXT}")),
        ("write", "Write a story about a fox who learns to play the violin.".to_owned()),
    ];
    println!("{guessed} tokens guessed, {streams} streams, {threads} threads, medians of {rounds}");
    println!("| task | tokens/s without | with | ratio | guessed a step | right |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut figures = Vec::new();
    for (task, prompt) in tasks {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        let before = ahead.only(Role::Unified).status().await;
        let mut expected = None;
        // The first round finds nothing in the caches and is not counted.
        for round in 0..=rounds {
            for (rates, cluster) in [(&mut without, &plain), (&mut with, &ahead)] {
                let (rate, answers) = rate(&cluster.api, &prompt, streams).await;
                assert_eq!(expected.get_or_insert_with(|| answers.clone()), &answers, "{task}");
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        let after = ahead.only(Role::Unified).status().await;
        let drafts = after.spec_decode_drafts - before.spec_decode_drafts;
        let drafted = after.spec_decode_draft_tokens - before.spec_decode_draft_tokens;
        let right = after.spec_decode_accepted_tokens - before.spec_decode_accepted_tokens;
        let (without, with) = (median(without), median(with));
        let each = drafted as f64 / drafts.max(1) as f64;
        let share = right as f64 / drafted.max(1) as f64;
        println!(
            "| {task} | {without:.1} | {with:.1} | {:.2}× | {each:.1} | {:.0} % |",
            with / without,
            share * 100.0
        );
        figures.push(json!({
            "task": task, "tokens_per_second": without, "tokens_per_second_guessing": with,
            "drafts": drafts, "draft_tokens": drafted, "accepted_tokens": right,
        }));
    }
    if let Some(path) = arguments.next() {
        let figures = json!({
            "speculative_tokens": guessed, "streams": streams, "threads": threads,
            "rounds": rounds, "tasks": figures,
        });
        std::fs::write(path, figures.to_string()).expect("the file of figures");
    }
    plain.finish().await;
    ahead.finish().await;
}

/// Tokens per second of so many equal chats at once, and the tokens.
async fn rate(api: &Api, prompt: &str, streams: usize) -> (f64, Vec<Vec<u32>>) {
    let body = |max_tokens: usize| {
        json!({
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": true,
        })
    };
    // The prompt goes into the prefix cache, so that what follows is all but decoding.
    api.ok("/v1/chat/completions", &body(1)).await;
    let start = Instant::now();
    let body = body(128);
    let chats = (0..streams).map(|_| api.ok("/v1/chat/completions", &body));
    let replies: Vec<Value> = futures::future::join_all(chats).await;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = |reply: &Value| ids(&reply["choices"][0]["token_ids"]);
    let answers: Vec<Vec<u32>> = replies.iter().map(tokens).collect();
    (answers.iter().map(Vec::len).sum::<usize>() as f64 / seconds, answers)
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}
