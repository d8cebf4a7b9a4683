//! What a coordinator asks of workers.

use std::time::Duration;

use baton_membership::tls::connect;
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{
    DrainRequest, Role, SetRoleRequest, UndrainRequest, WatchStatusRequest, WorkerStatus,
};
use baton_proto::{InstanceRole, endpoint};
use tonic::Status;
use tonic::transport::Channel;

/// How long a worker may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// What the worker says of itself now.
pub async fn status(address: &str) -> Result<WorkerStatus, Status> {
    ask(address, async |mut client| {
        let request = WatchStatusRequest { interval_ms: 60_000 };
        let mut statuses = client.watch_status(request).await?.into_inner();
        statuses.message().await?.ok_or_else(|| Status::unavailable("no status"))
    })
    .await
}

/// Has the worker refuse new requests, and give up after `limit` what it has not got rid of.
pub async fn drain(address: &str, limit: Duration) -> Result<(), Status> {
    let timeout_ms = limit.as_millis() as u64;
    ask(address, async |mut client| client.drain(DrainRequest { timeout_ms }).await).await?;
    Ok(())
}

/// Puts the worker back to service.
pub async fn undrain(address: &str) -> Result<(), Status> {
    ask(address, async |mut client| client.undrain(UndrainRequest {}).await).await?;
    Ok(())
}

/// Has the worker do what a pool does, and give up after `limit` what it has not got rid of.
pub async fn set_role(address: &str, pool: InstanceRole, limit: Duration) -> Result<(), Status> {
    let role = Role::from(pool).into();
    let request = SetRoleRequest { role, drain_timeout_ms: limit.as_millis() as u64 };
    ask(address, async |mut client| client.set_role(request).await).await?;
    Ok(())
}

async fn ask<T>(
    address: &str,
    call: impl AsyncFnOnce(WorkerClient<Channel>) -> Result<T, Status>,
) -> Result<T, Status> {
    let asked = async {
        let endpoint = endpoint(address).map_err(|error| Status::internal(error.to_string()))?;
        let channel = connect(&endpoint).await;
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        call(WorkerClient::new(channel)).await
    };
    let late = |_| Status::deadline_exceeded(format!("no answer within {ANSWER_WITHIN:?}"));
    tokio::time::timeout(ANSWER_WITHIN, asked).await.map_err(late)?
}
