//! `baton drain`: takes a worker out of service, or puts it back.

use std::time::{Duration, Instant};

use baton_membership::daemon::{Exit, Failure};
use baton_proto::v1::{DrainInstanceRequest, Instance};
use clap::Args;

use super::ask::CoordinatorArgs;

/// Between two looks at the worker.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Flags of `baton drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The worker: its id, its address or its name, as `baton top` shows them.
    instance: String,

    /// Put it back to service.
    #[arg(long)]
    undo: bool,

    /// Seconds to wait until it has finished what it has; it goes on draining after that.
    #[arg(long, default_value_t = 120, value_name = "SECONDS", conflicts_with = "undo")]
    timeout: u64,

    /// Whom to ask.
    #[command(flatten)]
    coordinator: CoordinatorArgs,
}

/// Asks, and waits.
pub async fn run(args: DrainArgs) -> Result<(), Failure> {
    let coordinator = args.coordinator.connect().await?;
    let DrainArgs { instance, undo, .. } = args.clone();
    let request = DrainInstanceRequest { instance, undo };
    let asked = coordinator.ask(async |mut client| client.drain_instance(request).await);
    let Instance { id, mut status, .. } = asked.await?;
    if args.undo {
        println!("{} is in service", args.instance);
        return Ok(());
    }
    let since = Instant::now();
    loop {
        let left = status.as_ref().map(|status| status.running + status.waiting);
        if left == Some(0) {
            println!("{} is drained; it stays so until --undo, or until it is stopped", id);
            return Ok(());
        }
        if since.elapsed().as_secs() >= args.timeout {
            let left = left.map_or("does not answer".to_owned(), |it| format!("has {it} requests"));
            let message =
                format!("{id} still {left} after {} s, and goes on draining", args.timeout);
            return Err(Failure::new(Exit::Failure, message));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        let view = coordinator.cluster().await?;
        let Some(now) = view.instances.into_iter().find(|it| it.id == id) else {
            return Err(Failure::new(Exit::Failure, format!("{id} is gone")));
        };
        status = now.status;
    }
}
