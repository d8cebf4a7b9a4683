//! A worker without an engine: it answers every request at once with the same token.
//!
//! Registered as a real one and with a real model's tokenizer, it leaves nothing of a request's
//! time but the gateway's share and the wire's. `bench_cluster` measures the gateway against it. Or
//! it fails, as a real one cannot be told to.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use baton_membership::daemon::{self, Exit, Failure, StopSignals};
use baton_membership::{EtcdAccess, EtcdSettings, InstanceRole, Registration};
use baton_proto::v1::generate_event::Event;
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::{
    AdapterList, AlignRequest, AlignResponse, BlockChanges, DescribeRequest, DrainRequest,
    DrainResponse, FetchBlocksRequest, FetchTokenizerRequest, FinishReason, Finished,
    GenerateEvent, GenerateRequest, ListAdaptersRequest, LoadAdapterRequest, ModelChunk,
    PoolRequest, PoolResponse, PrefillEvent, PrefillRequest, SetRoleRequest, SetRoleResponse,
    Started, Token, Tokens, UndrainRequest, UndrainResponse, UnloadAdapterRequest,
    WatchBlocksRequest, WatchStatusRequest, WorkerDescription, WorkerStatus,
};
use baton_proto::{MAX_MESSAGE_BYTES, endpoint};
use baton_tests::bench::null::TOKEN;
use clap::Parser;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio_stream::wrappers::IntervalStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A worker that computes nothing, for measuring what stands before it.
#[derive(Debug, Parser)]
struct Settings {
    /// URL of the cluster's etcd.
    #[arg(long)]
    etcd: String,
    /// A real worker to take the description and the tokenizer from; not needed afterwards.
    #[arg(long)]
    like: String,
    /// Fails every request, as a worker does whose steps fail.
    #[arg(long)]
    fail: bool,
    /// Dies of a request whose prompt has this token.
    #[arg(long)]
    die_of: Option<u32>,
    /// Tokens of the answer that it sends before it dies.
    #[arg(long, default_value_t = 0)]
    die_after: usize,
}

/// The time that what was sent last has to leave.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// What a real worker said of itself, and what this one does.
#[derive(Debug)]
struct NullWorker {
    description: WorkerDescription,
    tokenizer: Vec<ModelChunk>,
    settings: Settings,
    /// Requests that came.
    requests: Arc<AtomicU64>,
}

/// One thread: it shares a core with the load generator.
#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    daemon::exit(run(Settings::parse()).await)
}

async fn run(settings: Settings) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, error);
    let mut stop = StopSignals::take()?;
    let etcd = settings.etcd.clone();
    let mut worker = copy(settings).await.map_err(|error| failed(&error))?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(|e| failed(&e))?;
    let address = listener.local_addr().map_err(|error| failed(&error))?;
    let model = worker.description.model.clone().unwrap_or_default().name;
    let url = format!("http://{address}");
    let record = daemon::new_record(InstanceRole::Unified, url.clone(), model);
    worker.description.instance_id.clone_from(&record.id);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(16 * 1024 * 1024)
        .add_service(WorkerServer::new(worker))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    let serving = tokio::spawn(server);
    let etcd = EtcdSettings {
        endpoints: vec![etcd],
        cluster: "default".into(),
        lease_ttl: Duration::from_secs(5),
        start_timeout: Duration::from_secs(10),
        access: EtcdAccess::default(),
    };
    let registration = Registration::start(&etcd, record).await?;
    println!("ready unified {url}");
    stop.next().await;
    registration.withdraw().await;
    serving.abort();
    Ok(())
}

async fn copy(settings: Settings) -> Result<NullWorker, Box<dyn std::error::Error>> {
    let mut real = WorkerClient::new(endpoint(&settings.like)?.connect().await?)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let description = real.describe(DescribeRequest {}).await?.into_inner();
    let mut chunks = real.fetch_tokenizer(FetchTokenizerRequest {}).await?.into_inner();
    let mut tokenizer = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        tokenizer.push(chunk);
    }
    Ok(NullWorker { description, tokenizer, settings, requests: Arc::default() })
}

/// Ends the process, as a crash would.
async fn die() -> Result<GenerateEvent, Status> {
    tokio::time::sleep(LAST_WORDS).await;
    std::process::exit(1)
}

