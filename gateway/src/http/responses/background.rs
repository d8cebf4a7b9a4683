//! Responses that are generated without their client's connection, and the looking after those
//! whose gateway is gone.
//!
//! What happens to a response is in the store, where every gateway sees it. Whoever wants one to
//! end writes that it has ended; its own gateway looks at the store often, and stops.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::MissedTickBehavior;
use tracing::Instrument as _;

use super::super::Shared;
use super::super::generation::Order;
use super::run::Sink;
use super::{Ready, Responses, failed, taken};
use crate::api::responses::events::Event;
use crate::api::responses::object::{ResponseObject, Status};
use crate::api::responses::request::reworded;
use crate::error::ApiError;
use crate::quota::Permit;
use crate::store::{self, Store, StoreError};

/// How often the store is asked whether running responses were ended elsewhere.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Looks between heartbeats, and between searches for silent gateways.
const BEAT: u64 = 4;
const SEARCH: u64 = 10;
/// How long a gateway may be silent before its responses are given up. The store must have
/// answered for as long: when it was away, all have been silent.
const SILENT: Duration = Duration::from_secs(15);
/// Responses that one search takes.
const BATCH: i64 = 200;
/// How often expired responses are deleted, how many at once, and how long others may write in
/// between.
const EXPIRE_EVERY: Duration = Duration::from_secs(60);
const EXPIRE_BATCH: i64 = 100;
const EXPIRE_PAUSE: Duration = Duration::from_millis(100);
/// How often a response that is queued looks for a worker.
const START_EVERY: Duration = Duration::from_millis(500);
/// How long events wait for others, and how many go at once.
const GATHER: Duration = Duration::from_millis(50);
const MOST_EVENTS: usize = 128;
/// How long to wait between tries to write.
const PAUSES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];
/// How long responses may take to be written down when the gateway stops.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Why a response in the background stops before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// It was ended, or deleted, in the store.
    Elsewhere,
    /// This gateway stops.
    Stopping,
}

/// The responses that this gateway generates in the background.
pub(super) struct Background {
    /// This gateway, in the store.
    owner: String,
    most: usize,
    running: Mutex<HashMap<String, Arc<Running>>>,
    stopped: AtomicBool,
}

struct Running {
    cause: watch::Sender<Option<Cause>>,
    /// Changes with each write of events.
    grown: watch::Sender<()>,
    /// Whether the store has it.
    stored: AtomicBool,
}

impl Background {
    pub(super) fn new(most: usize) -> Self {
        Self {
            owner: uuid::Uuid::new_v4().simple().to_string(),
            most,
            running: Mutex::default(),
            stopped: AtomicBool::new(false),
        }
    }

    fn enter(&self, id: &str) -> Result<Arc<Running>, ApiError> {
        let mut running = self.running.lock();
        if running.contains_key(id) {
            return Err(taken(id));
        }
        if running.len() >= self.most {
            let message = format!(
                "This gateway generates {} responses in the background at once, and has as many; \
                 try again soon.",
                self.most
            );
            return Err(ApiError::overloaded(message));
        }
        let new = Arc::new(Running {
            cause: watch::Sender::new(None),
            grown: watch::Sender::new(()),
            stored: AtomicBool::new(false),
        });
        running.insert(id.to_owned(), new.clone());
        Ok(new)
    }

    /// Stops a response, if it is one of this gateway's.
    pub(super) fn end(&self, id: &str, cause: Cause) {
        if let Some(running) = self.running.lock().get(id) {
            running.cause.send_replace(Some(cause));
        }
    }

    /// Changes when a response of this gateway has new events.
    pub(super) fn watch(&self, id: &str) -> Option<watch::Receiver<()>> {
        self.running.lock().get(id).map(|running| running.grown.subscribe())
    }

    fn ids(&self, stored: bool) -> Vec<String> {
        let running = self.running.lock();
        let all = running.iter().filter(|(_, running)| !stored || running.stored.load(Relaxed));
        all.map(|(id, _)| id.clone()).collect()
    }
}

