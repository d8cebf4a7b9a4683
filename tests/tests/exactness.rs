//! Greedy output, token for token, against an independent implementation on the same weights, in
//! every way that Baton can compute it.

use std::time::{Duration, Instant};

use baton_tests::binaries::MODEL_NAME;
use baton_tests::http::ids;
use baton_tests::prometheus::Scrape;
use baton_tests::reference::{self, Greedy};
use baton_tests::{Api, Cluster, Role, grpc};
use serde_json::json;

/// Below this difference of the reference's two best logits, two correct programs may disagree:
/// they add the same numbers in another order.
const TIE: f32 = 1e-3;

/// How many tokens the reference generated, unless the sequence ended before.
const STEPS: usize = 32;

/// What a run of all cases came to.
#[derive(Default)]
struct Tally {
    cases: usize,
    tokens: usize,
    ties: usize,
    wrong: Vec<String>,
}

impl Tally {
    /// Judges one answer.
    fn add(&mut self, case: &Greedy, got: &[u32]) {
        self.cases += 1;
        self.tokens += case.output.len();
        let differ = |(a, b): (&u32, &u32)| a != b;
        let expected = &case.output;
        let first = match got.iter().zip(expected).position(differ) {
            Some(at) => at,
            None if got.len() == expected.len() => return,
            None => got.len().min(expected.len()),
        };
        // After a flip the two are different texts; only the step itself can be judged.
        if case.margin(first).is_some_and(|margin| margin < TIE) {
            self.ties += 1;
            println!(
                "{}: a tie flips at token {first}, margin {:?}",
                case.name,
                case.margin(first)
            );
        } else {
            self.wrong.push(format!(
                "{} ({} prompt tokens): token {first} is {:?}, not {:?}; the margin is {:?}",
                case.name,
                case.prompt.len(),
                got.get(first),
                expected.get(first),
                case.margin(first)
            ));
        }
    }

    fn check(&self, mode: &str, took: Duration) {
        println!(
            "{mode}: {} cases, {} tokens, {} ties flipped, {} wrong, {took:.1?}",
            self.cases,
            self.tokens,
            self.ties,
            self.wrong.len()
        );
        assert!(self.cases >= 40, "too few cases: {}", self.cases);
        // A flip is allowed where it can happen, not as a habit.
        assert!(self.ties * 20 <= self.cases, "{} flips in {} cases", self.ties, self.cases);
        assert!(self.wrong.is_empty(), "{mode}:\n{}", self.wrong.join("\n"));
    }
}

/// What the other ways of computing are held to: of the longest prompts two. `unified` computes all
/// of them, with the same kernels.
fn fewer() -> Vec<Greedy> {
    let mut cases = reference::greedy();
    cases.retain(|it| it.prompt.len() < 600 || ["code_1024", "prose_1500"].contains(&&*it.name));
    cases
}

async fn generate(api: &Api, case: &Greedy, salt: Option<&str>) -> Vec<u32> {
    let mut body = json!({
        "model": MODEL_NAME,
        "prompt": case.prompt,
        "max_tokens": STEPS,
        "temperature": 0,
        "return_token_ids": true,
    });
    if let Some(salt) = salt {
        body["cache_salt"] = salt.into();
    }
    let reply = api.ok("/v1/completions", &body).await;
    ids(&reply["choices"][0]["token_ids"])
}

/// Runs all cases, `at_once` at a time, each with a cache salt of its own so that nothing is a
/// cache hit.
async fn run_all(api: &Api, cases: &[Greedy], at_once: usize) -> Tally {
    let turns = tokio::sync::Semaphore::new(at_once);
    let calls = cases.iter().map(async |case| {
        let _turn = turns.acquire().await.expect("a turn");
        generate(api, case, Some(&case.name)).await
    });
    let mut tally = Tally::default();
    for (case, got) in cases.iter().zip(futures::future::join_all(calls).await) {
        tally.add(case, &got);
    }
    tally
}

