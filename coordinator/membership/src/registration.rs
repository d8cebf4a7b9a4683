//! Keeps one instance record in etcd.

use std::time::Duration;

use baton_proto::InstanceRecord;
use baton_proto::instance::instance_key;
use etcd_client::{Client, PutOptions};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::settings::{Backoff, CALL_TIMEOUT, EtcdSettings, MembershipError, connect, within};

/// A record held under a lease for as long as this value lives.
///
/// A background task renews the lease. When etcd goes away or forgets the lease, the task takes a
/// new one and puts the record again, for ever and with jittered waits. Dropping the value stops
/// the task and leaves the record to its lease; [`Registration::withdraw`] removes it at once.
#[derive(Debug)]
pub struct Registration {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Registration {
    /// Puts the record and returns once it stands.
    ///
    /// # Errors
    /// [`MembershipError::Unreachable`] when etcd does not answer within `start_timeout`.
    pub async fn start(
        settings: &EtcdSettings,
        record: InstanceRecord,
    ) -> Result<Self, MembershipError> {
        let client = connect(settings).await?;
        let (registered, first) = oneshot::channel();
        let stop = CancellationToken::new();
        let keeper = Keeper {
            key: instance_key(&settings.cluster, &record.id),
            value: serde_json::to_string(&record).unwrap_or_default(),
            ttl: settings.lease_ttl,
            client,
        };
        let task = tokio::spawn(keeper.run(stop.clone(), registered));
        let registration = Self { stop, task };
        match tokio::time::timeout(settings.start_timeout, first).await {
            Ok(_) => Ok(registration),
            Err(_) => Err(MembershipError::Timeout(settings.start_timeout)),
        }
    }

    /// Removes the record. Takes at most a few seconds, also when etcd is away.
    pub async fn withdraw(mut self) {
        self.stop.cancel();
        // The task's own last call is bounded.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            self.task.abort();
        }
    }
}

struct Keeper {
    key: String,
    value: String,
    ttl: Duration,
    client: Client,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken, registered: oneshot::Sender<()>) {
        let mut registered = Some(registered);
        let mut backoff = Backoff::new();
        let mut lease = None;
        loop {
            let held = async {
                let id = self.register().await?;
                lease = Some(id);
                if let Some(registered) = registered.take() {
                    let _ = registered.send(());
                } else {
                    info!(key = self.key, "registered again");
                }
                backoff.reset();
                keep_alive(&mut self.client, id, self.ttl).await
            };
            tokio::select! {
                () = stop.cancelled() => break,
                ended = held => {
                    if let Err(error) = ended {
                        warn!(key = self.key, %error, "the registration lapsed; trying again");
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = backoff.wait() => {}
            }
        }
        if let Some(id) = lease
            && let Err(error) = within(CALL_TIMEOUT, self.client.lease_revoke(id)).await
        {
            warn!(key = self.key, %error, "could not withdraw; the lease will run out");
        }
    }

    /// Puts the record under a new lease.
    async fn register(&mut self) -> Result<i64, MembershipError> {
        let ttl = self.ttl.as_secs().max(1) as i64;
        let id = within(CALL_TIMEOUT, self.client.lease_grant(ttl, None)).await?.id();
        let options = PutOptions::new().with_lease(id);
        within(
            CALL_TIMEOUT,
            self.client.put(self.key.as_str(), self.value.as_str(), Some(options)),
        )
        .await?;
        Ok(id)
    }
}

/// Renews a lease until it is lost. Never returns `Ok`.
pub async fn keep_alive(
    client: &mut Client,
    lease: i64,
    ttl: Duration,
) -> Result<(), MembershipError> {
    let (mut keeper, mut answers) = within(CALL_TIMEOUT, client.lease_keep_alive(lease)).await?;
    // Three renewals fit into one lease, so that one may be lost.
    let mut every = tokio::time::interval(ttl / 3);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        within(CALL_TIMEOUT, keeper.keep_alive()).await?;
        match within(CALL_TIMEOUT, answers.message()).await? {
            Some(answer) if answer.ttl() > 0 => {}
            _ => return Err(MembershipError::LeaseLost),
        }
    }
}