/// A response's place among those that run.
struct Seat {
    shared: Arc<Shared>,
    id: String,
    running: Arc<Running>,
    /// Its place in its client's quota, which the reply does not hold for long enough.
    _permit: Option<Permit>,
}

impl Seat {
    /// Waits for somebody to stop the response.
    async fn ended(&self) -> Cause {
        let mut cause = self.running.cause.subscribe();
        match cause.wait_for(Option::is_some).await {
            Ok(cause) => cause.unwrap_or(Cause::Elsewhere),
            Err(_) => Cause::Elsewhere,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.responses.background.running.lock().remove(&self.id);
    }
}

/// Keeps a response as queued and sends it on its way. A task of its own does both, so that a
/// client that leaves in between leaves nothing half done.
pub(super) async fn start(
    shared: &Arc<Shared>,
    ready: Ready,
    order: Order,
    permit: Option<Permit>,
) -> Result<(), ApiError> {
    let running = shared.responses.background.enter(&ready.id)?;
    let seat = Seat { shared: shared.clone(), id: ready.id.clone(), running, _permit: permit };
    let (tell, told) = oneshot::channel();
    actix_web::rt::spawn(generate(seat, ready, order, tell).in_current_span());
    told.await.unwrap_or_else(|_| Err(ApiError::internal("The response was not begun.")))
}

async fn generate(
    seat: Seat,
    mut ready: Ready,
    order: Order,
    tell: oneshot::Sender<Result<(), ApiError>>,
) {
    let shared = seat.shared.clone();
    let Some(store) = &shared.responses.store else { return };
    let record = ready.record(Status::Queued, Some(shared.responses.background.owner.clone()));
    let inserted = failed(&shared, store, "insert", store.insert(&record).await);
    let inserted = inserted.and_then(|new| if new { Ok(()) } else { Err(taken(&seat.id)) });
    let kept = inserted.is_ok();
    // A client that has left wants the response all the same.
    let _ = tell.send(inserted);
    if !kept {
        return;
    }
    seat.running.stored.store(true, Relaxed);

    let mut log = Log { seat: &seat, store, keeps: ready.streams, events: Vec::new(), since: None };
    ready.reader.writer.created();
    ready.reader.writer.queued();
    let stopped = tokio::select! {
        biased;
        cause = seat.ended() => Some(cause),
        done = answer(&mut ready, order, &mut log) => match done {
            Ok(true) => None,
            Ok(false) => Some(Cause::Elsewhere),
            Err(error) => {
                ready.reader.fail(&error);
                None
            }
        },
    };
    match stopped {
        Some(Cause::Elsewhere) => return,
        Some(Cause::Stopping) => {
            let message = "The server stopped before the response was complete; ask again.";
            ready.reader.fail(&ApiError::unavailable(message));
        }
        None => {}
    }
    let writer = &mut ready.reader.writer;
    log.add(writer.take());
    let last = writer.ended();
    log.add(vec![last]);
    let (status, body) = (writer.response.status().as_str(), writer.response.text());
    let events = std::mem::take(&mut log.events);
    // Should all tries fail, it is found later to run nowhere.
    let _ =
        persist(&shared, store, "finish", || store.finish(&seat.id, status, &body, &events)).await;
    seat.running.grown.send_replace(());
}

/// Generates; `false` when the response was ended elsewhere.
async fn answer(ready: &mut Ready, order: Order, log: &mut Log<'_>) -> Result<bool, ApiError> {
    log.send(ready.reader.writer.take()).await?;
    log.idle().await?;
    let until = order.arrived + order.shared.limits.request_timeout;
    let mut answer = loop {
        match order.clone().start(None).await {
            Ok(answers) => break answers.single()?,
            // Nobody waits for it: it may wait for a worker.
            Err(error) if error.passes() && Instant::now() < until => {
                tokio::time::sleep(START_EVERY).await;
            }
            Err(error) => return Err(reworded(error)),
        }
    };
    drop(order);
    ready.reader.writer.in_progress();
    let body = ready.reader.writer.response.text();
    let (store, id) = (log.store, &ready.id);
    if !persist(&log.seat.shared, store, "begin", || store.begin(id, &body)).await? {
        return Ok(false);
    }
    ready.reader.read(&mut answer, log).await?;
    Ok(true)
}

/// Writes, and again when that fails.
async fn persist<T, F: Future<Output = Result<T, StoreError>>>(
    shared: &Shared,
    store: &Store,
    operation: &str,
    write: impl Fn() -> F,
) -> Result<T, ApiError> {
    for pause in PAUSES {
        if let Ok(done) = failed(shared, store, operation, write().await) {
            return Ok(done);
        }
        tokio::time::sleep(pause).await;
    }
    failed(shared, store, operation, write().await)
}

/// Writes events to the store, some at a time.
struct Log<'a> {
    seat: &'a Seat,
    store: &'a Store,
    /// Whether events are kept at all.
    keeps: bool,
    events: Vec<store::Event>,
    /// When the first of them came.
    since: Option<Instant>,
}

