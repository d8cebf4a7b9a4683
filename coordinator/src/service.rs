//! `baton.v1.Coordinator`: the cluster as seen from here.

use std::sync::Arc;
use std::time::Duration;

use baton_membership::{ClusterWatch, InstanceRecord};
use baton_proto::endpoint;
use baton_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{ClusterView, GetClusterRequest, Instance, WatchStatusRequest, WorkerStatus};
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tracing::debug;

use crate::election::Election;

/// How long a worker may take to tell its status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// The service.
pub struct CoordinatorService {
    /// The cluster's name.
    pub cluster: String,
    /// Who is there.
    pub watch: ClusterWatch,
    /// Who leads.
    pub election: Election,
}

impl CoordinatorService {
    /// Serves until `shutdown` resolves.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        // Without this a small message waits for the acknowledgement of the one before: 40 ms.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tonic::transport::Server::builder()
            .timeout(Duration::from_secs(5))
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .add_service(CoordinatorServer::new(self))
            .serve_with_incoming_shutdown(incoming, shutdown)
            .await
    }
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn get_cluster(
        &self,
        _request: Request<GetClusterRequest>,
    ) -> Result<Response<ClusterView>, Status> {
        let membership = Arc::clone(&self.watch.subscribe().borrow());
        let instances = membership.instances.values().map(|record| async {
            Instance {
                id: record.id.clone(),
                role: record.role.to_string(),
                address: record.address.clone(),
                model: record.model.clone(),
                version: record.version.clone(),
                started_ms: record.started_ms,
                status: status(record).await,
            }
        });
        Ok(Response::new(ClusterView {
            cluster: self.cluster.clone(),
            etcd_connected: membership.etcd_connected,
            leader: self.election.leader(),
            instances: futures::future::join_all(instances).await,
        }))
    }
}

/// What a worker says of itself now; `None` for other processes and for silent workers.
async fn status(record: &InstanceRecord) -> Option<WorkerStatus> {
    if !record.role.is_worker() {
        return None;
    }
    let ask = async {
        let channel = endpoint(&record.address)?.connect().await?;
        let mut client = WorkerClient::new(channel);
        let request = WatchStatusRequest { interval_ms: 60_000 };
        let status = client.watch_status(request).await?.into_inner().message().await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(status)
    };
    match tokio::time::timeout(STATUS_TIMEOUT, ask).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            debug!(id = record.id, error, "no status");
            None
        }
        Err(_) => None,
    }
}
