//! Replays the events of a response in the background, and goes on live until its end.
//!
//! Followers read the store, whichever gateway generates; the one that does wakes its own when
//! there is more to read. So a follower that is slow, or gone, is nothing to the generation.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix_web::web::Bytes;
use futures::Stream;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::super::Shared;
use super::super::connection::Connection;
use super::super::frames::Frames;
use super::super::generation::written;
use super::super::load::Place;
use super::failed;
use crate::api::responses::object::Status;
use crate::error::ApiError;
use crate::store::Store;

/// How often the store is asked for what another gateway generates.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The same where this gateway generates, should a wake-up be missed.
const LOOK_AT_LEAST: Duration = Duration::from_secs(2);
/// Events that are read at once.
const BATCH: i64 = 256;

/// The events behind number `after`.
pub(super) fn follow(
    shared: Arc<Shared>,
    id: String,
    after: i64,
    place: Place,
    client: Option<Connection>,
) -> impl Stream<Item = Result<Bytes, actix_web::Error>> {
    written(client, None, async move |sender| {
        // Followers count as requests in progress.
        let _place = place;
        replay(&shared, &id, after, &sender).await;
    })
}

async fn replay(shared: &Shared, id: &str, mut last: i64, sender: &mpsc::Sender<Bytes>) {
    let Some(store) = &shared.responses.store else { return };
    let mut frames = Frames::default();
    loop {
        // Before the store is read: what is written meanwhile is not missed.
        let local = shared.responses.background.watch(id);
        let step = step(shared, store, id, &mut last, &mut frames).await;
        let over = step.unwrap_or_else(|error| {
            let error = &error.body()["error"];
            let event = json!({
                "type": "error",
                "sequence_number": last.saturating_add(1),
                "code": "server_error",
                "message": error["message"],
                "param": null,
            });
            frames.event("error", &event);
            Step::Over
        });
        if let Some(text) = frames.take()
            && sender.send(text.into()).await.is_err()
        {
            return;
        }
        match over {
            Step::Over => return,
            Step::More => {}
            // Another gateway can go on from where this one stops.
            Step::CaughtUp if local.is_none() && shared.draining.load(Relaxed) => return,
            Step::CaughtUp => wait(local).await,
        }
    }
}

enum Step {
    /// There may be more in the store.
    More,
    /// There is no more now.
    CaughtUp,
    /// There will be no more.
    Over,
}

async fn step(
    shared: &Shared,
    store: &Store,
    id: &str,
    last: &mut i64,
    frames: &mut Frames,
) -> Result<Step, ApiError> {
    // First the status: a response that has ended now has all its events.
    let status = failed(shared, store, "follow", store.status(id).await)?;
    let events = failed(shared, store, "follow", store.events(id, *last, BATCH).await)?;
    let more = events.len() as i64 == BATCH;
    let mut terminal = false;
    for (number, payload) in events {
        let event: Value = serde_json::from_str(&payload)
            .map_err(|_| ApiError::internal("An event was kept that cannot be read."))?;
        let kind = event["type"].as_str().unwrap_or_default();
        terminal |=
            matches!(kind, "response.completed" | "response.incomplete" | "response.failed");
        frames.event(kind, &event);
        *last = number;
    }
    if terminal {
        return Ok(Step::Over);
    }
    if more {
        return Ok(Step::More);
    }
    match status.as_deref() {
        Some(status) if Status::is_live(status) => return Ok(Step::CaughtUp),
        // One whose gateway is gone could not say so itself.
        Some(status) if status == Status::Failed.as_str() => {
            if let Some(event) = failure(shared, store, id, *last).await? {
                frames.event("response.failed", &event);
            }
        }
        _ => {}
    }
    Ok(Step::Over)
}

/// The last event of a response that was found to be lost; `None` where it has one of its own.
async fn failure(
    shared: &Shared,
    store: &Store,
    id: &str,
    last: i64,
) -> Result<Option<Value>, ApiError> {
    let tail = failed(shared, store, "follow", store.last_event(id).await)?;
    let (number, told) = match &tail {
        Some((number, payload)) => (*number, payload.contains("\"type\":\"response.failed\"")),
        None => (-1, false),
    };
    if told || last > number {
        return Ok(None);
    }
    let body = failed(shared, store, "follow", store.body(id).await)?;
    let response: Option<Value> = body.and_then(|body| serde_json::from_str(&body).ok());
    Ok(response.map(|response| {
        json!({
            "type": "response.failed",
            "sequence_number": number + 1,
            "response": response,
        })
    }))
}

async fn wait(local: Option<watch::Receiver<()>>) {
    match local {
        Some(mut grown) => {
            // When it ends, the next look sees it.
            let _ = tokio::time::timeout(LOOK_AT_LEAST, grown.changed()).await;
        }
        None => tokio::time::sleep(LOOK_EVERY).await,
    }
}