impl Log<'_> {
    fn add(&mut self, events: Vec<Event>) {
        if self.keeps && !events.is_empty() {
            let row = |event: Event| (event.number as i64, event.json().to_string());
            self.events.extend(events.into_iter().map(row));
            self.since.get_or_insert_with(Instant::now);
        }
    }

    fn age(&self) -> Option<Duration> {
        self.since.map(|since| since.elapsed())
    }
}

impl Sink for Log<'_> {
    async fn send(&mut self, events: Vec<Event>) -> Result<(), ApiError> {
        self.add(events);
        if self.events.len() >= MOST_EVENTS || self.age().is_some_and(|age| age >= GATHER) {
            self.idle().await?;
        }
        Ok(())
    }

    fn patience(&self) -> Duration {
        self.age().map_or(Duration::MAX, |age| GATHER.saturating_sub(age))
    }

    async fn idle(&mut self) -> Result<(), ApiError> {
        let (store, id, events) = (self.store, &self.seat.id, &self.events);
        persist(&self.seat.shared, store, "append", || store.append(id, events)).await?;
        self.events.clear();
        self.since = None;
        self.seat.running.grown.send_replace(());
        Ok(())
    }
}

impl Responses {
    /// Looks after the store, for as long as the gateway runs.
    pub async fn tend(shared: Arc<Shared>) {
        if let Some(store) = &shared.responses.store {
            // Side by side: however much there is to delete, this gateway is heard of in time.
            tokio::join!(watch_over(&shared, store), expire(&shared, store));
        }
    }