/// One at a time, and not only the choice but the numbers: logprobs differ among themselves as the
/// reference's logits do. The reference computes in float32 throughout; activations, keys and
/// values of sixteen bits differ from that by up to 8e-3 (of eight bits, by 0.5).
#[tokio::test]
async fn unified_equals_the_reference_in_tokens_and_in_logprobs() {
    const TOLERANCE: f64 = 1.5e-2;
    let cluster = Cluster::unified().await;
    let cases = reference::greedy();
    let start = Instant::now();
    let mut tally = Tally::default();
    let (mut compared, mut worst, mut wrong) = (0, 0.0_f64, Vec::new());
    for case in &cases {
        let body = json!({
            "model": MODEL_NAME,
            "prompt": case.prompt,
            "max_tokens": STEPS,
            "temperature": 0,
            "cache_salt": case.name,
            "logprobs": 4,
            "return_tokens_as_token_ids": true,
            "return_token_ids": true,
        });
        let reply = cluster.api.ok("/v1/completions", &body).await;
        let choice = &reply["choices"][0];
        tally.add(case, &ids(&choice["token_ids"]));
        let steps = choice["logprobs"]["top_logprobs"].as_array().expect("steps");
        let mut largest = 0.0_f64;
        for (step, expected) in steps.iter().zip(&case.top) {
            let logprob = |id: u32| step[format!("token_id:{id}")].as_f64();
            let Some((best, best_logit)) = expected.first().copied() else {
                continue;
            };
            let Some(best) = logprob(best) else { break };
            // The fourth may be another token here, when fourth and fifth are close.
            for (id, logit) in expected.iter().skip(1) {
                let Some(other) = logprob(*id) else { continue };
                let difference = (best - other) - f64::from(best_logit - logit);
                largest = largest.max(difference.abs());
                compared += 1;
            }
        }
        worst = worst.max(largest);
        if largest > TOLERANCE {
            wrong.push(format!("{}: {largest:.5}", case.name));
        }
    }
    let status = cluster.only(Role::Unified).status().await;
    assert_eq!(status.prefix_cache_hits, 0, "the salts keep cases apart: {status:?}");
    assert_eq!(status.handoff_requests, 0, "{status:?}");
    cluster.finish().await;
    println!("{compared} differences of logits compared, the worst is off by {worst:.6}");
    assert!(compared > 40 * STEPS * 2, "too few compared: {compared}");
    assert!(wrong.is_empty(), "off by more than {TOLERANCE}:\n{}", wrong.join("\n"));
    tally.check("unified", start.elapsed());
}

/// Every prompt crosses from the prefill process to the decode process.
async fn disaggregated(transport: &str) {
    let builder = Cluster::builder().prefill(1).decode(1).transport(transport);
    let cluster = builder.handoff_min_tokens(1).start().await;
    let cases = fewer();
    let start = Instant::now();
    let tally = run_all(&cluster.api, &cases, 3).await;

    let (prefill, decode) = (cluster.only(Role::Prefill), cluster.only(Role::Decode));
    let (there, here) = (prefill.status().await, decode.status().await);
    assert_eq!(here.handoff_requests, cases.len() as u64, "every prompt is handed over: {here:?}");
    assert_eq!(here.handoff_failures, 0, "{here:?}");
    let prompts: usize = cases.iter().map(|case| case.prompt.len()).sum();
    assert_eq!(there.prompt_tokens, prompts as u64, "computed by the prefill worker: {there:?}");
    let (shared, grpc) = (here.handoff_bytes_shared_memory, here.handoff_bytes_grpc);
    let (used, unused) = if transport == "shm" { (shared, grpc) } else { (grpc, shared) };
    let mut client = grpc::worker(&decode.address).await;
    let described = client.describe(baton_proto::v1::DescribeRequest {}).await;
    let layout = described.expect("a description").into_inner().kv_layout.expect("a layout");
    let blocks = |case: &Greedy| case.prompt.len().div_ceil(layout.block_size as usize) as u64;
    let expected = cases.iter().map(blocks).sum::<u64>() * layout.block_bytes;
    assert_eq!(unused, 0, "only {transport} is offered: {here:?}");
    assert!(used > expected / 2 && used <= expected, "{used} bytes of at most {expected}");
    println!("{transport}: {} MiB in {} hand-offs", used >> 20, here.handoff_requests);
    cluster.finish().await;
    tally.check(&format!("disaggregated over {transport}"), start.elapsed());
}

#[tokio::test]
async fn disaggregated_over_shared_memory_equals_the_reference() {
    disaggregated("shm").await;
}

#[tokio::test]
async fn disaggregated_over_grpc_equals_the_reference() {
    disaggregated("grpc").await;
}

