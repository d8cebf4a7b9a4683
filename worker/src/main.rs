//! `baton-worker`: loads a model, joins the cluster, computes.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use baton_membership::config;
use baton_membership::daemon::{self, BACKLOG, Exit, Failure, StopSignals, bind};
use baton_membership::traces::Traces;
use baton_membership::{Backoff, EtcdSettings, InstanceRecord, Registration};
use baton_proto::v1::{LoadAdapterRequest, ModelCard, SpeechCard, Task};
use baton_worker::checkpoint::{LoadError, WhisperFolder};
use baton_worker::config::{Role, Settings, Transport};
use baton_worker::device::Device;
use baton_worker::engine::{self, Engine};
use baton_worker::lora::{self, AdapterError, Adapters};
use baton_worker::model::{self, LoadedModel};
use baton_worker::pooling::{self, Pooler};
use baton_worker::scheduler::Limits;
use baton_worker::service::{Computes, Identity, Member, Parts, PoolingParts, WorkerService};
use baton_worker::transfer::{Transports, grpc};
use tracing::{error, info, warn};

/// Of the file of settings: it tells what settings other programs have.
const SCHEMA: &str = include_str!("../../deploy/baton.schema.json");

#[tokio::main(worker_threads = 2)]
pub(crate) async fn main() -> ExitCode {
    let settings: Settings = config::parse(SCHEMA);
    settings.cluster.init_log();
    daemon::exit(run(settings).await)
}

