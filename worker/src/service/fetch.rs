//! `FetchBlocks`: the KV of a sequence that was released, for the worker that goes on with it.

use std::sync::Arc;

use baton_membership::traces::Span;
use baton_proto::v1::prefill_event::Event as Out;
use baton_proto::v1::{FetchBlocksRequest, PrefillEvent, PrefillFinished};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Instrument as _, debug, info_span};

use super::drain::Held;
use super::{Owned, Shared, prefill, spans};
use crate::transfer::Transport;

/// Blocks in one piece: what is copied for messages that wait.
pub(super) const PIECE: usize = 16;

/// Checks a request and publishes the blocks.
pub(super) fn start(
    shared: Arc<Shared>,
    request: FetchBlocksRequest,
    mut call: Span,
) -> Result<Owned<PrefillEvent>, Status> {
    spans::named(&mut call, &request.request_id);
    let checked = check(&shared, &request);
    let (transport, held) = checked.inspect_err(|status| call.fail_rpc(status.code()))?;
    let have = request.have_tokens as usize;
    let block_size = shared.engine.limits().block_size;
    call.set("baton.blocks", (held.blocks.len() - have / block_size) as i64);
    let trace_id = call.as_parent().trace_id();
    let span = info_span!("fetch", request_id = request.request_id, trace_id);
    let task = move |sender: Sender| async move {
        // It lasts until the caller has let go.
        let _call = call;
        debug!(positions = held.positions, have, "blocks are fetched");
        let parts = (&*transport, request.nccl_link);
        let published = publish(&shared, parts, &held, have / block_size, &sender).await;
        if let Err(status) = published {
            let _ = sender.send(Err(status)).await;
        }
    };
    Ok(Owned::spawn(move |sender| task(sender).instrument(span)))
}

type Fetch = (Arc<dyn Transport>, Arc<Held>);

fn check(shared: &Shared, request: &FetchBlocksRequest) -> Result<Fetch, Status> {
    prefill::check_peer(shared, request.kv_layout.as_ref(), &request.weights_digest)?;
    let transport = prefill::transport(shared, request.transports())?;
    let held = shared.drain.held(&request.held_id).ok_or_else(|| {
        Status::not_found("`held_id` names no sequence whose blocks are still kept")
    })?;
    let have = request.have_tokens as usize;
    let block_size = shared.engine.limits().block_size;
    if !have.is_multiple_of(block_size) || have / block_size > held.blocks.len() {
        return Err(Status::invalid_argument("`have_tokens` must be whole blocks of the sequence"));
    }
    Ok((transport, held))
}

type Sender = mpsc::Sender<Result<PrefillEvent, Status>>;

/// Sends the blocks from `first` on, and keeps them until the caller has let go.
async fn publish(
    shared: &Shared,
    (transport, kept): (&dyn Transport, u64),
    held: &Held,
    first: usize,
    sender: &Sender,
) -> Result<(), Status> {
    let send = async |event: Out| {
        let sent = sender.send(Ok(PrefillEvent { event: Some(event) })).await;
        sent.map_err(|_| Status::cancelled("the caller has gone"))
    };
    let mut outlet = transport.offer(shared.engine.pool(), kept).map_err(prefill::broken)?;
    send(Out::Accepted(outlet.accepted())).await?;
    for (i, piece) in held.blocks[first..].chunks(PIECE).enumerate() {
        let events = outlet.publish(first + i * PIECE, piece).map_err(prefill::broken)?;
        for event in events {
            send(event).await?;
        }
        prefill::flush(&mut *outlet, sender).await?;
    }
    outlet.finish();
    let held_positions = held.positions as u32;
    send(Out::Finished(PrefillFinished { held_positions, ..PrefillFinished::default() })).await?;
    let _ = tokio::time::timeout(shared.hold_lease, sender.closed()).await;
    Ok(())
}