/// Nine at a time through both workers, so that prompts and answers share steps.
#[tokio::test]
async fn batched_among_eight_others_equals_the_reference() {
    let cluster = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(64).start().await;
    let cases = fewer();
    let start = Instant::now();
    let tally = run_all(&cluster.api, &cases, 9).await;
    let status = cluster.only(Role::Decode).status().await;
    assert!(status.handoff_requests > 0, "{status:?}");
    assert!(status.handoff_requests < cases.len() as u64, "short ones stay: {status:?}");
    cluster.finish().await;
    tally.check("batched among 8 others", start.elapsed());
}

/// Guessing ahead: what is guessed right is what would have been drawn.
#[tokio::test]
async fn with_speculation_equals_the_reference() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(64);
    let builder = builder.worker_arg("--speculative-tokens", "6");
    // Short matches, so that much is guessed, and much of it wrong.
    let cluster = builder.worker_arg("--speculative-ngram-min", "1").start().await;
    let cases = fewer();
    let start = Instant::now();
    let tally = run_all(&cluster.api, &cases, 3).await;
    let status = cluster.only(Role::Decode).status().await;
    let (drafted, accepted) = (status.spec_decode_draft_tokens, status.spec_decode_accepted_tokens);
    assert!(accepted > 0 && drafted > accepted, "{status:?}");
    println!("{accepted} of {drafted} guessed tokens were right");
    // The gateway hears of it four times a second.
    baton_tests::eventually("the gateway counts the same", Duration::from_secs(2), async || {
        let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text).expect("metrics");
        for (name, value) in [("draft_tokens", drafted), ("accepted_tokens", accepted)] {
            let name = format!("vllm:spec_decode_num_{name}_total");
            let seen = scrape.sum(&name, &[]);
            if seen != Some(value as f64) {
                return Err(format!("{name} is {seen:?}, at the worker {value}"));
            }
        }
        Ok(())
    })
    .await;
    cluster.finish().await;
    tally.check("with speculation", start.elapsed());
}

/// Each case twice without salts: the second time, and wherever cases share a prefix, blocks come
/// from the caches of both workers.
#[tokio::test]
async fn with_prefix_cache_hits_equals_the_reference() {
    let cluster = Cluster::builder()
        .prefill(1)
        .decode(1)
        .handoff_min_tokens(48)
        // Room for all cases: what is evicted is no hit.
        .kv_memory("1GiB")
        .start()
        .await;
    let cases = fewer();
    let start = Instant::now();
    let mut tally = Tally::default();
    for _ in 0..2 {
        for case in &cases {
            tally.add(case, &generate(&cluster.api, case, None).await);
        }
    }
    let decode = cluster.only(Role::Decode).status().await;
    let prompts: usize = cases.iter().map(|case| case.prompt.len()).sum();
    let hits = decode.prefix_cache_hits;
    assert!(hits as usize > prompts * 3 / 4, "{hits} of 2 × {prompts} tokens were cached");
    println!("{hits} of 2 × {prompts} prompt tokens were cached on the decode worker");
    cluster.finish().await;
    tally.check("with prefix-cache hits", start.elapsed());
}

/// Coarser settings give other answers than float32, but the same ones however they are computed:
/// alone on one worker, and in a batch behind a hand-off.
#[tokio::test]
async fn eight_bits_are_the_same_apart_and_together() {
    let builder = || {
        let builder = Cluster::builder().worker_arg("--activation-bits", "8");
        builder.worker_arg("--kv-cache-dtype", "int8")
    };
    let together = builder().unified(1).start().await;
    let apart = builder().prefill(1).decode(1).handoff_min_tokens(64).start().await;
    let cases: Vec<Greedy> = reference::greedy().into_iter().step_by(3).collect();
    let at_once = cases.iter().map(|case| generate(&apart.api, case, Some(&case.name)));
    let at_once = futures::future::join_all(at_once).await;
    let mut as_float = 0;
    for (case, apart) in cases.iter().zip(at_once) {
        let alone = generate(&together.api, case, Some(&case.name)).await;
        assert_eq!(alone, apart, "{}", case.name);
        as_float += usize::from(alone == case.output);
    }
    println!("{as_float} of {} answers are float32's", cases.len());
    let handed_off = apart.only(Role::Prefill).status().await.prompt_tokens;
    assert!(handed_off > 0, "nothing was handed off");
    together.finish().await;
    apart.finish().await;
}
