//! Workers as processes on this machine.
//!
//! A worker is a folder, which is all that is known of it: `command.json`, written at its launch and
//! when it is given to another pool;
//! `status.json`, written by its supervisor; `alive`, which the supervisor holds locked, so that
//! the kernel tells whether it runs; and `retire`, which tells it to end. A coordinator that dies
//! leaves the folders and the supervisors, and the next one finds them. `fence` is the newest
//! leader that gave an order. All looks and orders are taken under one lock.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::InstanceRole;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;

use super::supervise::{State, Status};
use super::template::{Template, Templates};
use super::{HOPELESS, LaunchError, Launched, Launcher, WorkerSpec};
use crate::scale::machine::Process;
use crate::scale::record::unix_ms;

/// How much of a log's end is read, and how much of it is told.
const LOG_TAIL: (u64, usize) = (8 * 1024, 600);
/// How long another coordinator of this machine may have the lock: it holds it for milliseconds, or
/// has been stopped in the middle.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// Where workers are kept, and how they are started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The folder of their folders.
    pub dir: PathBuf,
    /// The folder of their logs.
    pub logs: PathBuf,
    /// The program that supervises: `baton-coordinator`.
    pub supervisor: PathBuf,
    /// A file that the cluster's owner keeps locked. When it does not any more, all workers end.
    pub owner: Option<PathBuf>,
    /// How long a worker may take to end before it is killed.
    pub grace: Duration,
}

/// Workers as processes on this machine.
#[derive(Clone, Debug)]
pub struct LocalProcesses {
    settings: Arc<Settings>,
    /// As [`Launcher::keeper`].
    keeper: Arc<str>,
    templates: Arc<Templates>,
}

/// What a worker was launched with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) name: String,
    pub(super) pool: InstanceRole,
    pub(super) model: String,
    pub(super) program: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) log: PathBuf,
    /// Where the log began at the launch.
    pub(super) log_from: u64,
    pub(super) owner: Option<PathBuf>,
    pub(super) grace_ms: u64,
    pub(super) started_ms: u64,
}

/// A worker of this machine, with what only this launcher knows.
#[derive(Clone, Debug)]
pub struct LocalWorker {
    /// What every launcher tells.
    pub launched: Launched,
    /// Its process; 0 while it has none.
    pub pid: u32,
    /// Its log.
    pub log: PathBuf,
}

impl LocalProcesses {
    /// A launcher over a folder, which is made if it is not there.
    ///
    /// # Errors
    /// When the folders cannot be made.
    pub fn new(settings: Settings, templates: Templates) -> Result<Self, LaunchError> {
        for dir in [&settings.dir, &settings.logs] {
            fs::create_dir_all(dir).map_err(|error| system("make the folder", dir, error))?;
        }
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let dir = fs::canonicalize(&settings.dir).unwrap_or_else(|_| settings.dir.clone());
        let keeper = format!("{}:{}", host.trim(), dir.display()).into();
        Ok(Self { settings: Arc::new(settings), keeper, templates: Arc::new(templates) })
    }

    /// Forgets everything of a cluster that is gone.
    pub fn clear(&self) -> Result<(), LaunchError> {
        let dir = &self.settings.dir;
        fs::remove_dir_all(dir).map_err(|error| system("empty", dir, error))?;
        fs::create_dir_all(dir).map_err(|error| system("make the folder", dir, error))
    }

    /// Starts a worker, unless there is one of this name. `fence` is `None` for the cluster's owner,
    /// who is no leader.
    pub fn start(&self, fence: Option<i64>, spec: &WorkerSpec) -> Result<(), LaunchError> {
        let template = self.template(spec.pool, &spec.model)?;
        let _lock = self.lock()?;
        if let Some(fence) = fence {
            self.check(fence)?;
        }
        let dir = self.dir(&spec.name);
        if !dir.join("command.json").exists() {
            let log = self.settings.logs.join(format!("{}.log", spec.name));
            let order = Order {
                name: spec.name.clone(),
                pool: spec.pool,
                model: spec.model.clone(),
                program: template.program.clone(),
                args: template.args.clone(),
                log_from: fs::metadata(&log).map_or(0, |log| log.len()),
                log,
                owner: self.settings.owner.clone(),
                grace_ms: self.settings.grace.as_millis() as u64,
                started_ms: unix_ms(),
            };
            fs::create_dir_all(&dir).map_err(|error| system("make the folder", &dir, error))?;
            write_json(&dir, "command.json", &order)
                .map_err(|error| system("write to", &dir, error))?;
        }
        self.supervise(&dir).map_err(|error| system("start the supervisor of", &dir, error))
    }

