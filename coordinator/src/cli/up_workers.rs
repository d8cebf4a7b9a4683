//! The workers of `baton up`. They belong to the coordinator: `up` only starts the first ones, waits
//! for them, and ends all when the cluster ends.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_membership::InstanceRole;
use baton_membership::config::model_name;
use baton_membership::daemon::{Exit, Failure};

use super::up::{DRAIN_SECONDS, READY_WITHIN, UpArgs, shared_flags};
use crate::launch::LaunchError;
use crate::launch::local::{LocalProcesses, LocalWorker};
use crate::launch::template::{Template, Templates};
use crate::scale::machine::Process;

/// A model, and the names that it is served under, one at least.
pub(super) struct Served {
    pub(super) model: PathBuf,
    names: Vec<String>,
}

impl Served {
    /// Without a name, that of the file, as workers have it.
    pub(super) fn new(model: PathBuf, mut names: Vec<String>) -> Self {
        if names.is_empty() {
            names.push(model_name(&model));
        }
        Self { model, names }
    }

    /// The name that pools go by.
    pub(super) fn name(&self) -> &str {
        &self.names[0]
    }
}

/// How the workers of each pool are started. Every pool that could have workers has a command, so
/// that it can be scaled up from none.
pub(super) fn templates(
    args: &UpArgs,
    programs: &Path,
    etcd: &str,
    model: &Served,
    embedder: Option<&Served>,
) -> Templates {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores.div_ceil(args.workers())).to_string();
    let template = |pool: InstanceRole, served: &Served| {
        let model = served.model.display().to_string();
        let names = served.names.join(",");
        let mut flags = vec![
            ["--etcd", etcd],
            ["--role", pool.as_str()],
            ["--listen", "127.0.0.1:0"],
            ["--model", &model],
            ["--served-model-name", &names],
            ["--threads", &threads],
            ["--drain-timeout", DRAIN_SECONDS],
        ];
        if pool != InstanceRole::Pooling {
            flags.push(["--kv-memory", &args.kv_memory]);
        }
        let flags = flags.concat().into_iter().map(str::to_owned);
        let args = flags.chain(shared_flags(args)).collect();
        let program = programs.join("baton-worker");
        Template { pool, model: served.name().to_owned(), program, args }
    };
    let roles = [InstanceRole::Prefill, InstanceRole::Decode, InstanceRole::Unified];
    let mut pools: Vec<Template> = roles.map(|role| template(role, model)).into();
    pools.extend(embedder.map(|embedder| template(InstanceRole::Pooling, embedder)));
    Templates { pools }
}

/// Waits until all workers are ready. One that ends at its start fails the cluster's, with its own
/// error and exit code.
pub(super) async fn workers_ready(workers: &LocalProcesses) -> Result<(), Failure> {
    let since = Instant::now();
    loop {
        let all = listed(workers)?;
        for LocalWorker { launched, .. } in &all {
            if let Process::Crashed { .. } = launched.process {
                let exit = launched.exit_code.map_or(Exit::Failure, Exit::from_code);
                let message = format!("{}: {}", launched.spec.name, launched.said);
                return Err(Failure::new(exit, message));
            }
        }
        let ready = |it: &LocalWorker| it.launched.process == Process::Ready;
        let Some(late) = all.iter().find(|it| !ready(it)) else { return Ok(()) };
        if since.elapsed() >= READY_WITHIN {
            let (name, log) = (&late.launched.spec.name, late.log.display());
            let message = format!("{name} is not ready after {READY_WITHIN:?}; see {log}");
            return Err(Failure::new(Exit::Unavailable, message));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Says when a worker ends by itself and when it runs again, for ever.
pub(super) async fn tell_of_crashes(workers: &LocalProcesses) -> Infallible {
    let mut down = BTreeSet::new();
    // Of those that were ready. Some are started again between two looks.
    let mut pids: BTreeMap<String, u32> = BTreeMap::new();
    loop {
        let all = workers.all().await.unwrap_or_default();
        pids.retain(|name, _| all.iter().any(|it| it.launched.spec.name == *name));
        for LocalWorker { launched, log, pid } in all {
            let name = launched.spec.name;
            let ended = match launched.process {
                Process::Crashed { .. } => true,
                Process::Ready => {
                    pids.insert(name.clone(), pid).is_some_and(|before| before != pid)
                }
                _ => false,
            };
            if ended && down.insert(name.clone()) {
                let said = match launched.said.as_str() {
                    "" => String::new(),
                    said => format!(": {said}"),
                };
                eprintln!("{name} ended{said}; it is started again; see {}", log.display());
            }
            if launched.process == Process::Ready && down.remove(&name) {
                eprintln!("{name} runs again at {}", launched.address);
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

pub(super) fn listed(workers: &LocalProcesses) -> Result<Vec<LocalWorker>, Failure> {
    let mut all = workers.workers().map_err(launch_failed)?;
    all.sort_by(|a, b| a.launched.spec.name.cmp(&b.launched.spec.name));
    Ok(all)
}

pub(super) fn launch_failed(error: LaunchError) -> Failure {
    Failure::new(Exit::Failure, error)
}
