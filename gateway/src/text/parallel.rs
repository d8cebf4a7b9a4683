//! Work on many texts at once, off the threads that serve.

use std::sync::{Arc, LazyLock};

use futures::future::try_join_all;
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// Texts of so few bytes in all are worked on at once: to hand them over would take longer.
const SHORT: usize = 2 * 1024;
/// Bytes of texts that one thread takes in one go. Between two, other requests have their turn.
const GROUP: usize = 32 * 1024;

/// One for each core: all requests together keep no more threads busy.
static THREADS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)));

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
    let failed = |error: &dyn std::fmt::Display| {
        ApiError::internal(format!("The texts could not be tokenized: {error}."))
    };
    let all = groups.into_iter().map(|(first, group)| {
        let work = work.clone();
        async move {
            let turn = THREADS.acquire().await.map_err(|error| failed(&error))?;
            let done = tokio::task::spawn_blocking(move || {
                let each = group.into_iter().enumerate();
                each.map(|(at, item)| work(first + at, item)).collect::<Result<Vec<U>, _>>()
            });
            let done = done.await.map_err(|error| failed(&error))?;
            drop(turn);
            done
        }
    });
    let mut results = Vec::with_capacity(count);
    for group in try_join_all(all).await? {
        results.extend(group);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
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
}
