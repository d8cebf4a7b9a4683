//! The workers' and the coordinator's own view, asked directly.

use std::time::Duration;

use baton_membership::tls;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::worker_client;
use baton_proto::v1::{ClusterView, GetClusterRequest, WatchStatusRequest, WorkerStatus};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::eventually;

/// A client of a worker.
pub type WorkerClient = worker_client::WorkerClient<Channel>;

/// How long a connection or a unary call may take.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// A client of the worker at `address`.
pub async fn worker(address: &str) -> WorkerClient {
    WorkerClient::new(connect(address).await)
}

/// The worker's status as of now.
pub async fn status(address: &str) -> WorkerStatus {
    look(address).await.unwrap_or_else(|error| panic!("the status of {address}: {error}"))
}

/// The same, of a worker that may be dead.
pub async fn look(address: &str) -> Result<WorkerStatus, String> {
    let look = async {
        let channel = dial(address).await.map_err(|error| error.to_string())?;
        let request = WatchStatusRequest { interval_ms: 60_000 };
        let reply = WorkerClient::new(channel).watch_status(request).await;
        let message = reply.map_err(|error| error.to_string())?.into_inner().message().await;
        message.map_err(|error| error.to_string())?.ok_or_else(|| "no status".to_owned())
    };
    let status = tokio::time::timeout(CALL_WITHIN, look).await;
    status.unwrap_or_else(|_| Err("no status in time".into()))
}

/// Whether a worker has no request and no KV block; its status if it has.
pub async fn at_rest(address: &str) -> Result<(), String> {
    let status = look(address).await?;
    let busy = u64::from(status.running + status.waiting) + owned_blocks(&status);
    if busy == 0 { Ok(()) } else { Err(format!("{status:?}")) }
}

/// The worker's status, over and over.
pub async fn watch(address: &str, interval: Duration) -> Streaming<WorkerStatus> {
    let interval_ms = interval.as_millis().try_into().expect("an interval");
    let request = WatchStatusRequest { interval_ms };
    let reply = worker(address).await.watch_status(request).await;
    reply.unwrap_or_else(|e| panic!("WatchStatus of {address}: {e}")).into_inner()
}

/// The next status of a watch.
pub async fn next(stream: &mut Streaming<WorkerStatus>) -> WorkerStatus {
    let message = tokio::time::timeout(CALL_WITHIN, stream.message()).await;
    let message = message.expect("a status in time").expect("a status");
    message.expect("the worker still answers")
}

/// A client of the coordinator at `address`.
pub async fn coordinator(address: &str) -> CoordinatorClient<Channel> {
    CoordinatorClient::new(connect(address).await)
}

/// The cluster as the coordinator sees it.
pub async fn cluster_view(address: &str) -> ClusterView {
    let mut client = coordinator(address).await;
    let view = tokio::time::timeout(CALL_WITHIN, client.get_cluster(GetClusterRequest {})).await;
    view.expect("a view in time").expect("the cluster's view").into_inner()
}

/// KV blocks that somebody owns: zero when no request is in flight.
pub fn owned_blocks(status: &WorkerStatus) -> u64 {
    status.kv_blocks_requests + status.kv_blocks_handoff
}

/// Waits until nobody owns KV blocks of a worker: a client may have its last token a moment before
/// the sequence is gone. Gives the worker's status then, and how long it took.
pub async fn until_unowned(
    address: &str,
    what: &str,
    within: Duration,
) -> (WorkerStatus, Duration) {
    eventually(what, within, async || {
        let status = status(address).await;
        if owned_blocks(&status) == 0 { Ok(status) } else { Err(format!("{status:?}")) }
    })
    .await
}

/// Bytes that arrived in hand-offs, by whatever transport.
pub fn handoff_bytes(status: &WorkerStatus) -> u64 {
    status.handoff_bytes_shared_memory
        + status.handoff_bytes_grpc
        + status.handoff_bytes_cuda_ipc
        + status.handoff_bytes_nccl
}

async fn connect(address: &str) -> Channel {
    dial(address).await.unwrap_or_else(|e| panic!("connect to {address}: {e}"))
}

async fn dial(address: &str) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(address.to_owned()).expect("an address");
    // As one of the cluster, where the test has an identity.
    tls::connect(&endpoint.connect_timeout(CALL_WITHIN)).await
}
