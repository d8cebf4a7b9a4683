//! What the engine does when what computes fails, once or for good, or hangs.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use baton_proto::v1::KvDtype;
use baton_worker::engine::{Engine, Finish, RequestHandle, Settings, SubmitError};
use baton_worker::kv::pool::{DeviceError, KvPool};
use baton_worker::model::{
    Model, ModelConfig, ModelError, Precision, SequenceSlice, kv_layout, load,
};
use baton_worker::scheduler::Refusal;

use crate::{ended, limits, reference, request};

/// A model whose passes end like this, one after the other; those after them succeed.
struct Failing {
    model: Box<dyn Model>,
    passes: VecDeque<Option<ModelError>>,
}

impl Model for Failing {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        match self.passes.pop_front().flatten() {
            Some(error) => Err(error),
            None => self.model.forward(batch, kv, logits),
        }
    }
}

/// A model whose passes do not end while the other end is there.
struct Hanging {
    model: Box<dyn Model>,
    held: mpsc::Receiver<()>,
}

impl Model for Hanging {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let _ = self.held.recv();
        self.model.forward(batch, kv, logits)
    }
}

fn small() -> Box<dyn Model> {
    load(&reference("small/qwen3"), 1, Precision::Sixteen).unwrap().model
}

fn engine(passes: Vec<Option<ModelError>>) -> Engine {
    start(Box::new(Failing { model: small(), passes: passes.into() }), None)
}

fn start(model: Box<dyn Model>, step_timeout: Option<Duration>) -> Engine {
    let pool = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 40).unwrap();
    let limits = limits(40);
    let settings = Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout };
    Engine::start(model, pool, settings).unwrap()
}

fn submit(engine: &Engine) -> Result<RequestHandle, SubmitError> {
    engine.submit(request(vec![5, 6, 7], 4))
}

#[tokio::test]
async fn a_device_that_fails_once_fails_the_requests_of_its_step_alone() {
    let error = ModelError::Device(DeviceError("out of memory".into()));
    let engine = engine(vec![Some(error)]);
    let (tokens, finish) = ended(submit(&engine).unwrap()).await;
    assert!(tokens.is_empty());
    assert!(matches!(&finish, Finish::Failed(reason) if reason.contains("out of memory")));
    let (tokens, finish) = ended(submit(&engine).unwrap()).await;
    assert_eq!((tokens.len(), finish), (4, Finish::Length));
}

#[tokio::test]
async fn a_device_that_is_lost_gives_its_requests_up_and_takes_no_more() {
    let error = ModelError::Lost("the GPU fell off the bus".into());
    let engine = engine(vec![None, None, Some(error)]);
    let serving = tokio::time::timeout(Duration::from_millis(50), engine.lost()).await;
    assert!(serving.is_err(), "nothing is lost yet");
    let (tokens, finish) = ended(submit(&engine).unwrap()).await;
    // As when the worker is stopped: it goes on elsewhere.
    assert_eq!((tokens.len(), finish), (2, Finish::Stopping));
    let reason = tokio::time::timeout(Duration::from_secs(5), engine.lost()).await;
    assert_eq!(reason.expect("it is told"), "the GPU fell off the bus");
    let refused = submit(&engine).map(drop);
    assert_eq!(refused, Err(SubmitError::Refused(Refusal::Stopping)));
    let status = engine.status();
    assert_eq!((status.running, status.waiting, status.kv_blocks_requests), (0, 0, 0));
}

#[tokio::test]
async fn a_step_that_never_ends_is_told() {
    let (hold, held) = mpsc::channel();
    let model = Box::new(Hanging { model: small(), held });
    let engine = start(model, Some(Duration::from_millis(200)));
    let idle = tokio::time::timeout(Duration::from_millis(500), engine.lost()).await;
    assert!(idle.is_err(), "no step is in progress: {idle:?}");
    let handle = submit(&engine).unwrap();
    let reason = tokio::time::timeout(Duration::from_secs(5), engine.lost()).await;
    let reason = reason.expect("it is told");
    assert!(reason.contains("--step-timeout"), "{reason}");
    assert_eq!(submit(&engine).map(drop), Err(SubmitError::Refused(Refusal::Stopping)));
    drop(handle);
    // Nobody waits for what may never end.
    let start = Instant::now();
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    drop(hold);
}

#[tokio::test]
async fn steps_that_end_are_not_taken_for_one_that_does_not() {
    let (hold, held) = mpsc::channel();
    let model = Box::new(Hanging { model: small(), held });
    let engine = start(model, Some(Duration::from_secs(2)));
    let handle = submit(&engine).unwrap();
    let paced = async {
        // The prompt and three tokens, together longer than one step may take.
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(600)).await;
            hold.send(()).unwrap();
        }
        ended(handle).await
    };
    tokio::select! {
        (tokens, finish) = paced => assert_eq!((tokens.len(), finish), (4, Finish::Length)),
        reason = engine.lost() => panic!("{reason}"),
    }
}
