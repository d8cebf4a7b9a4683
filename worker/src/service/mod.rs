//! The worker's gRPC service: `baton.v1.Worker`.
//!
//! A request's life is bound to its response stream. A task of its own drives each request; the
//! stream holds the task, and dropping the stream ends it, which drops the engine's handle, which
//! frees the blocks.

mod adapters;
mod align;
mod generate;
mod prefill;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::{self, ModelCard, Role, SamplingParams, WorkerDescription, WorkerStatus};
use baton_proto::{MAX_MESSAGE_BYTES, TokenizerBundle};
use bytes::Bytes;
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::constraint::{Compiled, Compiler, ConstraintError};
use crate::engine::{Engine, SubmitError};
use crate::lora::Adapters;
use crate::scheduler::Refusal;
use crate::transfer::pull::Puller;

/// Events on their way to a client that reads slowly.
const STREAM_DEPTH: usize = 32;
/// Bytes of one piece of the tokenizer.
const CHUNK_BYTES: usize = 1024 * 1024;
/// The most a request may ask for: longer waits are cut.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What a service is made of.
pub struct Parts {
    /// Unique for this start.
    pub instance_id: String,
    /// What the worker does.
    pub role: Role,
    /// The model, for clients.
    pub model: ModelCard,
    /// The tokenizer, for gateways.
    pub tokenizer: TokenizerBundle,
    /// The adapters that requests may name.
    pub adapters: Adapters,
    /// How blocks may cross, best first.
    pub transports: Vec<v1::Transport>,
    /// How long finished blocks are kept for a peer.
    pub hold_lease: Duration,
    /// The engine.
    pub engine: Arc<Engine>,
}

/// The service.
pub struct WorkerService {
    shared: Arc<Shared>,
    tokenizer: Bytes,
}

/// What the tasks of requests share.
struct Shared {
    instance_id: String,
    role: Role,
    model: ModelCard,
    transports: Vec<v1::Transport>,
    hold_lease: Duration,
    adapters: Arc<Adapters>,
    engine: Arc<Engine>,
    puller: Puller,
    constraints: Compiler,
}

impl WorkerService {
    /// A service over a running engine. Fills in the card's `tokenizer_digest`.
    pub fn new(parts: Parts) -> Result<Self, serde_json::Error> {
        let tokenizer = serde_json::to_vec(&parts.tokenizer)?;
        let mut model = parts.model;
        model.tokenizer_digest = blake3::hash(&tokenizer).to_hex().to_string();
        let constraints =
            Compiler::new(&parts.tokenizer, model.vocab_size as usize, &model.eos_token_ids);
        let shared = Shared {
            constraints,
            instance_id: parts.instance_id,
            role: parts.role,
            model,
            puller: Puller::new(parts.transports.clone()),
            transports: parts.transports,
            hold_lease: parts.hold_lease,
            adapters: Arc::new(parts.adapters),
            engine: parts.engine,
        };
        Ok(Self { shared: Arc::new(shared), tokenizer: tokenizer.into() })
    }

    /// Serves until `shutdown` resolves and all streams have ended.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let service = WorkerServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // Without this a small message waits for the acknowledgement of the one before: 40 ms.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .initial_stream_window_size(4 * 1024 * 1024)
            .initial_connection_window_size(16 * 1024 * 1024)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, shutdown)
            .await
    }
}

impl Shared {
    fn status(&self) -> WorkerStatus {
        let mut status = self.engine.status();
        self.puller.count(&mut status);
        self.adapters.count(&mut status);
        status
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
        SubmitError::Refused(Refusal::Stopping) => Status::unavailable(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

fn timeout(millis: u64) -> Duration {
    if millis == 0 { MAX_TIMEOUT } else { Duration::from_millis(millis).min(MAX_TIMEOUT) }
}

#[tonic::async_trait]
impl Worker for WorkerService {
    type FetchTokenizerStream = Owned<v1::ModelChunk>;
    type GenerateStream = Owned<v1::GenerateEvent>;
    type PrefillStream = Owned<v1::PrefillEvent>;
    type WatchStatusStream = Owned<WorkerStatus>;

    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<WorkerDescription>, Status> {
        let shared = &self.shared;
        Ok(Response::new(WorkerDescription {
            instance_id: shared.instance_id.clone(),
            role: shared.role.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            model: Some(shared.model.clone()),
            kv_layout: Some(*shared.engine.pool().layout()),
            transports: shared.transports.iter().map(|&kind| kind.into()).collect(),
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
        generate::start(self.shared.clone(), request.into_inner()).await.map(Response::new)
    }

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        prefill::start(self.shared.clone(), request.into_inner()).await.map(Response::new)
    }

    async fn load_adapter(
        &self,
        request: Request<v1::LoadAdapterRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        adapters::load(self.shared.adapters.clone(), request.into_inner()).await.map(Response::new)
    }

    async fn unload_adapter(
        &self,
        request: Request<v1::UnloadAdapterRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        adapters::unload(&self.shared.adapters, &request.into_inner().name).map(Response::new)
    }

    async fn list_adapters(
        &self,
        _request: Request<v1::ListAdaptersRequest>,
    ) -> Result<Response<v1::AdapterList>, Status> {
        Ok(Response::new(self.shared.adapters.list()))
    }

    async fn pool(
        &self,
        _request: Request<v1::PoolRequest>,
    ) -> Result<Response<v1::PoolResponse>, Status> {
        Err(Status::failed_precondition("this worker does not pool"))
    }

    async fn align(
        &self,
        request: Request<v1::AlignRequest>,
    ) -> Result<Response<v1::AlignResponse>, Status> {
        align::align(&self.shared, request.into_inner()).await.map(Response::new)
    }

    async fn watch_status(
        &self,
        request: Request<v1::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let every =
            Duration::from_millis(request.into_inner().interval_ms.clamp(10, 60_000).into());
        let shared = self.shared.clone();
        Ok(Response::new(Owned::spawn(move |sender| async move {
            let mut ticks = tokio::time::interval(every);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if sender.send(Ok(shared.status())).await.is_err() {
                    return;
                }
            }
        })))
    }
}
