//! The small process beside a worker: `baton-coordinator supervise DIR`.
//!
//! It starts the worker, starts it again when it ends, with growing waits, and ends it when its
//! folder says so or when the cluster's owner is gone. It is nobody's child in spirit: the
//! coordinator that launched it may die. The worker is its child: the kernel kills it when the
//! supervisor is killed.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::local::{Order, read_json, write_json};
use crate::scale::record::unix_ms;

/// Between two looks at the worker and at the folder.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Waits before a worker that ended is started again: the first, and the longest.
const RESTART: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// A worker that ran this long is not in a crash loop.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Where the coordinator is. A worker has flags of the same names, and would take them for its own.
const PLACE: [&str; 2] = ["BATON_LISTEN", "BATON_ADVERTISE"];

/// What a supervisor tells of its worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it does.
    pub state: State,
    /// Its process; 0 while it has none.
    pub pid: u32,
    /// Where it serves; empty until it is ready.
    pub address: String,
    /// How often it ended in a row.
    pub crashes: u32,
    /// The code that it last ended with.
    pub exit_code: Option<i32>,
    /// Unix time of this state, in milliseconds.
    pub since_ms: u64,
}

/// What a supervised worker does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs and has not been ready yet.
    #[default]
    Starting,
    /// It runs and has been ready.
    Ready,
    /// It has ended by itself; it will be started again.
    Crashed,
}

/// Supervises the worker of a folder until it is retired, and removes the folder.
///
/// # Errors
/// When the folder cannot be used.
pub fn run(dir: &Path) -> io::Result<()> {
    let order: Order = read_json(dir, "command.json")?;
    let orphaned = order.owner.as_deref().map(watch_owner).transpose()?;
    let mut supervisor = Supervisor {
        dir,
        order,
        orphaned,
        crashes: 0,
        wait: RESTART.0,
        exit_code: None,
        untold: None,
    };
    supervisor.supervise()?;
    std::fs::remove_dir_all(dir)
}

/// Why a worker is to end.
enum End {
    /// It is retired, and has so long.
    Retired(Duration),
    /// Its owner is gone.
    Orphaned,
}

struct Supervisor<'a> {
    dir: &'a Path,
    order: Order,
    orphaned: Option<Receiver<()>>,
    crashes: u32,
    wait: Duration,
    exit_code: Option<i32>,
    /// A status that could not be written yet.
    untold: Option<Status>,
}

impl Supervisor<'_> {
    /// Returns when the worker is to end, and has.
    fn supervise(&mut self) -> io::Result<()> {
        loop {
            let started = Instant::now();
            // It may have been given to another pool since the last start.
            if let Ok(order) = read_json(self.dir, "command.json") {
                self.order = order;
            }
            self.tell(State::Starting, 0, "");
            match self.start() {
                Ok(child) => match self.follow(child)? {
                    None => return Ok(()),
                    Some(status) => {
                        self.exit_code = status.code();
                        self.log(format_args!("{} ended with {status}", self.order.name));
                    }
                },
                Err(error) => {
                    self.log(format_args!("error: cannot start {}: {error}", self.order.name));
                }
            }
            if started.elapsed() > STABLE_AFTER {
                (self.crashes, self.wait) = (0, RESTART.0);
            }
            self.crashes += 1;
            self.tell(State::Crashed, 0, "");
            let until = Instant::now() + self.wait;
            while Instant::now() < until {
                if self.end().is_some() {
                    return Ok(());
                }
                self.tell_again();
                std::thread::sleep(LOOK_EVERY);
            }
            self.wait = (self.wait * 2).min(RESTART.1);
        }
    }

    fn start(&self) -> io::Result<Child> {
        let log = File::options().create(true).append(true).open(&self.order.log)?;
        // setpriv has the kernel kill the worker when our main thread ends, which is this one, and
        // then becomes the worker.
        let mut command = Command::new("setpriv");
        for variable in PLACE {
            command.env_remove(variable);
        }
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.order.program)
            .args(&self.order.args)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .spawn()
    }

    /// Watches over a worker until it ends: by itself, or, with `None`, because it was to.
    fn follow(&mut self, mut child: Child) -> io::Result<Option<ExitStatus>> {
        let (announce, address) = channel();
        let stdout = child.stdout.take();
        // Reads on after the `ready` line, so that the pipe never fills.
        std::thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
                let Ok(line) = line else { return };
                let mut words = line.split_whitespace();
                if words.next() == Some("ready")
                    && let Some(address) = words.nth(1)
                {
                    let _ = announce.send(address.to_owned());
                }
            }
        });
        let pid = child.id();
        self.tell(State::Starting, pid, "");
        let mut asked = None;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(asked.is_none().then_some(status));
            }
            if asked.is_none()
                && let Ok(address) = address.try_recv()
            {
                self.tell(State::Ready, pid, &address);
            }
            match self.end() {
                Some(End::Orphaned) => child.kill()?,
                Some(End::Retired(grace)) => {
                    let asked = asked.get_or_insert_with(|| {
                        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
                        Instant::now()
                    });
                    if asked.elapsed() >= grace {
                        child.kill()?;
                    }
                }
                None => {}
            }
            self.tell_again();
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Whether the worker is to end.
    fn end(&self) -> Option<End> {
        let gone = |orphaned: &Receiver<()>| orphaned.try_recv() == Err(TryRecvError::Disconnected);
        if self.orphaned.as_ref().is_some_and(gone) {
            return Some(End::Orphaned);
        }
        let text = std::fs::read_to_string(self.dir.join("retire")).ok()?;
        let grace = text.trim().parse().unwrap_or(self.order.grace_ms);
        Some(End::Retired(Duration::from_millis(grace)))
    }

    /// Writes the worker's status. Without room for it the worker still goes on, and it is written
    /// when there is some again.
    fn tell(&mut self, state: State, pid: u32, address: &str) {
        let status = Status {
            state,
            pid,
            address: address.to_owned(),
            crashes: self.crashes,
            exit_code: self.exit_code,
            since_ms: unix_ms(),
        };
        if let Err(error) = write_json(self.dir, "status.json", &status) {
            self.log(format_args!("error: cannot tell of {}: {error}", self.order.name));
            self.untold = Some(status);
        } else {
            self.untold = None;
        }
    }

    fn tell_again(&mut self) {
        self.untold.take_if(|status| write_json(self.dir, "status.json", status).is_ok());
    }

    /// A line of the worker's log; on a full disk it is lost. (`eprintln!` would panic, and the
    /// kernel would kill the worker with us.)
    fn log(&self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Waits, in a thread of its own, until nobody holds the owner's lock; then the channel closes.
fn watch_owner(owner: &Path) -> io::Result<Receiver<()>> {
    let file = File::open(owner)?;
    let (sender, orphaned) = channel();
    std::thread::spawn(move || {
        // Kept locked until this process ends: the next owner must not begin before.
        let locked = file.lock_shared();
        drop(sender);
        loop {
            // It may wake up without a reason.
            std::thread::park();
            let _ = &locked;
        }
    });
    Ok(orphaned)
}
