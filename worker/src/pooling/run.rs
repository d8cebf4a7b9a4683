//! The thread that computes batches, and the way to it. Who brings a short text while the thread is
//! idle computes it himself: to wake the thread, and to be woken by it, takes a tenth of the time.
//!
//! All threads compute one batch together, for that is how its texts are answered soonest. When many
//! batches wait, each thread computes batches of its own instead: none waits for the others, which
//! it otherwise does some hundred times in a batch, and longest when the system takes a core away.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_proto::MAX_MESSAGE_BYTES;
use baton_proto::v1::{Task, WorkerStatus};
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tracing::error;

use super::load::Model;
use super::queue::{CallId, Limits, Queue, Taken};
use super::{Answer, Failure, Input, NewCall, Output, Refusal, Wanted};
use crate::encoder::Text;
use crate::model::ModelError;

/// What the pooler must know.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bounds of the queue.
    pub limits: Limits,
    /// Tokens of one batch; a longer text is a batch of its own.
    pub max_batch_tokens: usize,
}

/// Values of one answer: a message holds them, and some bytes for each text.
const MAX_ANSWER_BYTES: usize = MAX_MESSAGE_BYTES / 8 * 7;

/// Tokens of a call that who brings it may compute, and how long such a one may take: he holds up
/// what else his thread does.
const BRIEF: (usize, Duration) = (64, Duration::from_millis(4));

/// A thread computes a batch alone when it may hold so many tokens: weights are read once for all.
const LEAST_ALONE: usize = 256;

/// What calls are checked against.
struct Bounds {
    tasks: Vec<Task>,
    /// Elements of a row, for each of the tasks.
    widths: Vec<usize>,
    vocab: usize,
    types: usize,
    max_tokens: usize,
    matryoshka: Option<Vec<u32>>,
}

/// A model that computes what is asked of it, in batches.
pub struct Pooler {
    shared: Arc<Shared>,
    bounds: Bounds,
    settings: Settings,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    budget: usize,
    /// Locked before `state`, or without waiting.
    work: Mutex<Work>,
    /// One for each thread, to compute alone; none where the model cannot be shared. Locked in a region
    /// of `work`'s threads, by its task of the same number.
    alone: Vec<Mutex<Work>>,
}

/// What computes.
struct Work {
    model: Model,
    /// Which of the batches in progress is its own.
    slot: usize,
}

/// A batch that is computed.
#[derive(Default)]
struct Running {
    /// Calls with texts in it.
    calls: BTreeSet<CallId>,
    texts: usize,
    /// Raised when nobody waits for it.
    interrupt: Arc<AtomicBool>,
}

type Batch = Vec<(Taken, Wanted)>;

struct State {
    queue: Queue,
    /// Calls that are not answered, by their number.
    calls: BTreeMap<CallId, Call>,
    /// The batch of all threads, then that of each thread alone.
    running: Vec<Running>,
    /// Threads that compute alone are to end, for one of them found no share.
    meeting: bool,
    /// How long batches of few tokens took lately; none was computed before the first.
    brief: Option<Duration>,
    pooled_inputs: u64,
    pooled_batches: u64,
    prompt_tokens: u64,
    draining: bool,
    stopping: bool,
}

struct Call {
    wanted: Wanted,
    outputs: Vec<Output>,
    missing: usize,
    arrived: Instant,
    started: Option<Instant>,
    answer: oneshot::Sender<Result<Answer, Failure>>,
}

