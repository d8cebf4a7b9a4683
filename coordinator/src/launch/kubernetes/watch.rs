//! The objects of one kind, kept up to date by a list and watches.
//!
//! A watch goes on from the last version that was seen, also after it was cut off; when the API
//! server has forgotten that version (410 Gone), or a coordinator begins to lead, all are listed
//! anew. While no watch stands nothing is told: what was seen last may be long past.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_membership::Backoff;
use futures::{StreamExt as _, pin_mut};
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::call::{CALL_TIMEOUT, CallError, gone, refused, within};
use crate::launch::LaunchError;

/// How long one watch stands, in seconds: a connection that has died unnoticed hides changes for
/// so long and one more call.
const WATCH_SECONDS: u32 = 30;

/// What is watched.
#[derive(Clone, Debug)]
pub(super) struct Wanted<K: Clone> {
    pub(super) api: Api<K>,
    /// Its name in the API, for messages.
    pub(super) resource: &'static str,
    pub(super) namespace: String,
    pub(super) selector: String,
    /// Told of each object that replaces another.
    pub(super) changed: fn(&K, &K),
}

/// Objects by name, for as long as it lives.
#[derive(Debug)]
pub(super) struct Watched<K> {
    seen: watch::Receiver<Seen<K>>,
    /// Raised to have all listed anew.
    anew: watch::Sender<u64>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Seen<K> {
    objects: BTreeMap<String, Arc<K>>,
    /// The value of `anew` when they were listed.
    listed: u64,
    /// Why no watch stands.
    trouble: Option<String>,
}

impl<K> Watched<K>
where
    K: kube::Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    pub(super) fn start(wanted: Wanted<K>) -> Self {
        let (sender, seen) =
            watch::channel(Seen { objects: BTreeMap::new(), listed: 0, trouble: None });
        let (anew, orders) = watch::channel(1);
        let watcher = Watcher { wanted, sender, orders, version: None };
        Self { seen, anew, task: tokio::spawn(watcher.run()) }
    }

    /// Has all listed anew before any are told.
    pub(super) fn list_anew(&self) {
        self.anew.send_modify(|count| *count += 1);
    }

    /// All objects, by name; waits a little for a list that is under way.
    ///
    /// # Errors
    /// Why no watch stands.
    pub(super) async fn all(&self) -> Result<BTreeMap<String, Arc<K>>, String> {
        let wanted = *self.anew.borrow();
        let mut seen = self.seen.clone();
        let told = |seen: &Seen<K>| seen.listed >= wanted || seen.trouble.is_some();
        let seen = tokio::time::timeout(CALL_TIMEOUT, seen.wait_for(told)).await;
        let seen = seen.map_err(|_| "the API of Kubernetes does not answer".to_owned())?;
        let seen = seen.map_err(|_| "the watch has ended".to_owned())?;
        match &seen.trouble {
            Some(trouble) => Err(trouble.clone()),
            None => Ok(seen.objects.clone()),
        }
    }

