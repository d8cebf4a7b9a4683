//! The worker's gRPC service: `baton.v1.Worker`.
//!
//! A request's life is bound to its response stream. A task of its own drives each request; the
//! stream holds the task, and dropping the stream ends it, which drops the engine's handle, which
//! frees the blocks.
//!
//! A worker has an engine, or it pools; what it does not have is FAILED_PRECONDITION.

mod adapters;
mod align;
mod blocks;
mod drain;
mod fetch;
mod generate;
mod health;
mod pool;
mod prefill;
mod role;
mod spans;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use baton_membership::tls::incoming;
use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::{self, ModelCard, Role, SamplingParams, WorkerDescription, WorkerStatus};
use baton_proto::{InstanceRole, MAX_MESSAGE_BYTES, TokenizerBundle};
use bytes::Bytes;
use futures::Stream;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tonic::{Request, Response, Status};

use crate::constraint::{Compiled, Compiler, ConstraintError};
use crate::engine::{Engine, SubmitError};
use crate::lora::Adapters;
use crate::pooling::Pooler;
use crate::scheduler::Refusal;
use crate::transfer::Transports;
use crate::transfer::pull::Puller;

use self::role::Roles;

pub use drain::Drain;
pub use pool::PoolingParts;
pub use role::{Identity, Member};

/// Events on their way to a client that reads slowly.
const STREAM_DEPTH: usize = 32;
/// Bytes of one piece of the tokenizer.
const CHUNK_BYTES: usize = 1024 * 1024;
/// The most a request may ask for: longer waits are cut.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What computes, as far as starting and stopping go.
pub trait Computes: Send + Sync {
    /// Gauges and counters as of now.
    fn status(&self) -> WorkerStatus;
    /// Refuses new requests from here on; those that are in go on.
    fn drain(&self);
    /// Takes new requests again.
    fn undrain(&self);
    /// Ends all requests and the threads.
    fn stop(&self);
    /// Waits until it has ended by itself, if it ever does. Says why.
    fn lost(&self) -> BoxFuture<'_, String> {
        Box::pin(std::future::pending())
    }
}

impl Computes for Engine {
    fn lost(&self) -> BoxFuture<'_, String> {
        Box::pin(self.lost())
    }

    fn status(&self) -> WorkerStatus {
        self.status()
    }

    fn drain(&self) {
        self.drain();
    }

    fn undrain(&self) {
        self.undrain();
    }

    fn stop(&self) {
        self.stop();
    }
}

impl Computes for Pooler {
    fn status(&self) -> WorkerStatus {
        self.status()
    }

    fn drain(&self) {
        self.drain();
    }

    fn undrain(&self) {
        self.undrain();
    }

    fn stop(&self) {
        self.stop();
    }
}

/// What a service is made of that generates.
pub struct Parts {
    /// Who the worker is at first.
    pub identity: Identity,
    /// The model, for clients.
    pub model: ModelCard,
    /// The tokenizer, for gateways.
    pub tokenizer: TokenizerBundle,
    /// The adapters that requests may name.
    pub adapters: Adapters,
    /// How blocks may cross, best first.
    pub transports: Transports,
    /// How long finished blocks are kept for a peer.
    pub hold_lease: Duration,
    /// How long a drain may take that names no time.
    pub drain_timeout: Duration,
    /// The engine.
    pub engine: Arc<Engine>,
}

/// The service.
pub struct WorkerService {
    serves: Serves,
    tokenizer: Bytes,
}

/// What a worker has.
#[derive(Clone)]
enum Serves {
    Engine(Arc<Shared>),
    Pooler(Arc<pool::Shared>),
}

impl Serves {
    fn status(&self) -> WorkerStatus {
        match self {
            Self::Engine(shared) => shared.status(),
            Self::Pooler(shared) => shared.status(),
        }
    }
}

