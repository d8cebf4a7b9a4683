//! Command line and environment of `baton-coordinator`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use baton_membership::daemon::{ClusterArgs, Exit, Failure};
use baton_proto::InstanceRole;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::planner::run::Mode;
use crate::planner::{Limits, PlannerSettings, PoolId, Slo};
use crate::service::MAX_SIZE;

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

    /// How large pools should be.
    #[command(flatten)]
    pub planner: PlannerArgs,

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

/// Flags about the size of pools.
#[derive(Clone, Debug, Args)]
pub struct PlannerArgs {
    /// Size pools by load and promised latencies: `dry-run` only tells what it would do
    /// (`baton plan`, and the log), `on` does it.
    #[arg(long = "planner", env = "BATON_PLANNER", default_value = "off", value_enum)]
    pub mode: Mode,

    /// A pool to size, and how many workers it may have: POOL=MIN..MAX, or POOL/MODEL=MIN..MAX
    /// where the pool has several models. POOL is prefill, decode or unified. May be repeated.
    #[arg(
        long = "planner-pool",
        env = "BATON_PLANNER_POOL",
        value_delimiter = ',',
        value_name = "POOL=MIN..MAX"
    )]
    pub pools: Vec<PoolLimits>,

    /// Workers that these pools may have together.
    #[arg(long = "planner-budget", env = "BATON_PLANNER_BUDGET", value_name = "WORKERS")]
    pub budget: Option<u32>,

    /// Promised time to the first token, in milliseconds.
    #[arg(long = "planner-ttft-ms", env = "BATON_PLANNER_TTFT_MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub ttft_ms: u64,

    /// Promised time between two tokens, in milliseconds.
    #[arg(long = "planner-itl-ms", env = "BATON_PLANNER_ITL_MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub itl_ms: u64,

    /// Percentage of tokens that must keep the promises: a percentile.
    #[arg(long = "planner-attainment", env = "BATON_PLANNER_ATTAINMENT", default_value_t = 95.0, value_parser = percentage, value_name = "PERCENT")]
    pub attainment: f64,

    /// Seconds between two decisions.
    #[arg(long = "planner-interval", env = "BATON_PLANNER_INTERVAL", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,

    /// Seconds that a worker takes to start, until the first launch has told.
    #[arg(long = "planner-startup", env = "BATON_PLANNER_STARTUP", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub startup: u64,

    /// A pool shrinks to the largest size that was wanted in so many seconds.
    #[arg(long = "planner-down-window", env = "BATON_PLANNER_DOWN_WINDOW", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub down_window: u64,

    /// Seconds between a change and the next step down; after a failed operation the pause is
    /// doubled each time.
    #[arg(long = "planner-cooldown", env = "BATON_PLANNER_COOLDOWN", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub cooldown: u64,

    /// Seconds that a pool is left alone after an operator has scaled it.
    #[arg(long = "planner-hold", env = "BATON_PLANNER_HOLD", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub hold: u64,
}

/// One `--planner-pool`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolLimits {
    role: InstanceRole,
    model: Option<String>,
    limits: Limits,
}

impl FromStr for PoolLimits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "must be POOL=MIN..MAX or POOL/MODEL=MIN..MAX".to_owned();
        let (pool, range) = text.rsplit_once('=').ok_or_else(form)?;
        let (min, max) = range.split_once("..").ok_or_else(form)?;
        let (pool, model) = match pool.split_once('/') {
            Some((pool, model)) => (pool, Some(model.to_owned())),
            None => (pool, None),
        };
        let roles = [InstanceRole::Prefill, InstanceRole::Decode, InstanceRole::Unified];
        let role = roles.into_iter().find(|role| role.as_str() == pool);
        let role = role.ok_or_else(|| format!("`{pool}` is none of prefill, decode, unified"))?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| form());
        let limits = Limits { min: number(min)?, max: number(max)? };
        if limits.min == 0 || limits.max < limits.min || limits.max > MAX_SIZE {
            return Err(format!("MIN must be at least 1, MAX at least MIN and at most {MAX_SIZE}"));
        }
        Ok(Self { role, model, limits })
    }
}