    fn template(&self, pool: InstanceRole, model: &str) -> Result<&Template, LaunchError> {
        self.templates.find(pool, model).ok_or_else(|| self.unknown(pool, model))
    }

    /// Starts a supervisor, unless there is one. It gets the lock from us, as its stdin: there is
    /// no moment in which a second one could be started.
    fn supervise(&self, dir: &Path) -> io::Result<()> {
        let alive = open(&dir.join("alive"))?;
        if alive.try_lock().is_err() {
            return Ok(());
        }
        let order: Order = read_json(dir, "command.json")?;
        let log = File::options().create(true).append(true).open(&order.log)?;
        let mut child = Command::new(&self.settings.supervisor)
            .arg("supervise")
            .arg(dir)
            // The terminal's Ctrl-C is not for it.
            .process_group(0)
            .stdin(Stdio::from(alive))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()?;
        // It is to outlive us; but while we live, its end leaves no zombie.
        std::thread::Builder::new().name("reaper".into()).spawn(move || child.wait())?;
        Ok(())
    }

    /// Has a worker be started from another pool's command from now on.
    fn reassign(&self, fence: i64, name: &str, pool: InstanceRole) -> Result<(), LaunchError> {
        let _lock = self.lock()?;
        self.check(fence)?;
        let dir = self.dir(name);
        let order: Order =
            read_json(&dir, "command.json").map_err(|error| system("read", &dir, error))?;
        if order.pool == pool {
            return Ok(());
        }
        let template = self.template(pool, &order.model)?;
        let (program, args) = (template.program.clone(), template.args.clone());
        let order = Order { pool, program, args, ..order };
        write_json(&dir, "command.json", &order).map_err(|error| system("write to", &dir, error))
    }

    /// Has a worker end, within `grace`.
    fn end(&self, name: &str, grace: Duration) -> Result<(), LaunchError> {
        let dir = self.dir(name);
        if !dir.exists() {
            return Ok(());
        }
        fs::write(dir.join("retire.new"), grace.as_millis().to_string())
            .and_then(|()| fs::rename(dir.join("retire.new"), dir.join("retire")))
            .map_err(|error| system("write to", &dir, error))?;
        self.look(&dir);
        Ok(())
    }

    /// All workers.
    pub fn workers(&self) -> Result<Vec<LocalWorker>, LaunchError> {
        let _lock = self.lock()?;
        let dir = &self.settings.dir;
        let entries = fs::read_dir(dir).map_err(|error| system("list", dir, error))?;
        let folders = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        Ok(folders.filter_map(|dir| self.look(&dir)).collect())
    }

    /// The same, where waiting for the folder would hold up other tasks.
    pub async fn all(&self) -> Result<Vec<LocalWorker>, LaunchError> {
        self.blocking(|this| this.workers()).await
    }

