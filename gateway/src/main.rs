//! `baton-gateway`: joins the cluster, serves HTTP.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use baton_gateway::adapters::Catalog;
use baton_gateway::audio::windows::Decoders;
use baton_gateway::auth::{KeySet, Keys};
use baton_gateway::config::{AccessArgs, Settings};
use baton_gateway::coordinators::follow_scaling;
use baton_gateway::http::{self, Limits, Listening, Load, Parsers, Policy, Responses, Shared};
use baton_gateway::metrics::Metrics;
use baton_gateway::quota::Quota;
use baton_gateway::store::Store;
use baton_gateway::tls::Tls;
use baton_gateway::workers::Registry;
use baton_membership::config;
use baton_membership::daemon::{self, Exit, Failure, StopSignals};
use baton_membership::traces::Traces;
use baton_membership::{AdapterStore, ClusterWatch, InstanceRole, Registration};
use mimalloc::MiMalloc;
use rustix::thread::disable_transparent_huge_pages;
use tracing::{debug, info};

/// A request is some hundred small allocations, and as many frees: with the allocator of the C
/// library they are a tenth of its cost.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Of the file of settings: it tells what settings other programs have.
const SCHEMA: &str = include_str!("../../deploy/baton.schema.json");

/// Flags of keys, and their variables.
const API_KEY: (&str, &str) = ("--api-key", "BATON_API_KEY, VLLM_API_KEY");
const ADMIN_KEY: (&str, &str) = ("--admin-key", "BATON_ADMIN_KEY");

/// How long the workers that are registered may take to answer before the gateway serves without
/// those that did not.
const FIND_WITHIN: Duration = Duration::from_secs(1);

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let settings: Settings = config::parse(SCHEMA);
    settings.cluster.init_log();
    keep_pages_small();
    daemon::exit(run(settings).await)
}

/// The allocator asks for huge pages, so that the kernel fills two megabytes for each page that is
/// used, at once or at some time in the next hour: memory that grows by half, and at no request's
/// behest.
fn keep_pages_small() {
    if let Err(error) = disable_transparent_huge_pages(true) {
        debug!(%error, "huge pages cannot be declined");
    }
}

