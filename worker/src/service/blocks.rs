//! `WatchBlocks`: what the prefix cache holds, as it changes.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::BlockHash;
use baton_proto::v1::BlockChanges;
use tokio::sync::mpsc;
use tonic::Status;

use crate::kv::changes::{ChangeLog, News, Position};

/// Changes are gathered for so long: a message for each block would cost more than it tells.
const GATHER: Duration = Duration::from_millis(5);
/// Addresses of a message.
const ADDRESSES: usize = 16 * 1024;

/// Tells a watcher everything, then every change, until it goes.
pub(super) async fn watch(log: Arc<ChangeLog>, sender: mpsc::Sender<Result<BlockChanges, Status>>) {
    let mut position = Position::default();
    loop {
        let news = tokio::select! {
            news = log.news(&mut position) => news,
            () = sender.closed() => return,
        };
        for message in messages(&news) {
            // A watcher that reads slowly holds up nobody but itself.
            if sender.send(Ok(message)).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(GATHER).await;
    }
}

fn messages(news: &News) -> Vec<BlockChanges> {
    let packed =
        |hashes: &[BlockHash]| hashes.iter().flat_map(|hash| *hash.as_bytes()).collect::<Vec<u8>>();
    let mut messages = Vec::new();
    for stored in news.stored.chunks(ADDRESSES) {
        messages.push(BlockChanges { stored: packed(stored), ..BlockChanges::default() });
    }
    for removed in news.removed.chunks(ADDRESSES) {
        messages.push(BlockChanges { removed: packed(removed), ..BlockChanges::default() });
    }
    if news.reset {
        match messages.first_mut() {
            Some(first) => first.reset = true,
            None => messages.push(BlockChanges { reset: true, ..BlockChanges::default() }),
        }
    }
    messages
}
