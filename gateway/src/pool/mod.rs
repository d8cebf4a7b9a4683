//! The texts of one request, from tokens to vectors, over the workers that there are.
//!
//! They are cut into calls of bounded size ([`split`]), a few of which are under way at a time. A
//! call has no effect but its answer, so one that fails is sent to another worker. Dropping the
//! future cancels all calls, down to the workers' queues.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::MAX_MESSAGE_BYTES;
use baton_proto::drain::is_draining;
use baton_proto::v1::{PoolInput, PoolOutput, PoolRequest, PoolResponse, Task};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::timeout_at;
use tonic::{Code, Request, Status};
use tracing::{debug, warn};

use crate::error::ApiError;
use crate::trace::Trace;
use crate::workers::{Registry, Served, Worker};

/// The call, in spans.
const POOL: &str = "baton.v1.Worker/Pool";
/// Tokens and texts of one call, unless a single text has more.
const CALL_TOKENS: usize = 8 * 1024;
const CALL_TEXTS: usize = 256;
/// Bytes of all rows of a request that has one for each token: they are held until all are there.
const MAX_ROWS: usize = 128 << 20;
/// Calls of a request under way for each worker: one computes, the next waits in its queue.
const CALLS_PER_WORKER: usize = 2;
/// Failures after which a call is given up: it may be the texts that bring workers down.
const MAX_FAILURES: usize = 3;
/// How long a call waits for a worker that answers.
const START_WITHIN: Duration = Duration::from_secs(1);
/// How long a call waits for room, when others of its request are under way.
const ROOM_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks for a worker.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often a worker with a call is checked for life. One that is silent twice has lost the call.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// What is to be computed.
#[derive(Clone)]
pub struct Job {
    /// The model.
    pub served: Arc<Served>,
    /// For logs, here and on the workers.
    pub request_id: String,
    /// What of each text.
    pub task: Task,
    /// Whether embeddings get length one, and classes and scores the model's activation.
    pub activate: bool,
    /// To how many dimensions embeddings are cut; 0 is all.
    pub dimensions: u32,
    /// Lower is sooner.
    pub priority: i32,
    /// When to give up.
    pub deadline: Instant,
    /// What its spans hang on.
    pub trace: Trace,
}

/// What came of it.
#[derive(Debug)]
pub struct Pooled {
    /// In the order of the texts.
    pub outputs: Vec<PoolOutput>,
    /// The longest that any of the calls waited at its worker.
    pub queue: Duration,
    /// The longest that any of them was computed.
    pub compute: Duration,
}

/// Computes all of `inputs`.
pub async fn run(
    registry: &Registry,
    job: &Job,
    inputs: Vec<PoolInput>,
) -> Result<Pooled, ApiError> {
    let count = inputs.len();
    let lengths: Vec<usize> = inputs.iter().map(|input| input.token_ids.len()).collect();
    let row = row_bytes(job);
    check_rows(&lengths, row)?;
    let calls = split(&lengths, call_tokens(row));
    let alone = calls.len() == 1;
    let mut inputs = inputs.into_iter();
    let calls: Vec<Vec<PoolInput>> =
        calls.into_iter().map(|call| inputs.by_ref().take(call.len()).collect()).collect();
    let at_once = CALLS_PER_WORKER * registry.of_model(&job.served).len().max(1);
    let mut answers =
        stream::iter(calls.into_iter().map(|inputs| call(registry, job, inputs, alone)))
            .buffered(at_once);
    let mut pooled = Pooled {
        outputs: Vec::with_capacity(count),
        queue: Duration::ZERO,
        compute: Duration::ZERO,
    };
    while let Some(answer) = answers.try_next().await? {
        pooled.outputs.extend(answer.outputs);
        pooled.queue = pooled.queue.max(Duration::from_micros(answer.queue_us));
        pooled.compute = pooled.compute.max(Duration::from_micros(answer.compute_us));
    }
    Ok(pooled)
}

/// Bytes of the row that each token brings back, where each has one of its own.
fn row_bytes(job: &Job) -> Option<usize> {
    if !matches!(job.task, Task::TokenEmbed | Task::TokenClassify) {
        return None;
    }
    let card = job.served.card.pooling.clone().unwrap_or_default();
    let width = match job.task {
        Task::TokenClassify => card.labels.len(),
        _ => card.dimensions as usize,
    };
    Some(width.max(1) * size_of::<f32>())
}

