//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

/// Between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `probe` succeeds, and returns what it found and how long that took.
///
/// # Panics
/// When `within` has passed; the message holds the reason of the last failed look.
pub async fn eventually<T, F>(what: &str, within: Duration, mut probe: F) -> (T, Duration)
where
    F: AsyncFnMut() -> Result<T, String>,
{
    let start = Instant::now();
    loop {
        let looked = Instant::now();
        match tokio::time::timeout(within, probe()).await {
            Ok(Ok(found)) => return (found, start.elapsed()),
            Ok(Err(reason)) if start.elapsed() >= within => {
                panic!("not within {within:?}: {what}; at last: {reason}")
            }
            Ok(Err(_)) => tokio::time::sleep(INTERVAL.saturating_sub(looked.elapsed())).await,
            Err(_) => panic!("not within {within:?}: {what}; the last look did not return"),
        }
    }
}
