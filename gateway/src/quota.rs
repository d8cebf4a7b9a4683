//! How much one client may ask for: requests a minute, and requests at once.
//!
//! A client is a key, or without keys an address. The rate is GCRA's, as the governor crate has it
//! (ITU-T I.371): a burst of a minute's requests, then one each time that one is due.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota as Rate, RateLimiter};
use parking_lot::Mutex;

use crate::auth::KeyDigest;
use crate::error::ApiError;

/// How often clients are forgotten that have been silent for so long that they have all their
/// requests again.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

type Limiter =
    RateLimiter<Client, DefaultKeyedStateStore<Client>, DefaultClock, StateInformationMiddleware>;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// The holder of a key.
    Key(KeyDigest),
    /// A host. Of an IPv6 address, the network: a host has all of it.
    Address(IpAddr),
}

impl Client {
    /// The client at an address.
    pub fn at(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                Self::Address(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
            }
            v4 => Self::Address(v4),
        }
    }
}

/// The limits of every client, and where each stands.
pub struct Quota {
    rate: Option<(NonZeroU32, Limiter)>,
    /// Requests at once, and those in progress.
    most: Option<usize>,
    open: Mutex<HashMap<Client, usize>>,
}

/// A client's account after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Requests a minute.
    pub limit: u32,
    /// Requests that may follow at once.
    pub remaining: u32,
    /// Until all may.
    pub reset: Duration,
}

/// One request's place among its client's; dropping it, and what it was cloned to, makes room.
#[derive(Clone)]
pub struct Permit {
    _taken: Arc<Taken>,
}

struct Taken {
    quota: Arc<Quota>,
    client: Client,
}

/// A request over a limit.
#[derive(Debug)]
pub struct Refused {
    /// What the client is told.
    pub error: ApiError,
    /// Its account, when it has a rate.
    pub standing: Option<Standing>,
}

impl Quota {
    /// Limits of each client; 0 is none.
    pub fn new(requests_per_minute: u32, max_concurrent: usize) -> Arc<Self> {
        let rate = NonZeroU32::new(requests_per_minute).map(|n| {
            let limiter = RateLimiter::keyed(Rate::per_minute(n));
            (n, limiter.with_middleware::<StateInformationMiddleware>())
        });
        Arc::new(Self {
            rate,
            most: (max_concurrent > 0).then_some(max_concurrent),
            open: Mutex::default(),
        })
    }

    /// Whether there is any limit.
    pub fn limits(&self) -> bool {
        self.rate.is_some() || self.most.is_some()
    }

    /// Counts a request of `client`, or refuses it.
    pub fn enter(
        self: &Arc<Self>,
        client: Client,
    ) -> Result<(Option<Permit>, Option<Standing>), Box<Refused>> {
        // First, so that a request that is refused for it is not counted against the rate.
        let permit = match self.most {
            Some(most) => Some(self.permit(client, most)?),
            None => None,
        };
        Ok((permit, self.count(client)?))
    }

    /// The same for a request that takes no place.
    pub fn count(&self, client: Client) -> Result<Option<Standing>, Box<Refused>> {
        let Some((limit, limiter)) = &self.rate else { return Ok(None) };
        let limit = limit.get();
        let each = Duration::from_secs(60) / limit;
        match limiter.check_key(&client) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                let reset = each * limit.saturating_sub(remaining);
                Ok(Some(Standing { limit, remaining, reset }))
            }
            Err(not_until) => {
                let wait = not_until.wait_time_from(limiter.clock().now());
                let seconds = (wait.as_secs_f64().ceil() as u32).max(1);
                let message = format!(
                    "More than {limit} requests a minute came from this client \
                     (--key-requests-per-minute); try again in {seconds} s."
                );
                let reset = wait + each * (limit - 1);
                Err(Box::new(Refused {
                    error: ApiError::over_quota(message, seconds),
                    standing: Some(Standing { limit, remaining: 0, reset }),
                }))
            }
        }
    }

    fn permit(self: &Arc<Self>, client: Client, most: usize) -> Result<Permit, Box<Refused>> {
        let mut open = self.open.lock();
        let now = open.entry(client).or_default();
        if *now >= most {
            let message = format!(
                "{most} requests of this client are in progress, which is the most at once \
                 (--key-max-concurrent); try again when one has ended."
            );
            return Err(Box::new(Refused {
                error: ApiError::over_quota(message, 1),
                standing: None,
            }));
        }
        *now += 1;
        Ok(Permit { _taken: Arc::new(Taken { quota: self.clone(), client }) })
    }

    /// Forgets silent clients, for as long as the process lives.
    pub async fn sweep(self: Arc<Self>) {
        let Some((_, limiter)) = &self.rate else { return };
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut open = self.quota.open.lock();
        if let Some(now) = open.get_mut(&self.client) {
            *now -= 1;
            if *now == 0 {
                open.remove(&self.client);
            }
        }
    }
}