async fn run(settings: Settings) -> Result<(), Failure> {
    baton_membership::tls::install(&settings.cluster.tls)?;
    let cannot_listen = |error| Failure::listen("--listen", settings.listen, &error);
    let socket = bind(settings.listen).map_err(cannot_listen)?;
    let address = socket.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised = daemon::advertised(address, settings.advertise.as_deref())?;
    let mut stop_signals = StopSignals::take()?;
    settings.check_device().map_err(|message| Failure::new(Exit::Config, message))?;

    let loading = async {
        Ok::<_, Failure>(match settings.role {
            Role::Pooling => {
                let (parts, instance) = load_pooling(&settings, advertised).await?;
                let pooler: Arc<dyn Computes> = parts.pooler.clone();
                (WorkerService::pooling(parts), pooler, instance)
            }
            _ => {
                let (parts, instance) = load(&settings, advertised).await?;
                let engine: Arc<dyn Computes> = parts.engine.clone();
                (WorkerService::new(parts), engine, instance)
            }
        })
    };
    let (service, engine, instance) = tokio::select! {
        loaded = loading => loaded?,
        () = stop_signals.next() => {
            info!("stopped before the model was loaded");
            // Nothing is begun, and the thread that reads the model cannot be stopped.
            std::process::exit(0);
        }
    };
    let service = service.map_err(|error| Failure::new(Exit::BadModel, error))?;
    let cluster = &settings.cluster;
    let traces = Traces::start(&cluster.traces, &cluster.cluster, &instance)?;
    let (drain, member) = (service.drain(), service.member());
    let listener = socket.listen(BACKLOG).map_err(cannot_listen)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(service.serve(listener, async {
        let _ = stopped.await;
    }));
    let etcd = settings.cluster.etcd_settings()?;
    let registered = tokio::select! {
        registered = Registration::start(&etcd, instance.clone()) => registered?,
        () = stop_signals.next() => {
            info!("stopped before etcd was reached");
            // Nobody knows of it, so nobody has sent anything.
            std::process::exit(0);
        }
    };
    let mut registration = Some(registered);
    println!("ready {} {}", instance.role, instance.address);
    info!(id = instance.id, address = instance.address, "serving");

    let mut lost = None;
    tokio::select! {
        () = stop_signals.next() => {}
        reason = engine.lost() => lost = Some(reason),
        () = change_roles(member, &etcd, &instance, &mut registration) => {}
    }
    match &lost {
        None => info!("stopping: running requests go elsewhere, or finish"),
        Some(reason) => error!(reason, "stopping: running requests were given up"),
    }
    drain.close();
    if lost.is_some() {
        // Requests of an engine that hangs hear nothing from it.
        drain.begin(Some(Duration::ZERO));
        // Threads of the runtime may wait for the device too, and its end for them.
        let longest = Duration::from_secs(settings.drain_timeout) + Duration::from_secs(5);
        std::thread::spawn(move || {
            std::thread::sleep(longest);
            std::process::exit(Exit::Failure as i32);
        });
    }
    let drained = async {
        // Beside the drain: etcd may be away.
        let drained = async {
            while lost.is_none() && !drain.done() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let withdrawn = async {
            if let Some(registration) = registration {
                registration.withdraw().await;
            }
        };
        tokio::join!(drained, withdrawn);
    };
    // Whatever is left when its time is up is told so before the process ends.
    let limit = Duration::from_secs(settings.drain_timeout) + Duration::from_secs(1);
    stop_signals.drain(drained, limit).await;
    // Joining a thread: not on the runtime's own threads.
    let _ = tokio::task::spawn_blocking(move || engine.stop()).await;
    let _ = stop.send(());
    // Streams of status never end by themselves.
    let _ = tokio::time::timeout(Duration::from_millis(500), server).await;
    traces.stop().await;
    match lost {
        None => Ok(()),
        Some(reason) => Err(Failure::new(Exit::Failure, format!("{reason}; start it again"))),
    }
}

/// Has the worker be in the cluster what it is told to be. Never returns.
async fn change_roles(
    member: Option<Member>,
    etcd: &EtcdSettings,
    first: &InstanceRecord,
    registration: &mut Option<Registration>,
) {
    let Some(member) = member else { return std::future::pending().await };
    loop {
        let role = member.next_role().await;
        let record = daemon::new_record(role, first.address.clone(), first.model.clone());
        if let Some(registration) = registration.take() {
            registration.withdraw().await;
        }
        member.change(Identity { instance_id: record.id.clone(), role });
        let mut backoff = Backoff::new();
        *registration = loop {
            match Registration::start(etcd, record.clone()).await {
                Ok(registration) => break Some(registration),
                Err(error) => warn!(%error, "not registered in the new role; trying again"),
            }
            backoff.wait().await;
        };
        info!(id = record.id, role = %record.role, "serving");
    }
}

async fn load(settings: &Settings, address: String) -> Result<(Parts, InstanceRecord), Failure> {
    let config_error = |message: String| Failure::new(Exit::Config, message);
    let speculation = settings.speculation().map_err(config_error)?;
    let transports = settings.transports().map_err(config_error)?;
    let template = chat_template(settings)?;
    let of_settings = settings.clone();
    let mut loaded = tokio::task::spawn_blocking(move || load_model(&of_settings))
        .await
        .map_err(|error| Failure::new(Exit::BadModel, error))?
        .map_err(bad_model)?;
    loaded.tokenizer.chat_template = template.or(loaded.tokenizer.chat_template);
    check_role(settings.role, loaded.speech.is_some())?;
    let config = loaded.model.config().clone();
    // What sound takes of each sequence.
    let leading = loaded.model.audio_positions().next_multiple_of(settings.block_size);
    if leading > 0 && settings.lora_modules().next().is_some() {
        let message = "--lora-modules: a speech model takes no adapters";
        return Err(Failure::new(Exit::Config, message));
    }
    let layout = loaded.model.kv_layout(settings.block_size, settings.kv_cache_dtype.into());
    if transports.contains(&Transport::Grpc) {
        grpc::check(&layout).map_err(config_error)?;
    }
    let blocks = settings.kv_memory.0 / layout.block_bytes as usize;
    if blocks < 2 {
        let message = format!(
            "--kv-memory holds {blocks} blocks of {} bytes; give at least {} bytes",
            layout.block_bytes,
            2 * layout.block_bytes
        );
        return Err(Failure::new(Exit::Config, message));
    }
    let pool = loaded.model.kv_pool(layout, blocks).map_err(|error| {
        let wanted = blocks as u64 * layout.block_bytes;
        let message = format!("cannot make a KV pool of {wanted} bytes (--kv-memory): {error}");
        // Another process may still have a GPU's memory.
        let on_device = settings.device != Device::Cpu;
        Failure::new(if on_device { Exit::Unavailable } else { Exit::Failure }, message)
    })?;
    let limits = Limits {
        block_size: settings.block_size,
        blocks,
        max_batch_tokens: settings.max_batch_tokens,
        max_running: settings.max_running,
        max_waiting: settings.max_waiting,
        max_model_len: leading
            + settings.max_model_len.unwrap_or(usize::MAX).min(config.max_context),
        leading,
        speculation,
        priority_aging: Duration::from_secs(settings.priority_aging_seconds as u64),
    };
    let eos_token_ids = loaded.eos_token_ids.clone();
    let speech = loaded.speech.clone();
    let step_timeout = Duration::from_secs(settings.step_timeout);
    let step_timeout = Some(step_timeout).filter(|limit| !limit.is_zero());
    let engine_settings = engine::Settings { limits, eos_token_ids, speech, step_timeout };
    let engine = Engine::start(loaded.model, pool, engine_settings).map_err(|error| {
        Failure::new(Exit::Failure, format!("cannot start the engine: {error}"))
    })?;
    let role = settings.role.into();
    let names = settings.model_names().map_err(|message| Failure::new(Exit::Config, message))?;
    let takes_loras = leading == 0 && settings.device == Device::Cpu;
    let max_loras = if takes_loras { settings.max_loras } else { 0 };
    let bounds = lora::Bounds { adapters: max_loras, rank: settings.max_lora_rank };
    let adapters = Adapters::new(config.clone(), names.clone(), bounds);
    let adapters = load_adapters(settings, adapters, &names).await?;
    let (name, aliases) = (names[0].clone(), names[1..].to_vec());
    let instance = daemon::new_record(role, address, name.clone());
    let model = ModelCard {
        name,
        root: settings.model.display().to_string(),
        architecture: config.architecture.clone(),
        max_model_len: engine.limits().max_model_len.saturating_sub(leading) as u32,
        vocab_size: config.vocab as u32,
        eos_token_ids: loaded.eos_token_ids,
        weights_digest: loaded.weights_digest,
        tokenizer_digest: String::new(),
        aliases,
        tasks: tasks(loaded.speech.as_ref()),
        pooling: None,
        speech: loaded.speech,
    };
    let parts = Parts {
        identity: Identity { instance_id: instance.id.clone(), role },
        model,
        tokenizer: loaded.tokenizer,
        adapters,
        transports: Transports::new(&transports.into_iter().map(Into::into).collect::<Vec<_>>()),
        hold_lease: Duration::from_secs(settings.hold_lease),
        drain_timeout: Duration::from_secs(settings.drain_timeout),
        engine: Arc::new(engine),
    };
    Ok((parts, instance))
}

/// Reads the model for what computes it.
fn load_model(settings: &Settings) -> Result<LoadedModel, LoadError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = settings.threads.unwrap_or(cores);
    match settings.device {
        Device::Cpu => model::load(&settings.model, threads, settings.activation_bits.into()),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Err(LoadError::Device("built without the feature `cuda`".into())),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => {
            let options = model::cuda::Options {
                ordinal,
                threads,
                block_size: settings.block_size,
                rows: settings.max_batch_tokens,
                sequences: settings.max_running,
                context: settings.max_model_len.unwrap_or(usize::MAX),
            };
            model::cuda::load(&settings.model, &options)
        }
    }
}