    /// A worker as its folder tells; `None` when it is gone. Under the lock.
    fn look(&self, dir: &Path) -> Option<LocalWorker> {
        // Not made here: the supervisor may be removing the folder.
        let lock = File::options().write(true).open(dir.join("alive"));
        let alive = lock.is_ok_and(|lock| lock.try_lock().is_err());
        let retired = dir.join("retire").exists();
        let order = read_json::<Order>(dir, "command.json");
        if !alive && (retired || order.is_err()) {
            // Its supervisor was killed, and the worker with it; or it was never started.
            if let Err(error) = fs::remove_dir_all(dir)
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(dir = %dir.display(), %error, "cannot remove a worker's folder");
            }
            return None;
        }
        let order = order.ok()?;
        let status: Status = read_json(dir, "status.json").unwrap_or_default();
        let process = match status.state {
            _ if retired => Process::Stopping,
            _ if !alive => Process::Crashed { times: 1, hopeless: false },
            State::Starting => Process::Starting,
            State::Ready => Process::Ready,
            State::Crashed => Process::Crashed {
                times: status.crashes,
                hopeless: status.exit_code.is_some_and(|code| HOPELESS.contains(&code)),
            },
        };
        let said = match process {
            Process::Ready | Process::Stopping => String::new(),
            _ => tail(&order.log, order.log_from),
        };
        let spec = WorkerSpec { name: order.name, pool: order.pool, model: order.model };
        let launched = Launched {
            spec,
            process,
            address: status.address,
            started_ms: order.started_ms,
            said,
            exit_code: status.exit_code,
        };
        Some(LocalWorker { launched, pid: status.pid, log: order.log })
    }

    /// Ends all workers, and waits until they are gone. They are killed after `grace`.
    pub async fn stop_all(&self, grace: Duration) {
        let until = Instant::now() + grace + Duration::from_secs(5);
        loop {
            let left = self.workers().unwrap_or_default();
            if left.is_empty() || Instant::now() >= until {
                return;
            }
            for worker in left.iter().filter(|it| it.launched.process != Process::Stopping) {
                let name = &worker.launched.spec.name;
                let ended = self.lock().and_then(|_lock| self.end(name, grace));
                if let Err(error) = ended {
                    warn!(name, %error, "a worker cannot be stopped");
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills all workers, whatever they were told before.
    pub async fn kill_all(&self) {
        if let Ok(_lock) = self.lock() {
            for worker in fs::read_dir(&self.settings.dir).into_iter().flatten().flatten() {
                let _ = self.end(&worker.file_name().to_string_lossy(), Duration::ZERO);
            }
        }
        self.stop_all(Duration::ZERO).await;
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.settings.dir.join(name)
    }

    fn lock(&self) -> Result<File, LaunchError> {
        let path = self.settings.dir.join("lock");
        let file = open(&path).map_err(|error| system("open", &path, error))?;
        let until = Instant::now() + LOCK_WITHIN;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TryLockError::WouldBlock) => {
                    let held = format!("another coordinator has held it for {LOCK_WITHIN:?}");
                    let held = io::Error::new(io::ErrorKind::TimedOut, held);
                    return Err(system("lock", &path, held));
                }
                Err(TryLockError::Error(error)) => return Err(system("lock", &path, error)),
            }
        }
    }

    /// Refuses the orders of a leader that was followed by another; notes a new one. Under the
    /// lock.
    fn check(&self, ours: i64) -> Result<(), LaunchError> {
        let path = self.settings.dir.join("fence");
        let newest = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        let newest: i64 = newest.unwrap_or(0);
        if ours < newest {
            return Err(LaunchError::Stale { newest, ours });
        }
        if ours > newest {
            let next = self.settings.dir.join("fence.new");
            fs::write(&next, ours.to_string())
                .and_then(|()| fs::rename(&next, &path))
                .map_err(|error| system("write to", &path, error))?;
        }
        Ok(())
    }

    /// Does file work where it does not hold up other tasks.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, LaunchError> + Send + 'static,
    ) -> Result<T, LaunchError> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.unwrap_or_else(|error| {
            Err(LaunchError::System { what: "launcher".into(), source: io::Error::other(error) })
        })
    }
}

#[tonic::async_trait]
impl Launcher for LocalProcesses {
    async fn launch(&self, fence: i64, spec: &WorkerSpec) -> Result<(), LaunchError> {
        let spec = spec.clone();
        self.blocking(move |this| this.start(Some(fence), &spec)).await
    }

    async fn retire(&self, fence: i64, name: &str) -> Result<(), LaunchError> {
        let name = name.to_owned();
        self.blocking(move |this| {
            let _lock = this.lock()?;
            this.check(fence)?;
            this.end(&name, this.settings.grace)
        })
        .await
    }

    async fn assign(&self, fence: i64, name: &str, pool: InstanceRole) -> Result<(), LaunchError> {
        let name = name.to_owned();
        self.blocking(move |this| this.reassign(fence, &name, pool)).await
    }

    async fn list(&self) -> Result<Vec<Launched>, LaunchError> {
        let all = self.all().await?;
        Ok(all.into_iter().map(|worker| worker.launched).collect())
    }

    async fn lead(&self, fence: i64) -> Result<(), LaunchError> {
        self.blocking(move |this| {
            let _lock = this.lock()?;
            this.check(fence)
        })
        .await
    }

    fn keeper(&self) -> String {
        self.keeper.to_string()
    }

    fn models(&self, pool: InstanceRole) -> Vec<String> {
        let of_pool = self.templates.pools.iter().filter(|template| template.pool == pool);
        of_pool.map(|template| template.model.clone()).collect()
    }
}

fn system(what: &str, path: &Path, source: io::Error) -> LaunchError {
    LaunchError::System { what: format!("cannot {what} {}", path.display()), source }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(path)
}

/// Writes a file that is there whole or not at all.
pub(super) fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let next = dir.join(format!("{name}.new"));
    fs::write(&next, serde_json::to_vec_pretty(value)?)?;
    fs::rename(next, dir.join(name))
}

pub(super) fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(dir.join(name))?)?)
}

/// What a worker last said: its last error, or else its last lines.
fn tail(log: &Path, from: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let from = from.max(file.metadata()?.len().saturating_sub(LOG_TAIL.0));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL.0).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let error = lines.iter().rev().find_map(|line| line.strip_prefix("error: "));
    let said = match error {
        Some(error) => (*error).to_owned(),
        None if lines.is_empty() => "it has logged nothing".to_owned(),
        None => lines[lines.len().saturating_sub(3)..].join(" / "),
    };
    said.chars().take(LOG_TAIL.1).collect()
}
