//! What a running `baton up` leaves for `baton status` and `baton down` to find.
//!
//! The lock says whether it runs: the kernel gives it back when the process ends, however it ends.
//! The file beside it says where things are, and means nothing while the lock is free.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_membership::daemon::{Exit, Failure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How long `baton down` waits for the end.
const DOWN_WITHIN: Duration = Duration::from_secs(60);

/// How long the processes of a `baton up` that was killed may take to end.
pub(super) const ENDING: Duration = Duration::from_secs(1);

/// Where the running cluster is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The process of `baton up`.
    pub pid: i32,
    /// The coordinator's gRPC address.
    pub coordinator: String,
    /// The gateway's HTTP address.
    pub gateway: String,
}

/// The right to run the one cluster of this user on this machine.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    directory: PathBuf,
}

/// `$XDG_STATE_HOME/baton`, or `~/.local/state/baton`.
///
/// # Errors
/// When neither variable names a folder: what lies there is executed, so that it must not be one
/// that everybody may write to.
pub fn directory() -> Result<PathBuf, Failure> {
    let folder = |variable| std::env::var_os(variable).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    let state = folder("XDG_STATE_HOME").filter(absolute);
    let state = state.or_else(|| Some(folder("HOME").filter(absolute)?.join(".local/state")));
    let state = state.ok_or_else(|| {
        let message = "there is no folder for what runs: set HOME, or XDG_STATE_HOME, to one";
        Failure::new(Exit::Config, message)
    })?;
    Ok(state.join("baton"))
}

impl Lock {
    /// Takes the lock, or says who has it.
    pub fn take() -> Result<Self, Failure> {
        let directory = directory()?;
        fs::create_dir_all(&directory).map_err(|error| cannot(&directory, &error))?;
        let file = open(&directory)?;
        // The workers of one that was killed hold it until they have ended, a moment later.
        let since = Instant::now();
        let mut locked = file.try_lock();
        while matches!(locked, Err(TryLockError::WouldBlock)) && since.elapsed() < ENDING {
            std::thread::sleep(Duration::from_millis(20));
            locked = file.try_lock();
        }
        match locked {
            Ok(()) => {
                // Of one that had no time to take it away: its process may be another's by now.
                let _ = fs::remove_file(directory.join("cluster.json"));
                // Logs of the cluster before; there may be none.
                let _ = fs::remove_dir_all(directory.join("logs"));
                fs::create_dir_all(directory.join("logs"))
                    .map_err(|error| cannot(&directory, &error))?;
                Ok(Self { _file: file, directory })
            }
            Err(TryLockError::WouldBlock) => {
                let message =
                    "a cluster runs already; see `baton status`, stop it with `baton down`";
                Err(Failure::new(Exit::Failure, message))
            }
            Err(TryLockError::Error(error)) => Err(cannot(&directory, &error)),
        }
    }

    /// The file that is locked.
    pub fn file(&self) -> PathBuf {
        self.directory.join("lock")
    }

    /// The folder for logs and for etcd's data.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Tells the other commands where things are.
    pub fn publish(&self, state: &State) -> Result<(), Failure> {
        let path = self.directory.join("cluster.json");
        let text = serde_json::to_string_pretty(state).unwrap_or_default();
        fs::write(&path, text).map_err(|error| cannot(&path, &error))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.directory.join("cluster.json"));
    }
}

/// The cluster that `baton up` runs here, if it does.
pub fn running() -> Result<Option<State>, Failure> {
    let directory = directory()?;
    if !directory.join("lock").exists() || open(&directory)?.try_lock().is_ok() {
        return Ok(None);
    }
    let text = fs::read_to_string(directory.join("cluster.json")).map_err(|_| {
        Failure::new(Exit::Failure, "the cluster is still starting or already stopping")
    })?;
    Ok(serde_json::from_str(&text).ok())
}

/// `baton down`.
pub async fn down() -> Result<(), Failure> {
    let none = || Failure::new(Exit::Failure, "`baton up` runs no cluster here");
    let state = running()?.ok_or_else(none)?;
    kill(Pid::from_raw(state.pid), Signal::SIGTERM).map_err(|error| {
        Failure::new(Exit::Failure, format!("cannot signal process {}: {error}", state.pid))
    })?;
    let asked = Instant::now();
    while asked.elapsed() < DOWN_WITHIN {
        if open(&directory()?)?.try_lock().is_ok() {
            println!("stopped");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let message = format!("process {} has not stopped within {DOWN_WITHIN:?}; kill it", state.pid);
    Err(Failure::new(Exit::Failure, message))
}

fn open(directory: &Path) -> Result<File, Failure> {
    let path = directory.join("lock");
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| cannot(&path, &error))
}

fn cannot(path: &Path, error: &std::io::Error) -> Failure {
    let message = format!("cannot use {} ($XDG_STATE_HOME/baton): {error}", path.display());
    Failure::new(Exit::Failure, message)
}
