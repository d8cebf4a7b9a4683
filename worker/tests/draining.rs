//! A worker that drains, and what must not hold up the sequences that can go.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::InstanceRole;
use baton_proto::v1::worker_server::Worker as _;
use baton_proto::v1::{
    GenerateEvent, GenerateRequest, KvDtype, ModelCard, SamplingParams, Transport,
};
use baton_worker::engine::{Engine, Settings};
use baton_worker::kv::pool::KvPool;
use baton_worker::lora::{Adapters, Bounds};
use baton_worker::model::{
    Model, ModelConfig, ModelError, Precision, SequenceSlice, kv_layout, load,
};
use baton_worker::scheduler::Limits;
use baton_worker::service::{Identity, Owned, Parts, WorkerService};
use baton_worker::transfer::Transports;
use tonic::Request;

use crate::{limits, reference};

/// How long a pass takes: so that streams that nobody reads have room for all tokens of a test.
const PASS: Duration = Duration::from_millis(250);
/// How long blocks are kept.
const LEASE: Duration = Duration::from_secs(60);

struct Slow(Box<dyn Model>);

impl Model for Slow {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        std::thread::sleep(PASS);
        self.0.forward(batch, kv, logits)
    }
}

fn service() -> (WorkerService, Arc<Engine>) {
    let loaded = load(&reference("small/qwen3"), 1, Precision::Sixteen).unwrap();
    let config = loaded.model.config().clone();
    let pool = KvPool::new(kv_layout(&config, 16, KvDtype::I16), 200).unwrap();
    let limits = Limits {
        max_batch_tokens: 1024,
        max_running: 16,
        max_waiting: 16,
        max_model_len: 1000,
        ..limits(200)
    };
    let settings = Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout: None };
    let engine = Arc::new(Engine::start(Box::new(Slow(loaded.model)), pool, settings).unwrap());
    let parts = Parts {
        identity: Identity { instance_id: "a".into(), role: InstanceRole::Unified },
        model: ModelCard { vocab_size: config.vocab as u32, ..ModelCard::default() },
        tokenizer: loaded.tokenizer,
        adapters: Adapters::new(config, Vec::new(), Bounds { adapters: 0, rank: 8 }),
        transports: Transports::new(&[Transport::Grpc]),
        hold_lease: LEASE,
        drain_timeout: LEASE,
        engine: engine.clone(),
    };
    (WorkerService::new(parts).unwrap(), engine)
}

/// A stream that is not read.
async fn generate(
    service: &WorkerService,
    prompt: u32,
    prompt_logprobs: Option<u32>,
) -> Owned<GenerateEvent> {
    let request = GenerateRequest {
        prompt_token_ids: (0..prompt).map(|i| i * 7 % 250).collect(),
        sampling: Some(SamplingParams {
            max_tokens: 90,
            top_p: 1.0,
            repetition_penalty: 1.0,
            prompt_logprobs,
            ..SamplingParams::default()
        }),
        movable: true,
        ..GenerateRequest::default()
    };
    service.generate(Request::new(request)).await.unwrap().into_inner()
}

async fn until(what: &str, seen: impl Fn() -> bool) {
    let start = Instant::now();
    while !seen() {
        assert!(start.elapsed() < Duration::from_secs(15), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_keeps_its_blocks_and_no_others_turn() {
    let (service, engine) = service();
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(generate(&service, 3, None).await);
    }
    until("all decode", || engine.status().generation_tokens >= 8).await;
    service.drain().begin(None);
    until("four are released", || engine.status().released >= 4).await;
    assert_eq!(engine.status().released, 4, "a few at a time");
    until("the others are, too", || engine.status().released == 8).await;
    assert_eq!(engine.status().held, 8, "within the lease");
    drop(streams);
    until("all are freed", || engine.status().running == 0).await;
}

#[tokio::test]
async fn a_sequence_that_cannot_be_released_yet_takes_no_turn() {
    let (service, engine) = service();
    // Fifteen steps.
    let scored = generate(&service, 900, Some(0)).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(generate(&service, 3, None).await);
    }
    until("the others decode", || engine.status().generation_tokens >= 4).await;
    let start = Instant::now();
    service.drain().begin(None);
    until("the others are released", || engine.status().released == 4).await;
    assert!(start.elapsed() < Duration::from_millis(2500), "{:?}", start.elapsed());
    until("then it is", || engine.status().released == 5).await;
    drop((scored, streams));
}
