//! What all daemons do alike: flags of the cluster, logs, signals, exit codes.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_proto::{InstanceRecord, InstanceRole};
use clap::{Args, ValueEnum};
use tokio::net::TcpSocket;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::codegen::http::Uri;
use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::config::FileArgs;
use crate::tls::{ClusterTlsArgs, Files, Tls};
use crate::traces::TraceArgs;
use crate::{EtcdAccess, EtcdSettings, MembershipError};

/// Flags that every daemon has.
#[derive(Clone, Debug, Args)]
pub struct ClusterArgs {
    /// The file of settings.
    #[command(flatten)]
    pub file: FileArgs,

    /// etcd endpoints.
    #[arg(
        long,
        env = "BATON_ETCD",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    pub etcd: Vec<String>,

    /// Name of the cluster: processes of other names are not seen.
    #[arg(long, env = "BATON_CLUSTER", default_value = "default")]
    pub cluster: String,

    /// Seconds until etcd forgets this process after its death.
    #[arg(long, env = "BATON_LEASE_TTL", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_ttl: u64,

    /// Seconds to wait for etcd at start.
    #[arg(long, env = "BATON_ETCD_TIMEOUT", default_value_t = 10)]
    pub etcd_timeout: u64,

    /// Form of the log lines on stderr; RUST_LOG sets what is logged.
    #[arg(long, env = "BATON_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// Traces.
    #[command(flatten)]
    pub traces: TraceArgs,

    /// TLS between the processes of the cluster.
    #[command(flatten)]
    pub tls: ClusterTlsArgs,

    /// Certificates of those who may sign etcd's certificate, in PEM: with https in --etcd.
    #[arg(long, env = "BATON_ETCD_CA", value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,

    /// The certificate that etcd is shown, in PEM.
    #[arg(long, env = "BATON_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, env = "BATON_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,

    /// The user that etcd knows us as.
    #[arg(long, env = "BATON_ETCD_USER", value_name = "NAME", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,

    /// A file whose first line is the user's password.
    #[arg(long, env = "BATON_ETCD_PASSWORD_FILE", value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl ClusterArgs {
    /// The part that concerns etcd. Reads the files that it names.
    pub fn etcd_settings(&self) -> Result<EtcdSettings, Failure> {
        Ok(EtcdSettings {
            endpoints: self.etcd.clone(),
            cluster: self.cluster.clone(),
            lease_ttl: Duration::from_secs(self.lease_ttl),
            start_timeout: Duration::from_secs(self.etcd_timeout),
            access: self.etcd_access()?,
        })
    }

    fn etcd_access(&self) -> Result<EtcdAccess, Failure> {
        let wrong = |message: String| Failure::new(Exit::Config, message);
        let encrypted = self.etcd.iter().filter(|url| url.starts_with("https://")).count();
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let tls = match &self.etcd_ca {
            Some(ca) if encrypted == self.etcd.len() => {
                let files = Files { flags: "--etcd", ca: ca.clone(), identity };
                Some(Tls::load(files, None).map_err(wrong)?)
            }
            Some(_) => return Err(wrong("--etcd-ca: all URLs of --etcd must be https".into())),
            None if encrypted > 0 => {
                return Err(wrong("--etcd is https: name who signs it with --etcd-ca".into()));
            }
            None if identity.is_some() => {
                return Err(wrong("--etcd-cert needs --etcd-ca, and https in --etcd".into()));
            }
            None => None,
        };
        let user = match (&self.etcd_user, &self.etcd_password_file) {
            (Some(user), Some(file)) => {
                let text = std::fs::read_to_string(file).map_err(|error| {
                    let file = file.display();
                    wrong(format!("--etcd-password-file {file} cannot be read: {error}"))
                })?;
                Some((user.clone(), text.lines().next().unwrap_or_default().to_owned()))
            }
            _ => None,
        };
        Ok(EtcdAccess { tls, user })
    }

    /// Sends log lines to stderr.
    pub fn init_log(&self) {
        let filter = EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new("info,symphonia_core=off,kube_client=off"));
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogLines);
        match self.log_format {
            LogFormat::Text => log.with_ansi(false).init(),
            LogFormat::Json => log.json().init(),
        }
    }
}

/// stderr as log lines go there: on a full disk they are lost. The subscriber would tell of a
/// failed write by a write that panics when it fails, and take the request along.
struct LogLines;

impl Write for LogLines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let _ = std::io::stderr().write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Why a process ends, for scripts: codes of `sysexits.h` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Anything without a code of its own.
    Failure = 1,
    /// A flag or a setting is wrong.
    Config = 2,
    /// The model file is broken.
    BadModel = 65,
    /// The model file is not there.
    NoModel = 66,
    /// Something that is needed does not answer.
    Unavailable = 69,
    /// The address to listen on is taken.
    PortInUse = 98,
}

impl Exit {
    /// What a process meant that ended with this code.
    pub fn from_code(code: i32) -> Self {
        [Self::Config, Self::BadModel, Self::NoModel, Self::Unavailable, Self::PortInUse]
            .into_iter()
            .find(|exit| *exit as i32 == code)
            .unwrap_or(Self::Failure)
    }
}

