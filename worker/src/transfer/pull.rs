//! One hand-off, from the decode worker's side.

use std::collections::{HashMap, VecDeque};
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

use super::{Kept, Opening, TransferError, Transports};
use crate::engine::PullOrder;

/// How long a peer may take to say that it has the request.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that are read before their turn. Those of gRPC, which are large, never are.
const MAX_AHEAD: usize = 64;
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
    fn offer(&mut self, kinds: &[v1::Transport], kept: Option<&Kept>, deadline: Instant) {
        let kinds = kinds.iter().map(|&kind| kind.into()).collect();
        let kept = kept.map_or(0, |kept| kept.id);
        match self {
            Self::Compute(request) => {
                request.transports = kinds;
                request.nccl_link = kept;
                request.timeout_ms = millis_until(deadline);
            }
            Self::Held(request) => {
                request.transports = kinds;
                request.nccl_link = kept;
            }
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
    transports: Transports,
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

/// One attempt's circumstances.
struct Place<'a> {
    peer: &'a Peer,
    address: &'a str,
    deadline: Instant,
    kept: Option<Kept>,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
    bytes_shared_memory: AtomicU64,
    bytes_grpc: AtomicU64,
    bytes_cuda_ipc: AtomicU64,
    bytes_nccl: AtomicU64,
}

impl Counters {
    /// The bytes that came over a transport.
    fn bytes(&self, kind: v1::Transport) -> &AtomicU64 {
        match kind {
            v1::Transport::SharedMemory => &self.bytes_shared_memory,
            v1::Transport::CudaIpc => &self.bytes_cuda_ipc,
            v1::Transport::Nccl => &self.bytes_nccl,
            v1::Transport::Grpc | v1::Transport::Unspecified => &self.bytes_grpc,
        }
    }
}

impl Puller {
    /// Pulls over these transports, best first.
    pub fn new(transports: Transports) -> Self {
        Self { transports, peers: Mutex::default(), counters: Counters::default() }
    }

    /// Puts the hand-offs so far, those in progress included, into a status.
    pub fn count(&self, status: &mut v1::WorkerStatus) {
        status.handoff_requests = self.counters.requests.load(Relaxed);
        status.handoff_failures = self.counters.failures.load(Relaxed);
        status.handoff_bytes_shared_memory = self.counters.bytes_shared_memory.load(Relaxed);
        status.handoff_bytes_grpc = self.counters.bytes_grpc.load(Relaxed);
        status.handoff_bytes_cuda_ipc = self.counters.bytes_cuda_ipc.load(Relaxed);
        status.handoff_bytes_nccl = self.counters.bytes_nccl.load(Relaxed);
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
        if matches!(ask, Ask::Held(_)) {
            order.comes_in_part();
        }
        loop {
            let peer = self.peer(address)?;
            let known = peer.kinds.iter().filter_map(|&kind| self.transports.get(kind));
            let free: Vec<_> = known.filter(|transport| transport.available()).collect();
            let kept = free.iter().find_map(|transport| transport.kept(address));
            let kinds: Vec<_> = free.iter().map(|transport| transport.kind()).collect();
            ask.offer(&kinds, kept.as_ref(), deadline);
            let mut span = parent.rpc_client(ask.method(), address);
            let at = Place { peer: &peer, address, deadline, kept };
            let attempt = self.attempt(at, &ask, &mut order, (span.as_parent(), bytes)).await;
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
                // A transport does not reach this peer: go on without it.
                Err(TransferError::NotHere { transport, reason }) if peer.kinds.len() > 1 => {
                    let kind = transport.as_str_name();
                    info!(kind, reason, address, "falling back to the next transport");
                    let others = peer.kinds.iter().copied().filter(|kind| *kind != transport);
                    let kinds = others.collect();
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
        at: Place<'_>,
        ask: &Ask,
        order: &mut PullOrder,
        (parent, bytes): (&Parent, &mut u64),
    ) -> Result<(v1::Transport, v1::PrefillFinished), TransferError> {
        let Place { peer, address, deadline, kept } = at;
        let mut client = WorkerClient::new(peer.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let accept_by = deadline.min(Instant::now() + ACCEPT_TIMEOUT);
        let mut events = by(accept_by, ask.send(&mut client, parent)).await?;
        let Some(Event::Accepted(accepted)) = next(&mut events, accept_by).await? else {
            return Err(TransferError::Protocol("expected the acceptance".into()));
        };
        let offered = peer.kinds.contains(&accepted.transport());
        let transport = self.transports.get(accepted.transport()).filter(|_| offered);
        let transport = transport
            .ok_or_else(|| TransferError::Protocol("a transport that was not offered".into()))?;
        let mut source = transport.open(Opening {
            accepted: &accepted,
            layout: &ask.layout(),
            pool: order.pool(),
            peer: address,
            kept,
            deadline,
        })?;
        let arrived = self.counters.bytes(transport.kind());
        let mut events = Events { stream: events, ahead: VecDeque::new(), deadline };
        let finished = loop {
            let event = match events.next().await {
                Ok(Event::Finished(finished)) => break Ok(finished),
                Ok(event) => event,
                Err(error) => break Err(error),
            };
            match events.meanwhile(source.take(event, order)).await {
                Ok(came) => {
                    arrived.fetch_add(came, Relaxed);
                    *bytes += came;
                }
                Err(error) => break Err(error),
            }
        };
        match finished {
            Ok(_) => source.finish(),
            Err(_) if source.survives_peer() => {}
            Err(_) => order.discard(),
        }
        Ok((transport.kind(), finished?))
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
        let peer = Peer { channel, kinds: self.transports.kinds().collect() };
        peers.insert(address.to_owned(), peer.clone());
        Ok(peer)
    }
}

/// A peer's events. While blocks come in another way it is listened to all the same, so that its end
/// is noticed at once.
struct Events {
    stream: tonic::Streaming<v1::PrefillEvent>,
    /// Heard, and not yet wanted.
    ahead: VecDeque<Event>,
    deadline: Instant,
}

impl Events {
    async fn next(&mut self) -> Result<Event, TransferError> {
        match self.ahead.pop_front() {
            Some(event) => Ok(event),
            None => self.hear().await,
        }
    }

    async fn hear(&mut self) -> Result<Event, TransferError> {
        let ended = || TransferError::Peer(Status::unavailable("the peer ended the stream early"));
        next(&mut self.stream, self.deadline).await?.ok_or_else(ended)
    }

    /// Waits for something else, for as long as the peer is there.
    async fn meanwhile<T>(
        &mut self,
        other: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        let mut other = std::pin::pin!(other);
        loop {
            let full = self.ahead.len() >= MAX_AHEAD;
            tokio::select! {
                biased;
                done = &mut other => return done,
                event = self.hear(), if !full => self.ahead.push_back(event?),
            }
        }
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
