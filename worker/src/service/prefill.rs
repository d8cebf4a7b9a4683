//! `Prefill`: a prompt's KV for a peer.

use std::sync::Arc;
use std::time::Instant;

use baton_membership::traces::Span;
use baton_proto::InstanceRole;
use baton_proto::v1::prefill_event::Event as Out;
use baton_proto::v1::{self, KvLayout, PrefillEvent, PrefillFinished, PrefillRequest};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Instrument as _, debug, info_span};

use super::drain::given_up;
use super::fetch::PIECE;
use super::spans::{self, Spans};
use super::{Owned, Shared, refused, timeout};
use crate::engine::{Event, Finish, NewRequest, Purpose, RequestHandle};
use crate::kv::pool::DeviceError;
use crate::transfer::{Outlet, Transport};

/// Checks a request, puts it into the engine and publishes its blocks.
pub(super) async fn start(
    shared: Arc<Shared>,
    request: PrefillRequest,
    mut call: Span,
) -> Result<Owned<PrefillEvent>, Status> {
    spans::named(&mut call, &request.request_id);
    let trace_id = call.as_parent().trace_id();
    let span = info_span!("prefill", request_id = request.request_id, trace_id);
    let (have, len) = (request.have_tokens as usize, request.token_ids.len());
    let first_wanted = have / shared.engine.limits().block_size;
    let mut spans = Spans::new(call, shared.engine.limits().leading + len);
    let kept = request.nccl_link;
    let submitted = submit(&shared, request).await;
    let (transport, handle) = submitted.inspect_err(|status| spans.fail(status.code()))?;
    let task = move |sender: Sender| async move {
        debug!(tokens = len, have, "accepted");
        let published = tokio::select! {
            published = publish(&shared, (&*transport, kept), handle, first_wanted, &sender, &mut spans) => published,
            () = shared.drain.over() => Err(given_up()),
        };
        if let Err(status) = published {
            spans.fail(status.code());
            let _ = sender.send(Err(status)).await;
        }
    };
    Ok(Owned::spawn(move |sender| task(sender).instrument(span)))
}

/// Checks a request and puts it into the engine.
async fn submit(
    shared: &Shared,
    request: PrefillRequest,
) -> Result<(Arc<dyn Transport>, RequestHandle), Status> {
    shared.is_not(InstanceRole::Decode)?;
    check_peer(shared, request.kv_layout.as_ref(), &request.weights_digest)?;
    let block_size = shared.engine.limits().block_size;
    let (have, len) = (request.have_tokens as usize, request.token_ids.len());
    // Sound comes before the tokens.
    let positions = shared.engine.limits().leading + len;
    if !have.is_multiple_of(block_size) || have >= positions.max(1) {
        return Err(Status::invalid_argument("`have_tokens` must be whole blocks of the prompt"));
    }
    let transport = transport(shared, request.transports())?;
    let prompt = len
        .checked_sub(request.output_tokens as usize)
        .ok_or_else(|| Status::invalid_argument("`output_tokens` exceeds the prompt"))?;
    let sampling =
        request.sampling.ok_or_else(|| Status::invalid_argument("`sampling` is missing"))?;
    let adapter =
        request.adapter.as_ref().map(|wanted| shared.adapters.find(wanted)).transpose()?;
    let deadline = Instant::now() + timeout(request.timeout_ms);
    let constraint = shared.compile(&sampling).await?;
    let handle = shared
        .engine
        .submit(NewRequest {
            prompt: request.token_ids[..prompt].to_vec(),
            audio: request.audio.map(|audio| audio.samples),
            output: request.token_ids[prompt..].to_vec(),
            sampling,
            constraint,
            priority: request.priority,
            salt: request.cache_salt,
            adapter,
            purpose: Purpose::Prefill,
            deadline,
            returning: false,
        })
        .map_err(refused)?;
    Ok((transport, handle))
}