async fn run(settings: Settings) -> Result<(), Failure> {
    let wrong = |message| Failure::new(Exit::Config, message);
    let keys = keys(&settings.access)?;
    baton_membership::tls::install(&settings.cluster.tls)?;
    let cors = Policy::new(&settings.cors).map_err(wrong)?;
    let tls = Tls::load(&settings.tls).map_err(wrong)?;
    let listener = TcpListener::bind(settings.listen)
        .map_err(|error| Failure::listen("--listen", settings.listen, &error))?;
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised =
        settings.advertise.clone().unwrap_or_else(|| default_url(address, tls.is_some()));
    let mut stop_signals = StopSignals::take()?;
    let responses = &settings.responses;
    let kept = Store::open(&responses.responses_store, responses.responses_ttl)
        .await
        .map_err(|error| Failure::new(Exit::Config, format!("--responses-store: {error}")))?;

    let record = daemon::new_record(InstanceRole::Gateway, advertised.clone(), String::new());
    let traces = Traces::start(&settings.cluster.traces, &settings.cluster.cluster, &record)?;

    let etcd = settings.cluster.etcd_settings()?;
    let watch = tokio::select! {
        watch = ClusterWatch::start(&etcd) => watch?,
        () = stop_signals.next() => {
            info!("stopped before etcd was reached");
            return Ok(());
        }
    };
    let metrics = Metrics::new().map_err(|error| Failure::new(Exit::Failure, error))?;
    let registry = Registry::start(watch, settings.routing_policy);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let store = AdapterStore::connect(&etcd).await?;
    let shared = Arc::new(Shared {
        adapters: Catalog::start(registry.clone(), store),
        registry,
        metrics: Arc::new(metrics),
        keys,
        quota: Quota::new(
            settings.access.key_requests_per_minute,
            settings.access.key_max_concurrent,
        ),
        settings: settings.shown(),
        load: Load::new(settings.max_inflight),
        recordings: Load::new(settings.audio.max_recordings),
        decoders: Decoders::new(cores, settings.audio.max_audio_seconds),
        limits: Limits {
            max_body_bytes: settings.max_body_bytes,
            max_audio_bytes: settings.audio.max_audio_filesize_mb * 1024 * 1024,
            body_timeout: Duration::from_secs(settings.body_timeout),
            request_timeout: Duration::from_secs(settings.request_timeout),
            handoff_min_tokens: settings.handoff_min_tokens,
            max_logprobs: u32::try_from(settings.max_logprobs).ok(),
            trust_request_chat_template: settings.trust_request_chat_template,
            max_texts: settings.max_texts,
            prompt_tokens_details: settings.enable_prompt_tokens_details,
        },
        parsers: Parsers {
            tools: settings.tool_call_parser.clone(),
            reasoning: settings.reasoning_parser,
        },
        responses: Responses::new(kept, responses.max_background_responses),
        draining: AtomicBool::new(false),
    });
    let listening = Listening {
        listener,
        tls: tls
            .as_ref()
            .map(|tls| tls.server_config())
            .transpose()
            .map_err(|error| Failure::new(Exit::Failure, error))?,
        threads: settings.http_threads.into(),
        head_timeout: Duration::from_secs(settings.head_timeout),
        send_timeout: Duration::from_secs(settings.send_timeout),
        keep_alive: Duration::from_secs(settings.keep_alive_timeout),
        cors,
    };
    // Until then connections wait in the listener's queue.
    shared.registry.found(FIND_WITHIN).await;
    let server = http::server(shared.clone(), listening)
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    tls.map(|tls| tokio::spawn(tls.refresh()));
    tokio::spawn(shared.quota.clone().sweep());
    tokio::spawn(Responses::tend(shared.clone()));
    tokio::spawn(follow_scaling(shared.registry.clone(), shared.metrics.clone()));
    let handle = server.handle();
    let serving = tokio::spawn(server);
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
    shared.responses.stop().await;
    handle.stop(false).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), serving).await;
    traces.stop().await;
    Ok(())
}

fn keys(access: &AccessArgs) -> Result<Keys, Failure> {
    let mut api = access.api_keys.clone();
    if api.is_empty() {
        // As vLLM has it: flags win over its variable.
        api.extend(std::env::var("VLLM_API_KEY"));
    }
    let api = key_set(API_KEY, &api, access.api_key_file.as_deref())?;
    let admin = key_set(ADMIN_KEY, &access.admin_keys, access.admin_key_file.as_deref())?;
    if access.guard_all && api.is_empty() {
        let message = "--guard-all needs a key: give --api-key or --api-key-file";
        return Err(Failure::new(Exit::Config, message));
    }
    Ok(Keys::new(api, admin, access.guard_all))
}

/// The keys of `flag`, and of the file that `flag`-file names.
fn key_set(
    (flag, variables): (&str, &str),
    keys: &[String],
    file: Option<&Path>,
) -> Result<KeySet, Failure> {
    let wanted = !keys.is_empty() || file.is_some();
    let keys = KeySet::load(keys, file).map_err(|error| {
        let file = file.unwrap_or_else(|| "".as_ref());
        let message = format!("{flag}-file {} cannot be read: {error}", file.display());
        Failure::new(Exit::Config, message)
    })?;
    if wanted && keys.is_empty() {
        // Open to all is not what was meant.
        let message = format!(
            "{flag} or {flag}-file is given, as a flag or as a variable ({variables}), but holds \
             no key: leave it out, or unset it"
        );
        return Err(Failure::new(Exit::Config, message));
    }
    Ok(keys)
}

/// Where others reach this process, when they are not told: gateways are only shown, not called.
fn default_url(address: SocketAddr, tls: bool) -> String {
    let scheme = if tls { "https" } else { "http" };
    match address.ip().is_unspecified() {
        true => format!("{scheme}://127.0.0.1:{}", address.port()),
        false => format!("{scheme}://{address}"),
    }
}