/// What the tasks of requests share, where there is an engine.
struct Shared {
    roles: Roles,
    model: ModelCard,
    transports: Transports,
    hold_lease: Duration,
    drain: Arc<Drain>,
    adapters: Arc<Adapters>,
    engine: Arc<Engine>,
    puller: Puller,
    constraints: Compiler,
}

impl WorkerService {
    /// A service over a running engine. Fills in the card's `tokenizer_digest`.
    pub fn new(parts: Parts) -> Result<Self, serde_json::Error> {
        let (tokenizer, model) = with_tokenizer(&parts.tokenizer, parts.model)?;
        let constraints =
            Compiler::new(&parts.tokenizer, model.vocab_size as usize, &model.eos_token_ids);
        let drain = Arc::new(Drain::new(parts.engine.clone(), parts.drain_timeout));
        let shared = Shared {
            constraints,
            roles: Roles::new(parts.identity, model.speech.is_some(), drain.clone()),
            model,
            puller: Puller::new(parts.transports.clone()),
            transports: parts.transports,
            hold_lease: parts.hold_lease,
            drain,
            adapters: Arc::new(parts.adapters),
            engine: parts.engine,
        };
        Ok(Self { serves: Serves::Engine(Arc::new(shared)), tokenizer })
    }

    /// A service that pools. Fills in the card's `tokenizer_digest`.
    pub fn pooling(parts: PoolingParts) -> Result<Self, serde_json::Error> {
        let (tokenizer, model) = with_tokenizer(&parts.tokenizer, parts.model)?;
        let PoolingParts { instance_id, pooler, drain_timeout, .. } = parts;
        let drain = Arc::new(Drain::new(pooler.clone(), drain_timeout));
        let shared = pool::Shared { instance_id, model, pooler, drain };
        Ok(Self { serves: Serves::Pooler(Arc::new(shared)), tokenizer })
    }

    /// How the worker is drained.
    pub fn drain(&self) -> Arc<Drain> {
        match &self.serves {
            Serves::Engine(shared) => shared.drain.clone(),
            Serves::Pooler(shared) => shared.drain.clone(),
        }
    }

    /// The worker as a member of its cluster; `None` for one that is always the same.
    pub fn member(&self) -> Option<Member> {
        match &self.serves {
            Serves::Engine(shared) => Some(Member(shared.clone())),
            Serves::Pooler(_) => None,
        }
    }

    fn engine(&self) -> Result<&Arc<Shared>, Status> {
        match &self.serves {
            Serves::Engine(shared) => Ok(shared),
            Serves::Pooler(_) => Err(Status::failed_precondition(
                "this worker pools: it neither generates nor has adapters",
            )),
        }
    }

    /// Serves until `shutdown` resolves and all streams have ended.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let drain = self.drain();
        let service = WorkerServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .initial_stream_window_size(4 * 1024 * 1024)
            .initial_connection_window_size(16 * 1024 * 1024)
            .add_service(service)
            .add_service(health)
            .serve_with_incoming_shutdown(incoming(listener), shutdown);
        tokio::select! {
            ended = server => ended,
            never = health::tell(&reporter, &drain) => match never {},
        }
    }
}

/// The tokenizer as it crosses, and the card that names its digest.
fn with_tokenizer(
    tokenizer: &TokenizerBundle,
    mut model: ModelCard,
) -> Result<(Bytes, ModelCard), serde_json::Error> {
    let bytes = serde_json::to_vec(tokenizer)?;
    model.tokenizer_digest = blake3::hash(&bytes).to_hex().to_string();
    Ok((bytes.into(), model))
}

impl Shared {
    fn status(&self) -> WorkerStatus {
        self.roles.own(self.counted())
    }

    /// With what was counted since the process began.
    fn counted(&self) -> WorkerStatus {
        let mut status = self.engine.status();
        self.puller.count(&mut status);
        self.adapters.count(&mut status);
        status
    }

