//! What the engine does not take.

#![allow(clippy::unwrap_used)]

use baton_proto::v1::{KvDtype, SamplingParams};
use baton_worker::engine::{Engine, NewRequest, Settings, SubmitError};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, kv_layout, load};
use baton_worker::scheduler::Limits;

use crate::{limits, reference, request};

const BLOCKS: usize = 5000;

fn engine() -> Engine {
    let model = load(&reference("small/qwen3"), 1, Precision::Sixteen).unwrap().model;
    let pool = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), BLOCKS).unwrap();
    let limits = Limits { max_model_len: usize::MAX, ..limits(BLOCKS) };
    let settings = Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout: None };
    Engine::start(model, pool, settings).unwrap()
}

/// With logprobs of so many tokens each, in place of at most so many.
fn submit(engine: &Engine, logprobs: u32, max_tokens: u32) -> Result<(), SubmitError> {
    let sampling = SamplingParams {
        logprobs: Some(logprobs),
        max_tokens,
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..SamplingParams::default()
    };
    let request = NewRequest { sampling, ..request(vec![5, 6, 7], 0) };
    engine.submit(request).map(drop)
}

#[test]
fn logprobs_of_all_tokens_together_are_bounded() {
    let engine = engine();
    // The whole vocabulary, 256 tokens, and the one that was drawn.
    for count in [256, u32::MAX] {
        let refused = submit(&engine, count, 70_000);
        assert_eq!(refused, Err(SubmitError::Logprobs { tokens: 70_000, count }));
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("`logprobs`") && message.contains("`max_tokens`"), "{message}");
        // What the context leaves is what may be drawn.
        let longest = Err(SubmitError::Logprobs { tokens: 16 * BLOCKS - 3, count });
        assert_eq!(submit(&engine, count, u32::MAX), longest);
        assert_eq!(submit(&engine, count, 60_000), Ok(()));
    }
    assert_eq!(submit(&engine, 20, 70_000), Ok(()));
}
