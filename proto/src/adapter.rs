//! LoRA adapters that a whole cluster serves, as etcd keeps them.
//!
//! A record outlives workers and gateways: workers that join get the adapters that are recorded. A
//! claim is there while an adapter is loaded, and goes with the gateway that loads it.

use serde::{Deserialize, Serialize};

/// Bytes of an adapter's name, at most.
const MAX_NAME: usize = 256;

/// An adapter that all workers of a model are to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// The name that clients use in `model`.
    pub name: String,
    /// The folder, as workers see it.
    pub path: String,
    /// The served name of the model that it belongs to.
    pub base: String,
    /// What workers must find at the path.
    pub digest: String,
}

/// The key prefix of all adapter records of a cluster.
pub fn adapters_prefix(cluster: &str) -> String {
    format!("/baton/{cluster}/adapters/")
}

/// The key of one adapter record.
pub fn adapter_key(cluster: &str, name: &str) -> String {
    format!("{}{name}", adapters_prefix(cluster))
}

/// The key of what is drawn anew when the records begin, after etcd has lost them too.
pub fn adapters_epoch_key(cluster: &str) -> String {
    format!("/baton/{cluster}/adapters-epoch")
}

/// The key prefix of all claims: names whose adapters a gateway is loading. A claim's value is the
/// name; it lies under a lease that the gateway keeps alive.
pub fn claims_prefix(cluster: &str) -> String {
    format!("/baton/{cluster}/adapter-claims/")
}

/// The key of the claim of one name.
pub fn claim_key(cluster: &str, name: &str) -> String {
    format!("{}{name}", claims_prefix(cluster))
}

/// Why a name cannot be an adapter's, if so: it becomes a key, a label and a line in logs.
pub fn bad_name(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("is empty"),
        _ if name.len() > MAX_NAME => Some("is longer than 256 bytes"),
        _ if name.chars().any(|c| c.is_control() || c.is_whitespace() || c == ',') => {
            Some("has spaces, commas or control characters")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_break_a_label_or_a_log_are_refused() {
        for good in ["sql", "org/sql-lora.v2", "é"] {
            assert_eq!(bad_name(good), None, "{good}");
        }
        for bad in ["", "a b", "a,b", "a\nb", "\0", &"x".repeat(257)] {
            assert!(bad_name(bad).is_some(), "{bad:?}");
        }
    }
}
