//! Registration under an etcd lease, and a watched view of the cluster.
//!
//! * [`Registration`]: keeps this process's [`InstanceRecord`] in etcd, whatever etcd does.
//! * [`ClusterWatch`]: keeps a [`Membership`], the last view known, whatever etcd does.
//! * [`AdapterStore`]: the LoRA adapters that the cluster serves.
//! * [`config`]: the file that may hold any program's settings.
//! * [`daemon`]: the flags, logs, signals and exit codes that all daemons share.
//! * [`tls`]: how processes call each other, unheard by others if the operator wants it so.
//! * [`traces`]: spans of what a process does for a request, and their export.
//!
//! Neither is on the path of a request: when etcd is away, processes go on with the last view, and
//! both tasks come back by themselves. A lease that ran out is a hint that a process is gone,
//! never proof; who acts on it must look for itself.

#![forbid(unsafe_code)]

mod adapters;
pub mod config;
pub mod daemon;
mod registration;
mod settings;
pub mod tls;
pub mod traces;
mod watch;

pub use adapters::{AdapterStore, Adapters, Claim};
pub use registration::{Registration, keep_alive};
pub use settings::{
    Backoff, CALL_TIMEOUT, EtcdAccess, EtcdSettings, MembershipError, connect, within,
};
pub use watch::{ClusterWatch, Membership};

pub use baton_proto::{AdapterRecord, InstanceRecord, InstanceRole};