    /// Whether a request of another role's has come: from a gateway or a worker that has not heard
    /// of a change yet.
    fn is_not(&self, role: InstanceRole) -> Result<(), Status> {
        if self.roles.current().role != role {
            return Ok(());
        }
        let message = format!("this is a {role} worker now");
        Err(baton_proto::drain::draining(message))
    }

    /// The constraint of a request, compiled.
    async fn compile(&self, sampling: &SamplingParams) -> Result<Option<Arc<Compiled>>, Status> {
        let Some(constraint) = &sampling.constraint else { return Ok(None) };
        match self.constraints.compile(constraint).await {
            Ok(compiled) => Ok(Some(compiled)),
            Err(error @ ConstraintError::Busy) => {
                Err(Status::resource_exhausted(error.to_string()))
            }
            Err(error) => Err(Status::invalid_argument(error.to_string())),
        }
    }
}

/// A response stream that owns the task behind it.
pub struct Owned<T> {
    messages: mpsc::Receiver<Result<T, Status>>,
    task: AbortHandle,
}

impl<T: Send + 'static> Owned<T> {
    /// Runs `task` for as long as somebody listens.
    fn spawn<F>(task: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, messages) = mpsc::channel(STREAM_DEPTH);
        Self { messages, task: tokio::spawn(task(sender)).abort_handle() }
    }
}