    /// Ends what runs in the background, because the gateway stops.
    pub async fn stop(&self) {
        for id in self.background.ids(false) {
            self.background.end(&id, Cause::Stopping);
        }
        let ended = async {
            while !self.background.ids(false).is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(STOP_WITHIN, ended).await;
        self.background.stopped.store(true, Relaxed);
        if let Some(store) = &self.store {
            store.close().await;
        }
    }
}

/// Looks after the responses of this gateway, and those of gateways that are gone.
async fn watch_over(shared: &Shared, store: &Store) {
    let background = &shared.responses.background;
    let mut interval = tokio::time::interval(LOOK_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Since when the store has answered, as far as this gateway knows.
    let mut answers: Option<Instant> = None;
    for look in 0.. {
        interval.tick().await;
        if background.stopped.load(Relaxed) {
            return;
        }
        let looked = look_after(background, store, look, answers).await;
        // Logged and counted; the next look may do better.
        match failed(shared, store, "tend", looked) {
            Err(_) => answers = None,
            // Of a gateway without responses, the other looks do not reach the store.
            Ok(()) if look.is_multiple_of(SEARCH) => answers = answers.or(Some(Instant::now())),
            Ok(()) => {}
        }
    }
}

async fn look_after(
    background: &Background,
    store: &Store,
    look: u64,
    answers: Option<Instant>,
) -> Result<(), StoreError> {
    let search = look.is_multiple_of(SEARCH);
    let before = background.ids(true);
    if before.is_empty() && !search {
        return Ok(());
    }
    // First of all: others may be about to search, and a store that was away has old heartbeats.
    if search || look.is_multiple_of(BEAT) || answers.is_none() {
        store.beat(&background.owner).await?;
    }
    let alive = store.alive(&background.owner).await?;
    for id in before.iter().filter(|id| !alive.contains(id)) {
        background.end(id, Cause::Elsewhere);
    }
    let now = background.ids(false);
    // The store was away when it ended.
    for id in alive.iter().filter(|id| !now.contains(id)) {
        lose(store, id, "The response has ended, but could not be kept; ask again.").await?;
    }
    if search && answers.is_some_and(|since| since.elapsed() >= SILENT) {
        for id in store.abandoned(&background.owner, SILENT, BATCH).await? {
            tracing::warn!(id, "a response was left by its gateway");
            let message = "The server that generated the response stopped unexpectedly; ask again.";
            lose(store, &id, message).await?;
        }
    }
    Ok(())
}

/// Deletes responses whose time is over.
async fn expire(shared: &Shared, store: &Store) {
    let mut interval = tokio::time::interval(EXPIRE_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        loop {
            if shared.responses.background.stopped.load(Relaxed) {
                return;
            }
            // A failure is logged and counted; the next minute may do better.
            let deleted = failed(shared, store, "expire", store.expire(EXPIRE_BATCH).await);
            if !deleted.is_ok_and(|count| count >= EXPIRE_BATCH as u64) {
                break;
            }
            tokio::time::sleep(EXPIRE_PAUSE).await;
        }
    }
}

/// Marks a response failed that nobody generates.
async fn lose(store: &Store, id: &str, message: &str) -> Result<(), StoreError> {
    let Some(body) = store.body(id).await? else { return Ok(()) };
    let Ok(mut response) = ResponseObject::parse(&body) else { return Ok(()) };
    response.fail(&ApiError::unavailable(message));
    store.finish(id, Status::Failed.as_str(), &response.text(), &[]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::SqlitePool;

    use super::*;
    use crate::api::envelope::unix_seconds;
    use crate::store::{Place, Record};

    #[tokio::test]
    async fn nobody_is_given_up_before_the_store_has_answered_for_a_while() {
        let folder = std::env::temp_dir().join(format!("baton-watch-{}", std::process::id()));
        let file = folder.join("responses.db");
        let store = Store::open(&Place::Sqlite(Some(file.clone())), 60).await.unwrap().unwrap();
        let background = Background::new(2);
        background.enter("own").unwrap().stored.store(true, Relaxed);
        for (id, owner) in [("own", background.owner.as_str()), ("other", "another gateway")] {
            let record = Record {
                id: id.into(),
                created: unix_seconds(),
                status: Status::Queued.as_str(),
                owner: Some(owner.into()),
                streamed: false,
                key: String::new(),
                previous: None,
                body: "{}".into(),
                input: "[]".into(),
            };
            assert!(store.insert(&record).await.unwrap());
        }
        // As after an outage.
        let pool = SqlitePool::connect(&format!("sqlite:{}", file.display())).await.unwrap();
        sqlx::query("UPDATE responses SET heartbeat = 0").execute(&pool).await.unwrap();
        for answers in [None, Some(Instant::now())] {
            look_after(&background, &store, SEARCH, answers).await.unwrap();
            assert_eq!(store.status("other").await.unwrap().unwrap(), "queued");
        }
        // This gateway beats at the first look, so that no other takes it for dead.
        let silent = store.abandoned("a third one", SILENT, BATCH).await.unwrap();
        assert_eq!(silent, ["other"]);
        let long_ago = Instant::now().checked_sub(SILENT);
        look_after(&background, &store, SEARCH + 1, long_ago).await.unwrap();
        assert_eq!(store.status("other").await.unwrap().unwrap(), "queued");
        look_after(&background, &store, SEARCH, long_ago).await.unwrap();
        assert_eq!(store.status("other").await.unwrap().unwrap(), "failed");
        assert_eq!(store.status("own").await.unwrap().unwrap(), "queued");
        pool.close().await;
        store.close().await;
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