/// Tokens of one call: fewer where each brings a row back, which must fit the message.
fn call_tokens(row: Option<usize>) -> usize {
    row.map_or(CALL_TOKENS, |row| (MAX_MESSAGE_BYTES / 2 / row).clamp(1, CALL_TOKENS))
}

/// Refuses texts whose rows are more than the gateway holds for one request.
fn check_rows(lengths: &[usize], row: Option<usize>) -> Result<(), ApiError> {
    let Some(row) = row else { return Ok(()) };
    let (tokens, most) = (lengths.iter().sum::<usize>(), MAX_ROWS / row);
    if tokens <= most {
        return Ok(());
    }
    let message = format!(
        "`input` has {tokens} tokens, each of which has a row of {row} bytes in the reply; at most \
         {most} tokens are taken in one request; send the texts in several."
    );
    Err(ApiError::bad_value("input", message))
}

/// Cuts texts of these lengths into calls.
fn split(lengths: &[usize], call_tokens: usize) -> Vec<Range<usize>> {
    let mut calls: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (at, length) in lengths.iter().enumerate() {
        match calls.last_mut() {
            Some(call) if call.len() < CALL_TEXTS && tokens + length <= call_tokens => {
                call.end += 1;
                tokens += length;
            }
            _ => {
                calls.push(at..at + 1);
                tokens = *length;
            }
        }
    }
    calls
}

