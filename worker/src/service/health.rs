//! `grpc.health.v1.Health`, for probes: the empty service says that the worker answers,
//! `baton.v1.Worker` that it takes requests, which one that drains does not.

use std::convert::Infallible;

use baton_proto::v1::worker_server::WorkerServer;
use tonic_health::server::HealthReporter;

use super::{Drain, WorkerService};

/// Tells for as long as it is polled.
pub(super) async fn tell(reporter: &HealthReporter, drain: &Drain) -> Infallible {
    let mut drains = drain.changes();
    loop {
        let draining = drains.borrow_and_update().is_some();
        match draining {
            true => reporter.set_not_serving::<WorkerServer<WorkerService>>().await,
            false => reporter.set_serving::<WorkerServer<WorkerService>>().await,
        }
        if drains.changed().await.is_err() {
            // The sender is `drain`'s.
            std::future::pending::<()>().await;
        }
    }
}
