//! Follows what a worker's prefix cache holds.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use baton_proto::BlockHash;
use baton_proto::v1::WatchBlocksRequest;
use tonic::{Code, Status};
use tracing::debug;

use super::Worker;
use crate::routing::kv_index::Share;

/// Waits between attempts: the first, the longest, and where the worker has no such call.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
const UNKNOWN: Duration = Duration::from_secs(600);

/// Keeps the worker's part of the index, for ever. While the worker does not say what it holds, what
/// was sent there is the guess.
pub(super) async fn follow(worker: &Arc<Worker>, mut share: Share) {
    let mut wait = RETRY.0;
    loop {
        let Err(error) = listen(worker, &mut share, &mut wait).await;
        worker.tells_blocks.store(false, Relaxed);
        share.clear();
        debug!(id = worker.record.id, %error, "no word of its KV blocks");
        // One of an earlier version, or one without a KV cache.
        let never = matches!(error.code(), Code::Unimplemented | Code::FailedPrecondition);
        tokio::time::sleep(if never { UNKNOWN } else { wait }).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

/// Listens until the stream ends, and says why it did.
async fn listen(
    worker: &Worker,
    share: &mut Share,
    wait: &mut Duration,
) -> Result<Infallible, Status> {
    let mut stream = worker.control().watch_blocks(WatchBlocksRequest {}).await?.into_inner();
    while let Some(changes) = stream.message().await? {
        if changes.reset {
            share.clear();
        }
        share.remove(BlockHash::read_all(&changes.removed));
        share.store(BlockHash::read_all(&changes.stored));
        if !worker.tells_blocks.swap(true, Relaxed) {
            // Nobody need guess.
            *worker.prefixes.lock() = None;
        }
        *wait = RETRY.0;
    }
    Err(Status::unavailable("the worker closed the stream"))
}