/// Has one call answered, by whichever worker does it.
async fn call(
    registry: &Registry,
    job: &Job,
    inputs: Vec<PoolInput>,
    alone: bool,
) -> Result<PoolResponse, ApiError> {
    let count = inputs.len();
    let lengths = inputs.iter().map(|input| input.token_ids.len());
    let (tokens, longest): (usize, usize) = (lengths.clone().sum(), lengths.max().unwrap_or(0));
    let mut request = PoolRequest {
        request_id: job.request_id.clone(),
        inputs,
        task: job.task.into(),
        activate: job.activate,
        dimensions: job.dimensions,
        timeout_ms: 0,
        priority: job.priority,
    };
    // Since when nobody is there who could be asked.
    let mut begun = Instant::now();
    let mut failures = 0;
    let mut failed: Vec<String> = Vec::new();
    loop {
        // Each worker is asked once in a round.
        let mut asked = failed.clone();
        let mut full = false;
        while let Some(ticket) = registry.choose_pooling(&job.served, (tokens, longest), &asked) {
            let left = job.deadline.saturating_duration_since(Instant::now());
            request.timeout_ms = left.as_millis().max(1) as u64;
            let record = &ticket.worker.record;
            let mut span = job.trace.parent().rpc_client(POOL, &record.address);
            span.set("baton.texts", count as i64);
            let asking = span.as_parent().request(request.clone());
            let answer = ask(&ticket.worker, job.deadline, asking).await;
            let answer = answer.inspect_err(|_| span.fail_rpc(Code::DeadlineExceeded))?;
            let status = match answer {
                Ok(answer) => match sound(&answer, count) {
                    Ok(()) => return Ok(answer),
                    Err(message) => {
                        span.fail("no_number");
                        warn!(id = ticket.worker.record.id, message, "a worker's answer is wrong");
                        return Err(ApiError::internal(message));
                    }
                },
                Err(status) => status,
            };
            span.fail_rpc(status.code());
            drop(span);
            let worker = &ticket.worker;
            asked.push(worker.record.id.clone());
            match status.code() {
                Code::ResourceExhausted => {
                    worker.mark_full();
                    full = true;
                    continue;
                }
                Code::Unavailable if is_draining(&status) => {
                    worker.mark_draining();
                    continue;
                }
                Code::InvalidArgument => {
                    return Err(ApiError::bad_value("input", capitalized(status.message())));
                }
                Code::DeadlineExceeded => return Err(ApiError::timed_out()),
                // The worker lives. What failed may be another text of its batch.
                Code::Internal if std::error::Error::source(&status).is_none() => {
                    warn!(id = worker.record.id, %status, "a worker failed a call");
                    if failures + 1 >= MAX_FAILURES {
                        return Err(ApiError::internal(capitalized(status.message())));
                    }
                }
                _ => {
                    warn!(id = worker.record.id, %status, "a worker does not answer a call");
                    worker.mark_down();
                }
            }
            failures += 1;
            if failures >= MAX_FAILURES {
                return Err(ApiError::given_up(
                    "The workers that had the texts failed; try again.",
                ));
            }
            failed.push(worker.record.id.clone());
            begun = Instant::now();
            debug!(request_id = job.request_id, "asking another worker");
        }
        let patience = match full {
            true if alone => Duration::ZERO,
            true => ROOM_WITHIN,
            false => START_WITHIN,
        };
        if Instant::now() >= job.deadline {
            return Err(ApiError::timed_out());
        }
        if begun.elapsed() >= patience {
            return Err(match full {
                true => ApiError::overloaded("All workers' queues are full; try again soon."),
                false => ApiError::no_worker(job.served.name()),
            });
        }
        // A worker that failed may be back as good as new.
        failed.clear();
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Asks one worker. The outer error is for the client, the inner one is to be judged.
async fn ask(
    worker: &Worker,
    deadline: Instant,
    request: Request<PoolRequest>,
) -> Result<Result<PoolResponse, Status>, ApiError> {
    let mut client = worker.client();
    tokio::select! {
        answer = timeout_at(deadline.into(), client.pool(request)) => match answer {
            Ok(answer) => Ok(answer.map(|reply| reply.into_inner())),
            Err(_) => Err(ApiError::timed_out()),
        },
        () = silent(worker) => Ok(Err(Status::unavailable("the worker has gone silent"))),
    }
}

/// Waits until a worker has been silent for a while.
async fn silent(worker: &Worker) {
    let mut checks = 0;
    while checks < 2 {
        tokio::time::sleep(CHECK_EVERY).await;
        checks = if worker.answers() { 0 } else { checks + 1 };
    }
}

/// Whether an answer is one: as many outputs as texts, and all of them numbers.
fn sound(answer: &PoolResponse, count: usize) -> Result<(), &'static str> {
    if answer.outputs.len() != count {
        return Err("The worker did not answer for each text.");
    }
    let numbers = |output: &PoolOutput| output.values.iter().all(|value| value.is_finite());
    match answer.outputs.iter().all(numbers) {
        true => Ok(()),
        false => Err("The model computed values that are no numbers."),
    }
}

fn capitalized(message: &str) -> String {
    let mut letters = message.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).chain(['.']).collect(),
        None => "The worker gave no reason.".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_with_values_that_are_no_numbers_is_none() {
        let output = |values: &[f32]| PoolOutput { values: values.to_vec(), width: 2 };
        let answer = |outputs: Vec<PoolOutput>| PoolResponse { outputs, ..Default::default() };
        assert!(sound(&answer(vec![output(&[1.0, -2.0])]), 1).is_ok());
        assert!(sound(&answer(vec![output(&[1.0, f32::NAN])]), 1).is_err());
        assert!(sound(&answer(vec![output(&[f32::INFINITY, 0.0])]), 1).is_err());
        assert!(sound(&answer(vec![]), 1).is_err());
    }

    #[test]
    fn more_rows_than_are_held_are_refused() {
        let row = Some(1024);
        let most = MAX_ROWS / 1024;
        assert!(check_rows(&[most - 1, 1], row).is_ok());
        let error = check_rows(&[most, 1], row).unwrap_err();
        assert_eq!((error.field(), &error.body()["error"]["code"]), (Some("input"), &400.into()));
        // A vector for each text.
        assert!(check_rows(&[most, most], None).is_ok());
        assert_eq!(call_tokens(None), CALL_TOKENS);
        assert!(call_tokens(row) * 1024 <= MAX_MESSAGE_BYTES);
    }

    proptest! {
        #[test]
        fn calls_hold_all_texts_in_order_and_are_bounded(
            lengths in proptest::collection::vec(1usize..600, 1..2000),
            call_tokens in 1usize..2000,
        ) {
            let calls = split(&lengths, call_tokens);
            let texts: Vec<usize> = calls.iter().cloned().flatten().collect();
            prop_assert_eq!(texts, (0..lengths.len()).collect::<Vec<_>>());
            for call in calls {
                let tokens: usize = lengths[call.clone()].iter().sum();
                prop_assert!(call.len() == 1 || tokens <= call_tokens, "{tokens}");
                prop_assert!(call.len() <= CALL_TEXTS);
            }
        }
    }
}
