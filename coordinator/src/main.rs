//! `baton-coordinator`: watches the cluster, and scales it.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::cli::state;
use baton_coordinator::config::{LaunchArgs, LauncherKind, Settings};
use baton_coordinator::election::Election;
use baton_coordinator::launch::kubernetes::{self, Kubernetes};
use baton_coordinator::launch::local::{self, LocalProcesses};
use baton_coordinator::launch::template::Templates;
use baton_coordinator::launch::{Launcher, supervise};
use baton_coordinator::planner::run::{Decisions, Mode, Planning};
use baton_coordinator::scale::machine::Limits;
use baton_coordinator::scale::run::Runner;
use baton_coordinator::scale::store::ScaleStore;
use baton_coordinator::service::CoordinatorService;
use baton_membership::config;
use baton_membership::daemon::{self, BACKLOG, Exit, Failure, StopSignals, bind};
use baton_membership::traces::Traces;
use baton_membership::{ClusterWatch, InstanceRole, Registration};
use tracing::info;

/// Of the file of settings: it tells what settings other programs have.
const SCHEMA: &str = include_str!("../../deploy/baton.schema.json");

fn main() -> ExitCode {
    let settings: Settings = config::parse(SCHEMA);
    if let Some(dir) = settings.supervises() {
        // Without a runtime: the kernel ties the worker's life to the thread that starts it.
        let ended = supervise::run(dir);
        let said = |error| Failure::new(Exit::Failure, format!("{}: {error}", dir.display()));
        return daemon::exit(ended.map_err(said));
    }
    settings.cluster.init_log();
    daemon::exit(run(settings))
}

#[tokio::main(worker_threads = 1)]
async fn run(settings: Settings) -> Result<(), Failure> {
    baton_membership::tls::install(&settings.cluster.tls)?;
    let local = local(&settings.launch)?;
    let cannot_listen = |error| Failure::listen("--listen", settings.listen, &error);
    let socket = bind(settings.listen).map_err(cannot_listen)?;
    let address = socket.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised = daemon::advertised(address, settings.advertise.as_deref())?;
    let mut stop_signals = StopSignals::take()?;

    let etcd = settings.cluster.etcd_settings()?;
    let store = tokio::select! {
        store = ScaleStore::connect(&etcd) => store?,
        () = stop_signals.next() => {
            info!("stopped before etcd was reached");
            return Ok(());
        }
    };
    let record = daemon::new_record(InstanceRole::Coordinator, advertised.clone(), String::new());
    let watch = ClusterWatch::start(&etcd).await?;
    let launcher: Option<Arc<dyn Launcher>> = match settings.launch.launcher {
        LauncherKind::Local => local.map(|local| Arc::new(local) as Arc<dyn Launcher>),
        LauncherKind::Kubernetes => Some(Arc::new(kubernetes(&settings.launch, &watch).await?)),
    };
    let decisions = Decisions::default();
    let planning = match (settings.planner.mode, &launcher) {
        (Mode::Off, _) => None,
        (_, None) => {
            let message = "--planner needs workers that can be launched: give --workers FILE, \
                           or --launcher kubernetes";
            return Err(Failure::new(Exit::Config, message));
        }
        (mode, Some(launcher)) => Some(Planning {
            mode,
            settings: settings
                .planner
                .settings(|pool| launcher.models(pool), launcher.keeps_roles().is_none())?,
            every: Duration::from_secs(settings.planner.interval),
            hold: Duration::from_secs(settings.planner.hold),
            store: store.clone(),
            watch: ClusterWatch::start(&etcd).await?,
            launcher: launcher.clone(),
            decisions: decisions.clone(),
        }),
    };
    let cluster = &settings.cluster;
    let traces = Traces::start(&cluster.traces, &cluster.cluster, &record)?;
    let service = CoordinatorService {
        cluster: settings.cluster.cluster.clone(),
        watch,
        election: Election::start(etcd.clone(), record.id.clone()),
        store: store.clone(),
        launcher: launcher.clone(),
        plans: (settings.planner.mode, decisions.clone()),
    };
    let launch_ms = settings.launch.launch_timeout * 1000;
    let runner = Runner {
        store,
        watch: ClusterWatch::start(&etcd).await?,
        launcher,
        limits: Limits { launch_ms, ..Limits::default() },
    };
    let running = tokio::spawn(runner.run(service.election.own()));
    let planning = planning.map(|planning| tokio::spawn(planning.run(service.election.own())));
    let resignation = service.election.resignation();
    let listener = socket.listen(BACKLOG).map_err(cannot_listen)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(service.serve(listener, async {
        let _ = stopped.await;
    }));
    let registration = Registration::start(&etcd, record).await?;
    println!("ready coordinator {advertised}");
    info!(address = advertised, "serving");

    stop_signals.next().await;
    info!("stopping");
    running.abort();
    planning.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::join!(registration.withdraw(), resignation.hand_in());
    let _ = stop.send(());
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    traces.stop().await;
    Ok(())
}

/// The launcher of processes on this machine, when there are commands for it.
fn local(args: &LaunchArgs) -> Result<Option<LocalProcesses>, Failure> {
    let Some(file) = &args.workers else { return Ok(None) };
    if args.launcher != LauncherKind::Local {
        let message = "--workers is for --launcher local: the pods of a StatefulSet have their \
                       command from it; leave out one of the two";
        return Err(Failure::new(Exit::Config, message));
    }
    let templates = Templates::read(file)?;
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, error);
    let dir = match &args.workers_dir {
        Some(dir) => dir.clone(),
        None => state::directory()?.join("workers"),
    };
    let logs = args.workers_logs.clone();
    let settings = local::Settings {
        logs: logs.unwrap_or_else(|| dir.with_file_name("logs")),
        dir,
        supervisor: std::env::current_exe().map_err(|error| failed(&error))?,
        owner: args.workers_owner.clone(),
        grace: Duration::from_secs(args.stop_timeout),
    };
    LocalProcesses::new(settings, templates).map(Some).map_err(|error| failed(&error))
}

/// The launcher of pods.
async fn kubernetes(args: &LaunchArgs, watch: &ClusterWatch) -> Result<Kubernetes, Failure> {
    let settings = kubernetes::Settings {
        namespace: args.kubernetes_namespace.clone(),
        selector: args.kubernetes_selector.clone(),
    };
    let connected = Kubernetes::connect(settings, watch.subscribe()).await;
    connected.map_err(|why| {
        let message = format!("--launcher kubernetes: {why}; set KUBECONFIG, or run in a pod");
        Failure::new(Exit::Config, message)
    })
}
