//! The records of scale operations in etcd.
//!
//! A pool has at most one running operation, under `/baton/<cluster>/scale/running/<pool>`; one that
//! moves workers from a pool to another lies under both. Those that ended lie under
//! `…/scale/ended/<id>`. Anybody may ask for an operation or take it back;
//! only the leader moves it, in a transaction that holds while the leader's key in the election is
//! still the one that it was elected with. A leader that has been replaced, and does not know it
//! yet, is refused by etcd itself.

use baton_membership::{CALL_TIMEOUT, EtcdSettings, MembershipError, connect, within};
use baton_proto::InstanceRole;
use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse, WatchOptions,
    WatchStream,
};
use tracing::warn;

use super::record::Record;
use crate::election::Leadership;

/// Operations that are remembered after their end.
const REMEMBERED: usize = 20;

/// The records.
#[derive(Clone)]
pub struct ScaleStore {
    client: Client,
    prefix: String,
}

/// A record, and which version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The record.
    pub record: Record,
    /// etcd's revision of it.
    pub revision: i64,
}

/// All records, of one moment.
#[derive(Clone, Debug, Default)]
pub struct Operations {
    /// Those that run.
    pub running: Vec<Stored>,
    /// Those that ended, oldest first.
    pub ended: Vec<Record>,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub enum Begun {
    /// It is a new operation, or the same as one that runs.
    Runs(Record),
    /// Another operation runs for the pool.
    Conflict(Record),
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// It is written, as this revision.
    Written(i64),
    /// Somebody else has changed the record.
    Changed,
    /// Another coordinator leads.
    Deposed,
}

impl ScaleStore {
    /// Connects.
    ///
    /// # Errors
    /// [`MembershipError::Unreachable`] when etcd does not answer within `start_timeout`.
    pub async fn connect(settings: &EtcdSettings) -> Result<Self, MembershipError> {
        let prefix = format!("/baton/{}/scale/", settings.cluster);
        Ok(Self { client: connect(settings).await?, prefix })
    }

    fn running_key(&self, pool: InstanceRole) -> String {
        format!("{}running/{pool}", self.prefix)
    }

    fn ended_key(&self, id: &str) -> String {
        format!("{}ended/{id}", self.prefix)
    }

    async fn txn(&self, txn: Txn) -> Result<etcd_client::TxnResponse, MembershipError> {
        within(CALL_TIMEOUT, self.client.clone().txn(txn)).await
    }

    /// All records.
    pub async fn list(&self) -> Result<Operations, MembershipError> {
        let options = GetOptions::new().with_prefix();
        let mut client = self.client.clone();
        let answer = within(CALL_TIMEOUT, client.get(self.prefix.as_str(), Some(options))).await?;
        let mut operations = Operations::default();
        for kv in answer.kvs() {
            let Some(stored) = parse(kv) else { continue };
            match stored.record.phase.ended() {
                // Once, though it lies under all its pools.
                false if kv.key() == self.running_key(stored.record.pool).as_bytes() => {
                    operations.running.push(stored);
                }
                false => {}
                true => operations.ended.push(stored.record),
            }
        }
        Ok(operations)
    }

    /// Tells of changes of any record.
    pub async fn watch(&self) -> Result<WatchStream, MembershipError> {
        let options = WatchOptions::new().with_prefix();
        let mut client = self.client.clone();
        within(CALL_TIMEOUT, client.watch(self.prefix.as_str(), Some(options))).await
    }

    fn running_keys(&self, record: &Record) -> Vec<String> {
        record.pools().map(|pool| self.running_key(pool)).collect()
    }

    /// Writes a running operation under all its pools.
    fn puts(&self, record: &Record) -> Vec<TxnOp> {
        let keys = self.running_keys(record).into_iter();
        keys.map(|key| TxnOp::put(key, json(record), None)).collect()
    }

    /// Holds while no operation runs for any pool of a request.
    fn free(&self, request: &Record) -> Vec<Compare> {
        let keys = self.running_keys(request).into_iter();
        keys.map(|key| Compare::version(key, CompareOp::Equal, 0)).collect()
    }

    /// Records a request, unless an operation runs for its pools.
    pub async fn begin(&self, request: Record) -> Result<Begun, MembershipError> {
        let keys = self.running_keys(&request);
        let gets: Vec<_> = keys.iter().map(|key| TxnOp::get(key.as_str(), None)).collect();
        // A record may end, move, or not be readable, between two looks.
        for _ in 0..10 {
            let txn = Txn::new().when(self.free(&request)).and_then(self.puts(&request));
            let answer = self.txn(txn.or_else(gets.clone())).await?;
            if answer.succeeded() {
                return Ok(Begun::Runs(request));
            }
            if let Some(stored) = first(answer.op_responses()) {
                if !stored.record.is_asked_by(&request) {
                    return Ok(Begun::Conflict(stored.record));
                }
                if !stored.record.planned || request.planned {
                    return Ok(Begun::Runs(stored.record));
                }
                // What the planner has begun is an operator's wish now, and stands like one.
                let wished = Record { planned: false, ..stored.record.clone() };
                if let Advanced::Written(_) = self.change(&stored, &wished).await? {
                    return Ok(Begun::Runs(wished));
                }
            }
        }
        let keys = keys.join(" or ");
        let message = format!("{keys} holds a record that cannot be read; delete it");
        Err(MembershipError::WatchEnded(message))
    }

