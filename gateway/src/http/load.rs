//! How many generation requests are in progress, and how many may be.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::error::ApiError;

/// Generation requests in progress.
pub struct Load {
    now: AtomicUsize,
    most: usize,
}

/// One request's place; dropping it, and what it was cloned to, makes room.
#[derive(Clone)]
pub struct Place {
    _taken: Arc<Taken>,
}

struct Taken(Arc<Load>);

impl Load {
    /// Room for `most` requests.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { now: AtomicUsize::new(0), most })
    }

    /// Requests in progress.
    pub fn now(&self) -> usize {
        self.now.load(Relaxed)
    }

    /// Requests that there may be.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Takes a place.
    pub fn enter(self: &Arc<Self>) -> Result<Place, ApiError> {
        // The place exists before the check, so that two cannot take the last one.
        let place = Place { _taken: Arc::new(Taken(self.clone())) };
        if self.now.fetch_add(1, Relaxed) >= self.most {
            let message = format!(
                "This gateway serves {} requests at once, and has as many; try again soon.",
                self.most
            );
            return Err(ApiError::overloaded(message));
        }
        Ok(place)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Relaxed);
    }
}
