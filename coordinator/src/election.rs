//! Which of several coordinators leads: etcd's own election, under a lease.

use std::time::Duration;

use baton_membership::{CALL_TIMEOUT, EtcdSettings, MembershipError, connect, keep_alive, within};
use baton_proto::instance::election_name;
use etcd_client::Client;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// The proof of having been elected: the key that stands for us in etcd, and the revision at which
/// it was made. While the key is there with this revision, nobody else leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// The key.
    pub key: Vec<u8>,
    /// Later leaders have greater ones.
    pub revision: i64,
}

/// A candidacy for as long as it lives.
#[derive(Debug)]
pub struct Election {
    leader: watch::Receiver<String>,
    own: watch::Receiver<Option<Leadership>>,
    stop: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

/// The way out of an election.
#[derive(Debug)]
pub struct Resignation {
    own: watch::Receiver<Option<Leadership>>,
    stop: CancellationToken,
}

impl Resignation {
    /// Leads no more, and has the next one lead at once. Takes a few seconds at most, also when
    /// etcd is away.
    pub async fn hand_in(mut self) {
        self.stop.cancel();
        // The task that stands ends; its own last call is bounded.
        while self.own.changed().await.is_ok() {}
    }
}

impl Election {
    /// Stands for election under `id`, for ever.
    pub fn start(settings: EtcdSettings, id: String) -> Self {
        let (sender, leader) = watch::channel(String::new());
        let (elected, own) = watch::channel(None);
        let observer = settings.clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let tasks = [
            tokio::spawn(async move {
                loop {
                    let ended = stand(&settings, &id, &elected, &stopped).await;
                    elected.send_replace(None);
                    if stopped.is_cancelled() {
                        return;
                    }
                    if let Err(error) = ended {
                        warn!(%error, "out of the election; trying again");
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }),
            tokio::spawn(async move {
                loop {
                    // Ends with an error when etcd is away; the last leader known stays known.
                    let _ = observe(&observer, &sender).await;
                    tokio::time::sleep(RETRY).await;
                }
            }),
        ];
        Self { leader, own, stop, tasks }
    }

    /// Our own leadership, as far as we know: etcd knows better.
    pub fn own(&self) -> watch::Receiver<Option<Leadership>> {
        self.own.clone()
    }

    /// How it is left before the process ends.
    pub fn resignation(&self) -> Resignation {
        Resignation { own: self.own.clone(), stop: self.stop.clone() }
    }

    /// The id of the leader as last heard; empty before there was one.
    pub fn leader(&self) -> String {
        self.leader.borrow().clone()
    }
}

/// Does `work` whenever `own` says that we lead, until it says otherwise; then calls `changed`.
/// Ends with the election, or with the work.
pub async fn while_leading<W: Future<Output = ()>>(
    mut own: watch::Receiver<Option<Leadership>>,
    work: impl Fn(Leadership) -> W,
    changed: impl Fn(),
) {
    loop {
        let leader = own.borrow_and_update().clone();
        let news = match leader {
            None => own.changed().await,
            Some(leader) => tokio::select! {
                news = own.changed() => news,
                () = work(leader) => return,
            },
        };
        changed();
        if news.is_err() {
            return;
        }
    }
}

impl Drop for Election {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Waits to be elected and leads until the lease is lost, or until it is to `stop`: then the lease
/// is given back.
async fn stand(
    settings: &EtcdSettings,
    id: &str,
    elected: &watch::Sender<Option<Leadership>>,
    stop: &CancellationToken,
) -> Result<(), MembershipError> {
    let connected = stop.run_until_cancelled(connect(settings)).await;
    let Some(client) = connected else { return Ok(()) };
    let mut client = client?;
    let ttl = settings.lease_ttl;
    let seconds = ttl.as_secs().max(1) as i64;
    let lease = within(CALL_TIMEOUT, client.lease_grant(seconds, None)).await?.id();
    let mut campaigner: Client = client.clone();
    let lead = async {
        // Returns when all who stood before are gone.
        let name = election_name(&settings.cluster);
        let mut won = campaigner.campaign(name, id, lease).await?;
        info!(id, "leading");
        let key = won.take_leader();
        elected.send_replace(key.map(|it| Leadership { key: it.key().into(), revision: it.rev() }));
        std::future::pending::<Result<(), MembershipError>>().await
    };
    tokio::select! {
        lost = keep_alive(&mut client, lease, ttl) => return lost,
        failed = lead => return failed,
        () = stop.cancelled() => {}
    }
    within(CALL_TIMEOUT, client.lease_revoke(lease)).await.map(drop)
}

/// Listens to who leads.
async fn observe(
    settings: &EtcdSettings,
    sender: &watch::Sender<String>,
) -> Result<(), MembershipError> {
    let mut client = connect(settings).await?;
    let call = client.observe(election_name(&settings.cluster));
    let mut leaders = within(CALL_TIMEOUT, call).await?;
    while let Some(answer) = leaders.message().await? {
        if let Some(kv) = answer.kv() {
            sender.send_replace(String::from_utf8_lossy(kv.value()).into_owned());
        }
    }
    Ok(())
}
