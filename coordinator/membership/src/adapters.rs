//! The adapters that a cluster serves, in etcd, and the names that are being loaded.

use std::collections::HashSet;
use std::time::Duration;

use baton_proto::AdapterRecord;
use baton_proto::adapter::{
    adapter_key, adapters_epoch_key, adapters_prefix, claim_key, claims_prefix,
};
use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::registration::keep_alive;
use crate::settings::{Backoff, CALL_TIMEOUT, EtcdSettings, MembershipError, connect, within};

/// The records of adapters. They belong to no process: they stay when gateways and workers go.
#[derive(Clone)]
pub struct AdapterStore {
    client: Client,
    cluster: String,
    /// How long a claim outlives the gateway that made it.
    claim_ttl: Duration,
}

/// All records and claims, of one moment.
#[derive(Debug, Default)]
pub struct Adapters {
    /// What all workers of a model are to have.
    pub records: Vec<AdapterRecord>,
    /// Names that a gateway is loading: what workers have under them is its affair alone.
    pub claimed: HashSet<String>,
    /// Drawn when the records began, so another after etcd has lost them; `None` until
    /// [`AdapterStore::begin`].
    pub epoch: Option<String>,
}

impl AdapterStore {
    /// Connects.
    ///
    /// # Errors
    /// [`MembershipError::Unreachable`] when etcd does not answer within `start_timeout`.
    pub async fn connect(settings: &EtcdSettings) -> Result<Self, MembershipError> {
        let (cluster, claim_ttl) = (settings.cluster.clone(), settings.lease_ttl);
        Ok(Self { client: connect(settings).await?, cluster, claim_ttl })
    }

    /// All records and claims.
    pub async fn list(&self) -> Result<Adapters, MembershipError> {
        let all = |prefix| TxnOp::get(prefix, Some(GetOptions::new().with_prefix()));
        // In one transaction, so that a load that has just ended is seen as either.
        let of = &self.cluster;
        let parts = [
            all(adapters_prefix(of)),
            all(claims_prefix(of)),
            TxnOp::get(adapters_epoch_key(of), None),
        ];
        let mut client = self.client.clone();
        let answer = within(CALL_TIMEOUT, client.txn(Txn::new().and_then(parts))).await?;
        let mut found = answer.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(mut got) => got.take_kvs(),
            _ => Vec::new(),
        });
        let mut next = || found.next().unwrap_or_default();
        let record = |kv: KeyValue| {
            let record = serde_json::from_slice(kv.value());
            // One bad record must not hide the others.
            record.inspect_err(|error| warn!(%error, "skipping an adapter's record")).ok()
        };
        let records = next().into_iter().filter_map(record).collect();
        let name = |kv: KeyValue| kv.value_str().ok().map(str::to_owned);
        let claimed = next().into_iter().filter_map(name).collect();
        let epoch = next().into_iter().find_map(name);
        Ok(Adapters { records, claimed, epoch })
    }

    /// Begins an epoch, unless one has begun, with these records where there are none of their
    /// names.
    pub async fn begin(&self, records: &[AdapterRecord]) -> Result<(), MembershipError> {
        let record = |it: &AdapterRecord| {
            let value = serde_json::to_string(it).unwrap_or_default();
            (adapter_key(&self.cluster, &it.name), value)
        };
        // The epoch last: who sees it sees the records.
        let epoch = (adapters_epoch_key(&self.cluster), uuid::Uuid::new_v4().to_string());
        for (key, value) in records.iter().map(record).chain([epoch]) {
            let absent = Compare::version(key.as_str(), CompareOp::Equal, 0);
            let put = Txn::new().when([absent]).and_then([TxnOp::put(key, value, None)]);
            within(CALL_TIMEOUT, self.client.clone().txn(put)).await?;
        }
        Ok(())
    }

    /// Claims a name, to load an adapter under it; `None` when another has it.
    pub async fn claim(&self, name: &str) -> Result<Option<Claim>, MembershipError> {
        let mut client = self.client.clone();
        let ttl = self.claim_ttl.as_secs().max(1) as i64;
        let lease = within(CALL_TIMEOUT, client.lease_grant(ttl, None)).await?.id();
        // From here on its owner gives the lease back, however this ends.
        let (held, released) = oneshot::channel();
        let keeper = tokio::spawn(keep(client.clone(), lease, self.claim_ttl, released));
        let claim = Claim { store: self.clone(), name: name.to_owned(), lease, held, keeper };
        let key = claim_key(&self.cluster, name);
        let free = Compare::version(key.as_str(), CompareOp::Equal, 0);
        let put = TxnOp::put(key, name, Some(PutOptions::new().with_lease(lease)));
        let answer = within(CALL_TIMEOUT, client.txn(Txn::new().when([free]).and_then([put])));
        Ok(answer.await?.succeeded().then_some(claim))
    }

    /// Removes a record; false when there was none.
    pub async fn remove(&self, name: &str) -> Result<bool, MembershipError> {
        let key = adapter_key(&self.cluster, name);
        let mut client = self.client.clone();
        Ok(within(CALL_TIMEOUT, client.delete(key, None)).await?.deleted() > 0)
    }
}

/// A name that is being loaded. It is free again when this is dropped, and soon after the process
/// has died.
pub struct Claim {
    store: AdapterStore,
    name: String,
    lease: i64,
    held: oneshot::Sender<()>,
    keeper: JoinHandle<()>,
}

impl Claim {
    /// Puts the record of what was loaded, whatever was there.
    ///
    /// # Errors
    /// [`MembershipError::LeaseLost`] when the claim has run out, and the name may be another's.
    pub async fn complete(&self, record: &AdapterRecord) -> Result<(), MembershipError> {
        let cluster = &self.store.cluster;
        let ours = Compare::lease(claim_key(cluster, &self.name), CompareOp::Equal, self.lease);
        let value = serde_json::to_string(record).unwrap_or_default();
        let put = TxnOp::put(adapter_key(cluster, &record.name), value, None);
        let mut client = self.store.client.clone();
        let answer = within(CALL_TIMEOUT, client.txn(Txn::new().when([ours]).and_then([put])));
        if answer.await?.succeeded() { Ok(()) } else { Err(MembershipError::LeaseLost) }
    }

    /// Gives the name back before it returns.
    pub async fn release(self) {
        drop(self.held);
        // It ends within the time of a call.
        let _ = self.keeper.await;
    }
}

/// Keeps a claim's lease until the claim is given back.
async fn keep(mut client: Client, lease: i64, ttl: Duration, released: oneshot::Receiver<()>) {
    let mut other = client.clone();
    let kept = async {
        let mut backoff = Backoff::new();
        while !matches!(keep_alive(&mut other, lease, ttl).await, Err(MembershipError::LeaseLost)) {
            backoff.wait().await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = kept => {}
        _ = released => {}
    }
    if let Err(error) = within(CALL_TIMEOUT, client.lease_revoke(lease)).await {
        warn!(%error, "an adapter's name stays claimed until its lease has run out");
    }
}
