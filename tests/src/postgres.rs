//! A real PostgreSQL, with its data in a folder of its own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::poll::eventually;
use crate::ports;
use crate::process::{Process, Spec};

/// One server with one database.
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    data: PathBuf,
    // Last, so that the server ends before its folder goes.
    dir: TempDir,
}

impl Postgres {
    /// Makes a database and starts a server.
    pub async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("baton-postgres-").tempdir().expect("a folder");
        // PostgreSQL does not run as root.
        if let Some(user) = owner() {
            chown(dir.path(), Some(user), None).expect("give the folder away");
        }
        let data = dir.path().join("data");
        let path = data.to_str().expect("a path in UTF-8");
        let (program, args) = as_owner(
            "initdb",
            &["--pgdata", path, "--username", "baton", "--auth", "trust", "--no-sync"],
        );
        let output = Command::new(program).args(args).output().expect("run initdb");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut server = Self { process: None, port: ports::free(), data, dir };
        server.restart().await;
        server
    }

    /// The database's URL.
    pub fn url(&self) -> String {
        format!("postgres://baton@127.0.0.1:{}/postgres", self.port)
    }

    /// Stops the server; its clients are cut off.
    pub async fn stop(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::SIGINT);
        process.end(Duration::from_secs(30)).await;
    }

    /// Starts the server, on the data that it had.
    pub async fn restart(&mut self) {
        let port = self.port.to_string();
        let path = self.data.to_str().expect("a path in UTF-8");
        let args = ["-D", path, "-p", &port, "-h", "127.0.0.1", "-k", path, "-c", "fsync=off"];
        let (program, args) = as_owner("postgres", &args);
        let process = Process::start(&Spec::new("postgres", program, args), self.dir.path());
        self.process = Some(process);
        let url = self.url();
        eventually("PostgreSQL answers", Duration::from_secs(60), async || {
            let output = Command::new(program_path("psql")).args([&url, "-c", "select 1"]).output();
            let output = output.map_err(|e| e.to_string())?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(said) }
        })
        .await;
    }
}

/// Whom PostgreSQL runs as: Debian's user when we are root.
fn owner() -> Option<u32> {
    let ours = fs::metadata("/proc/self").expect("read /proc").uid();
    (ours == 0).then(|| {
        let output = Command::new("id").args(["-u", "postgres"]).output().expect("run id");
        let id = String::from_utf8_lossy(&output.stdout);
        id.trim().parse().expect("the user `postgres`: `apt-get install postgresql`")
    })
}

fn as_owner(name: &str, args: &[&str]) -> (PathBuf, Vec<String>) {
    let program = program_path(name);
    let Some(user) = owner() else {
        return (program, args.iter().map(|&arg| arg.to_owned()).collect());
    };
    let user = format!("--reuid={user}");
    let program = program.to_str().expect("a path in UTF-8");
    // A change of users forgets who is to be told of a parent's death.
    let outer = [&user, "--clear-groups", "--", "setpriv", "--pdeathsig", "KILL", "--", program];
    ("setpriv".into(), outer.iter().chain(args).map(|&arg| arg.to_owned()).collect())
}

/// A program of the newest release that Debian has put under `/usr/lib/postgresql`.
fn program_path(name: &str) -> PathBuf {
    let releases = fs::read_dir("/usr/lib/postgresql");
    let releases = releases.expect("PostgreSQL: `apt-get install postgresql`");
    let found = releases.flatten().map(|release| release.path().join("bin").join(name));
    let mut found: Vec<PathBuf> = found.filter(|path| path.is_file()).collect();
    found.sort();
    found.pop().unwrap_or_else(|| panic!("PostgreSQL has no {name}"))
}