    /// The objects as they were seen last, however long ago.
    pub(super) fn last(&self) -> BTreeMap<String, Arc<K>> {
        self.seen.borrow().objects.clone()
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Watcher<K: Clone> {
    wanted: Wanted<K>,
    sender: watch::Sender<Seen<K>>,
    orders: watch::Receiver<u64>,
    /// Where the next watch begins; `None` when all are to be listed.
    version: Option<String>,
}

impl<K> Watcher<K>
where
    K: kube::Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    async fn run(mut self) {
        let mut backoff = Backoff::new();
        loop {
            match self.follow(&mut backoff).await {
                // Its time is over, or all are to be listed.
                Ok(()) => {}
                Err(error) => self.lost(&error),
            }
            // A server that ends each watch at once is not asked at once again, either.
            backoff.wait().await;
        }
    }

    fn lost(&self, error: &LaunchError) {
        let error = error.to_string();
        let before = self.sender.borrow().trouble.clone();
        if before.as_ref() != Some(&error) {
            warn!(error, "lost sight of Kubernetes; trying again");
        }
        self.sender.send_modify(|seen| seen.trouble = Some(error));
    }

    /// Lists all objects, unless it is known where to go on; then one watch, to its end.
    async fn follow(&mut self, backoff: &mut Backoff) -> Result<(), LaunchError> {
        let order = *self.orders.borrow_and_update();
        if self.sender.borrow().listed < order {
            self.version = None;
        }
        let version = match &self.version {
            Some(version) => version.clone(),
            None => self.list(order).await?,
        };
        let Wanted { api, resource, namespace, selector, .. } = self.wanted.clone();
        let what = || format!("cannot watch {resource} in namespace `{namespace}`");
        let params = WatchParams::default().labels(&selector).timeout(WATCH_SECONDS);
        let events = match within(api.watch(&params, &version)).await {
            Err(error) if gone(&error) => return self.forgotten(),
            events => events.map_err(|error| refused(what(), error))?,
        };
        pin_mut!(events);
        let had_trouble = self.sender.borrow().trouble.is_some();
        if had_trouble {
            info!(resource, "Kubernetes is back");
        }
        self.sender.send_modify(|seen| seen.trouble = None);
        let stands = Instant::now();
        let silent = Duration::from_secs(WATCH_SECONDS.into()) + CALL_TIMEOUT;
        loop {
            let event = tokio::select! {
                _ = self.orders.changed() => {
                    backoff.reset();
                    return Ok(());
                }
                event = tokio::time::timeout(silent, events.next()) => event,
            };
            let Ok(event) = event else {
                let why = format!("nothing for {silent:?}");
                return Err(LaunchError::Kubernetes { what: what(), why, passes: true });
            };
            match event {
                None => {
                    if stands.elapsed() >= CALL_TIMEOUT {
                        backoff.reset();
                    }
                    return Ok(());
                }
                Some(Ok(WatchEvent::Error(status))) if status.code == 410 => {
                    return self.forgotten();
                }
                Some(Ok(WatchEvent::Error(status))) => {
                    return Err(refused(what(), CallError::Said(kube::Error::Api(status))));
                }
                Some(Err(error)) => return Err(refused(what(), CallError::Said(error))),
                Some(Ok(event)) => {
                    backoff.reset();
                    self.apply(event);
                }
            }
        }
    }

    /// The version is too old: not a failure, but everything must be listed.
    fn forgotten(&mut self) -> Result<(), LaunchError> {
        info!(
            resource = self.wanted.resource,
            "Kubernetes has forgotten our version; listing anew"
        );
        self.version = None;
        Ok(())
    }

    async fn list(&mut self, order: u64) -> Result<String, LaunchError> {
        let Wanted { api, resource, namespace, selector, changed } = self.wanted.clone();
        let what = || format!("cannot list {resource} in namespace `{namespace}`");
        // Without a version: what all members of etcd agree on, not what a server remembers.
        let params = ListParams::default().labels(&selector);
        let list = within(api.list(&params)).await;
        let list = list.map_err(|error| refused(what(), error))?;
        let version = list.metadata.resource_version.unwrap_or_default();
        let objects: BTreeMap<String, Arc<K>> =
            list.items.into_iter().map(|object| (object.name_any(), Arc::new(object))).collect();
        self.sender.send_modify(|seen| {
            for (name, object) in &objects {
                if let Some(old) = seen.objects.get(name) {
                    changed(old, object);
                }
            }
            (seen.objects, seen.listed) = (objects, order);
        });
        self.version = Some(version.clone());
        Ok(version)
    }

    fn apply(&mut self, event: WatchEvent<K>) {
        let changed = self.wanted.changed;
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                self.version = object.resource_version();
                self.sender.send_modify(|seen| {
                    let (name, object) = (object.name_any(), Arc::new(object));
                    if let Some(old) = seen.objects.insert(name, Arc::clone(&object)) {
                        changed(&old, &object);
                    }
                });
            }
            WatchEvent::Deleted(object) => {
                self.version = object.resource_version();
                self.sender.send_modify(|seen| {
                    seen.objects.remove(&object.name_any());
                });
            }
            WatchEvent::Bookmark(bookmark) => {
                self.version = Some(bookmark.metadata.resource_version);
            }
            WatchEvent::Error(_) => {}
        }
    }
}
