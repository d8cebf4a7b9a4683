//! The connection to one worker.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use baton_membership::tls::connect_lazy;
use baton_membership::{InstanceRecord, InstanceRole};
use baton_proto::v1::{
    DescribeRequest, FetchTokenizerRequest, ListAdaptersRequest, WatchStatusRequest,
};
use baton_proto::{TokenizerBundle, endpoint};
use parking_lot::Mutex;
use thread_local::ThreadLocal;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tonic::Status;
use tracing::{debug, warn};

use super::adapters::Loaded;
use super::faults::Faults;
use super::{Registry, Served, Worker, blocks};
use crate::routing::kv_index::Share;
use crate::routing::prefix_index::PrefixIndex;
use crate::text::TextModel;

/// Limit of the short calls.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a worker reports, and the silence that counts as death.
const STATUS_EVERY: Duration = Duration::from_millis(250);
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);
/// Waits between attempts to reach a worker that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Bytes that a sequence, and all sequences of a worker together, may have under way.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Blocks remembered of a worker that does not say how many it has.
const DEFAULT_PREFIXES: usize = 4096;

/// Makes a worker of a record and starts its task; `None` for an address that is none.
pub(super) fn start(
    registry: &Arc<Registry>,
    record: InstanceRecord,
) -> Option<(Arc<Worker>, AbortHandle)> {
    // Sequences and status on connections of their own, and a small window for each sequence: a
    // client that does not read must not silence the worker for others.
    let (sequences, control) = match endpoint(&record.address) {
        Ok(endpoint) => (
            endpoint
                .clone()
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW),
            connect_lazy(&endpoint),
        ),
        Err(error) => {
            warn!(id = record.id, address = record.address, %error, "a worker's address is no URL");
            return None;
        }
    };
    let Some(share) = Share::new(&registry.kv) else {
        warn!(id = record.id, "more workers than the index of KV blocks has places for");
        return None;
    };
    let worker = Arc::new(Worker {
        record,
        slot: share.slot(),
        tells_blocks: AtomicBool::new(false),
        promised: Mutex::default(),
        sequences,
        channels: ThreadLocal::new(),
        control,
        served: ArcSwapOption::empty(),
        adapters: ArcSwap::from_pointee(Loaded::default()),
        departed: registry.departed.clone(),
        status: ArcSwapOption::empty(),
        first_status: OnceLock::new(),
        was_there: !registry.begun.load(Relaxed),
        alive: AtomicBool::new(false),
        listed: AtomicBool::new(true),
        requests: AtomicUsize::new(0),
        pending_tokens: AtomicU64::new(0),
        handed_tokens: AtomicU64::new(0),
        full_until: Mutex::new(None),
        faults: Faults::default(),
        prefixes: Mutex::new(None),
        suspect: Notify::new(),
    });
    let (registry, follower) = (registry.clone(), worker.clone());
    let task = tokio::spawn(async move {
        let run = run(registry, follower.clone());
        match follower.record.role {
            InstanceRole::Pooling => run.await,
            _ => tokio::join!(run, blocks::follow(&follower, share)).0,
        }
    });
    Some((worker, task.abort_handle()))
}

async fn run(registry: Arc<Registry>, worker: Arc<Worker>) {
    let mut wait = RETRY.0;
    loop {
        let error = match follow(&registry, &worker, &mut wait).await {
            Ok(()) => Status::unavailable("the worker closed the status stream"),
            Err(error) => error,
        };
        if worker.alive.swap(false, Relaxed) {
            warn!(id = worker.record.id, %error, "worker does not answer any more");
        } else {
            debug!(id = worker.record.id, %error, "worker does not answer yet");
        }
        registry.forget_unlisted(&worker);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

/// Learns what the worker serves, then listens until the stream of status ends.
async fn follow(registry: &Registry, worker: &Worker, wait: &mut Duration) -> Result<(), Status> {
    let served = match worker.served() {
        Some(served) => served,
        None => Arc::new(learn(registry, worker).await?),
    };
    let request = WatchStatusRequest { interval_ms: STATUS_EVERY.as_millis() as u32 };
    let mut stream = within(worker.control().watch_status(request)).await?.into_inner();
    loop {
        let next = tokio::time::timeout(STATUS_TIMEOUT, stream.message());
        let status = tokio::select! {
            status = next => status.map_err(|_| Status::deadline_exceeded("no status"))??,
            // A request could not reach it: prove by a new stream that it lives.
            () = worker.suspect.notified() => return Err(Status::unavailable("a request failed")),
        };
        let Some(status) = status else { return Ok(()) };
        is_still(worker, &status.instance_id)?;
        // Nobody asks a worker that computes no sequences for adapters.
        if worker.record.role != InstanceRole::Pooling
            && worker.adapters.load().version() != Some(status.adapters_version)
        {
            let list = within(worker.control().list_adapters(ListAdaptersRequest {})).await?;
            worker.set_adapters(&served, list.into_inner());
            registry.adapters_changed.notify_one();
        }
        let mut prefixes = worker.prefixes.lock();
        if prefixes.is_none() && !worker.tells_blocks.load(Relaxed) {
            let blocks = usize::try_from(status.kv_blocks_total).unwrap_or(DEFAULT_PREFIXES);
            *prefixes = Some(PrefixIndex::new(blocks.max(1)));
        }
        drop(prefixes);
        worker.heard(status);
        worker.alive.store(true, Relaxed);
        // Last: a model is listed when it can be asked.
        if worker.served.load().is_none() {
            worker.served.store(Some(served.clone()));
        }
        *wait = RETRY.0;
    }
}

async fn learn(registry: &Registry, worker: &Worker) -> Result<Served, Status> {
    let description = within(worker.control().describe(DescribeRequest {})).await?.into_inner();
    is_still(worker, &description.instance_id)?;
    let card = description
        .model
        .clone()
        .ok_or_else(|| Status::internal("the worker's description names no model"))?;
    let slot = registry.texts.lock().entry(card.tokenizer_digest.clone()).or_default().clone();
    // One fetches it, and the others of its model wait: a gateway that starts finds all at once.
    let mut known = slot.lock().await;
    let text = match known.upgrade() {
        Some(text) => text,
        None => {
            let text = Arc::new(fetch_text(worker).await?);
            *known = Arc::downgrade(&text);
            text
        }
    };
    Ok(Served { description, card, text, adapter: None })
}

/// Whether who answers is who is registered. A worker that changed its role, or whose process was
/// started again at its address, is another: what is known of the one before is void. Earlier
/// workers do not say.
fn is_still(worker: &Worker, answers: &str) -> Result<(), Status> {
    if answers.is_empty() || worker.record.id == answers {
        return Ok(());
    }
    Err(Status::not_found(format!("{answers} answers at its address")))
}

async fn fetch_text(worker: &Worker) -> Result<TextModel, Status> {
    let mut chunks =
        within(worker.control().fetch_tokenizer(FetchTokenizerRequest {})).await?.into_inner();
    let mut json = Vec::new();
    while let Some(chunk) = within(chunks.message()).await? {
        json.extend_from_slice(&chunk.payload);
    }
    // Building a tokenizer of fifty thousand merges takes a while.
    let built = tokio::task::spawn_blocking(move || {
        let bundle: TokenizerBundle =
            serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        TextModel::new(&bundle)
    });
    built.await.map_err(|error| Status::internal(error.to_string()))?.map_err(Status::internal)
}

async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}
