//! The last sequences that this gateway served: which workers computed them, and how.
//!
//! Kept in memory, for people who watch the cluster work. It holds ids and counts, no text.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use baton_proto::v1::{Started, Transport};
use parking_lot::Mutex;

use super::{Served, Worker};
use crate::metrics::transport;

/// Sequences remembered.
pub const KEPT: usize = 64;

/// Where a sequence was computed, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The reply's id; all sequences of a request have the same.
    pub request_id: String,
    /// The model's served name.
    pub model: String,
    /// When its first token came.
    pub started: SystemTime,
    /// From the request's arrival at the gateway to its first token.
    pub ttft: Duration,
    /// The worker that generates it; after a migration, the one that went on.
    pub decode: String,
    /// The prefill worker that computed the prompt; `None` when `decode` did. After a migration,
    /// the worker that the KV came from.
    pub prefill: Option<String>,
    /// How the KV blocks came from there: `shm`, `grpc`, `cuda-ipc` or `nccl`; `None` when none did.
    pub transport: Option<&'static str>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the decode worker's prefix cache.
    pub cached_tokens: u32,
    /// Of these, computed by the prefill worker.
    pub handed_off_tokens: u32,
    /// Size of the KV blocks of those.
    pub handed_off_bytes: u64,
    /// From the sequence's arrival at the worker to its admission.
    pub queue: Duration,
    /// From admission to the first token.
    pub prefill_time: Duration,
    /// How often it went on with another worker.
    pub migrations: u32,
}

impl Placement {
    /// What a worker says of a sequence when it has computed the prompt.
    pub fn new(
        request_id: &str,
        served: &Served,
        prompt_tokens: usize,
        worker: &Worker,
        started: &Started,
        ttft: Duration,
    ) -> Self {
        let handed_off = started.handed_off_tokens > 0;
        Self {
            request_id: request_id.to_owned(),
            model: served.card.name.clone(),
            started: SystemTime::now(),
            ttft,
            decode: worker.record.id.clone(),
            prefill: handed_off.then(|| started.prefill_instance_id.clone()),
            transport: Some(started.transport())
                .filter(|kind| handed_off && *kind != Transport::Unspecified)
                .map(transport),
            prompt_tokens,
            cached_tokens: started.cached_tokens,
            handed_off_tokens: started.handed_off_tokens,
            handed_off_bytes: served.kv_bytes(started.handed_off_tokens),
            queue: Duration::from_micros(started.queue_us),
            prefill_time: Duration::from_micros(started.prefill_us),
            migrations: 0,
        }
    }
}

/// The last [`KEPT`] sequences.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Numbered>);

#[derive(Debug, Default)]
struct Numbered {
    /// Oldest first.
    kept: VecDeque<(u64, Placement)>,
    next: u64,
}

impl Recent {
    /// Remembers a sequence that has begun; returns its number for [`Recent::moved`].
    pub fn started(&self, placement: Placement) -> u64 {
        let mut list = self.0.lock();
        let number = list.next;
        list.next += 1;
        if list.kept.len() == KEPT {
            list.kept.pop_front();
        }
        list.kept.push_back((number, placement));
        number
    }

    /// Notes that a sequence went on with another worker. Its first token stays when it was.
    pub fn moved(&self, number: u64, placement: Placement) {
        let mut list = self.0.lock();
        if let Some((_, kept)) = list.kept.iter_mut().find(|(known, _)| *known == number) {
            *kept = Placement {
                started: kept.started,
                ttft: kept.ttft,
                migrations: kept.migrations + 1,
                ..placement
            };
        }
    }

    /// All that are remembered, newest first.
    pub fn list(&self) -> Vec<Placement> {
        self.0.lock().kept.iter().rev().map(|(_, placement)| placement.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(id: &str, decode: &str, ttft_ms: u64) -> Placement {
        Placement {
            request_id: id.to_owned(),
            model: "m".to_owned(),
            started: SystemTime::UNIX_EPOCH,
            ttft: Duration::from_millis(ttft_ms),
            decode: decode.to_owned(),
            prefill: None,
            transport: None,
            prompt_tokens: 3,
            cached_tokens: 0,
            handed_off_tokens: 0,
            handed_off_bytes: 0,
            queue: Duration::ZERO,
            prefill_time: Duration::ZERO,
            migrations: 0,
        }
    }

    #[test]
    fn the_newest_are_kept_and_come_first() {
        let recent = Recent::default();
        for i in 0..KEPT + 10 {
            recent.started(placement(&i.to_string(), "a", 1));
        }
        let list = recent.list();
        assert_eq!(list.len(), KEPT);
        assert_eq!(list[0].request_id, (KEPT + 9).to_string());
        assert_eq!(list[KEPT - 1].request_id, "10");
    }

    #[test]
    fn a_sequence_that_moves_shows_where_it_is_now_and_when_it_began() {
        let recent = Recent::default();
        // Choices of one request share its id.
        let first = recent.started(placement("r", "a", 5));
        let second = recent.started(placement("r", "a", 6));
        recent.moved(second, placement("r", "b", 900));
        recent.moved(second, placement("r", "c", 900));
        let list = recent.list();
        assert_eq!((list[0].decode.as_str(), list[0].migrations), ("c", 2));
        assert_eq!(list[0].ttft, Duration::from_millis(6));
        assert_eq!((list[1].decode.as_str(), list[1].migrations), ("a", 0));
        // One that is forgotten already is no error.
        (0..KEPT as u64).for_each(|i| assert!(recent.started(placement("x", "a", i)) > second));
        recent.moved(first, placement("r", "d", 1));
        assert!(recent.list().iter().all(|kept| kept.request_id == "x"));
    }
}