/// A failure that ends the process.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The code to end with.
    pub exit: Exit,
    /// One line that names what is wrong, and the way out.
    pub message: String,
}

impl Failure {
    /// Gives an error its exit code.
    pub fn new(exit: Exit, error: impl std::fmt::Display) -> Self {
        Self { exit, message: error.to_string() }
    }

    /// A listener that could not be had; `flag` chooses another address.
    pub fn listen(flag: &str, address: SocketAddr, error: &std::io::Error) -> Self {
        let exit = match error.kind() {
            std::io::ErrorKind::AddrInUse => Exit::PortInUse,
            _ => Exit::Failure,
        };
        let message = format!("cannot listen on {address}: {error}; choose another with {flag}");
        Self { exit, message }
    }
}

impl From<MembershipError> for Failure {
    fn from(error: MembershipError) -> Self {
        Self::new(Exit::Unavailable, error)
    }
}

/// Ends the process: says what went wrong, if anything.
pub fn exit(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit, message }) => {
            eprintln!("error: {message}");
            ExitCode::from(exit as u8)
        }
    }
}

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Takes both from their default, which is to end the process.
    pub fn take() -> Result<Self, Failure> {
        let take = |kind| signal(kind).map_err(|error| Failure::new(Exit::Failure, error));
        Ok(Self {
            terminate: take(SignalKind::terminate())?,
            interrupt: take(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits until running requests are `done`, but at most for `limit`: another signal ends the
    /// wait at once.
    pub async fn drain(&mut self, done: impl Future<Output = ()>, limit: Duration) {
        tokio::select! {
            () = done => {}
            () = tokio::time::sleep(limit) => {
                warn!("giving up requests that did not finish in time");
            }
            () = self.next() => warn!("stopping at once"),
        }
    }
}

/// Connections that wait to be taken, as tokio's `TcpListener::bind` has it.
pub const BACKLOG: u32 = 1024;

/// Takes an address at once, so that one that is bad or taken is told before anything slow, and lets
/// nobody in yet: whoever looks whether it serves, by TCP alone, must not find it before it does. It
/// does after `listen` with [`BACKLOG`].
///
/// # Errors
/// The system's, as for `TcpListener::bind`.
pub fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // As `TcpListener::bind` does: connections of the process before may linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// The URL under which others reach a process that serves on `listen`: the one of --advertise, where
/// it is `given`.
///
/// # Errors
/// When it is none that others could call.
pub fn advertised(listen: SocketAddr, given: Option<&str>) -> Result<String, Failure> {
    let port = listen.port();
    let message = match given {
        None if listen.ip().is_unspecified() => format!(
            "--listen {listen} takes any address, so others need one to call: set --advertise \
             http://HOST:{port}"
        ),
        None => return Ok(format!("http://{listen}")),
        Some(url) if callable(url) => return Ok(url.to_owned()),
        Some(url) => format!(
            "--advertise: `{url}` is no URL that others could call: give http://HOST:{port}, and \
             an IPv6 address in brackets"
        ),
    };
    Err(Failure::new(Exit::Config, message))
}

fn callable(url: &str) -> bool {
    let Ok(url) = url.parse::<Uri>() else { return false };
    let host = url.host().is_some_and(|host| !host.is_empty());
    host && url.scheme_str().is_some_and(|scheme| matches!(scheme, "http" | "https"))
}

/// The record of this process, under an id that no other start has.
pub fn new_record(role: InstanceRole, address: String, model: String) -> InstanceRecord {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    InstanceRecord {
        id: format!("{role}-{}", uuid::Uuid::new_v4().simple()),
        role,
        address,
        model,
        version: env!("CARGO_PKG_VERSION").into(),
        started_ms: started.as_millis() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_advertised_that_others_can_call() {
        let own: SocketAddr = "10.0.0.5:7000".parse().unwrap();
        let any: SocketAddr = "0.0.0.0:7700".parse().unwrap();
        let any_v6: SocketAddr = "[::]:7700".parse().unwrap();
        assert_eq!(advertised(own, None).unwrap(), "http://10.0.0.5:7000");
        for url in ["http://worker-0.worker:7000", "https://10.0.0.5", "http://[fd00::1]:7000"] {
            assert_eq!(advertised(any, Some(url)).unwrap(), url);
        }
        for listen in [any, any_v6] {
            let failure = advertised(listen, None).unwrap_err();
            assert_eq!(failure.exit, Exit::Config);
            assert!(failure.message.contains(&format!("--listen {listen} ")), "{failure}");
            assert!(failure.message.contains("--advertise http://HOST:7700"), "{failure}");
        }
        let wrong = [
            "",
            "10.0.0.5",
            "10.0.0.5:7000",
            "fd00::1:7000",
            "http://fd00::1:7000",
            "http://",
            "http://:7000",
            "tcp://10.0.0.5:7000",
            "/10.0.0.5:7000",
        ];
        for url in wrong {
            let failure = advertised(own, Some(url)).unwrap_err();
            assert_eq!(failure.exit, Exit::Config, "{failure}");
            let told = format!(
                "--advertise: `{url}` is no URL that others could call: give http://HOST:7000"
            );
            assert!(failure.message.starts_with(&told), "{failure}");
        }
    }
}
