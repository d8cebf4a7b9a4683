//! One process of a local cluster, and where its program is.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use baton_membership::daemon::{Exit, Failure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// The folder of Baton's programs: all lie beside this one.
pub(super) fn programs() -> Result<PathBuf, Failure> {
    let own = std::env::current_exe().map_err(|error| Failure::new(Exit::Failure, error))?;
    let programs = own.parent().unwrap_or(Path::new(".")).to_path_buf();
    for program in ["baton-coordinator", "baton-gateway", "baton-worker"] {
        let program = programs.join(program);
        if !program.is_file() {
            let build = "build it with `cargo build --release`";
            let message = format!("{} is missing; {build}", program.display());
            return Err(Failure::new(Exit::Failure, message));
        }
    }
    Ok(programs)
}

/// What a process is started with.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name in tables and of its log.
    pub name: String,
    /// What it does.
    pub role: &'static str,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables of its own: what nobody else is to see.
    pub env: Vec<(&'static str, String)>,
    /// Whether it says on stdout when it is ready, and where it serves.
    pub announces: bool,
}

/// A running process. Dropping it kills it; so does the end of the thread that started it.
#[derive(Debug)]
pub struct Process {
    /// What it was started with.
    pub spec: Spec,
    /// Where it serves; empty when it does not say.
    pub address: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it, its stderr going to a log file.
    pub fn start(spec: Spec, logs: &Path) -> Result<Self, Failure> {
        let log = logs.join(format!("{}.log", spec.name));
        let failed = |what: &str, error: std::io::Error| {
            Failure::new(Exit::Failure, format!("cannot start {}: {what}: {error}", spec.name))
        };
        let append = File::options().create(true).append(true).open(&log);
        let stderr = append.map_err(|error| failed("its log", error))?;
        let stdout = match spec.announces {
            true => Stdio::piped(),
            false => Stdio::null(),
        };
        // setpriv has the kernel kill the process when ours ends without a chance to do so, and
        // then becomes the process. A process group of its own keeps the terminal's Ctrl-C away:
        // the order of stopping is ours.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&spec.program)
            .args(&spec.args)
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed("setpriv (package util-linux)", error))?;
        Ok(Self { spec, address: String::new(), child, log })
    }

    /// Waits for its `ready` line. When it ends instead, its own error and exit code are given.
    pub async fn ready(&mut self, within: Duration) -> Result<(), Failure> {
        let Some(stdout) = self.child.stdout.take() else { return Ok(()) };
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(within, lines.next_line()).await;
        match line {
            Ok(Ok(Some(line))) => {
                self.address = line.split_whitespace().nth(2).unwrap_or_default().to_owned();
                Ok(())
            }
            Ok(_) => {
                let status = self.child.wait().await.ok();
                Err(self.failure(status))
            }
            Err(_) => {
                let message = format!(
                    "{} is not ready after {within:?}; see {}",
                    self.spec.name,
                    self.log.display()
                );
                Err(Failure::new(Exit::Unavailable, message))
            }
        }
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Failure {
        let status = self.child.wait().await.ok();
        self.failure(status)
    }

    /// Asks it to stop, waits, and kills it when it does not.
    pub async fn stop(&mut self, within: Duration) {
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        if tokio::time::timeout(within, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// Its process id; `None` when it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Where its log is.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its end as an error of ours: the last error line of its log, under its exit code.
    fn failure(&self, status: Option<ExitStatus>) -> Failure {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let said = log.lines().rev().find_map(|line| line.strip_prefix("error: "));
        let code = status.and_then(|status| status.code());
        let exit = code.map_or(Exit::Failure, Exit::from_code);
        let how = status.map_or_else(|| "ended".to_owned(), |status| status.to_string());
        let message = match said {
            Some(said) => format!("{}: {said}", self.spec.name),
            None => format!("{}: {how}; see {}", self.spec.name, self.log.display()),
        };
        Failure::new(exit, message)
    }
}
