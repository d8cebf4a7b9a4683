//! Command line and environment of `baton-coordinator`.

use std::net::SocketAddr;
use std::path::PathBuf;

use baton_membership::daemon::ClusterArgs;
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLE: &str =
    "Example:\n  baton-coordinator --listen 10.0.0.5:7700 --etcd http://10.0.0.5:2379";

/// Baton's coordinator: watches who is in the cluster, tells operators, and scales pools of workers.
///
/// Several may run; one leads, and another takes over when it dies.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "baton-coordinator",
    version,
    after_help = EXAMPLE,
    args_conflicts_with_subcommands = true
)]
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

    /// Workers that it may start.
    #[command(flatten)]
    pub launch: LaunchArgs,

    #[command(subcommand)]
    pub(crate) action: Option<Action>,
}

/// Flags about starting workers.
#[derive(Clone, Debug, Args)]
pub struct LaunchArgs {
    /// Who starts and ends workers.
    #[arg(long, env = "BATON_LAUNCHER", default_value = "local")]
    pub launcher: LauncherKind,

    /// Namespace of the pools' StatefulSets; by default that of the kubeconfig's context, or of
    /// the pod that the coordinator runs in.
    #[arg(long, env = "BATON_KUBERNETES_NAMESPACE", value_name = "NAME")]
    pub kubernetes_namespace: Option<String>,

    /// Labels that StatefulSets of this cluster's pools and their pods have: baton.dev/pool, and
    /// others where several clusters share a namespace.
    #[arg(
        long,
        env = "BATON_KUBERNETES_SELECTOR",
        default_value = "baton.dev/pool",
        value_name = "LABELS"
    )]
    pub kubernetes_selector: String,

    /// JSON file with the command of each pool's workers; without it no worker can be launched.
    /// docs/operate.md has an example.
    #[arg(long, env = "BATON_WORKERS", value_name = "FILE")]
    pub workers: Option<PathBuf>,

    /// Folder of the workers launched; coordinators of one machine share it. By default
    /// $XDG_STATE_HOME/baton/workers, or ~/.local/state/baton/workers.
    #[arg(long, env = "BATON_WORKERS_DIR", value_name = "FOLDER")]
    pub workers_dir: Option<PathBuf>,

    /// Folder of their logs; by default `logs` in the folder above that of the workers.
    #[arg(long, env = "BATON_WORKERS_LOGS", value_name = "FOLDER")]
    pub workers_logs: Option<PathBuf>,

    /// A file that the owner of the workers keeps locked (flock): all of them end when it does not
    /// any more. Without it they run until they are retired.
    #[arg(long, env = "BATON_WORKERS_OWNER", value_name = "FILE")]
    pub workers_owner: Option<PathBuf>,

    /// Seconds until a launched worker must serve.
    #[arg(long, env = "BATON_LAUNCH_TIMEOUT", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub launch_timeout: u64,

    /// Seconds that a worker gets to end before it is killed.
    #[arg(long, env = "BATON_STOP_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub stop_timeout: u64,
}

/// Who starts and ends workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LauncherKind {
    /// Processes on this machine, by the file of --workers.
    Local,
    /// Pods of StatefulSets, of the cluster that KUBECONFIG, ~/.kube/config or the pod's service
    /// account names.
    Kubernetes,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Action {
    /// Watches over one worker; started by a launcher.
    #[command(hide = true)]
    Supervise {
        /// The worker's folder.
        dir: PathBuf,
    },
}

impl Settings {
    /// The folder of the worker to supervise, when that is what this process is for.
    pub fn supervises(&self) -> Option<&PathBuf> {
        self.action.as_ref().map(|Action::Supervise { dir }| dir)
    }
}
