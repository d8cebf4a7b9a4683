//! How to reach etcd, and what can go wrong.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions};
use rand::RngExt as _;
use tracing::debug;

use crate::config::without_password;
use crate::tls::{Balanced, Tls};

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
    /// How it is entered.
    pub access: EtcdAccess,
}

/// How etcd is entered; by default in plain text, by anybody.
#[derive(Clone, Default)]
pub struct EtcdAccess {
    /// Certificates.
    pub tls: Option<Arc<Tls>>,
    /// A user, and the password.
    pub user: Option<(String, String)>,
}

impl fmt::Debug for EtcdAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_ref().map(|(user, _)| user);
        f.debug_struct("EtcdAccess").field("tls", &self.tls).field("user", &user).finish()
    }
}

/// Why a process could not join.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// etcd did not answer in time.
    #[error(
        "etcd is not reachable at {} (waited {waited:.0?}): {source}; start etcd there or set --etcd",
        endpoints.iter().map(|url| without_password(url)).collect::<Vec<_>>().join(", ")
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
    let mut options = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(1))
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_keep_alive_while_idle(true)
        // A member that has lost its quorum must say so, not keep silent.
        .with_require_leader(true);
    if let Some((user, password)) = &settings.access.user {
        // A token that nobody uses, as while only streams are open, lapses after five minutes.
        options = options.with_user(user, password).with_auto_token_refresh(true);
    }
    let mut client = match &settings.access.tls {
        None => within(CALL_TIMEOUT, Client::connect(&settings.endpoints, Some(options))).await?,
        Some(tls) => {
            // The client would refuse `https`: it leaves TLS to the channels that it is given.
            let plain = |url: &String| url.replacen("https://", "http://", 1);
            let urls: Vec<String> = settings.endpoints.iter().map(plain).collect();
            let channels = Balanced(tls.clone());
            let connected = Client::connect_with_balanced_channel(&urls, Some(options), channels);
            within(CALL_TIMEOUT, connected).await?
        }
    };
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