impl Pooler {
    /// Starts the thread.
    pub fn start(mut model: Model, settings: Settings) -> std::io::Result<Self> {
        let tasks = model.head.tasks();
        let bounds = Bounds {
            widths: tasks.iter().map(|&task| model.head.width(task)).collect(),
            tasks,
            vocab: model.vocab,
            types: model.types.max(1),
            max_tokens: model.max_tokens,
            matryoshka: model.matryoshka.clone(),
        };
        let threads = model.encoder.threads().threads();
        let alone: Vec<Model> = match threads {
            1 => Vec::new(),
            _ => (0..threads).map_while(|_| model.alone()).collect(),
        };
        let mut running = Vec::new();
        let mut work = |mut model: Model| {
            let batch = Running::default();
            model.encoder.set_interrupt(batch.interrupt.clone());
            running.push(batch);
            Mutex::new(Work { model, slot: running.len() - 1 })
        };
        let (together, alone) = (work(model), alone.into_iter().map(&mut work).collect());
        let state = State {
            queue: Queue::new(settings.limits),
            calls: BTreeMap::new(),
            running,
            meeting: false,
            brief: None,
            pooled_inputs: 0,
            pooled_batches: 0,
            prompt_tokens: 0,
            draining: false,
            stopping: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            budget: settings.max_batch_tokens,
            work: together,
            alone,
        });
        let running = shared.clone();
        let thread =
            std::thread::Builder::new().name("pooler".into()).spawn(move || running.run())?;
        Ok(Self { shared, bounds, settings, thread: Mutex::new(Some(thread)) })
    }

    /// Takes a call, or says why not. May compute it, when that is a matter of milliseconds.
    pub fn submit(&self, mut call: NewCall) -> Result<CallHandle, Refusal> {
        self.bounds.check(&call).map_err(Refusal::Invalid)?;
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.state.lock();
        if state.draining || state.stopping {
            return Err(Refusal::Stopping);
        }
        let (count, arrived) = (call.inputs.len(), Instant::now());
        let tokens: usize = call.inputs.iter().map(|input| input.tokens.len()).sum();
        let idle = state.queue.texts() == 0 && state.running.iter().all(|batch| batch.texts == 0);
        // One batch holds all of it: nobody would be woken for a rest.
        let most = BRIEF.0.min(self.settings.max_batch_tokens);
        let brief = tokens <= most && state.brief.is_some_and(|took| took <= BRIEF.1);
        let id = state.queue.push(&mut call, arrived)?;
        let record = Call {
            wanted: call.wanted,
            outputs: vec![Output::default(); count],
            missing: count,
            arrived,
            started: None,
            answer: sender,
        };
        state.calls.insert(id, record);
        let work = (idle && brief).then(|| self.shared.work.try_lock()).flatten();
        match work {
            Some(mut work) => {
                let batch = state.take(work.slot, |queue, now| queue.take(self.shared.budget, now));
                drop(state);
                self.shared.compute(&mut work, batch);
            }
            None => {
                self.shared.wake.notify_one();
            }
        }
        Ok(CallHandle { id, answer: receiver, shared: self.shared.clone() })
    }

    /// Gauges and counters as of now, in texts.
    pub fn status(&self) -> WorkerStatus {
        let state = self.shared.state.lock();
        WorkerStatus {
            running: state.running.iter().map(|batch| batch.texts as u32).sum(),
            waiting: state.queue.texts() as u32,
            max_waiting: self.settings.limits.texts as u32,
            prompt_tokens: state.prompt_tokens,
            pooled_inputs: state.pooled_inputs,
            pooled_batches: state.pooled_batches,
            draining: state.draining,
            ..WorkerStatus::default()
        }
    }

    /// Refuses new calls from here on; those that are in go on.
    pub fn drain(&self) {
        self.shared.state.lock().draining = true;
    }

    /// Takes new calls again.
    pub fn undrain(&self) {
        self.shared.state.lock().draining = false;
    }

    /// Ends all calls and the thread.
    pub fn stop(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        state.running.iter().for_each(|batch| batch.interrupt.store(true, Ordering::Relaxed));
        drop(state);
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Bounds {
    /// Says what is wrong with a call, naming the field.
    fn check(&self, call: &NewCall) -> Result<(), String> {
        let Wanted { task, dimensions, .. } = call.wanted;
        let Some(at) = self.tasks.iter().position(|known| *known == task) else {
            let known: Vec<_> = self.tasks.iter().map(|task| task.as_str_name()).collect();
            return Err(format!(
                "`task` {} is not one that this model has; it has {}",
                task.as_str_name(),
                known.join(", ")
            ));
        };
        let width = self.widths[at];
        if dimensions > 0 && !matches!(task, Task::Embed | Task::TokenEmbed) {
            return Err("`dimensions` is for embeddings only".into());
        }
        if dimensions > 0 {
            let Some(listed) = &self.matryoshka else {
                return Err(format!(
                    "`dimensions` cannot be changed: this model makes embeddings of {width} only"
                ));
            };
            let fits = match listed.is_empty() {
                true => dimensions <= width,
                false => listed.iter().any(|&to| to as usize == dimensions),
            };
            if !fits {
                let choice = match listed.is_empty() {
                    true => format!("1 to {width}"),
                    false => format!("{listed:?}"),
                };
                return Err(format!("`dimensions` of {dimensions} is not supported; {choice}"));
            }
        }
        if call.inputs.is_empty() {
            return Err("`inputs` is empty; send at least one text".into());
        }
        let by_token = matches!(task, Task::TokenEmbed | Task::TokenClassify);
        let mut rows = 0;
        for (i, input) in call.inputs.iter().enumerate() {
            self.check_input(input).map_err(|reason| format!("input {i}: {reason}"))?;
            rows += if by_token { input.tokens.len() } else { 1 };
        }
        let kept = if dimensions > 0 { dimensions } else { width };
        let bytes = rows.saturating_mul(kept).saturating_mul(size_of::<f32>());
        if bytes > MAX_ANSWER_BYTES {
            return Err(format!(
                "the answer would hold {bytes} bytes, more than {MAX_ANSWER_BYTES}; send fewer or \
                 shorter texts at a time"
            ));
        }
        Ok(())
    }

    fn check_input(&self, input: &Input) -> Result<(), String> {
        let (tokens, max) = (input.tokens.len(), self.max_tokens);
        if tokens == 0 {
            return Err("it has no tokens; send at least one".into());
        }
        if tokens > max {
            return Err(format!(
                "This model's maximum context length is {max} tokens. However, your request has \
                 {tokens} input tokens. Please reduce the length of the input."
            ));
        }
        if let Some(id) = input.tokens.iter().find(|id| **id as usize >= self.vocab) {
            return Err(format!("token id {id} is outside the vocabulary of {}", self.vocab));
        }
        if !input.types.is_empty() && input.types.len() != tokens {
            let types = input.types.len();
            return Err(format!("{types} `type_ids` for {tokens} tokens; send none, or one each"));
        }
        if let Some(id) = input.types.iter().find(|id| **id as usize >= self.types) {
            let types = self.types;
            return Err(format!("type id {id} is not below {types}, the segments of this model"));
        }
        Ok(())
    }
}

/// A call in the pooler. Dropping it takes what is left of the call out of the queue.
pub struct CallHandle {
    id: CallId,
    answer: oneshot::Receiver<Result<Answer, Failure>>,
    shared: Arc<Shared>,
}

impl CallHandle {
    /// Waits for the answer.
    pub async fn answer(mut self) -> Result<Answer, Failure> {
        (&mut self.answer).await.unwrap_or(Err(Failure::Stopping))
    }
}

impl Drop for CallHandle {
    fn drop(&mut self) {
        self.shared.state.lock().remove(self.id);
    }
}

impl Shared {
    fn run(&self) {
        while self.wait() {
            let mut work = self.work.lock();
            loop {
                let mut state = self.state.lock();
                if state.queue.texts() == 0 || state.stopping {
                    break;
                }
                if self.share(&state) > 0 {
                    state.meeting = false;
                    drop(state);
                    work.model.encoder.threads().run(self.alone.len(), |i| self.run_alone(i));
                    state = self.state.lock();
                    if state.queue.texts() == 0 || state.stopping {
                        break;
                    }
                }
                let batch = state.take(work.slot, |queue, now| queue.take(self.budget, now));
                drop(state);
                self.compute(&mut work, batch);
            }
        }
    }

    /// Computes batches on this thread alone, until one of the threads finds no share: none must sit
    /// idle while others go on, for it comes back with all of them only.
    fn run_alone(&self, thread: usize) {
        let mut work = self.alone[thread].lock();
        loop {
            let mut state = self.state.lock();
            if state.meeting || state.stopping {
                return;
            }
            let share = self.share(&state);
            let batch = match share {
                0 => Batch::new(),
                _ => state.take(work.slot, |queue, now| queue.take_within(share, now)),
            };
            // Too little waits, or the next text is a long one: all threads compute it together.
            if batch.is_empty() {
                state.meeting = true;
                return;
            }
            drop(state);
            self.compute(&mut work, batch);
        }
    }

    /// Most tokens of a batch that a thread computes alone; 0 when too few wait.
    ///
    /// So much less than what waits that all threads are done with their last ones at about the same
    /// time (guided self-scheduling, Polychronopoulos and Kuck 1987). And with many threads half of a
    /// common batch: a text is answered when all of its batch is done, and each thread keeps memory for
    /// one. By default the longest text of most encoders fits, 512 tokens.
    fn share(&self, state: &State) -> usize {
        let threads = self.alone.len();
        if threads == 0 {
            return 0;
        }
        let share = state.queue.tokens() / (2 * threads);
        let most = 2 * self.budget / threads.clamp(2, 4);
        if share < LEAST_ALONE { 0 } else { share.min(most) }
    }

    /// Waits for texts. False at the end, when all calls are failed.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        while state.queue.texts() == 0 && !state.stopping {
            self.wake.wait(&mut state);
        }
        if state.stopping {
            for (id, call) in std::mem::take(&mut state.calls) {
                state.queue.remove(id);
                let _ = call.answer.send(Err(Failure::Stopping));
            }
        }
        !state.stopping
    }

    fn compute(&self, work: &mut Work, batch: Batch) {
        let wanted: Vec<Wanted> = batch.iter().map(|(_, wanted)| *wanted).collect();
        let texts: Vec<Taken> = batch.into_iter().map(|(taken, _)| taken).collect();
        let &mut Work { ref mut model, slot } = work;
        let pass = AssertUnwindSafe(|| model.compute(&texts, &wanted));
        let began = Instant::now();
        let result = match catch_unwind(pass) {
            Ok(Ok(outputs)) => Ok(outputs),
            // Nobody waits for it, or the worker stops.
            Ok(Err(ModelError::Interrupted)) => Err(Failure::Stopping),
            Ok(Err(failed)) => Err(Failure::Failed(failed.to_string())),
            Err(_) => Err(Failure::Failed("the forward pass panicked".into())),
        };
        if let Err(Failure::Failed(reason)) = &result {
            error!(reason, texts = texts.len(), "a batch failed");
        }
        self.deliver(slot, &texts, result, began.elapsed());
    }

    fn deliver(
        &self,
        slot: usize,
        texts: &[Taken],
        result: Result<Vec<Output>, Failure>,
        took: Duration,
    ) {
        let tokens: usize = texts.iter().map(|taken| taken.input.tokens.len()).sum();
        let mut state = self.state.lock();
        if tokens <= BRIEF.0 && slot == 0 && result.is_ok() {
            // One that was held up says little.
            state.brief = Some(state.brief.map_or(took, |before| (3 * before + took) / 4));
        }
        let state = &mut *state;
        let batch = &mut state.running[slot];
        (batch.calls, batch.texts) = (BTreeSet::new(), 0);
        let outputs = match result {
            Ok(outputs) => outputs,
            Err(failure) => {
                for taken in texts {
                    if let Some(call) = state.remove(taken.call) {
                        let _ = call.answer.send(Err(failure.clone()));
                    }
                }
                return;
            }
        };
        state.pooled_batches += 1;
        state.pooled_inputs += texts.len() as u64;
        state.prompt_tokens += tokens as u64;
        for (taken, output) in texts.iter().zip(outputs) {
            let Some(call) = state.calls.get_mut(&taken.call) else { continue };
            call.outputs[taken.index] = output;
            call.missing -= 1;
            if call.missing > 0 {
                continue;
            }
            if let Some(call) = state.calls.remove(&taken.call) {
                let started = call.started.unwrap_or(call.arrived);
                let answer = Answer {
                    outputs: call.outputs,
                    queued: started - call.arrived,
                    computed: started.elapsed(),
                };
                let _ = call.answer.send(Ok(answer));
            }
        }
    }
}

