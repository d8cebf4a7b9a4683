//! `baton-coordinator`: watches the cluster, and scales it.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::cli::state;
use baton_coordinator::config::{LaunchArgs, Settings};
use baton_coordinator::election::Election;
use baton_coordinator::launch::local::{self, LocalProcesses};
use baton_coordinator::launch::template::Templates;
use baton_coordinator::launch::{Launcher, supervise};
use baton_coordinator::scale::machine::Limits;
use baton_coordinator::scale::run::Runner;
use baton_coordinator::scale::store::ScaleStore;
use baton_coordinator::service::CoordinatorService;
use baton_membership::daemon::{self, Exit, Failure, StopSignals};
use baton_membership::traces::Traces;
use baton_membership::{ClusterWatch, InstanceRole, Registration};
use clap::Parser as _;
use tokio::net::TcpListener;
use tracing::info;

fn main() -> ExitCode {
    let settings = Settings::parse();
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
    let launcher = settings.launch.workers.as_ref().map(|file| {
        let templates = Templates::read(file)?;
        launcher(&settings.launch, templates)
    });
    let launcher: Option<Arc<dyn Launcher>> = match launcher.transpose()? {
        Some(launcher) => Some(Arc::new(launcher)),
        None => None,
    };
    let listener = TcpListener::bind(settings.listen)
        .await
        .map_err(|error| Failure::listen("--listen", settings.listen, &error))?;
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised = settings.advertise.clone().unwrap_or_else(|| format!("http://{address}"));
    let mut stop_signals = StopSignals::take()?;

    let etcd = settings.cluster.etcd_settings()?;
    let store = ScaleStore::connect(&etcd).await?;
    let record = daemon::new_record(InstanceRole::Coordinator, advertised.clone(), String::new());
    let cluster = &settings.cluster;
    let traces = Traces::start(&cluster.traces, &cluster.cluster, &record)?;
    let service = CoordinatorService {
        cluster: settings.cluster.cluster.clone(),
        watch: ClusterWatch::start(&etcd).await?,
        election: Election::start(etcd.clone(), record.id.clone()),
        store: store.clone(),
        launcher: launcher.clone(),
    };
    let launch_ms = settings.launch.launch_timeout * 1000;
    let runner = Runner {
        store,
        watch: ClusterWatch::start(&etcd).await?,
        launcher,
        limits: Limits { launch_ms, ..Limits::default() },
    };
    let running = tokio::spawn(runner.run(service.election.own()));
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
    registration.withdraw().await;
    let _ = stop.send(());
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    traces.stop().await;
    Ok(())
}

fn launcher(args: &LaunchArgs, templates: Templates) -> Result<LocalProcesses, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, error);
    let dir = args.workers_dir.clone().unwrap_or_else(|| state::directory().join("workers"));
    let logs = args.workers_logs.clone();
    let settings = local::Settings {
        logs: logs.unwrap_or_else(|| dir.with_file_name("logs")),
        dir,
        supervisor: std::env::current_exe().map_err(|error| failed(&error))?,
        owner: args.workers_owner.clone(),
        grace: Duration::from_secs(args.stop_timeout),
    };
    LocalProcesses::new(settings, templates).map_err(|error| failed(&error))
}
