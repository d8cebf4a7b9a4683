//! One sequence's way through its constraint, computed beside the engine.
//!
//! Right after a token was drawn, a helper thread takes the matcher over it and computes which
//! tokens may follow, while the engine computes the token's forward pass. The engine asks at the
//! next draw, and waits if the helper is not done.
//!
//! Sequences of one constraint share its lexer, whose states and errors are all of theirs. So one
//! that fails is taken over its output once more, with a lexer of its own: what it fails of there is
//! its own fault.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use llguidance::{CancellationHandle, Matcher};
use parking_lot::{Condvar, Mutex, MutexGuard};
use toktrie::SimpleVob;

use super::{Compiled, brief};

/// The longest that a draw, and with it the engine, waits. A mask is bounded by llguidance's limits,
/// to tens of milliseconds; beyond this something is wrong.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tokens after which a sequence looks how full the lexer is.
const LOOK_EVERY: usize = 32;

/// A sequence's state in its constraint. Dropping it stops what is being computed for it.
pub struct Session {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
}

pub(super) struct Shared {
    state: Mutex<State>,
    ready: Condvar,
}

/// What may follow the output so far, once it is known.
pub struct State {
    /// Absent before the first job, while a helper has it, and after a failure.
    matcher: Option<Matcher>,
    /// Where the matcher comes from.
    origin: Arc<Compiled>,
    /// Whether its lexer is its own.
    apart: bool,
    cancel: Option<CancellationHandle>,
    /// Tokens that it has taken, and those that it has yet to take.
    taken: Vec<u32>,
    todo: Vec<u32>,
    /// Whether a helper has it, or will.
    queued: bool,
    abandoned: bool,
    mask: SimpleVob,
    over: bool,
    failure: Option<String>,
}

impl State {
    /// The tokens that may follow, a bit for each.
    pub fn allowed(&self) -> &[u32] {
        self.mask.as_slice()
    }

    /// Whether this token may follow.
    pub fn allows(&self, token: u32) -> bool {
        (token as usize) < self.mask.len() && self.mask.is_allowed(token)
    }

    /// Whether the output is complete and nothing can follow it.
    pub fn over(&self) -> bool {
        self.over
    }
}

impl Session {
    /// A session that goes on after `output`.
    pub(super) fn start(compiled: Arc<Compiled>, queue: Arc<Queue>, output: &[u32]) -> Self {
        let mut todo = Vec::with_capacity(output.len().max(8));
        todo.extend_from_slice(output);
        let state = State {
            matcher: None,
            origin: compiled,
            apart: false,
            cancel: None,
            taken: Vec::new(),
            todo,
            queued: true,
            abandoned: false,
            mask: SimpleVob::new(),
            over: false,
            failure: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), ready: Condvar::new() });
        queue.push(shared.clone());
        Self { shared, queue }
    }

    /// Notes a token of the output, and has what may follow it computed.
    pub fn advance(&self, token: u32) {
        let mut state = self.shared.state.lock();
        state.todo.push(token);
        if !std::mem::replace(&mut state.queued, true) {
            drop(state);
            self.queue.push(self.shared.clone());
        }
    }

    /// What may follow the output, and how long that took to come.
    ///
    /// # Errors
    /// When the output does not match, or a limit is reached.
    pub fn next(&self) -> (Result<MutexGuard<'_, State>, String>, Duration) {
        let mut state = self.shared.state.lock();
        if !state.queued {
            return (known(state), Duration::ZERO);
        }
        let start = Instant::now();
        while state.queued {
            if self.shared.ready.wait_until(&mut state, start + PATIENCE).timed_out() {
                return (Err("the constraint takes too long".to_owned()), start.elapsed());
            }
        }
        (known(state), start.elapsed())
    }
}

fn known(state: MutexGuard<'_, State>) -> Result<MutexGuard<'_, State>, String> {
    match state.failure.clone() {
        None => Ok(state),
        Some(failure) => Err(failure),
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.abandoned = true;
        if let Some(cancel) = &state.cancel {
            cancel.cancel();
        }
    }
}

impl Shared {
    /// Takes the matcher as far as the output goes.
    fn work(&self) {
        let mut tokens = Vec::new();
        let mut state = self.state.lock();
        let origin = state.origin.clone();
        loop {
            if state.abandoned || state.failure.is_some() {
                break;
            }
            tokens.clear();
            // Not taken: the engine's thread must not allocate when it adds the next.
            tokens.append(&mut state.todo);
            state.taken.extend_from_slice(&tokens);
            let mut matcher = match state.matcher.take() {
                Some(matcher) => matcher,
                None => {
                    tokens.clone_from(&state.taken);
                    let apart = state.apart;
                    MutexGuard::unlocked(&mut state, || match apart {
                        true => origin.own_matcher(),
                        false => origin.matcher(),
                    })
                }
            };
            state.cancel = matcher.cancellation_handle();
            if state.abandoned {
                break;
            }
            let (step, matcher) = MutexGuard::unlocked(&mut state, || {
                let step = matcher.consume_tokens(&tokens).and_then(|()| {
                    let over = matcher.is_stopped();
                    Ok((matcher.compute_mask_or_eos()?, over))
                });
                (step, matcher)
            });
            match step {
                Ok((mask, over)) => {
                    (state.mask, state.over) = (mask, over);
                    state.matcher = Some(matcher);
                }
                Err(error) if state.abandoned => drop(error),
                Err(_) if !state.apart => {
                    origin.retire();
                    state.apart = true;
                    continue;
                }
                Err(error) => state.failure = Some(format!("constraint: {}", brief(&error))),
            }
            if state.todo.is_empty() {
                break;
            }
        }
        state.queued = false;
        self.ready.notify_all();
        // Now and then, and after the answer: others may have the lexer.
        let due = state.taken.len().is_multiple_of(LOOK_EVERY);
        let look = due && state.matcher.is_some() && !state.apart;
        drop(state);
        if look {
            origin.retire_in_time();
        }
    }
}

/// Sessions that wait for a helper: at most one entry for each.
pub(super) struct Queue {
    state: Mutex<Jobs>,
    work: Condvar,
}

struct Jobs {
    waiting: VecDeque<Arc<Shared>>,
    stopping: bool,
}

impl Queue {
    fn push(&self, job: Arc<Shared>) {
        self.state.lock().waiting.push_back(job);
        self.work.notify_one();
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        while !state.stopping {
            match state.waiting.pop_front() {
                Some(job) => MutexGuard::unlocked(&mut state, || {
                    // A helper outlives a fault of one constraint, whose draw gives up.
                    let _ = catch_unwind(AssertUnwindSafe(|| job.work()));
                }),
                None => self.work.wait(&mut state),
            }
        }
    }
}

/// The helper threads. They end when this is dropped.
pub(super) struct Helpers {
    queue: Arc<Queue>,
}

impl Helpers {
    pub(super) fn start(threads: usize) -> std::io::Result<Self> {
        let jobs = Jobs { waiting: VecDeque::with_capacity(512), stopping: false };
        let queue = Arc::new(Queue { state: Mutex::new(jobs), work: Condvar::new() });
        let helpers = Self { queue: queue.clone() };
        for _ in 0..threads {
            let queue = queue.clone();
            std::thread::Builder::new().name("constraint".into()).spawn(move || queue.serve())?;
        }
        Ok(helpers)
    }

    pub(super) fn queue(&self) -> Arc<Queue> {
        self.queue.clone()
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        // Not joined: the last to let go may be a helper itself.
        self.queue.state.lock().stopping = true;
        self.queue.work.notify_all();
    }
}