impl State {
    /// Removes a call and what is left of it, and gives up the batches that nobody waits for then.
    fn remove(&mut self, id: CallId) -> Option<Call> {
        self.queue.remove(id);
        let call = self.calls.remove(&id)?;
        for batch in self.running.iter().filter(|batch| batch.calls.contains(&id)) {
            if !batch.calls.iter().any(|id| self.calls.contains_key(id)) {
                batch.interrupt.store(true, Ordering::Relaxed);
            }
        }
        Some(call)
    }

    /// The next batch, of texts that wait.
    fn take(&mut self, slot: usize, of: impl FnOnce(&mut Queue, Instant) -> Vec<Taken>) -> Batch {
        let now = Instant::now();
        let batch = of(&mut self.queue, now);
        let running = &mut self.running[slot];
        running.interrupt.store(false, Ordering::Relaxed);
        running.calls = batch.iter().map(|taken| taken.call).collect();
        running.texts = batch.len();
        let wanted = batch.into_iter().filter_map(|taken| {
            let call = self.calls.get_mut(&taken.call)?;
            call.started.get_or_insert(now);
            Some((taken, call.wanted))
        });
        wanted.collect()
    }
}

impl Model {
    fn compute(&mut self, texts: &[Taken], wanted: &[Wanted]) -> Result<Vec<Output>, ModelError> {
        let inputs: Vec<Text<'_>> = texts
            .iter()
            .map(|taken| Text { tokens: &taken.input.tokens, types: &taken.input.types })
            .collect();
        let hidden = self.encoder.hidden();
        let (mut rest, threads) = self.encoder.encode(&inputs)?;
        let mut rows = Vec::with_capacity(texts.len());
        for (text, &wanted) in inputs.iter().zip(wanted) {
            let (own, after) = rest.split_at(text.tokens.len() * hidden);
            rest = after;
            rows.push((own, wanted));
        }
        let outputs = self.head.apply(threads, &rows);
        // Who waits for the answer wants a core now.
        threads.rest();
        Ok(outputs)
    }
}