/// Refuses a peer whose blocks would mean something else here.
pub(super) fn check_peer(
    shared: &Shared,
    layout: Option<&KvLayout>,
    weights_digest: &str,
) -> Result<(), Status> {
    let same = layout == Some(shared.engine.pool().layout())
        && weights_digest == shared.model.weights_digest;
    same.then_some(()).ok_or_else(|| {
        Status::failed_precondition(
            "the workers' models or KV layouts differ; start both with the same --model and \
             --block-size",
        )
    })
}

/// The first of the caller's transports that this worker has too.
pub(super) fn transport(
    shared: &Shared,
    offered: impl Iterator<Item = v1::Transport>,
) -> Result<Arc<dyn Transport>, Status> {
    let first = shared.transports.first(offered);
    first.ok_or_else(|| Status::failed_precondition("no transport in common"))
}

/// What a caller is told whose blocks cannot be read: it computes them itself.
pub(super) fn broken(error: DeviceError) -> Status {
    Status::unavailable(error.to_string())
}

/// Waits until the blocks that were published have left. An error where they do not, or nobody
/// listens any more.
pub(super) async fn flush<T>(
    outlet: &mut dyn Outlet,
    sender: &mpsc::Sender<Result<T, Status>>,
) -> Result<(), Status> {
    tokio::select! {
        flushed = outlet.flush() => flushed.map_err(|error| Status::unavailable(error.to_string())),
        () = sender.closed() => Err(Status::cancelled("the caller has gone")),
    }
}

type Sender = mpsc::Sender<Result<PrefillEvent, Status>>;

/// Sends blocks as they are computed, then keeps them until the caller has let go or the hold
/// lease ends. Returns early when nobody listens.
async fn publish(
    shared: &Shared,
    (transport, kept): (&dyn Transport, u64),
    mut handle: RequestHandle,
    first_wanted: usize,
    sender: &Sender,
    spans: &mut Spans,
) -> Result<(), Status> {
    let gone = || Status::cancelled("the caller has gone");
    let send = async |event: Out| {
        sender.send(Ok(PrefillEvent { event: Some(event) })).await.map_err(|_| gone())
    };
    let mut outlet = transport.offer(shared.engine.pool(), kept).map_err(broken)?;
    send(Out::Accepted(outlet.accepted())).await?;
    let mut finished = PrefillFinished::default();
    while let Some(event) = handle.next().await {
        match event {
            Event::Admitted { cached, waited } => {
                spans.admitted(cached, waited);
                finished.cached_tokens = cached as u32;
            }
            Event::Blocks { first, blocks } => {
                let skip = first_wanted.saturating_sub(first).min(blocks.len());
                // What was cached comes all at once, but is not copied so.
                for (i, piece) in blocks[skip..].chunks(PIECE).enumerate() {
                    let at = first + skip + i * PIECE;
                    for event in outlet.publish(at, piece).map_err(broken)? {
                        send(event).await?;
                    }
                    flush(&mut *outlet, sender).await?;
                }
            }
            Event::Token(token) => finished.first_token = Some(token),
            Event::Finished(Finish::Length) => {
                spans.computed();
                outlet.finish();
                send(Out::Finished(finished)).await?;
                tokio::select! {
                    () = sender.closed() => {}
                    () = tokio::time::sleep(shared.hold_lease) => {
                        return Err(Status::aborted("the blocks were not fetched in time"));
                    }
                }
                return Ok(());
            }
            Event::Finished(Finish::Deadline) => {
                return Err(Status::deadline_exceeded("out of time"));
            }
            Event::Finished(Finish::Stuck(reason)) => return Err(Status::invalid_argument(reason)),
            Event::Finished(Finish::Failed(reason)) => return Err(Status::internal(reason)),
            Event::Finished(_) => return Err(given_up()),
            Event::NoSpeech(probability) => finished.no_speech_probability = Some(probability),
            Event::Prompt(_) | Event::Aligned(_) => {}
            Event::Pull(_) | Event::Released { .. } => {
                return Err(Status::internal("a prefill was told to pull, or released"));
            }
        }
    }
    Err(Status::internal("the engine dropped the request"))
}
