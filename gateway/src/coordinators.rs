//! Calls of the coordinators, which carry out what operators ask of the cluster.
//!
//! Any of them takes a request: it records it in etcd, and the one that leads carries it out. So a
//! call goes to whichever answers.

use std::sync::Arc;
use std::time::Duration;

use baton_membership::tls::connect;
use baton_proto::endpoint;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{ListScalesRequest, ScaleOperation};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tracing::debug;

use crate::metrics::Metrics;
use crate::workers::Registry;

/// Between two looks at the scale operations.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long one of them may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Asks the coordinators one after the other until one answers.
///
/// # Errors
/// What it refuses, or UNAVAILABLE when none answers.
pub async fn ask<T>(
    registry: &Registry,
    call: impl AsyncFn(CoordinatorClient<Channel>) -> Result<Response<T>, Status>,
) -> Result<T, Status> {
    let addresses = registry.coordinators();
    if addresses.is_empty() {
        let message = "No coordinator is running: start baton-coordinator and try again.";
        return Err(Status::unavailable(message));
    }
    for address in addresses {
        let asked = async {
            let endpoint = endpoint(&address).map_err(|it| Status::unavailable(it.to_string()))?;
            let channel = connect(&endpoint).await;
            let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
            call(CoordinatorClient::new(channel)).await
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, asked).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        match answer {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if passes(status.code()) => {
                debug!(address, %status, "a coordinator does not answer");
            }
            Err(status) => return Err(status),
        }
    }
    Err(Status::unavailable("No coordinator answers; try again soon."))
}

/// The scale operations that run, and the last ones that ended.
///
/// # Errors
/// As [`ask`].
pub async fn scales(registry: &Registry) -> Result<Vec<ScaleOperation>, Status> {
    let list = async |mut client: CoordinatorClient<Channel>| {
        client.list_scales(ListScalesRequest {}).await
    };
    Ok(ask(registry, list).await?.operations)
}

/// Has the metrics tell how scale operations do, for ever. While no coordinator answers they tell
/// what was known last.
pub async fn follow_scaling(registry: Arc<Registry>, metrics: Arc<Metrics>) {
    loop {
        if !registry.coordinators().is_empty() {
            match scales(&registry).await {
                Ok(operations) => metrics.scaling(&operations),
                Err(status) => debug!(%status, "no news of scale operations"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether another coordinator may do better.
fn passes(code: Code) -> bool {
    use Code::{Cancelled, DeadlineExceeded, Unavailable, Unimplemented, Unknown};
    matches!(code, Cancelled | DeadlineExceeded | Unavailable | Unimplemented | Unknown)
}