fn percentage(text: &str) -> Result<f64, String> {
    let given = text.parse().ok().filter(|it: &f64| (50.0..=99.99).contains(it));
    given.ok_or_else(|| "must be from 50 to 99.99".into())
}

impl PlannerArgs {
    /// What they mean, given the models that can be launched in each pool, and whether workers can
    /// change their role.
    ///
    /// # Errors
    /// [`Exit::Config`], naming the flag and the fix.
    pub fn settings(
        &self,
        models: impl Fn(InstanceRole) -> Vec<String>,
        convert: bool,
    ) -> Result<PlannerSettings, Failure> {
        let wrong = |message: String| Failure::new(Exit::Config, message);
        let mut pools = BTreeMap::new();
        for PoolLimits { role, model, limits } in &self.pools {
            let offered = models(*role);
            let model = match (model, offered.as_slice()) {
                (Some(model), _) if offered.contains(model) => model.clone(),
                (None, [only]) => only.clone(),
                (_, []) => {
                    return Err(wrong(format!(
                        "--planner-pool {role}: no worker of this pool can be launched: the file \
                         of --workers has no command for it, or there is no StatefulSet of it"
                    )));
                }
                _ => {
                    return Err(wrong(format!(
                        "--planner-pool {role}: name a model, as {role}/MODEL=MIN..MAX; one of {}",
                        offered.join(", ")
                    )));
                }
            };
            if pools.insert(PoolId { role: *role, model }, *limits).is_some() {
                return Err(wrong(format!("--planner-pool {role}: the pool is named twice")));
            }
        }
        if pools.is_empty() {
            return Err(wrong("--planner needs a pool to size: --planner-pool decode=1..4".into()));
        }
        let least: u32 = pools.values().map(|limits| limits.min).sum();
        if self.budget.is_some_and(|budget| budget < least) {
            return Err(wrong(format!(
                "--planner-budget must be at least {least}, the sum of the pools' MIN"
            )));
        }
        let slo = Slo {
            ttft: self.ttft_ms as f64 / 1e3,
            itl: self.itl_ms as f64 / 1e3,
            attainment: self.attainment / 100.0,
        };
        Ok(PlannerSettings {
            budget: self.budget,
            startup: self.startup as f64,
            down_window: self.down_window as f64,
            cooldown: self.cooldown as f64,
            convert,
            ..PlannerSettings::new(slo, pools)
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn args(flags: &[&str]) -> Result<PlannerArgs, String> {
        let all = ["baton-coordinator", "--planner", "on"].iter().chain(flags);
        Ok(Settings::try_parse_from(all).map_err(|error| error.to_string())?.planner)
    }

    #[test]
    fn pools_of_the_planner_are_read_and_what_is_wrong_is_named() {
        let models = |role: InstanceRole| match role {
            InstanceRole::Decode => vec!["a".to_owned()],
            InstanceRole::Unified => vec!["a".to_owned(), "b".to_owned()],
            _ => Vec::new(),
        };
        let given = args(&["--planner-pool", "decode=1..4,unified/b=2..3"]).unwrap();
        let settings = given.settings(models, true).unwrap();
        let pool = |role, model: &str| PoolId { role, model: model.into() };
        assert_eq!(settings.pools[&pool(InstanceRole::Decode, "a")], Limits { min: 1, max: 4 });
        assert_eq!(settings.pools[&pool(InstanceRole::Unified, "b")], Limits { min: 2, max: 3 });
        for (flags, part) in [
            (&[][..], "--planner-pool decode=1..4"),
            (&["--planner-pool", "prefill=1..2"], "no command"),
            (&["--planner-pool", "unified=1..2"], "one of a, b"),
            (&["--planner-pool", "decode/x=1..2"], "one of a"),
            (&["--planner-pool", "decode=1..2,decode=1..3"], "twice"),
            (&["--planner-pool", "decode=2..3", "--planner-budget", "1"], "at least 2"),
        ] {
            let error = args(flags).unwrap().settings(models, true).unwrap_err().to_string();
            assert!(error.contains(part), "{flags:?}: {error}");
        }
        for bad in
            ["decode", "decode=1", "decode=0..2", "decode=3..2", "pooling=1..2", "decode=1..x"]
        {
            assert!(args(&["--planner-pool", bad]).is_err(), "{bad}");
        }
    }
}