impl<T> Stream for Owned<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.messages.poll_recv(context)
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a refusal is in gRPC.
fn refused(error: SubmitError) -> Status {
    match &error {
        SubmitError::Refused(Refusal::QueueFull { .. }) => {
            Status::resource_exhausted(error.to_string())
        }
        SubmitError::Refused(Refusal::Stopping) => baton_proto::drain::draining(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn timeout(millis: u64) -> Duration {
    if millis == 0 { MAX_TIMEOUT } else { Duration::from_millis(millis).min(MAX_TIMEOUT) }
}

#[tonic::async_trait]
impl Worker for WorkerService {
    type FetchTokenizerStream = Owned<v1::ModelChunk>;
    type GenerateStream = Owned<v1::GenerateEvent>;
    type PrefillStream = Owned<v1::PrefillEvent>;
    type WatchBlocksStream = Owned<v1::BlockChanges>;
    type FetchBlocksStream = Owned<v1::PrefillEvent>;
    type WatchStatusStream = Owned<WorkerStatus>;

    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<WorkerDescription>, Status> {
        let shared = match &self.serves {
            Serves::Engine(shared) => shared,
            Serves::Pooler(shared) => return Ok(Response::new(shared.describe())),
        };
        let identity = shared.roles.current();
        Ok(Response::new(WorkerDescription {
            instance_id: identity.instance_id.clone(),
            role: Role::from(identity.role).into(),
            version: env!("CARGO_PKG_VERSION").into(),
            model: Some(shared.model.clone()),
            kv_layout: Some(*shared.engine.pool().layout()),
            transports: shared.transports.kinds().map(Into::into).collect(),
            max_loras: shared.adapters.bounds().adapters as u32,
        }))
    }

    async fn fetch_tokenizer(
        &self,
        _request: Request<v1::FetchTokenizerRequest>,
    ) -> Result<Response<Self::FetchTokenizerStream>, Status> {
        let tokenizer = self.tokenizer.clone();
        Ok(Response::new(Owned::spawn(|sender| async move {
            for start in (0..tokenizer.len()).step_by(CHUNK_BYTES) {
                let end = (start + CHUNK_BYTES).min(tokenizer.len());
                let chunk = v1::ModelChunk { payload: tokenizer.slice(start..end) };
                if sender.send(Ok(chunk)).await.is_err() {
                    return;
                }
            }
        })))
    }

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (span, request) = spans::taken("baton.v1.Worker/Generate", request);
        generate::start(self.engine()?.clone(), request, span).await.map(Response::new)
    }

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let (span, request) = spans::taken("baton.v1.Worker/Prefill", request);
        prefill::start(self.engine()?.clone(), request, span).await.map(Response::new)
    }

    async fn fetch_blocks(
        &self,
        request: Request<v1::FetchBlocksRequest>,
    ) -> Result<Response<Self::FetchBlocksStream>, Status> {
        let (span, request) = spans::taken("baton.v1.Worker/FetchBlocks", request);
        fetch::start(self.engine()?.clone(), request, span).map(Response::new)
    }

    async fn load_adapter(
        &self,
        request: Request<v1::LoadAdapterRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        adapters::load(self.engine()?.adapters.clone(), request.into_inner())
            .await
            .map(Response::new)
    }

    async fn unload_adapter(
        &self,
        request: Request<v1::UnloadAdapterRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        adapters::unload(&self.engine()?.adapters, &request.into_inner().name).map(Response::new)
    }

    async fn list_adapters(
        &self,
        _request: Request<v1::ListAdaptersRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        // Whoever watches adapters asks every worker.
        Ok(Response::new(match &self.serves {
            Serves::Engine(shared) => shared.adapters.list(),
            Serves::Pooler(_) => v1::AdapterList::default(),
        }))
    }

    async fn pool(
        &self,
        request: Request<v1::PoolRequest>,
    ) -> Result<Response<v1::PoolResponse>, Status> {
        let (span, request) = spans::taken("baton.v1.Worker/Pool", request);
        match &self.serves {
            Serves::Pooler(shared) => shared.pool(request, span).await.map(Response::new),
            Serves::Engine(_) => Err(Status::failed_precondition("this worker does not pool")),
        }
    }

    async fn align(
        &self,
        request: Request<v1::AlignRequest>,
    ) -> Result<Response<v1::AlignResponse>, Status> {
        let (mut span, request) = spans::taken("baton.v1.Worker/Align", request);
        spans::named(&mut span, &request.request_id);
        let shared = self.engine()?;
        let aligned = tokio::select! {
            aligned = align::align(shared, request) => aligned,
            () = shared.drain.over() => Err(drain::given_up()),
        };
        aligned.inspect_err(|status| span.fail_rpc(status.code())).map(Response::new)
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let millis = request.into_inner().timeout_ms;
        Self::drain(self).begin((millis > 0).then(|| timeout(millis)));
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn undrain(
        &self,
        _request: Request<v1::UndrainRequest>,
    ) -> Result<Response<v1::UndrainResponse>, Status> {
        match &self.serves {
            Serves::Engine(shared) => shared.roles.keep(),
            Serves::Pooler(shared) => shared.drain.end(),
        }?;
        Ok(Response::new(v1::UndrainResponse {}))
    }

    async fn set_role(
        &self,
        request: Request<v1::SetRoleRequest>,
    ) -> Result<Response<v1::SetRoleResponse>, Status> {
        let request = request.into_inner();
        let millis = request.drain_timeout_ms;
        let limit = (millis > 0).then(|| timeout(millis));
        self.engine()?.roles.want(request.role(), limit)?;
        Ok(Response::new(v1::SetRoleResponse {}))
    }

    async fn watch_blocks(
        &self,
        _request: Request<v1::WatchBlocksRequest>,
    ) -> Result<Response<Self::WatchBlocksStream>, Status> {
        let log = self.engine()?.engine.changes().clone();
        Ok(Response::new(Owned::spawn(move |sender| blocks::watch(log, sender))))
    }

    async fn watch_status(
        &self,
        request: Request<v1::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let every =
            Duration::from_millis(request.into_inner().interval_ms.clamp(10, 60_000).into());
        let serves = self.serves.clone();
        Ok(Response::new(Owned::spawn(move |sender| async move {
            let mut ticks = tokio::time::interval(every);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if sender.send(Ok(serves.status())).await.is_err() {
                    return;
                }
            }
        })))
    }
}
