//! One hand-off, from the decode worker's side.
//!
//! A peer that does not answer is left alone for a while: a prefill worker that gateways reach and
//! this worker does not costs one request some seconds, and not each.

use std::collections::{HashMap, VecDeque};
use std::error::Error as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_membership::tls::connect_lazy;
use baton_membership::traces::{Parent, Span};
use baton_proto::v1;
use baton_proto::v1::PrefillPeer;
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
/// For how long a peer is left alone that did not answer: short at first, for it may be on its way
/// back, and twice as long each time after that.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

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
struct Peer {
    /// Another instance at its address is another peer.
    instance_id: String,
    way: Way,
    /// Set while it does not answer.
    silence: Option<Silence>,
}

/// How a peer is reached.
#[derive(Clone)]
struct Way {
    channel: Channel,
    /// Transports that may reach it, best first.
    kinds: Vec<v1::Transport>,
}

/// That a peer did not answer.
struct Silence {
    /// When it was noticed last.
    noticed: Instant,
    /// Until when it is left alone, and for how long that was.
    until: Instant,
    pause: Duration,
}

/// One attempt's circumstances.
struct Place<'a> {
    peer: &'a PrefillPeer,
    way: &'a Way,
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
        peer: &PrefillPeer,
        ask: Ask,
        order: PullOrder,
        deadline: Instant,
        span: &mut Span,
    ) -> Result<(v1::Transport, Option<f32>), TransferError> {
        self.counters.requests.fetch_add(1, Relaxed);
        let block_bytes = order.block_bytes().max(1) as u64;
        let mut bytes = 0;
        let pulled =
            self.try_pull(peer, ask, order, deadline, (span.as_parent(), &mut bytes)).await;
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
        peer: &PrefillPeer,
        mut ask: Ask,
        mut order: PullOrder,
        deadline: Instant,
        (parent, bytes): (&Parent, &mut u64),
    ) -> Result<(v1::Transport, Option<f32>), TransferError> {
        let address = &*peer.address;
        if matches!(ask, Ask::Held(_)) {
            order.comes_in_part();
        }
        loop {
            let (way, began) = (self.way(peer)?, Instant::now());
            let known = way.kinds.iter().filter_map(|&kind| self.transports.get(kind));
            let free: Vec<_> = known.filter(|transport| transport.available()).collect();
            let kept = free.iter().find_map(|transport| transport.kept(address));
            let kinds: Vec<_> = free.iter().map(|transport| transport.kind()).collect();
            ask.offer(&kinds, kept.as_ref(), deadline);
            let mut span = parent.rpc_client(ask.method(), address);
            let at = Place { peer, way: &way, deadline, kept };
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
                Err(TransferError::NotHere { transport, reason }) if way.kinds.len() > 1 => {
                    let kind = transport.as_str_name();
                    info!(kind, reason, address, "falling back to the next transport");
                    self.known(peer, |known| known.way.kinds.retain(|kind| *kind != transport));
                    order.discard();
                }
                Err(error) => {
                    warn!(%error, address, "hand-off failed; computing here");
                    self.failed(peer, &error, began);
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
        let Place { peer, way, deadline, kept } = at;
        let mut client = WorkerClient::new(way.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let accept_by = deadline.min(Instant::now() + ACCEPT_TIMEOUT);
        let answer = async {
            let mut events = by(accept_by, ask.send(&mut client, parent)).await?;
            let first = next(&mut events, accept_by).await?;
            Ok::<_, TransferError>((events, first))
        };
        let answer = answer.await;
        let late = Instant::now() >= accept_by;
        let (events, first) = match answer {
            Ok(answer) => answer,
            // A request whose own time is up blames nobody.
            Err(error) if late && accept_by == deadline => return Err(error),
            Err(TransferError::Peer(status)) if late || status.source().is_some() => {
                return Err(TransferError::NoAnswer(status));
            }
            Err(refused) => {
                self.heard(peer);
                return Err(refused);
            }
        };
        self.heard(peer);
        let Some(Event::Accepted(accepted)) = first else {
            return Err(TransferError::Protocol("expected the acceptance".into()));
        };
        let offered = way.kinds.contains(&accepted.transport());
        let transport = self.transports.get(accepted.transport()).filter(|_| offered);
        let transport = transport
            .ok_or_else(|| TransferError::Protocol("a transport that was not offered".into()))?;
        let mut source = transport.open(Opening {
            accepted: &accepted,
            layout: &ask.layout(),
            pool: order.pool(),
            peer: &peer.address,
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

    /// How a peer is reached. An error while one is left alone that did not answer; when that is
    /// over, one request finds out for all.
    fn way(&self, peer: &PrefillPeer) -> Result<Way, TransferError> {
        let now = Instant::now();
        let way = self.known(peer, |known| match &mut known.silence {
            Some(silence) if now < silence.until => {
                let ago = now.saturating_duration_since(silence.noticed).as_millis();
                let reason = format!("nor did it {ago} ms ago, and is left alone for a while");
                Err(TransferError::NoAnswer(Status::unavailable(reason)))
            }
            Some(silence) => {
                // Not before it has found out.
                silence.until = now + silence.pause.max(ACCEPT_TIMEOUT);
                Ok(known.way.clone())
            }
            None => Ok(known.way.clone()),
        });
        if let Some(way) = way {
            return way;
        }
        let way = self.new_way(&peer.address)?;
        let mut peers = self.peers.lock();
        if peers.len() >= MAX_PEERS {
            peers.clear();
        }
        let instance_id = peer.instance_id.clone();
        let known = Peer { instance_id, way: way.clone(), silence: None };
        peers.insert(peer.address.clone(), known);
        Ok(way)
    }

    fn new_way(&self, address: &str) -> Result<Way, TransferError> {
        let endpoint = endpoint(address)
            .map_err(|error| TransferError::Protocol(format!("{address}: {error}")))?;
        let endpoint = endpoint
            // A block is about a megabyte: the default window would cost a round trip for each.
            .initial_stream_window_size(16 * 1024 * 1024)
            .initial_connection_window_size(32 * 1024 * 1024);
        Ok(Way { channel: connect_lazy(&endpoint), kinds: self.transports.kinds().collect() })
    }

    /// Looks at a peer, or changes what is known of it; `None` when that is nothing.
    fn known<T>(&self, peer: &PrefillPeer, look: impl FnOnce(&mut Peer) -> T) -> Option<T> {
        let mut peers = self.peers.lock();
        let known = peers.get_mut(&peer.address);
        known.filter(|known| known.instance_id == peer.instance_id).map(look)
    }

    /// Notes that a peer answers.
    fn heard(&self, peer: &PrefillPeer) {
        self.known(peer, |known| known.silence = None);
    }

    /// Notes how a peer failed, in an attempt that began then.
    fn failed(&self, peer: &PrefillPeer, error: &TransferError, began: Instant) {
        match error {
            TransferError::NoAnswer(_) => {}
            // It went away: which transports reach it may be otherwise when it is back.
            TransferError::Peer(status) if status.source().is_some() => {
                self.peers.lock().remove(&peer.address);
                return;
            }
            // It refused: what is known of the way to it stays.
            _ => return,
        }
        let Ok(way) = self.new_way(&peer.address) else { return };
        self.known(peer, |known| {
            known.way = way;
            let noticed = Instant::now();
            match &mut known.silence {
                // Of several attempts at once, the first has said so.
                Some(silence) if silence.noticed > began => {}
                silence => {
                    let pause = silence.as_ref().map_or(FIRST_PAUSE, |before| before.pause * 2);
                    let pause = pause.min(LONGEST_PAUSE);
                    *silence = Some(Silence { noticed, until: noticed + pause, pause });
                }
            }
        });
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
