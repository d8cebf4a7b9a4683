//! `baton status`: the cluster, as its coordinator sees it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_membership::daemon::Failure;
use baton_proto::InstanceRole;
use baton_proto::v1::{ClusterView, WorkerStatus};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use serde_json::json;

use super::ask::CoordinatorArgs;

/// Flags of `baton status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Whom to ask.
    #[command(flatten)]
    coordinator: CoordinatorArgs,

    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
}

/// Asks, and prints.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let view = args.coordinator.connect().await?.cluster().await?;
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
                "name": instance.name,
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
    let mut table = new_table(&[
        "role",
        "name",
        "address",
        "model",
        "up",
        "running",
        "waiting",
        "KV blocks or texts",
    ]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for instance in &view.instances {
        let drains = instance.status.as_ref().is_some_and(|status| status.draining);
        let role = match instance.id == view.leader {
            true => format!("{} (leads)", instance.role),
            false if drains => format!("{} (draining)", instance.role),
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
            instance.name.clone(),
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
