//! One child process: its logs, its signals, its end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::leftovers;
use crate::poll::eventually;

/// How long a daemon may take from its start to its `ready` line. Generous, because it covers a
/// busy machine; `up.rs` and `start_errors.rs` hold the tight bounds.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// How long a graceful stop may take.
pub const STOP_WITHIN: Duration = Duration::from_secs(15);

/// What a process is started with.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Names the log files.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment variables beside the inherited ones.
    pub env: Vec<(OsString, OsString)>,
}

impl Spec {
    /// A program with arguments.
    pub fn new<A: Into<OsString>>(
        name: impl Into<String>,
        program: PathBuf,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let args = args.into_iter().map(Into::into).collect();
        Self { name: name.into(), program, args, env: Vec::new() }
    }
}

/// A running child. It dies with the test: killed on drop, and by the kernel when the test itself
/// is killed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    started: Instant,
}

impl Process {
    /// Starts `spec` with its logs and its temporary files under `dir`.
    pub fn start(spec: &Spec, dir: &Path) -> Self {
        let (stdout, stderr) = log_files(dir, &spec.name);
        let tmp = dir.join("tmp");
        fs::create_dir_all(&tmp).expect("create the folder for temporary files");
        // setpriv asks the kernel to kill the process when the thread that started it ends, and
        // then becomes the process.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&spec.program)
            .args(&spec.args)
            .env_clear()
            .envs(inherited())
            .env("TMPDIR", &tmp)
            // Where a gateway keeps responses.
            .env("XDG_DATA_HOME", dir.join("data"))
            .env(leftovers::MARK, dir)
            .envs(spec.env.iter().cloned())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).expect("create a log"))
            .stderr(File::create(&stderr).expect("create a log"));
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("start {} through setpriv (util-linux): {e}", spec.name));
        Self { name: spec.name.clone(), child, stdout, stderr, started: Instant::now() }
    }

    /// Waits for the `ready <role> <address>` line and returns the address.
    pub async fn ready(&mut self) -> String {
        let what = format!("{} is ready", self.name);
        let (line, _) = eventually(&what, READY_WITHIN, async || {
            if let Some(status) = self.exited() {
                panic!("{} ended at its start with {status}:\n{}", self.name, self.stderr());
            }
            let out = self.stdout();
            out.split_inclusive('\n')
                .find(|line| line.starts_with("ready ") && line.ends_with('\n'))
                .map(str::to_owned)
                .ok_or_else(|| format!("stdout {out:?}"))
        })
        .await;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, address] = words[..] else { panic!("an odd ready line: {line:?}") };
        address.to_owned()
    }

    /// The name given at the start.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When the process was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything written to stdout so far.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Everything written to stderr so far.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// The exit status, when the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("ask for the exit status")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().try_into().expect("a process id"));
        kill(pid, signal).unwrap_or_else(|e| panic!("{signal} to {}: {e}", self.name));
    }

    /// Ctrl-C, as a terminal sends it: to the process and all of its children.
    pub fn interrupt(&self) {
        let group = Pid::from_raw(self.pid().try_into().expect("a process id"));
        killpg(group, Signal::SIGINT).unwrap_or_else(|e| panic!("SIGINT to {}: {e}", self.name));
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait for the killed process");
    }

    /// Waits for the process to end by itself.
    pub async fn end(&mut self, within: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        let look = async || self.exited().ok_or_else(|| "still running".to_owned());
        eventually(&what, within, look).await.0
    }

    /// Stops the process as an operator does; it must end well and in time.
    pub async fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.end(STOP_WITHIN).await;
        assert!(status.success(), "{} stopped with {status}:\n{}", self.name, self.stderr());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exited().is_none() {
            // The process may have ended by itself since the look above: nothing to do then.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {}: stdout\n{}", self.name, tail(&self.stdout()));
            eprintln!("--- {}: stderr\n{}", self.name, tail(&self.stderr()));
        }
    }
}

/// This process's environment without Baton's own settings, which would leak into every test.
fn inherited() -> Vec<(OsString, OsString)> {
    std::env::vars_os().filter(|(key, _)| setting(key)).collect()
}

fn setting(key: &OsString) -> bool {
    let key = key.to_string_lossy();
    key == "BATON_MODEL_DIR" || !(key.starts_with("BATON_") || key.starts_with("VLLM_"))
}

/// Names for logs that no earlier process of the same name has.
fn log_files(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (0..)
        .map(|n| (dir.join(format!("{name}.{n}.out")), dir.join(format!("{name}.{n}.err"))))
        .find(|(out, _)| !out.exists())
        .expect("a free name")
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(100)..].join("\n")
}
