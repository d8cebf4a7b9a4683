//! Work on texts off the threads that serve: many at once, or a long one.

use std::sync::{Arc, LazyLock};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// Texts of so few bytes in all are worked on at once: to hand them over would take longer.
const SHORT: usize = 2 * 1024;
/// Bytes of texts that one thread takes in one go. Between two, other requests have their turn.
const GROUP: usize = 32 * 1024;

/// As many threads as there are cores.
static CORES: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));
/// One for each core: all requests together keep no more threads busy.
static THREADS: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(*CORES));

/// What `work` makes, once a core is free for it.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |error: &dyn std::fmt::Display| {
        ApiError::internal(format!("The tokenizer failed: {error}."))
    };
    let turn = THREADS.acquire().await.map_err(|error| failed(&error))?;
    let done = tokio::task::spawn_blocking(move || {
        // Until the thread is done, whether or not somebody still waits for it.
        let _turn = turn;
        work()
    });
    done.await.map_err(|error| failed(&error))
}

/// What `work` makes of each item, in order. `work` gets the item's place too, and `bytes` says how
/// much work there is with an item. The first error ends all.
pub async fn map<T, U>(
    items: Vec<T>,
    bytes: impl Fn(&T) -> usize,
    work: impl Fn(usize, T) -> Result<U, ApiError> + Send + Sync + 'static,
) -> Result<Vec<U>, ApiError>
where
    T: Send + 'static,
    U: Send + 'static,
{
    if items.iter().map(&bytes).sum::<usize>() < SHORT {
        return items.into_iter().enumerate().map(|(at, item)| work(at, item)).collect();
    }
    let count = items.len();
    let mut groups: Vec<(usize, Vec<T>)> = Vec::new();
    let mut left = 0;
    for (at, item) in items.into_iter().enumerate() {
        let size = bytes(&item).max(1);
        match groups.last_mut() {
            Some((_, group)) if size <= left => group.push(item),
            _ => {
                left = GROUP;
                groups.push((at, vec![item]));
            }
        }
        left = left.saturating_sub(size);
    }
    let work = Arc::new(work);
    let all = groups.into_iter().map(|(first, group)| {
        let work = work.clone();
        async move {
            let group = move || {
                let each = group.into_iter().enumerate();
                each.map(|(at, item)| work(first + at, item)).collect::<Result<Vec<U>, _>>()
            };
            run(group).await?
        }
    });
    // No more of them wait for a thread at a time: those of other requests come in between.
    let mut done = stream::iter(all).buffered(*CORES);
    let mut results = Vec::with_capacity(count);
    while let Some(group) = done.try_next().await? {
        results.extend(group);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn order_is_kept_and_the_first_error_is_told() {
        let sizes = [1, 40_000, 5, 20_000, 20_000, 1, 70_000, 3];
        let twice = |at: usize, item: usize| Ok((at, item * 2));
        let all = map(sizes.to_vec(), |size| *size, twice).await.unwrap();
        let expected: Vec<_> = sizes.iter().map(|size| size * 2).enumerate().collect();
        assert_eq!(all, expected);
        // Few bytes take the short way.
        assert_eq!(map(vec![1, 2], |_| 1, twice).await.unwrap(), [(0, 2), (1, 4)]);
        let fails = |at: usize, _: usize| match at {
            3 => Err(ApiError::internal("here")),
            _ => Ok(at),
        };
        assert!(map(sizes.to_vec(), |size| *size, fails).await.is_err());
    }

    #[tokio::test]
    async fn no_more_threads_are_busy_than_there_are_cores() {
        static BUSY: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let work = || {
            MOST.fetch_max(BUSY.fetch_add(1, Relaxed) + 1, Relaxed);
            std::thread::sleep(Duration::from_millis(20));
            BUSY.fetch_sub(1, Relaxed);
        };
        // Of those that nobody waits for, the threads go on.
        for _ in 0..2 * *CORES {
            let _ = tokio::time::timeout(Duration::from_millis(1), run(work)).await;
        }
        let all = (0..4 * *CORES).map(|_| run(work));
        assert!(futures::future::join_all(all).await.iter().all(Result::is_ok));
        assert!((1..=*CORES).contains(&MOST.load(Relaxed)), "{MOST:?}");
        let fails = || assert!(BUSY.load(Relaxed) > 0, "a tokenizer that fails");
        assert!(run(fails).await.is_err());
        assert!(run(|| ()).await.is_ok());
    }
}
