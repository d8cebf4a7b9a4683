//! How to reach etcd, and what can go wrong.

use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions};
use rand::RngExt as _;
use tracing::debug;

/// How long one call to etcd may take.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a silent connection is probed, and how long it may take to answer. etcd takes probes
/// within 5 s of each other for an attack and closes the connection (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(3));
/// The first wait after a failure, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Where etcd is and what part of it is ours.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// `http://host:port` of each etcd member.
    pub endpoints: Vec<String>,
    /// The cluster's name: everything lies under `/baton/<cluster>/`.
    pub cluster: String,
    /// How long a record outlives its process. etcd counts in whole seconds.
    pub lease_ttl: Duration,
    /// How long to wait for etcd at start before giving up.
    pub start_timeout: Duration,
}

/// Why a process could not join.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// etcd did not answer in time.
    #[error(
        "etcd is not reachable at {} (waited {waited:.0?}): {source}; start etcd there or set --etcd",
        endpoints.join(", ")
    )]
    Unreachable {
        /// The endpoints tried.
        endpoints: Vec<String>,
        /// How long.
        waited: Duration,
        /// The last failure.
        source: etcd_client::Error,
    },
    /// etcd answered with an error.
    #[error("etcd: {0}")]
    Etcd(#[from] etcd_client::Error),
    /// A call to etcd took too long.
    #[error("etcd did not answer within {0:?}")]
    Timeout(Duration),
    /// The lease ran out or was revoked.
    #[error("the lease is gone")]
    LeaseLost,
    /// The watch ended; the view must be listed anew.
    #[error("the watch ended: {0}")]
    WatchEnded(String),
}

/// Connects to etcd, trying until it answers or `start_timeout` is over.
pub async fn connect(settings: &EtcdSettings) -> Result<Client, MembershipError> {
    let started = Instant::now();
    let mut backoff = Backoff::new();
    loop {
        let source = match try_connect(settings).await {
            Ok(client) => return Ok(client),
            Err(MembershipError::Etcd(source)) => source,
            Err(other) => etcd_client::Error::WatchError(other.to_string()),
        };
        let waited = started.elapsed();
        if waited >= settings.start_timeout {
            let endpoints = settings.endpoints.clone();
            return Err(MembershipError::Unreachable { endpoints, waited, source });
        }
        debug!(%source, "etcd does not answer yet");
        backoff.wait().await;
    }
}

/// One attempt to connect, proved by a call: the channel itself is lazy.
pub(crate) async fn try_connect(settings: &EtcdSettings) -> Result<Client, MembershipError> {
    let options = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(1))
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_keep_alive_while_idle(true)
        // A member that has lost its quorum must say so, not keep silent.
        .with_require_leader(true);
    let mut client =
        within(CALL_TIMEOUT, Client::connect(&settings.endpoints, Some(options))).await?;
    within(CALL_TIMEOUT, client.status()).await?;
    Ok(client)
}

/// Bounds a call to etcd.
pub async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, MembershipError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(MembershipError::Timeout(limit)),
    }
}

/// Exponential waits with jitter, so that a cluster does not return to a server in step.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: BACKOFF.0 }
    }
}

impl Backoff {
    /// Begins with the shortest wait.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins again with the shortest wait.
    pub fn reset(&mut self) {
        self.next = BACKOFF.0;
    }

    /// Waits, and will wait longer the next time.
    pub async fn wait(&mut self) {
        let wait = self.next.mul_f64(rand::rng().random_range(0.5..1.0));
        self.next = (self.next * 2).min(BACKOFF.1);
        tokio::time::sleep(wait).await;
    }
}