/// As [`load`], for a worker that pools.
async fn load_pooling(
    settings: &Settings,
    address: String,
) -> Result<(PoolingParts, InstanceRecord), Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = pooling::Options {
        threads: settings.threads.unwrap_or(cores),
        activations: settings.activation_bits.into(),
        dtype: settings.dtype,
        pooling: settings.pooling,
        max_tokens: settings.max_model_len,
        max_batch_tokens: settings.max_batch_tokens,
    };
    let template = chat_template(settings)?;
    let path = settings.model.clone();
    if matches!(WhisperFolder::open(&path), Ok(Some(_))) {
        check_role(settings.role, true)?;
    }
    let mut loaded = tokio::task::spawn_blocking(move || pooling::load(&path, &options))
        .await
        .map_err(|error| Failure::new(Exit::BadModel, error))?
        .map_err(bad_model)?;
    loaded.tokenizer.chat_template = template.or(loaded.tokenizer.chat_template);
    let names = settings.model_names().map_err(|message| Failure::new(Exit::Config, message))?;
    let (name, aliases) = (names[0].clone(), names[1..].to_vec());
    let instance = daemon::new_record(settings.role.into(), address, name.clone());
    let model = ModelCard {
        name,
        root: settings.model.display().to_string(),
        architecture: loaded.architecture,
        max_model_len: loaded.model.max_tokens() as u32,
        vocab_size: loaded.model.vocab() as u32,
        eos_token_ids: loaded.eos_token_ids,
        weights_digest: loaded.weights_digest,
        tokenizer_digest: String::new(),
        aliases,
        tasks: loaded.model.head().tasks().into_iter().map(Into::into).collect(),
        pooling: Some(loaded.card),
        speech: None,
    };
    let limits = pooling::Limits {
        texts: settings.max_waiting.saturating_mul(64),
        tokens: settings.max_waiting.saturating_mul(4096),
        priority_aging: Duration::from_secs(settings.priority_aging_seconds as u64),
    };
    let bounds = pooling::Settings { limits, max_batch_tokens: settings.max_batch_tokens };
    let pooler = Pooler::start(loaded.model, bounds).map_err(|error| {
        Failure::new(Exit::Failure, format!("cannot start the pooling thread: {error}"))
    })?;
    let parts = PoolingParts {
        instance_id: instance.id.clone(),
        model,
        tokenizer: loaded.tokenizer,
        drain_timeout: Duration::from_secs(settings.drain_timeout),
        pooler: Arc::new(pooler),
    };
    Ok((parts, instance))
}

