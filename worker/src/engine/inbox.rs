//! The way into the engine thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use baton_proto::v1::Token;
use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;

use super::{Event, NewRequest};
use crate::scheduler::{Limits, Load, Pulled, Refusal, SequenceId};

pub(super) enum Command {
    Add { id: SequenceId, request: Box<NewRequest>, events: mpsc::Sender<Event>, arrived: Instant },
    Abort(SequenceId),
    Release(SequenceId),
    PullEnded { id: SequenceId, pulled: Pulled, first: Option<Token> },
}

/// What outlives the lock: the commands, and whether to go on.
pub(super) struct Batch {
    pub(super) commands: VecDeque<Command>,
    pub(super) stopping: bool,
}

pub(super) struct Inbox {
    limits: Limits,
    state: Mutex<State>,
    wake: Condvar,
    /// Raised by an abort that saves work: the step in progress is given up.
    interrupt: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    commands: VecDeque<Command>,
    next_id: SequenceId,
    /// Requests among the commands, and those among the commands that the engine took since it
    /// last told its load.
    arrived: usize,
    taken: usize,
    /// The scheduler's load as of the last drain.
    load: Load,
    /// Sequences whose abort interrupts the step in progress: those of whose tokens it computes
    /// several. Whoever takes one row of it, or has ended already, is not worth the others' time.
    /// None of a step that follows an interrupted one, so that a storm of cancels cannot stop all
    /// progress.
    interrupting: Vec<SequenceId>,
    draining: bool,
    stopping: bool,
}

impl Inbox {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), wake: Condvar::new(), interrupt: Arc::default() }
    }

    pub(super) fn interrupt(&self) -> Arc<AtomicBool> {
        self.interrupt.clone()
    }

    pub(super) fn add(
        &self,
        request: NewRequest,
        events: mpsc::Sender<Event>,
    ) -> Result<SequenceId, Refusal> {
        let mut state = self.state.lock();
        if state.stopping || (state.draining && !request.returning) {
            return Err(Refusal::Stopping);
        }
        // One that returns had its place before.
        if !request.returning {
            self.limits.check_queue(state.load, state.arrived + state.taken)?;
        }
        state.next_id += 1;
        state.arrived += 1;
        let id = state.next_id;
        let (request, arrived) = (Box::new(request), Instant::now());
        state.commands.push_back(Command::Add { id, request, events, arrived });
        self.wake.notify_one();
        Ok(id)
    }

    pub(super) fn push(&self, command: Command) {
        let mut state = self.state.lock();
        if state.interrupts(&command) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        state.commands.push_back(command);
        self.wake.notify_one();
    }

    pub(super) fn drain(&self) {
        self.state.lock().draining = true;
    }

    pub(super) fn undrain(&self) {
        self.state.lock().draining = false;
    }

    /// Whether new requests are refused, and how many were taken that no status counts yet.
    pub(super) fn draining(&self) -> (bool, usize) {
        let state = self.state.lock();
        (state.draining, state.arrived + state.taken)
    }

    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopping = true;
        self.interrupt.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Takes all commands, waiting for one until `until`.
    pub(super) fn take(&self, until: Option<Instant>) -> Batch {
        let mut state = self.state.lock();
        if let Some(until) = until {
            while state.commands.is_empty() && !state.stopping {
                if self.wake.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
        }
        state.taken += std::mem::take(&mut state.arrived);
        Batch { commands: std::mem::take(&mut state.commands), stopping: state.stopping }
    }

    /// Opens a step: notes the load, and whose aborts interrupt it. False when one of these has
    /// come already.
    pub(super) fn open_step(
        &self,
        load: Load,
        interrupting: impl Iterator<Item = SequenceId>,
    ) -> bool {
        let mut state = self.state.lock();
        state.load = load;
        state.taken = 0;
        // In place: a step allocates nothing.
        state.interrupting.clear();
        state.interrupting.extend(interrupting);
        if !state.stopping {
            self.interrupt.store(false, Ordering::Relaxed);
        }
        !state.commands.iter().any(|command| state.interrupts(command))
    }
}

impl State {
    fn interrupts(&self, command: &Command) -> bool {
        matches!(command, Command::Abort(id) if self.interrupting.contains(id))
    }
}
