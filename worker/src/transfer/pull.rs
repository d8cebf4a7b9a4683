//! One hand-off, from the decode worker's side.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_membership::tls::connect_lazy;
use baton_membership::traces::{Parent, Span};
use baton_proto::v1;
use baton_proto::v1::prefill_event::Event;
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::{MAX_MESSAGE_BYTES, endpoint};
use parking_lot::Mutex;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{info, warn};

use super::{Source, TransferError, Transport, transports};
use crate::engine::PullOrder;

/// How long a peer may take to say that it has the request.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Peers whose connection is kept.
const MAX_PEERS: usize = 256;

/// What a peer is asked for.
#[derive(Clone, Debug)]
pub enum Ask {
    /// To compute a prompt.
    Compute(Box<v1::PrefillRequest>),
    /// What it has of a sequence that it released.
    Held(v1::FetchBlocksRequest),
}

impl Ask {
    fn offer(&mut self, kinds: &[v1::Transport], deadline: Instant) {
        let kinds = kinds.iter().map(|&kind| kind.into()).collect();
        match self {
            Self::Compute(request) => {
                request.transports = kinds;
                request.timeout_ms = millis_until(deadline);
            }
            Self::Held(request) => request.transports = kinds,
        }
    }

    /// The call, in spans.
    fn method(&self) -> &'static str {
        match self {
            Self::Compute(_) => "baton.v1.Worker/Prefill",
            Self::Held(_) => "baton.v1.Worker/FetchBlocks",
        }
    }

    fn layout(&self) -> v1::KvLayout {
        let layout = match self {
            Self::Compute(request) => &request.kv_layout,
            Self::Held(request) => &request.kv_layout,
        };
        layout.unwrap_or_default()
    }

    async fn send(
        &self,
        client: &mut WorkerClient<Channel>,
        parent: &Parent,
    ) -> Result<tonic::Streaming<v1::PrefillEvent>, Status> {
        let reply = match self {
            Self::Compute(request) => client.prefill(parent.request((**request).clone())).await,
            Self::Held(request) => client.fetch_blocks(parent.request(request.clone())).await,
        };
        reply.map(tonic::Response::into_inner)
    }
}

/// Connections to peers, and what came over them.
pub struct Puller {
    transports: Vec<v1::Transport>,
    peers: Mutex<HashMap<String, Peer>>,
    counters: Counters,
}

/// A prefill worker as it was found.
#[derive(Clone)]
struct Peer {
    channel: Channel,
    /// Transports that may reach it, best first.
    kinds: Vec<v1::Transport>,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
    bytes_shared_memory: AtomicU64,
    bytes_grpc: AtomicU64,
}

impl Puller {
    /// Pulls over these transports, best first.
    pub fn new(transports: Vec<v1::Transport>) -> Self {
        Self { transports, peers: Mutex::default(), counters: Counters::default() }
    }

    /// Puts the hand-offs so far, those in progress included, into a status.
    pub fn count(&self, status: &mut v1::WorkerStatus) {
        status.handoff_requests = self.counters.requests.load(Relaxed);
        status.handoff_failures = self.counters.failures.load(Relaxed);
        status.handoff_bytes_shared_memory = self.counters.bytes_shared_memory.load(Relaxed);
        status.handoff_bytes_grpc = self.counters.bytes_grpc.load(Relaxed);
    }

    /// Fills an order from a peer and ends it; returns what carried the blocks, and of a speech
    /// model how likely the peer found it that nobody speaks. When this fails
    /// the order is ended too, with what has come: the engine computes the rest.
    pub async fn pull(
        &self,
        address: &str,
        ask: Ask,
        order: PullOrder,
        deadline: Instant,
        span: &mut Span,
    ) -> Result<(v1::Transport, Option<f32>), TransferError> {
        self.counters.requests.fetch_add(1, Relaxed);
        let block_bytes = order.block_bytes().max(1) as u64;
        let mut bytes = 0;
        let pulled =
            self.try_pull(address, ask, order, deadline, (span.as_parent(), &mut bytes)).await;
        span.set("baton.bytes", bytes as i64);
        span.set("baton.blocks", (bytes / block_bytes) as i64);
        match &pulled {
            Ok((transport, _)) => span.set("baton.transport", transport.as_str_name()),
            Err(error) => {
                span.fail(error.kind());
                self.counters.failures.fetch_add(1, Relaxed);
            }
        }
        pulled
    }

