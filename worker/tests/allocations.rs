//! A step of a running batch allocates nothing in the engine's thread.
//!
//! What is left is bounded, and happens when requests begin and end, not at each step: a request's
//! channel is a list of blocks of 32 events, which its reader gives back, so that a stream that is
//! read allocates a few at its start; the answers of `logprobs` are lists of their own; the table
//! of a sequence's drafts doubles.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_proto::v1::constraint::Kind;
use baton_proto::v1::{Constraint, KvDtype, SamplingParams, TokenSequence};
use baton_worker::constraint::{Compiled, Compiler};
use baton_worker::engine::{Engine, Event, NewRequest, Purpose, RequestHandle, Settings};
use baton_worker::kv::pool::KvPool;
use baton_worker::lora::{Adapter, peft};
use baton_worker::model::{
    LoadedModel, Model, ModelConfig, ModelError, Precision, SequenceSlice, kv_layout, load,
};
use baton_worker::scheduler::{Limits, Speculation};

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// Counts allocations of the threads that are [`COUNTED`].
struct Counting;

fn count() {
    if COUNTED.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

/// Steps since the streams were read. A reader that falls behind makes channels longer.
static AHEAD: AtomicUsize = AtomicUsize::new(0);
const MOST_AHEAD: usize = 6;
/// A reader may wait for a stream that begins only when the engine goes on.
const PATIENCE: Duration = Duration::from_millis(100);

/// Marks the thread that calls it, which is the engine's, and holds it back for its readers.
struct Marking(Box<dyn Model>);

impl Model for Marking {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.0.set_interrupt(flag);
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        COUNTED.set(true);
        let start = Instant::now();
        while AHEAD.load(Ordering::Relaxed) > MOST_AHEAD && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        AHEAD.fetch_add(1, Ordering::Relaxed);
        self.0.forward(batch, kv, logits)
    }
}

const BATCH: usize = 4;
/// Output tokens before the count begins: by then buffers have grown and channels have their blocks.
const WARM: usize = 150;
const COUNTED_TOKENS: usize = 300;

fn small() -> LoadedModel {
    let small = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/small/qwen3");
    load(&small, 1, Precision::Sixteen).unwrap()
}

fn engine(speculative: usize) -> Engine {
    let model = Box::new(Marking(small().model));
    let pool = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 400).unwrap();
    let limits = Limits {
        block_size: 16,
        blocks: 400,
        max_batch_tokens: 1024,
        max_running: 8,
        max_waiting: 8,
        max_model_len: 1000,
        leading: 0,
        speculation: Speculation { tokens: speculative, ..Speculation::OFF },
        priority_aging: Duration::from_secs(30),
    };
    Engine::start(
        model,
        pool,
        Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout: None },
    )
    .unwrap()
}

/// Starts a batch, reads it past the warm-up, and counts. Every second sequence runs with the
/// adapter, if there is one.
fn allocations(
    engine: &Engine,
    sampling: &SamplingParams,
    constraint: Option<&Arc<Compiled>>,
    adapter: Option<&Arc<Adapter>>,
) -> usize {
    let start = |prompt: Vec<u32>, max_tokens| {
        let adapter = adapter.filter(|_| prompt[0].is_multiple_of(2)).cloned();
        let request = NewRequest {
            prompt,
            audio: None,
            output: Vec::new(),
            sampling: SamplingParams { max_tokens, ..sampling.clone() },
            constraint: constraint.cloned(),
            priority: 0,
            salt: String::new(),
            adapter,
            purpose: Purpose::Generate { pull_from: None },
            deadline: Instant::now() + Duration::from_secs(600),
            returning: false,
        };
        engine.submit(request).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let read = async |handle: &mut RequestHandle| loop {
        match handle.next().await.unwrap() {
            Event::Finished(_) => break,
            Event::Token(_) => return,
            _ => {}
        }
    };
    runtime.block_on(async {
        // The model's buffers grow to the longest context and the largest step.
        let mut long = start((0..999).map(|i| i * 7 % 256).collect(), 1);
        while long.next().await.is_some_and(|event| !matches!(event, Event::Finished(_))) {}
        AHEAD.store(0, Ordering::Relaxed);
        let mut batch: Vec<RequestHandle> = (0..BATCH as u32)
            .map(|i| start(vec![i, 5, 6], 3 + (WARM + COUNTED_TOKENS) as u32 + 300))
            .collect();
        let mut counts = [0; 2];
        for (count, tokens) in counts.iter_mut().zip([WARM, COUNTED_TOKENS]) {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..tokens {
                for handle in &mut batch {
                    read(handle).await;
                }
                AHEAD.store(0, Ordering::Relaxed);
            }
            *count = ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
        assert!(counts[0] > 0, "the engine's thread is counted");
        counts[1]
    })
}

/// One test, as the counter is the process's.
#[test]
fn steps_allocate_nothing() {
    let greedy = SamplingParams {
        top_p: 1.0,
        repetition_penalty: 1.0,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let sampled = SamplingParams { temperature: 1.0, top_p: 0.9, seed: 3, ..greedy.clone() };
    let filtered = SamplingParams { top_k: 40, min_p: 0.01, ..sampled.clone() };
    let reported = SamplingParams { logprobs: Some(0), ..sampled.clone() };
    let restricted = SamplingParams {
        allowed_token_ids: (0..200).collect(),
        bad_words: [vec![9], vec![8, 7], vec![6, 5, 4]]
            .map(|token_ids| TokenSequence { token_ids })
            .into(),
        ..sampled.clone()
    };
    let LoadedModel { model, tokenizer, .. } = small();
    let compiler = Compiler::new(&tokenizer, model.config().vocab, &[]);
    let kind = Some(Kind::Regex("[a-zA-Z0-9 ]*".into()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let letters = runtime.block_on(compiler.compile(&Constraint { kind })).unwrap();
    let plain = engine(0);
    for (what, sampling, constraint) in [
        ("greedy", &greedy, None),
        ("top-p", &sampled, None),
        ("top-k", &filtered, None),
        ("logprobs", &reported, None),
        ("allowed tokens and bad words", &restricted, None),
        ("a constraint", &sampled, Some(&letters)),
    ] {
        let count = allocations(&plain, sampling, constraint, None);
        assert_eq!(count, 0, "{what}: in {COUNTED_TOKENS} steps of {BATCH} sequences");
    }
    let small = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/small");
    let config = load(&small.join("qwen3"), 1, Precision::Sixteen).unwrap().model.config().clone();
    let adapter = Arc::new(peft::read(&small.join("lora/qwen3-root"), &config, 8).unwrap());
    let count = allocations(&plain, &greedy, None, Some(&adapter));
    assert_eq!(count, 0, "with an adapter: in {COUNTED_TOKENS} steps of {BATCH} sequences");
    // Each sequence's two tables double once or twice while it grows threefold, no more.
    let count = allocations(&engine(4), &greedy, None, None);
    assert!(count <= BATCH * 2 * 4, "greedy with drafts: {count}");
}
