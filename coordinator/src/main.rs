//! `baton-coordinator`: watches the cluster.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use baton_coordinator::config::Settings;
use baton_coordinator::election::Election;
use baton_coordinator::service::CoordinatorService;
use baton_membership::daemon::{self, Exit, Failure, StopSignals};
use baton_membership::{ClusterWatch, InstanceRole, Registration};
use clap::Parser as _;
use tokio::net::TcpListener;
use tracing::info;

#[tokio::main(worker_threads = 1)]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    settings.cluster.init_log();
    daemon::exit(run(settings).await)
}

async fn run(settings: Settings) -> Result<(), Failure> {
    let listener = TcpListener::bind(settings.listen)
        .await
        .map_err(|error| Failure::listen("--listen", settings.listen, &error))?;
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Failure, error))?;
    let advertised = settings.advertise.clone().unwrap_or_else(|| format!("http://{address}"));
    let mut stop_signals = StopSignals::take()?;

    let etcd = settings.cluster.etcd_settings();
    let watch = ClusterWatch::start(&etcd).await?;
    let record = daemon::new_record(InstanceRole::Coordinator, advertised.clone(), String::new());
    let service = CoordinatorService {
        cluster: settings.cluster.cluster.clone(),
        watch,
        election: Election::start(etcd.clone(), record.id.clone()),
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(service.serve(listener, async {
        let _ = stopped.await;
    }));
    let registration = Registration::start(&etcd, record).await?;
    println!("ready coordinator {advertised}");
    info!(address = advertised, "serving");

    stop_signals.next().await;
    info!("stopping");
    registration.withdraw().await;
    let _ = stop.send(());
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    Ok(())
}
