//! A request that goes interrupts the step in progress where that saves work, and only there.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_proto::v1::KvDtype;
use baton_worker::engine::{Engine, Event, Finish, RequestHandle, Settings};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{
    Model, ModelConfig, ModelError, Precision, SequenceSlice, kv_layout, load,
};
use baton_worker::scheduler::Limits;

use crate::{limits, reference, request};

/// Passes that began, and those that were interrupted.
#[derive(Default)]
struct Seen {
    passes: AtomicUsize,
    interrupted: AtomicUsize,
}

/// A model whose passes wait so long for an interruption before they begin.
struct Patient {
    model: Box<dyn Model>,
    patience: Duration,
    interrupt: Arc<AtomicBool>,
    seen: Arc<Seen>,
}

impl Model for Patient {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag.clone();
        self.model.set_interrupt(flag);
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        self.seen.passes.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        while !self.interrupt.load(Ordering::Relaxed) && start.elapsed() < self.patience {
            std::thread::sleep(Duration::from_micros(200));
        }
        let passed = self.model.forward(batch, kv, logits);
        if matches!(passed, Err(ModelError::Interrupted)) {
            self.seen.interrupted.fetch_add(1, Ordering::Relaxed);
        }
        passed
    }
}

fn engine(patience: Duration) -> (Engine, Arc<Seen>) {
    let model = load(&reference("small/qwen3"), 1, Precision::Sixteen).unwrap().model;
    let pool = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 200).unwrap();
    let limits = Limits {
        max_batch_tokens: 1024,
        max_running: 16,
        max_waiting: 16,
        max_model_len: 1000,
        ..limits(200)
    };
    let seen = Arc::new(Seen::default());
    let model = Patient { model, patience, interrupt: Arc::default(), seen: seen.clone() };
    let settings = Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout: None };
    (Engine::start(Box::new(model), pool, settings).unwrap(), seen)
}

fn submit(engine: &Engine, prompt: u32, max_tokens: u32) -> RequestHandle {
    let request = request((0..prompt).map(|i| i * 7 % 250).collect(), max_tokens);
    engine.submit(request).unwrap()
}

/// Reads a request to its end, or until it has so many tokens, and lets go of it.
async fn read(mut handle: RequestHandle, most: usize) -> (usize, Option<Finish>) {
    let mut tokens = 0;
    while tokens < most {
        match handle.next().await.unwrap() {
            Event::Token(_) => tokens += 1,
            Event::Finished(finish) => return (tokens, Some(finish)),
            _ => {}
        }
    }
    (tokens, None)
}

#[tokio::test]
async fn a_request_that_ends_or_leaves_while_it_decodes_interrupts_nobody() {
    let (engine, seen) = engine(Duration::from_millis(2));
    let others = async {
        for _ in 0..10 {
            let five = (0..5).map(|_| read(submit(&engine, 3, 3), usize::MAX));
            for end in futures::future::join_all(five).await {
                assert_eq!(end, (3, Some(Finish::Length)));
            }
            read(submit(&engine, 3, 300), 4).await;
        }
    };
    let (long, ()) = tokio::join!(read(submit(&engine, 3, 300), usize::MAX), others);
    assert_eq!(long, (300, Some(Finish::Length)));
    assert_eq!(seen.interrupted.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_request_that_leaves_in_the_middle_of_its_prompt_interrupts_the_step() {
    let (engine, seen) = engine(Duration::from_secs(30));
    let handle = submit(&engine, 800, 3);
    let freed = async {
        while seen.passes.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(handle);
        while engine.status().finished == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), freed).await.expect("it is given up at once");
    assert_eq!(seen.interrupted.load(Ordering::Relaxed), 1);
    assert_eq!(engine.status().kv_blocks_requests, 0);
}
