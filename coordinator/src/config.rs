//! Command line and environment of `baton-coordinator`.

use std::net::SocketAddr;

use baton_membership::daemon::ClusterArgs;
use clap::Parser;

const EXAMPLE: &str =
    "Example:\n  baton-coordinator --listen 10.0.0.5:7700 --etcd http://10.0.0.5:2379";

/// Baton's coordinator: watches who is in the cluster and tells operators.
///
/// Several may run; one leads, and another takes over when it dies.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-coordinator", version, after_help = EXAMPLE)]
pub struct Settings {
    /// Address to serve gRPC on; port 0 takes any free one.
    #[arg(long, env = "BATON_LISTEN", default_value = "127.0.0.1:7700")]
    pub listen: SocketAddr,

    /// URL under which others reach this coordinator; by default the listen address.
    #[arg(long, env = "BATON_ADVERTISE")]
    pub advertise: Option<String>,

    /// The cluster to join.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}
