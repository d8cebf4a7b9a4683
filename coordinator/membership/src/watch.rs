//! A watched view of all instances.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_proto::InstanceRecord;
use baton_proto::instance::instances_prefix;
use etcd_client::{Client, EventType, GetOptions, KeyValue, WatchOptions};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::settings::{Backoff, CALL_TIMEOUT, EtcdSettings, MembershipError, connect, within};

/// Who is in the cluster, as etcd last said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// All records, by instance id.
    pub instances: BTreeMap<String, InstanceRecord>,
    /// Whether etcd answers. When it does not, the records are the last ones known.
    pub etcd_connected: bool,
    /// etcd's revision of this view.
    pub revision: i64,
}

/// Keeps a [`Membership`] up to date for as long as it lives.
#[derive(Debug)]
pub struct ClusterWatch {
    view: watch::Receiver<Arc<Membership>>,
    task: JoinHandle<()>,
}

impl ClusterWatch {
    /// Lists the instances and watches them from there on.
    ///
    /// # Errors
    /// [`MembershipError::Unreachable`] when etcd does not answer within `start_timeout`.
    pub async fn start(settings: &EtcdSettings) -> Result<Self, MembershipError> {
        let client = connect(settings).await?;
        let (sender, view) = watch::channel(Arc::new(Membership::default()));
        let mut watcher = Watcher { client, prefix: instances_prefix(&settings.cluster), sender };
        watcher.list().await?;
        Ok(Self { view, task: tokio::spawn(watcher.run()) })
    }

    /// The view, now and as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Membership>> {
        self.view.clone()
    }
}

impl Drop for ClusterWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Watcher {
    client: Client,
    prefix: String,
    sender: watch::Sender<Arc<Membership>>,
}

impl Watcher {
    async fn run(mut self) {
        let mut backoff = Backoff::new();
        loop {
            // Ends only with an error: follow resumes at the view's revision, and lists anew
            // when etcd has compacted past it.
            if let Err(error) = self.follow(&mut backoff).await {
                self.update(|view| view.etcd_connected = false);
                warn!(%error, "lost sight of etcd; going on with the last view");
            }
            // What to follow from is known only after a list.
            loop {
                backoff.wait().await;
                match self.list().await {
                    Ok(()) => break,
                    Err(error) => warn!(%error, "etcd does not answer"),
                }
            }
            info!("etcd is back");
        }
    }

    /// Replaces the view by what etcd holds now.
    async fn list(&mut self) -> Result<(), MembershipError> {
        let options = GetOptions::new().with_prefix();
        let answer =
            within(CALL_TIMEOUT, self.client.get(self.prefix.as_str(), Some(options))).await?;
        let instances =
            answer.kvs().iter().filter_map(parse).map(|record| (record.id.clone(), record));
        let view = Membership {
            instances: instances.collect(),
            etcd_connected: true,
            revision: answer.header().map_or(0, |header| header.revision()),
        };
        self.update(|old| *old = view);
        Ok(())
    }

    /// Applies events from the view's revision on.
    async fn follow(&mut self, backoff: &mut Backoff) -> Result<(), MembershipError> {
        let from = self.sender.borrow().revision + 1;
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let mut stream =
            within(CALL_TIMEOUT, self.client.watch(self.prefix.as_str(), Some(options))).await?;
        loop {
            // Silence is normal here; HTTP/2 keep-alive ends a stream whose peer is gone.
            let Some(answer) = stream.message().await? else {
                return Err(MembershipError::WatchEnded("etcd closed the stream".into()));
            };
            if answer.canceled() {
                return Err(MembershipError::WatchEnded(answer.cancel_reason().to_owned()));
            }
            // The answer to the call itself says nothing of what was seen.
            if answer.created() {
                continue;
            }
            backoff.reset();
            let revision = answer.header().map_or(0, |header| header.revision());
            self.update(|view| {
                for event in answer.events() {
                    let Some(kv) = event.kv() else { continue };
                    match event.event_type() {
                        EventType::Put => {
                            if let Some(record) = parse(kv) {
                                view.instances.insert(record.id.clone(), record);
                            }
                        }
                        EventType::Delete => {
                            let id = kv.key().get(self.prefix.len()..).unwrap_or_default();
                            view.instances.remove(String::from_utf8_lossy(id).as_ref());
                        }
                    }
                }
                view.revision = view.revision.max(revision);
                view.etcd_connected = true;
            });
        }
    }

    fn update(&self, change: impl FnOnce(&mut Membership)) {
        self.sender.send_if_modified(|view| {
            let mut next = Membership::clone(view);
            change(&mut next);
            let changed = next != **view;
            *view = Arc::new(next);
            changed
        });
    }
}

/// A record, or `None` with a line in the log: one bad record must not hide the others.
fn parse(kv: &KeyValue) -> Option<InstanceRecord> {
    match serde_json::from_slice(kv.value()) {
        Ok(record) => Some(record),
        Err(error) => {
            warn!(key = %String::from_utf8_lossy(kv.key()), %error, "skipping a record that does not parse");
            None
        }
    }
}
