//! The records that processes keep in etcd, and the keys they keep them under.
//!
//! Everything of one cluster lies under `/baton/<cluster>/`. An instance record is bound to its
//! process's lease, so it goes when the process does.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::v1;

/// What a process does in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceRole {
    /// Speaks HTTP to clients.
    Gateway,
    /// Watches membership and steers scaling.
    Coordinator,
    /// Computes prompts for decode workers.
    Prefill,
    /// Generates; computes short prompts itself.
    Decode,
    /// Does both in one process.
    Unified,
    /// Computes vectors, classes and scores of texts.
    Pooling,
    /// Hears and writes down speech, in one process.
    Audio,
}

impl InstanceRole {
    /// Those of workers.
    pub const WORKERS: [Self; 5] =
        [Self::Prefill, Self::Decode, Self::Unified, Self::Pooling, Self::Audio];

    /// The name used in records, on the command line and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Coordinator => "coordinator",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Unified => "unified",
            Self::Pooling => "pooling",
            Self::Audio => "audio",
        }
    }

    /// Whether a gateway may send this instance a `Generate` call.
    pub fn generates(self) -> bool {
        matches!(self, Self::Decode | Self::Unified | Self::Audio)
    }

    /// Whether a gateway may send it what clients ask for.
    pub fn answers(self) -> bool {
        self.generates() || self == Self::Pooling
    }

    /// Whether it is a worker, of whatever kind.
    pub fn is_worker(self) -> bool {
        Self::WORKERS.contains(&self)
    }
}

impl From<InstanceRole> for v1::Role {
    fn from(role: InstanceRole) -> Self {
        match role {
            InstanceRole::Prefill => Self::Prefill,
            InstanceRole::Decode => Self::Decode,
            InstanceRole::Unified => Self::Unified,
            InstanceRole::Pooling => Self::Pooling,
            InstanceRole::Audio => Self::Audio,
            InstanceRole::Gateway | InstanceRole::Coordinator => Self::Unspecified,
        }
    }
}

impl fmt::Display for InstanceRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One live process, as the others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Unique for each start of a process, so that a restarted one is never taken for the old one.
    pub id: String,
    /// What the process does.
    pub role: InstanceRole,
    /// `http://host:port` of its gRPC server; of its HTTP server for a gateway.
    pub address: String,
    /// The served model's name; empty for gateways and coordinators.
    #[serde(default)]
    pub model: String,
    /// Baton's version.
    pub version: String,
    /// Unix time of the start, in milliseconds.
    pub started_ms: u64,
}

/// The key prefix of all instance records of a cluster.
pub fn instances_prefix(cluster: &str) -> String {
    format!("/baton/{cluster}/instances/")
}

/// The key of one instance record.
pub fn instance_key(cluster: &str, id: &str) -> String {
    format!("{}{id}", instances_prefix(cluster))
}

/// The name of the coordinators' election.
pub fn election_name(cluster: &str) -> String {
    format!("/baton/{cluster}/leader")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_unknown_fields_are_ignored() {
        let record = InstanceRecord {
            id: "w-1".into(),
            role: InstanceRole::Decode,
            address: "http://127.0.0.1:7001".into(),
            model: "m".into(),
            version: "0.1.0".into(),
            started_ms: 1,
        };
        let mut json = serde_json::to_value(&record).unwrap();
        json["from_a_newer_version"] = true.into();
        assert_eq!(serde_json::from_value::<InstanceRecord>(json).unwrap(), record);
    }

    #[test]
    fn a_cluster_named_as_a_prefix_of_another_does_not_see_its_keys() {
        assert!(!instance_key("prod2", "x").starts_with(&instances_prefix("prod")));
    }
}
