//! The adapters that a cluster serves, in etcd.

use std::time::Duration;

use baton_proto::AdapterRecord;
use baton_proto::adapter::{adapter_key, adapters_prefix};
use etcd_client::{Client, Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};
use tracing::warn;

use crate::settings::{CALL_TIMEOUT, EtcdSettings, MembershipError, connect, within};

/// How long a claim outlives the gateway that made it.
const CLAIM: Duration = Duration::from_secs(120);

/// The records of adapters. They belong to no process: they stay when gateways and workers go.
#[derive(Clone)]
pub struct AdapterStore {
    client: Client,
    cluster: String,
}

impl AdapterStore {
    /// Connects.
    ///
    /// # Errors
    /// [`MembershipError::Unreachable`] when etcd does not answer within `start_timeout`.
    pub async fn connect(settings: &EtcdSettings) -> Result<Self, MembershipError> {
        Ok(Self { client: connect(settings).await?, cluster: settings.cluster.clone() })
    }

    /// All records.
    pub async fn list(&self) -> Result<Vec<AdapterRecord>, MembershipError> {
        let options = GetOptions::new().with_prefix();
        let prefix = adapters_prefix(&self.cluster);
        let mut client = self.client.clone();
        let answer = within(CALL_TIMEOUT, client.get(prefix, Some(options))).await?;
        let records = answer.kvs().iter().filter_map(|kv| {
            let record = serde_json::from_slice(kv.value());
            // One bad record must not hide the others.
            record.inspect_err(|error| warn!(%error, "skipping an adapter's record")).ok()
        });
        Ok(records.collect())
    }

    /// Puts a record unless the name is taken; false when it is. The record goes by itself after a
    /// while unless [`AdapterStore::put`] replaces it.
    pub async fn claim(&self, record: &AdapterRecord) -> Result<bool, MembershipError> {
        let mut client = self.client.clone();
        let ttl = CLAIM.as_secs() as i64;
        let lease = within(CALL_TIMEOUT, client.lease_grant(ttl, None)).await?.id();
        let key = adapter_key(&self.cluster, &record.name);
        let free = Compare::version(key.as_str(), CompareOp::Equal, 0);
        let put = TxnOp::put(key, value(record), Some(PutOptions::new().with_lease(lease)));
        let answer = within(CALL_TIMEOUT, client.txn(Txn::new().when([free]).and_then([put])));
        Ok(answer.await?.succeeded())
    }

    /// Puts a record, whatever was there.
    pub async fn put(&self, record: &AdapterRecord) -> Result<(), MembershipError> {
        let key = adapter_key(&self.cluster, &record.name);
        let mut client = self.client.clone();
        within(CALL_TIMEOUT, client.put(key, value(record), None)).await?;
        Ok(())
    }

    /// Removes a record; false when there was none.
    pub async fn remove(&self, name: &str) -> Result<bool, MembershipError> {
        let key = adapter_key(&self.cluster, name);
        let mut client = self.client.clone();
        Ok(within(CALL_TIMEOUT, client.delete(key, None)).await?.deleted() > 0)
    }
}

fn value(record: &AdapterRecord) -> String {
    serde_json::to_string(record).unwrap_or_default()
}
