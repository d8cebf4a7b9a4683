//! `baton status`: the cluster, as its coordinator sees it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_membership::daemon::{Exit, Failure};
use baton_proto::InstanceRole;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{ClusterView, GetClusterRequest, WorkerStatus};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use serde_json::json;
use tonic::transport::Endpoint;

use super::state;

/// How long the coordinator may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Flags of `baton status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// The coordinator to ask; by default that of the cluster which `baton up` runs here.
    #[arg(long, env = "BATON_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,

    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
}

/// Asks, and prints.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let coordinator = match args.coordinator {
        Some(url) => url,
        None => state::running()?.coordinator,
    };
    let view = ask(&coordinator).await?;
    if args.json {
        println!("{:#}", as_json(&view));
        return Ok(());
    }
    println!("{}", table(&view));
    if !view.etcd_connected {
        println!("etcd does not answer: this is the last view known");
    }
    Ok(())
}

async fn ask(coordinator: &str) -> Result<ClusterView, Failure> {
    let silent = |error: &dyn std::fmt::Display| {
        let message = format!("the coordinator at {coordinator} does not answer: {error}");
        Failure::new(Exit::Unavailable, message)
    };
    let ask = async {
        let endpoint = Endpoint::from_shared(coordinator.to_owned())
            .map_err(|error| Failure::new(Exit::Config, format!("--coordinator: {error}")))?;
        let channel = endpoint.connect().await.map_err(|error| silent(&error))?;
        let answer = CoordinatorClient::new(channel).get_cluster(GetClusterRequest {}).await;
        Ok(answer.map_err(|status| silent(&status.message()))?.into_inner())
    };
    let late = || silent(&format_args!("nothing within {ANSWER_WITHIN:?}"));
    tokio::time::timeout(ANSWER_WITHIN, ask).await.map_err(|_| late())?
}

fn as_json(view: &ClusterView) -> serde_json::Value {
    let status = |status: &WorkerStatus| {
        json!({
            "running": status.running,
            "waiting": status.waiting,
            "kv_blocks_total": status.kv_blocks_total,
            "kv_blocks_requests": status.kv_blocks_requests,
            "kv_blocks_handoff": status.kv_blocks_handoff,
            "kv_blocks_cached": status.kv_blocks_cached,
            "pooled_texts": status.pooled_inputs,
            "pooled_batches": status.pooled_batches,
            "draining": status.draining,
        })
    };
    let instances: Vec<_> = view
        .instances
        .iter()
        .map(|instance| {
            json!({
                "id": instance.id,
                "role": instance.role,
                "address": instance.address,
                "model": instance.model,
                "version": instance.version,
                "started_ms": instance.started_ms,
                "status": instance.status.as_ref().map(status),
            })
        })
        .collect();
    json!({
        "cluster": view.cluster,
        "etcd_connected": view.etcd_connected,
        "leader": view.leader,
        "instances": instances,
    })
}

fn table(view: &ClusterView) -> Table {
    let mut table =
        new_table(&["role", "address", "model", "up", "running", "waiting", "KV blocks or texts"]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for instance in &view.instances {
        let role = match instance.id == view.leader {
            true => format!("{} (leads)", instance.role),
            false => instance.role.clone(),
        };
        let up = now.saturating_sub(Duration::from_millis(instance.started_ms)).as_secs();
        let is_worker = !matches!(instance.role.as_str(), "gateway" | "coordinator");
        let (running, waiting, blocks) = match &instance.status {
            Some(status) if instance.role == InstanceRole::Pooling.as_str() => (
                status.running.to_string(),
                status.waiting.to_string(),
                format!("{} texts in {} batches", status.pooled_inputs, status.pooled_batches),
            ),
            Some(status) => (
                status.running.to_string(),
                status.waiting.to_string(),
                format!(
                    "{} used, {} cached of {}",
                    status.kv_blocks_requests + status.kv_blocks_handoff,
                    status.kv_blocks_cached,
                    status.kv_blocks_total
                ),
            ),
            None if is_worker => ("?".into(), "?".into(), "does not answer".into()),
            None => Default::default(),
        };
        table.add_row([
            role,
            instance.address.clone(),
            instance.model.clone(),
            format!("{}m{:02}s", up / 60, up % 60),
            running,
            waiting,
            blocks,
        ]);
    }
    table
}

/// A table in the command's style.
pub fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.iter().copied());
    table
}
