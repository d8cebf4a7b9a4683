//! Calls of the coordinator.

use std::time::Duration;

use baton_membership::daemon::{Exit, Failure};
use baton_membership::tls::{self, ClusterTlsArgs};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{ClusterView, GetClusterRequest};
use clap::Args;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use super::state;

/// How long the coordinator may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Which coordinator to ask.
#[derive(Clone, Debug, Args)]
pub struct CoordinatorArgs {
    /// The coordinator to ask; by default that of the cluster which `baton up` runs here.
    #[arg(long, env = "BATON_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,

    /// TLS between the processes of the cluster.
    #[command(flatten)]
    tls: ClusterTlsArgs,
}

/// A coordinator that answers.
#[derive(Clone, Debug)]
pub struct Coordinator {
    url: String,
    client: CoordinatorClient<Channel>,
}

impl CoordinatorArgs {
    /// Connects.
    ///
    /// # Errors
    /// When `baton up` runs no cluster here and none was named, and when it does not answer.
    pub async fn connect(&self) -> Result<Coordinator, Failure> {
        tls::install(&self.tls)?;
        let url = match &self.coordinator {
            Some(url) => url.clone(),
            None => state::running()?.ok_or_else(unnamed)?.coordinator,
        };
        Coordinator::at(url).await
    }
}

impl Coordinator {
    /// Connects to the coordinator at this URL.
    async fn at(url: String) -> Result<Self, Failure> {
        let endpoint = Endpoint::from_shared(url.clone())
            .map_err(|error| Failure::new(Exit::Config, format!("--coordinator: {error}")))?;
        let silent = |error: &dyn std::fmt::Display| silent(&url, error);
        match tokio::time::timeout(ANSWER_WITHIN, tls::connect(&endpoint)).await {
            Ok(Ok(channel)) => Ok(Self { client: CoordinatorClient::new(channel), url }),
            Ok(Err(error)) => Err(silent(&reasons(&error))),
            Err(_) => Err(silent(&format_args!("nothing within {ANSWER_WITHIN:?}"))),
        }
    }

    /// The one that leads.
    ///
    /// # Errors
    /// When none leads, or it does not answer.
    pub async fn leader(&self) -> Result<Self, Failure> {
        let view = self.cluster().await?;
        let leader = view.instances.iter().find(|it| it.id == view.leader);
        let none = || Failure::new(Exit::Unavailable, "no coordinator leads; try again");
        Self::at(leader.ok_or_else(none)?.address.clone()).await
    }

    /// Asks, and waits a bounded time.
    ///
    /// # Errors
    /// When it does not answer, or refuses.
    pub async fn ask<T>(
        &self,
        call: impl AsyncFnOnce(CoordinatorClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(ANSWER_WITHIN, call(self.client.clone())).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            // Not said by the coordinator: the connection broke, such as in plain text to TLS.
            Ok(Err(status)) if std::error::Error::source(&status).is_some() => {
                Err(silent(&self.url, &status.message()))
            }
            Ok(Err(status)) => Err(match status.code() {
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                    silent(&self.url, &status.message())
                }
                Code::InvalidArgument => Failure::new(Exit::Config, status.message()),
                _ => Failure::new(Exit::Failure, status.message()),
            }),
            Err(_) => Err(silent(&self.url, &format_args!("nothing within {ANSWER_WITHIN:?}"))),
        }
    }

    /// The cluster as it sees it.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn cluster(&self) -> Result<ClusterView, Failure> {
        self.ask(async |mut client| client.get_cluster(GetClusterRequest {}).await).await
    }
}

/// Processes may run all the same, started in another way.
fn unnamed() -> Failure {
    let message = "`baton up` runs no cluster here: name a coordinator with --coordinator \
                   http://HOST:7700 or BATON_COORDINATOR, or start a cluster with `baton up`";
    Failure::new(Exit::Failure, message)
}

/// An error with what is behind it.
fn reasons(error: &dyn std::error::Error) -> String {
    let all = std::iter::successors(Some(error), |error| error.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn silent(url: &str, error: &dyn std::fmt::Display) -> Failure {
    let message = format!("the coordinator at {url} does not answer: {error}");
    Failure::new(Exit::Unavailable, message)
}
