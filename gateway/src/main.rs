//! `baton-gateway`: joins the cluster, serves HTTP.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_gateway::auth::Keys;
use baton_gateway::config::{LogFormat, Settings};
use baton_gateway::http::{self, Limits, Load, Shared};
use baton_gateway::metrics::Metrics;
use baton_gateway::workers::Registry;
use baton_membership::{ClusterWatch, InstanceRecord, InstanceRole, Registration};
use clap::Parser as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

/// Exit codes, from `sysexits.h` where it has one.
mod exit {
    pub(super) const FAILURE: u8 = 1;
    pub(super) const CONFIG: u8 = 2;
    pub(super) const NO_ETCD: u8 = 69;
    pub(super) const PORT_IN_USE: u8 = 98;
}

struct Failure(u8, String);

impl Failure {
    fn new(code: u8, error: impl std::fmt::Display) -> Self {
        Self(code, error.to_string())
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    match run(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, message)) => {
            eprintln!("error: {message}");
            ExitCode::from(code)
        }
    }
}

async fn run(settings: Settings) -> Result<(), Failure> {
    let keys = keys(&settings)?;
    let listener = bind(settings.listen)?;
    let address = listener.local_addr().map_err(|error| Failure::new(exit::FAILURE, error))?;
    let advertised = settings.advertise.clone().unwrap_or_else(|| default_url(address));
    let mut terminate = stop_signal(SignalKind::terminate())?;
    let mut interrupt = stop_signal(SignalKind::interrupt())?;

    let etcd = settings.etcd_settings();
    let no_etcd = |error| Failure::new(exit::NO_ETCD, error);
    let watch = ClusterWatch::start(&etcd).await.map_err(no_etcd)?;
    let metrics = Metrics::new().map_err(|error| Failure::new(exit::FAILURE, error))?;
    let shared = Arc::new(Shared {
        registry: Registry::start(watch),
        metrics: Arc::new(metrics),
        keys,
        load: Load::new(settings.max_inflight),
        limits: Limits {
            max_body_bytes: settings.max_body_bytes,
            request_timeout: Duration::from_secs(settings.request_timeout),
            handoff_min_tokens: settings.handoff_min_tokens,
        },
        draining: AtomicBool::new(false),
    });
    let server = http::server(shared.clone(), listener, settings.http_threads.into())
        .map_err(|error| Failure::new(exit::FAILURE, error))?;
    let handle = server.handle();
    let serving = tokio::spawn(server);
    let registration = Registration::start(&etcd, record(advertised.clone())).await;
    let registration = registration.map_err(no_etcd)?;
    println!("ready gateway {advertised}");
    info!(address = advertised, "serving");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping: running requests may finish");
    shared.draining.store(true, Relaxed);
    registration.withdraw().await;
    handle.pause().await;
    let drained = async {
        while shared.load.now() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Their last bytes are on their way.
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    tokio::select! {
        () = drained => {}
        () = tokio::time::sleep(Duration::from_secs(settings.drain_timeout)) => {
            warn!("giving up requests that did not finish in time");
        }
        _ = terminate.recv() => warn!("stopping at once"),
        _ = interrupt.recv() => warn!("stopping at once"),
    }
    handle.stop(false).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
    Ok(())
}

fn keys(settings: &Settings) -> Result<Keys, Failure> {
    let mut keys = settings.api_keys.clone();
    if keys.is_empty() {
        // As vLLM has it: flags win over its variable.
        keys.extend(std::env::var("VLLM_API_KEY"));
    }
    Keys::load(&keys, settings.api_key_file.as_deref()).map_err(|error| {
        let file = settings.api_key_file.as_deref().unwrap_or_else(|| "".as_ref());
        let message = format!("--api-key-file {} cannot be read: {error}", file.display());
        Failure(exit::CONFIG, message)
    })
}

fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::AddrInUse => exit::PORT_IN_USE,
            _ => exit::FAILURE,
        };
        let message = format!("cannot listen on {address}: {error}; choose another with --listen");
        Failure(code, message)
    })
}

/// Where others reach this process, when they are not told: gateways are only shown, not called.
fn default_url(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://127.0.0.1:{}", address.port()),
        false => format!("http://{address}"),
    }
}

fn record(address: String) -> InstanceRecord {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    InstanceRecord {
        id: format!("gateway-{}", uuid::Uuid::new_v4().simple()),
        role: InstanceRole::Gateway,
        address,
        model: String::new(),
        version: env!("CARGO_PKG_VERSION").into(),
        started_ms: started.as_millis() as u64,
    }
}

fn stop_signal(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::new(exit::FAILURE, error))
}