impl Standing {
    /// The headers by which OpenAI says this.
    pub fn headers(&self) -> [(&'static str, String); 3] {
        [
            ("x-ratelimit-limit-requests", self.limit.to_string()),
            ("x-ratelimit-remaining-requests", self.remaining.to_string()),
            ("x-ratelimit-reset-requests", span(self.reset)),
        ]
    }
}

/// A time as OpenAI writes it: `6m0s`, `1.5s`, `120ms`.
fn span(time: Duration) -> String {
    let millis = time.as_millis();
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    match (minutes, rest) {
        (0, 0..1000) => format!("{rest}ms"),
        (0, _) => format!("{}s", rest as f64 / 1e3),
        _ => format!("{minutes}m{}s", rest as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> Client {
        Client::Key([n; 32])
    }

    #[test]
    fn each_client_has_a_rate_of_its_own() {
        let quota = Quota::new(3, 0);
        for remaining in [2, 1, 0] {
            let (permit, standing) = quota.enter(client(1)).unwrap();
            let standing = standing.unwrap();
            assert_eq!((standing.limit, standing.remaining), (3, remaining));
            assert!(permit.is_none());
        }
        let refused = quota.enter(client(1)).err().unwrap();
        let standing = refused.standing.unwrap();
        assert_eq!(standing.remaining, 0);
        assert!(standing.reset > Duration::from_secs(58), "{standing:?}");
        assert!(refused.error.to_string().contains("3 requests a minute"), "{}", refused.error);
        quota.enter(client(2)).unwrap();
    }

    #[test]
    fn a_permit_is_held_until_it_is_dropped() {
        let quota = Quota::new(0, 2);
        let first = quota.enter(client(1)).unwrap();
        let _second = quota.enter(client(1)).unwrap();
        let refused = quota.enter(client(1)).err().unwrap();
        assert!(refused.error.to_string().contains("--key-max-concurrent"), "{}", refused.error);
        let other = quota.enter(client(2)).unwrap();
        let kept = first.0.clone();
        drop(first);
        quota.enter(client(1)).err().unwrap();
        drop(kept);
        let third = quota.enter(client(1)).unwrap();
        drop((third, other, _second));
        assert!(quota.open.lock().is_empty(), "a client at rest takes memory");
    }

    #[test]
    fn what_is_refused_for_the_number_at_once_does_not_count_against_the_rate() {
        let quota = Quota::new(2, 1);
        let held = quota.enter(client(1)).unwrap();
        for _ in 0..10 {
            quota.enter(client(1)).err().unwrap();
        }
        drop(held);
        quota.enter(client(1)).unwrap();
        // And what is refused for the rate holds no place.
        quota.enter(client(1)).err().unwrap();
        assert!(quota.open.lock().is_empty());
    }

    #[test]
    fn what_takes_no_place_counts_against_the_rate_all_the_same() {
        let quota = Quota::new(2, 1);
        let _held = quota.enter(client(1)).unwrap();
        assert_eq!(quota.count(client(1)).unwrap().unwrap().remaining, 0);
        quota.count(client(1)).unwrap_err();
    }

    #[test]
    fn without_limits_nothing_is_counted() {
        let quota = Quota::new(0, 0);
        assert!(!quota.limits());
        for _ in 0..1000 {
            assert!(matches!(quota.enter(client(1)), Ok((None, None))));
        }
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let at = |text: &str| Client::at(text.parse().unwrap());
        assert_eq!(at("2001:db8:1:2::1"), at("2001:db8:1:2:ffff::2"));
        assert_ne!(at("2001:db8:1:2::1"), at("2001:db8:1:3::1"));
        assert_eq!(at("::ffff:10.0.0.1"), at("10.0.0.1"));
        assert_ne!(at("10.0.0.2"), at("10.0.0.1"));
    }

    #[test]
    fn times_are_written_as_openai_writes_them() {
        let millis = Duration::from_millis;
        let cases = [(0, "0ms"), (120, "120ms"), (1500, "1.5s"), (2000, "2s"), (360_000, "6m0s")];
        for (time, text) in cases {
            assert_eq!(span(millis(time)), text);
        }
    }
}
