//! `baton-gateway`: joins the cluster, serves HTTP.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use baton_gateway::adapters::Catalog;
use baton_gateway::auth::Keys;
use baton_gateway::config::Settings;
use baton_gateway::http::{self, Limits, Load, Shared};
use baton_gateway::metrics::Metrics;
use baton_gateway::workers::Registry;
use baton_membership::daemon::{self, Exit, Failure, StopSignals};
use baton_membership::{AdapterStore, ClusterWatch, InstanceRole, Registration};
use clap::Parser as _;
use mimalloc::MiMalloc;
use tracing::info;

/// A request is some hundred small allocations, and as many frees: with the allocator of the C
/// library they are a tenth of its cost.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    settings.cluster.init_log();
    daemon::exit(run(settings).await)
}

async fn run(settings: Settings) -> Result<(), Failure> {
    let keys = keys(&settings)?;
    let listener = TcpListener::bind(settings.listen)
        .map_err(|error| Failure::listen("--listen", settings.listen, &error))?;
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised = settings.advertise.clone().unwrap_or_else(|| default_url(address));
    let mut stop_signals = StopSignals::take()?;

    let etcd = settings.cluster.etcd_settings();
    let watch = ClusterWatch::start(&etcd).await?;
    let metrics = Metrics::new().map_err(|error| Failure::new(Exit::Failure, error))?;
    let registry = Registry::start(watch);
    let store = AdapterStore::connect(&etcd).await?;
    let shared = Arc::new(Shared {
        adapters: Catalog::start(registry.clone(), store),
        registry,
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
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    let handle = server.handle();
    let serving = tokio::spawn(server);
    let record = daemon::new_record(InstanceRole::Gateway, advertised.clone(), String::new());
    let registration = Registration::start(&etcd, record).await?;
    println!("ready gateway {advertised}");
    info!(address = advertised, "serving");

    stop_signals.next().await;
    info!("stopping: running requests may finish");
    shared.draining.store(true, Relaxed);
    registration.withdraw().await;
    let drained = async {
        while shared.load.now() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Their last bytes are on their way.
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    stop_signals.drain(drained, Duration::from_secs(settings.drain_timeout)).await;
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
    let file = settings.api_key_file.as_deref();
    let wanted = !keys.is_empty() || file.is_some();
    let keys = Keys::load(&keys, file).map_err(|error| {
        let file = file.unwrap_or_else(|| "".as_ref());
        let message = format!("--api-key-file {} cannot be read: {error}", file.display());
        Failure::new(Exit::Config, message)
    })?;
    if wanted && keys.is_empty() {
        // Open to all is not what was meant.
        let message = "--api-key or --api-key-file is given, but holds no key";
        return Err(Failure::new(Exit::Config, message));
    }
    Ok(keys)
}

/// Where others reach this process, when they are not told: gateways are only shown, not called.
fn default_url(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://127.0.0.1:{}", address.port()),
        false => format!("http://{address}"),
    }
}