#[tonic::async_trait]
impl Worker for NullWorker {
    type FetchTokenizerStream = BoxStream<'static, Result<ModelChunk, Status>>;
    type GenerateStream = BoxStream<'static, Result<GenerateEvent, Status>>;
    type PrefillStream = BoxStream<'static, Result<PrefillEvent, Status>>;
    type WatchBlocksStream = BoxStream<'static, Result<BlockChanges, Status>>;
    type FetchBlocksStream = BoxStream<'static, Result<PrefillEvent, Status>>;
    type WatchStatusStream = BoxStream<'static, Result<WorkerStatus, Status>>;

    async fn describe(
        &self,
        _request: Request<DescribeRequest>,
    ) -> Result<Response<WorkerDescription>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    async fn fetch_tokenizer(
        &self,
        _request: Request<FetchTokenizerRequest>,
    ) -> Result<Response<Self::FetchTokenizerStream>, Status> {
        let chunks: Vec<_> = self.tokenizer.iter().cloned().map(Ok).collect();
        Ok(Response::new(stream::iter(chunks).boxed()))
    }

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.requests.fetch_add(1, Relaxed);
        if self.settings.fail {
            let failed = Status::internal("the forward pass panicked");
            return Ok(Response::new(stream::iter([Err(failed)]).boxed()));
        }
        let request = request.into_inner();
        let before = request.output_token_ids.len();
        let count = request.sampling.unwrap_or_default().max_tokens as usize;
        let count = count.saturating_sub(before).max(1);
        let token = Tokens { tokens: vec![Token { id: TOKEN, ..Token::default() }] };
        let finished = Finished { reason: FinishReason::Length.into(), stop_token_id: None };
        let mut events = vec![Event::Started(Started::default())];
        events.resize(1 + count, Event::Tokens(token));
        events.push(Event::Finished(finished));
        let Settings { die_of, die_after, .. } = self.settings;
        let deadly = die_of.is_some_and(|token| request.prompt_token_ids.contains(&token));
        let dies = deadly && die_after < count;
        if dies {
            // With the first token, as a real one, it says that it has started.
            events.truncate(if die_after == 0 { 0 } else { 1 + die_after });
        }
        let events = events.into_iter().map(|event| Ok(GenerateEvent { event: Some(event) }));
        let events = stream::iter(events.collect::<Vec<_>>());
        Ok(Response::new(match dies {
            true => events.chain(stream::once(die())).boxed(),
            false => events.boxed(),
        }))
    }

    async fn prefill(
        &self,
        _request: Request<PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn load_adapter(
        &self,
        _request: Request<LoadAdapterRequest>,
    ) -> Result<Response<AdapterList>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn unload_adapter(
        &self,
        _request: Request<UnloadAdapterRequest>,
    ) -> Result<Response<AdapterList>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn list_adapters(
        &self,
        _request: Request<ListAdaptersRequest>,
    ) -> Result<Response<AdapterList>, Status> {
        Ok(Response::new(AdapterList::default()))
    }

    async fn pool(&self, _request: Request<PoolRequest>) -> Result<Response<PoolResponse>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn align(
        &self,
        _request: Request<AlignRequest>,
    ) -> Result<Response<AlignResponse>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn watch_blocks(
        &self,
        _request: Request<WatchBlocksRequest>,
    ) -> Result<Response<Self::WatchBlocksStream>, Status> {
        Err(Status::failed_precondition("this worker has no KV cache"))
    }

    async fn fetch_blocks(
        &self,
        _: Request<FetchBlocksRequest>,
    ) -> Result<Response<Self::FetchBlocksStream>, Status> {
        Err(Status::unimplemented("this worker computes nothing"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("this worker is never drained"))
    }

    async fn undrain(
        &self,
        _: Request<UndrainRequest>,
    ) -> Result<Response<UndrainResponse>, Status> {
        Err(Status::unimplemented("this worker is never drained"))
    }

    async fn set_role(
        &self,
        _: Request<SetRoleRequest>,
    ) -> Result<Response<SetRoleResponse>, Status> {
        Err(Status::unimplemented("this worker has one role"))
    }

    async fn watch_status(
        &self,
        request: Request<WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let every = Duration::from_millis(request.into_inner().interval_ms.max(10).into());
        let requests = self.requests.clone();
        let status = move || WorkerStatus {
            kv_blocks_total: 4096,
            requests: requests.load(Relaxed),
            ..WorkerStatus::default()
        };
        let ticks = IntervalStream::new(tokio::time::interval(every));
        Ok(Response::new(ticks.map(move |_| Ok(status())).boxed()))
    }
}
