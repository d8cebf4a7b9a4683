//! `baton scale`: changes how many workers a pool has.

use std::time::{Duration, Instant};

use baton_membership::daemon::{Exit, Failure};
use baton_proto::v1::{
    CancelScaleRequest, GetScaleRequest, ListScalesRequest, ScaleOperation, ScaleRequest,
};
use clap::Args;

use super::ask::{Coordinator, CoordinatorArgs};
use super::status::new_table;

/// Between two looks at the operation.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a coordinator may be silent before the wait is given up: another may have to take over.
const SILENT_FOR: Duration = Duration::from_secs(60);

/// Flags of `baton scale`.
#[derive(Clone, Debug, Args)]
pub struct ScaleArgs {
    /// How many workers the pool is to have.
    #[arg(required_unless_present_any = ["cancel", "list"], conflicts_with_all = ["cancel", "list"])]
    size: Option<u32>,

    /// prefill, decode, unified, pooling or audio; by default the pool that generates: decode, or
    /// unified where there are no decode workers.
    #[arg(long)]
    pool: Option<String>,

    /// Take new workers from this pool: prefill, decode or unified. They change their role and keep
    /// their model, which is faster than a start.
    #[arg(long, value_name = "POOL", conflicts_with_all = ["cancel", "list"])]
    from: Option<String>,

    /// The model, where the pool has several.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// Seconds that the requests of workers that are to go have. When it is over the workers are put
    /// back to service, and the operation fails.
    #[arg(long, default_value_t = 120, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    drain_timeout: u64,

    /// Take back the operation that runs for the pool, and wait until it is undone.
    #[arg(long)]
    cancel: bool,

    /// Show operations: those that run, and the last ones that ended.
    #[arg(long, conflicts_with = "cancel")]
    list: bool,

    /// Whom to ask.
    #[command(flatten)]
    coordinator: CoordinatorArgs,
}

/// Asks for the change and follows it to its end.
pub async fn run(args: ScaleArgs) -> Result<(), Failure> {
    let mut coordinator = args.coordinator.connect().await?;
    let pool = args.pool.clone().unwrap_or_default();
    if args.list {
        return list(&coordinator).await;
    }
    let operation = match args.size {
        Some(size) => {
            let model = args.model.clone().unwrap_or_default();
            let drain_timeout_ms = args.drain_timeout * 1000;
            let from_pool = args.from.clone().unwrap_or_default();
            let request = ScaleRequest { pool, model, size, drain_timeout_ms, from_pool };
            coordinator.ask(async |mut client| client.scale(request).await).await?
        }
        None => {
            let request = CancelScaleRequest { id: String::new(), pool };
            coordinator.ask(async |mut client| client.cancel_scale(request).await).await?
        }
    };
    println!("{}", operation.id);
    let ended = follow(&mut coordinator, &args.coordinator, operation).await?;
    let ScaleOperation { pool, size, from, .. } = &ended;
    match ended.phase.as_str() {
        "done" if args.cancel => {
            Err(Failure::new(Exit::Failure, "it was done before it could be cancelled"))
        }
        "done" => {
            println!("{pool}: {from} -> {size}");
            Ok(())
        }
        "cancelled" if args.cancel => {
            println!("cancelled: {pool} is as it was");
            Ok(())
        }
        "cancelled" => Err(Failure::new(Exit::Failure, "somebody has cancelled it")),
        _ => Err(Failure::new(Exit::Failure, &ended.reason)),
    }
}

/// Prints each phase until the operation is over.
async fn follow(
    coordinator: &mut Coordinator,
    args: &CoordinatorArgs,
    mut operation: ScaleOperation,
) -> Result<ScaleOperation, Failure> {
    let mut told = String::new();
    let mut heard = Instant::now();
    loop {
        if told != operation.phase {
            told.clone_from(&operation.phase);
            let names = match told.as_str() {
                "launch" => operation.launched.join(" "),
                "convert" => operation.converted.join(" "),
                "drain" => operation.retired.join(" "),
                _ => String::new(),
            };
            println!("  {told} {names}");
        }
        if operation.ended_ms > 0 {
            return Ok(operation);
        }
        tokio::time::sleep(LOOK_EVERY).await;
        let id = operation.id.clone();
        let request = GetScaleRequest { id };
        match coordinator.ask(async |mut client| client.get_scale(request).await).await {
            Ok(now) => (operation, heard) = (now, Instant::now()),
            // It may be started again under the same address.
            Err(failure) if failure.exit != Exit::Unavailable => return Err(failure),
            Err(failure) if heard.elapsed() >= SILENT_FOR => return Err(failure),
            Err(_) => {
                if let Ok(again) = args.connect().await {
                    *coordinator = again;
                }
            }
        }
    }
}

async fn list(coordinator: &Coordinator) -> Result<(), Failure> {
    let asked = coordinator.ask(async |mut client| client.list_scales(ListScalesRequest {}).await);
    let mut table = new_table(&["operation", "pool", "model", "from", "to", "phase", "took", ""]);
    for it in asked.await?.operations {
        let ended = if it.ended_ms > 0 { it.ended_ms } else { crate::scale::record::unix_ms() };
        let took = ended.saturating_sub(it.started_ms) as f64 / 1000.0;
        let (from, size) = (it.from.to_string(), it.size.to_string());
        let took = format!("{took:.1} s");
        table.add_row([it.id, it.pool, it.model, from, size, it.phase, took, it.reason]);
    }
    println!("{table}");
    Ok(())
}