/// The chat template that the flags name.
fn chat_template(settings: &Settings) -> Result<Option<String>, Failure> {
    let template = settings.chat_template.as_ref().map(std::fs::read_to_string).transpose();
    template.map_err(|error| {
        let file = settings.chat_template.as_deref().unwrap_or_else(|| "".as_ref());
        let message = format!("--chat-template {} cannot be read: {error}", file.display());
        Failure::new(Exit::Config, message)
    })
}

fn bad_model(error: LoadError) -> Failure {
    match error {
        LoadError::Missing(_) => Failure::new(Exit::NoModel, error),
        LoadError::Device(_) => Failure::new(Exit::Config, error),
        // Another process may still have its memory.
        LoadError::DeviceFailed(_) => Failure::new(Exit::Unavailable, error),
        _ => Failure::new(Exit::BadModel, error),
    }
}

/// Refuses a model that cannot do what the role asks for.
fn check_role(role: Role, speech: bool) -> Result<(), Failure> {
    let message = match (role, speech) {
        (Role::Pooling, true) => {
            "--role pooling: the model is one for speech; start it with --role audio"
        }
        (Role::Audio, false) => {
            "--role audio: the model is none for speech; give a Whisper model with --model, or \
             start it with --role unified"
        }
        _ => return Ok(()),
    };
    Err(Failure::new(Exit::Config, message))
}

/// What the model can be asked for.
fn tasks(speech: Option<&SpeechCard>) -> Vec<i32> {
    match speech {
        None => vec![Task::Generate.into()],
        Some(card) if card.multilingual => vec![Task::Transcribe.into(), Task::Translate.into()],
        Some(_) => vec![Task::Transcribe.into()],
    }
}

/// Reads the adapters that the flags name.
async fn load_adapters(
    settings: &Settings,
    adapters: Adapters,
    names: &[String],
) -> Result<Adapters, Failure> {
    let mut requests = Vec::new();
    for module in settings.lora_modules() {
        if let Some(base) = module.base_model_name.as_ref().filter(|base| !names.contains(base)) {
            let message =
                format!("--lora-modules: `{}` is for `{base}`, not this model", module.name);
            return Err(Failure::new(Exit::Config, message));
        }
        requests.push(LoadAdapterRequest {
            name: module.name.clone(),
            path: module.path.clone(),
            ..LoadAdapterRequest::default()
        });
    }
    let load = move || {
        requests.iter().try_for_each(|request| adapters.load(request, true)).map(|()| adapters)
    };
    tokio::task::spawn_blocking(load)
        .await
        .map_err(|error| Failure::new(Exit::BadModel, error))?
        .map_err(|error| {
            let exit = match error {
                AdapterError::Missing { .. } => Exit::NoModel,
                AdapterError::Name { .. } | AdapterError::Exists(_) | AdapterError::Full(_) => {
                    Exit::Config
                }
                _ => Exit::BadModel,
            };
            Failure::new(exit, format!("--lora-modules: {error}"))
        })
}
