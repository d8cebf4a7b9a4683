//! What a constraint costs while decoding.
//!
//! One unified worker with the default model decodes, in turn, a stream without constraint, one
//! under a JSON schema whose names are forced and whose values are free, and one under a regular
//! expression that leaves nearly every token possible. Printed are medians of tokens per second after
//! the first token, their ratio to the stream without, and how long a draw waited for its mask.
//!
//! ```text
//! cargo build --release --bins && cargo run --release -p baton-tests --example bench_constraint
//! ```
//!
//! Arguments, all optional: streams at once (1), rounds (7), threads of the worker (2).

use std::time::Instant;

use baton_proto::v1::constraint::Kind;
use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{Constraint, GenerateRequest};
use baton_tests::bench::direct;
use baton_tests::{Cluster, Role, grpc};
use serde_json::json;

const TOKENS: u32 = 200;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |or: usize| {
        arguments.next().map_or(or, |argument| argument.parse().expect("a whole number"))
    };
    let (streams, rounds, threads) = (number(1), number(7), number(2).to_string());
    let cluster = Cluster::builder().unified(1).worker_arg("--threads", &threads).start().await;
    let worker = cluster.only(Role::Unified);
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"type": "string"},
            "member": {"type": "boolean"},
        },
        "required": ["name", "age", "city", "member"],
        "additionalProperties": false,
    });
    // With a gateway's bound on white space.
    let style = json!({"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"});
    let people = json!({"type": "array", "items": person, "minItems": 100, "x-guidance": style});
    let kinds = [
        ("none", None),
        ("JSON schema", Some(Kind::JsonSchema(people.to_string()))),
        ("regular expression", Some(Kind::Regex("(?s:.){2000,}".into()))),
    ];
    let mut rates = [(); 3].map(|()| Vec::new());
    let mut waits = [(0u64, 0u64); 3];
    // The first round compiles and is not counted.
    for round in 0..=rounds {
        for (i, (_, kind)) in kinds.iter().enumerate() {
            let before = worker.status().await;
            let calls = (0..streams).map(|n| rate(&worker.address, kind.clone(), n as u64));
            let rate: f64 = futures::future::join_all(calls).await.into_iter().sum();
            let after = worker.status().await;
            if round > 0 {
                rates[i].push(rate);
                waits[i].0 += after.constrained_tokens - before.constrained_tokens;
                waits[i].1 += after.constraint_wait_us - before.constraint_wait_us;
            }
        }
    }
    println!("{streams} streams, {threads} threads, medians of {rounds}");
    println!("| constraint | tokens/s | ratio | waited a draw, µs |");
    println!("| --- | --- | --- | --- |");
    let medians = rates.map(median);
    for (((name, _), rate), (draws, wait)) in kinds.iter().zip(medians).zip(waits) {
        let wait = wait as f64 / draws.max(1) as f64;
        println!("| {name} | {rate:.1} | {:.3} | {wait:.1} |", rate / medians[0]);
    }
    cluster.finish().await;
}

/// Tokens per second of one stream after its first token.
async fn rate(worker: &str, kind: Option<Kind>, seed: u64) -> f64 {
    let mut request = direct::request((1000..1020).collect(), TOKENS);
    let sampling = request.sampling.as_mut().expect("parameters");
    (sampling.temperature, sampling.seed) = (1.0, seed);
    sampling.constraint = kind.map(|kind| Constraint { kind: Some(kind) });
    let mut client = grpc::worker(worker).await;
    let request = GenerateRequest { cache_salt: seed.to_string(), ..request };
    let mut events = client.generate(request).await.expect("accepted").into_inner();
    let (mut tokens, mut start) = (0, None);
    while let Some(event) = events.message().await.expect("an event") {
        if matches!(event.event, Some(Event::Tokens(_))) {
            start.get_or_insert_with(Instant::now);
            tokens += 1;
        }
    }
    assert_eq!(tokens, TOKENS);
    f64::from(tokens - 1) / start.expect("a token").elapsed().as_secs_f64()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}