    /// Records what the leader itself asks for. False when another operation runs for one of the
    /// pools, or another coordinator leads.
    pub async fn propose(
        &self,
        leader: &Leadership,
        request: Record,
    ) -> Result<bool, MembershipError> {
        let mut holds = self.free(&request);
        holds.push(leads(leader));
        let answer = self.txn(Txn::new().when(holds).and_then(self.puts(&request))).await?;
        Ok(answer.succeeded())
    }

    /// Marks a running operation as taken back, if it is still the one that was seen.
    pub async fn cancel(&self, stored: &Stored) -> Result<Advanced, MembershipError> {
        self.change(stored, &Record { cancel: true, ..stored.record.clone() }).await
    }

    /// Writes what anybody may change of a running operation, if it is still the one that was seen.
    async fn change(&self, stored: &Stored, to: &Record) -> Result<Advanced, MembershipError> {
        let key = self.running_key(to.pool);
        let same = Compare::mod_revision(key, CompareOp::Equal, stored.revision);
        let answer = self.txn(Txn::new().when([same]).and_then(self.puts(to))).await?;
        Ok(match answer.succeeded() {
            true => Advanced::Written(revision(&answer)),
            false => Advanced::Changed,
        })
    }

    /// Writes the next state of an operation, for the leader alone.
    pub async fn advance(
        &self,
        leader: &Leadership,
        stored: &Stored,
        next: &Record,
    ) -> Result<Advanced, MembershipError> {
        let key = self.running_key(next.pool);
        let same = Compare::mod_revision(key, CompareOp::Equal, stored.revision);
        let writes = match next.phase.ended() {
            false => self.puts(next),
            true => {
                let ended = TxnOp::put(self.ended_key(&next.id), json(next), None);
                let keys = self.running_keys(next).into_iter();
                keys.map(|key| TxnOp::delete(key, None)).chain([ended]).collect()
            }
        };
        let txn = Txn::new().when([leads(leader), same]).and_then(writes);
        let answer = self.txn(txn).await?;
        if answer.succeeded() {
            return Ok(Advanced::Written(revision(&answer)));
        }
        Ok(match self.leads(leader).await? {
            true => Advanced::Changed,
            false => Advanced::Deposed,
        })
    }

    /// Whether a leader still leads.
    pub async fn leads(&self, leader: &Leadership) -> Result<bool, MembershipError> {
        Ok(self.txn(Txn::new().when([leads(leader)])).await?.succeeded())
    }

    /// Forgets operations that ended long ago.
    pub async fn forget(
        &self,
        leader: &Leadership,
        ended: &[Record],
    ) -> Result<(), MembershipError> {
        let old = &ended[..ended.len().saturating_sub(REMEMBERED)];
        if old.is_empty() {
            return Ok(());
        }
        let deletes = old.iter().take(100).map(|old| TxnOp::delete(self.ended_key(&old.id), None));
        let deletes: Vec<_> = deletes.collect();
        self.txn(Txn::new().when([leads(leader)]).and_then(deletes)).await?;
        Ok(())
    }
}

/// Holds while the leader is the one that was elected with this key.
fn leads(leader: &Leadership) -> Compare {
    Compare::create_revision(leader.key.as_slice(), CompareOp::Equal, leader.revision)
}

fn revision(answer: &etcd_client::TxnResponse) -> i64 {
    answer.header().map_or(0, etcd_client::ResponseHeader::revision)
}

fn first(responses: Vec<TxnOpResponse>) -> Option<Stored> {
    responses.into_iter().find_map(|response| match response {
        TxnOpResponse::Get(got) => got.kvs().first().and_then(parse),
        _ => None,
    })
}

fn json(record: &Record) -> String {
    serde_json::to_string(record).unwrap_or_default()
}

/// A record, or `None` with a line in the log: one bad record must not hide the others.
fn parse(kv: &KeyValue) -> Option<Stored> {
    match serde_json::from_slice(kv.value()) {
        Ok(record) => Some(Stored { record, revision: kv.mod_revision() }),
        Err(error) => {
            warn!(key = %String::from_utf8_lossy(kv.key()), %error, "skipping a record that does not parse");
            None
        }
    }
}