    async fn try_pull(
        &self,
        address: &str,
        mut ask: Ask,
        mut order: PullOrder,
        deadline: Instant,
        (parent, bytes): (&Parent, &mut u64),
    ) -> Result<(v1::Transport, Option<f32>), TransferError> {
        loop {
            let peer = self.peer(address)?;
            ask.offer(&peer.kinds, deadline);
            let mut span = parent.rpc_client(ask.method(), address);
            let attempt =
                self.attempt(&peer, &ask, &mut order, deadline, (span.as_parent(), bytes)).await;
            if let Err(error) = &attempt {
                span.fail(error.kind());
            }
            drop(span);
            match attempt {
                Ok((transport, finished)) => {
                    let completed = match (finished.first_token, &ask) {
                        (Some(first), _) => order.complete(first),
                        (None, Ask::Held(_)) => {
                            order.complete_part(finished.held_positions as usize)
                        }
                        (None, Ask::Compute(_)) => Err("no first token".into()),
                    };
                    completed.map_err(TransferError::Protocol)?;
                    return Ok((transport, finished.no_speech_probability));
                }
                // The best transport does not reach this peer: go on without it.
                Err(error @ TransferError::NotHere { .. }) if peer.kinds.len() > 1 => {
                    info!(%error, address, "falling back to the next transport");
                    let kinds = peer.kinds[1..].to_vec();
                    self.peers.lock().insert(address.to_owned(), Peer { kinds, ..peer });
                    order.discard();
                }
                Err(error) => {
                    warn!(%error, address, "hand-off failed; computing here");
                    self.peers.lock().remove(address);
                    return Err(error);
                }
            }
        }
    }

    async fn attempt(
        &self,
        peer: &Peer,
        ask: &Ask,
        order: &mut PullOrder,
        deadline: Instant,
        (parent, bytes): (&Parent, &mut u64),
    ) -> Result<(v1::Transport, v1::PrefillFinished), TransferError> {
        let mut client = WorkerClient::new(peer.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let accept_by = deadline.min(Instant::now() + ACCEPT_TIMEOUT);
        let mut events = by(accept_by, ask.send(&mut client, parent)).await?;
        let Some(Event::Accepted(accepted)) = next(&mut events, accept_by).await? else {
            return Err(TransferError::Protocol("expected the acceptance".into()));
        };
        let transport: Box<dyn Transport> = transports(&peer.kinds)
            .into_iter()
            .find(|transport| transport.kind() == accepted.transport())
            .ok_or_else(|| TransferError::Protocol("a transport that was not offered".into()))?;
        let mut source = transport.open(&accepted, &ask.layout())?;
        let arrived = match transport.kind() {
            v1::Transport::SharedMemory => &self.counters.bytes_shared_memory,
            _ => &self.counters.bytes_grpc,
        };
        loop {
            match next(&mut events, deadline).await {
                Ok(Some(Event::Finished(finished))) => return Ok((transport.kind(), finished)),
                Ok(Some(event)) => {
                    let came = source.take(event, order)?;
                    arrived.fetch_add(came, Relaxed);
                    *bytes += came;
                }
                Ok(None) => {
                    keep_or_discard(source.as_ref(), order);
                    let status = Status::unavailable("the peer ended the stream early");
                    return Err(TransferError::Peer(status));
                }
                Err(error) => {
                    keep_or_discard(source.as_ref(), order);
                    return Err(error);
                }
            }
        }
    }

    fn peer(&self, address: &str) -> Result<Peer, TransferError> {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get(address) {
            return Ok(peer.clone());
        }
        let endpoint = endpoint(address)
            .map_err(|error| TransferError::Protocol(format!("{address}: {error}")))?;
        let endpoint = endpoint
            // A block is about a megabyte: the default window would cost a round trip for each.
            .initial_stream_window_size(16 * 1024 * 1024)
            .initial_connection_window_size(32 * 1024 * 1024);
        let channel = connect_lazy(&endpoint);
        if peers.len() >= MAX_PEERS {
            peers.clear();
        }
        let peer = Peer { channel, kinds: self.transports.clone() };
        peers.insert(address.to_owned(), peer.clone());
        Ok(peer)
    }
}

fn keep_or_discard(source: &dyn Source, order: &mut PullOrder) {
    if !source.survives_peer() {
        order.discard();
    }
}

async fn next(
    events: &mut tonic::Streaming<v1::PrefillEvent>,
    deadline: Instant,
) -> Result<Option<Event>, TransferError> {
    Ok(by(deadline, events.message()).await?.and_then(|event| event.event))
}

async fn by<T>(
    deadline: Instant,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, TransferError> {
    match tokio::time::timeout_at(deadline.into(), call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(TransferError::Peer(Status::deadline_exceeded("the peer took too long"))),
    }
}

/// Milliseconds left, at least one.
pub fn millis_until(deadline: Instant) -> u64 {
    deadline.saturating_duration_since(Instant::now()).as_millis().max(1) as u64
}
