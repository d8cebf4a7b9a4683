//! Speculation changes how fast tokens come, and nothing else: an engine that guesses ahead gives
//! the same tokens, log-probabilities and endings as one that does not, whatever is asked of it.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use baton_proto::v1::{KvDtype, SamplingParams, Token, WorkerStatus};
use baton_worker::engine::{Engine, Event, Finish, NewRequest, Purpose, Settings};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, kv_layout, load};
use baton_worker::scheduler::{Limits, Speculation};
use proptest::prelude::*;

use crate::reference;

const BLOCK: usize = 16;

/// Over a tiny untrained model: its texts soon repeat, in part, so that guesses are right and wrong.
fn engine(tokens: usize, blocks: usize) -> Engine {
    let small = reference("small/qwen3");
    let model = load(&small, 1, Precision::Sixteen).unwrap().model;
    let pool = KvPool::new(kv_layout(model.config(), BLOCK, KvDtype::I16), blocks).unwrap();
    let limits = Limits {
        block_size: BLOCK,
        blocks,
        max_batch_tokens: 64,
        max_running: 8,
        max_waiting: 64,
        max_model_len: 120,
        leading: 0,
        speculation: Speculation { tokens, ngram_min: 1, ngram_max: 3 },
        priority_aging: Duration::from_secs(30),
    };
    Engine::start(
        model,
        pool,
        Settings { limits, eos_token_ids: vec![7, 8], speech: None, step_timeout: None },
    )
    .unwrap()
}

/// Everything that a client sees of a request.
#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<Token>,
    finish: Finish,
}

/// Runs all requests at once.
fn answers(engine: &Engine, requests: &[NewRequest]) -> Vec<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let handles: Vec<_> = requests.iter().map(|new| engine.submit(new.clone()).unwrap()).collect();
    let collect = async |mut handle: baton_worker::engine::RequestHandle| {
        let mut tokens = Vec::new();
        loop {
            match handle.next().await.unwrap() {
                Event::Token(token) => tokens.push(token),
                Event::Finished(finish) => return Answer { tokens, finish },
                _ => {}
            }
        }
    };
    runtime.block_on(futures::future::join_all(handles.into_iter().map(collect)))
}

/// The status after all requests have gone.
fn at_rest(engine: &Engine) -> WorkerStatus {
    let start = Instant::now();
    loop {
        let status = engine.status();
        if status.running + status.waiting == 0 && status.kv_blocks_requests == 0 {
            return status;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{status:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn request() -> impl Strategy<Value = NewRequest> {
    let prompt = prop_oneof![
        prop::collection::vec(10u32..14, 1..40),
        prop::collection::vec(0u32..256, 1..40),
    ];
    let output = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(10u32..14, 1..8)];
    let draw =
        (prop_oneof![Just(0.0f32), Just(0.05), Just(0.3)], 0.5f32..=1.0, 0u32..9, any::<u64>());
    let penalties = prop_oneof![
        2 => Just((1.0f32, 0.0f32, 0.0f32)),
        1 => (0.8f32..1.3, -0.5f32..0.5, -0.3f32..0.3),
    ];
    let ends = (1u32..70, 0u32..20, prop::collection::vec(0u32..256, 0..6), any::<bool>());
    let more = (
        prop::collection::btree_map(0u32..256, -2f32..2.0, 0..4),
        prop_oneof![3 => Just(None), 1 => (0u32..4).prop_map(Some)],
    );
    (prompt, output, draw, penalties, ends, more).prop_map(
        |(prompt, output, draw, penalties, ends, (bias, logprobs))| {
            let (temperature, top_p, top_k, seed) = draw;
            let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
            let (new, min_tokens, stop_token_ids, ignore_eos) = ends;
            let sampling = SamplingParams {
                temperature,
                top_p,
                top_k,
                seed,
                max_tokens: new + output.len() as u32,
                min_tokens,
                stop_token_ids,
                ignore_eos,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: bias.into_iter().collect(),
                logprobs,
                ..SamplingParams::default()
            };
            NewRequest {
                output,
                sampling,
                deadline: Instant::now() + Duration::from_secs(600),
                ..crate::request(prompt, 0)
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn answers_are_the_same_with_and_without(
        requests in prop::collection::vec(request(), 1..7),
        tokens in 1usize..9,
        // Few enough that some must give way.
        blocks in 8usize..40,
    ) {
        let (plain, ahead) = (engine(0, blocks), engine(tokens, blocks));
        let expected = answers(&plain, &requests);
        // Twice: the second time prompts, and answers that others continue, are cached.
        for _ in 0..2 {
            let got = answers(&ahead, &requests);
            for (got, (expected, request)) in got.iter().zip(expected.iter().zip(&requests)) {
                prop_assert_eq!(got, expected, "{:?}", request);
            }
        }
        let continued: Vec<NewRequest> = requests
            .iter()
            .zip(&expected)
            .filter(|(request, answer)| request.prompt.len() + request.output.len() + answer.tokens.len() < 100)
            .map(|(request, answer)| {
                let mut request = request.clone();
                request.prompt.extend(&request.output);
                request.prompt.extend(answer.tokens.iter().map(|token| token.id));
                request.output.clear();
                request.sampling.max_tokens = 10;
                request
            })
            .collect();
        prop_assert_eq!(answers(&ahead, &continued), answers(&plain, &continued));
        prop_assert_eq!(at_rest(&plain).spec_decode_drafts, 0);
        at_rest(&ahead);
    }
}

#[test]
fn what_repeats_is_guessed_and_counted() {
    let ahead = engine(6, 40);
    let sampling = SamplingParams {
        max_tokens: 100,
        ignore_eos: true,
        top_p: 1.0,
        repetition_penalty: 1.0,
        // One token over and over.
        logit_bias: [(42, 1000.0)].into(),
        ..SamplingParams::default()
    };
    let request = NewRequest {
        prompt: vec![1, 2, 3],
        audio: None,
        output: Vec::new(),
        sampling,
        constraint: None,
        priority: 0,
        salt: String::new(),
        adapter: None,
        purpose: Purpose::Generate { pull_from: None },
        deadline: Instant::now() + Duration::from_secs(60),
        returning: false,
    };
    let answer = answers(&ahead, &[request]).remove(0);
    assert!(answer.tokens.len() == 100 && answer.tokens.iter().all(|token| token.id == 42));
    let WorkerStatus {
        spec_decode_drafts,
        spec_decode_draft_tokens,
        spec_decode_accepted_tokens,
        ..
    } = at_rest(&ahead);
    assert_eq!(spec_decode_accepted_tokens, spec_decode_draft_tokens, "none was wrong");
    // A step gives seven tokens; the first two and the last few come in shorter ones.
    assert!((82..=98).contains(&spec_decode_accepted_tokens), "{spec_decode_accepted_tokens}");
    assert!((13..=20).contains(&spec_decode_drafts), "{spec_decode_drafts}");
}
