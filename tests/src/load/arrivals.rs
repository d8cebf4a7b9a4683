//! When requests arrive.

use std::time::Duration;

use rand::Rng;
use rand_distr::{Distribution as _, Exp};

/// Arrivals of a Poisson process: open loop, so a slow server does not slow them.
///
/// # Panics
/// When `rate`, requests a second, is not above 0.
pub fn poisson(rate: f64, span: Duration, rng: &mut impl Rng) -> Vec<Duration> {
    let gap = Exp::new(rate).expect("a rate above 0");
    let mut at = 0.0;
    std::iter::from_fn(|| {
        at += gap.sample(rng);
        (at < span.as_secs_f64()).then(|| Duration::from_secs_f64(at))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn a_seed_repeats_the_arrivals_and_the_rate_is_kept() {
        let of = |seed| poisson(50.0, Duration::from_secs(200), &mut StdRng::seed_from_u64(seed));
        let arrivals = of(1);
        assert_eq!(arrivals, of(1));
        assert_ne!(arrivals, of(2));
        assert!(arrivals.is_sorted());
        // Ten thousand expected, a hundred of standard deviation.
        assert!((9_500..10_500).contains(&arrivals.len()), "{}", arrivals.len());
        // The gaps of a Poisson process vary as much as they last.
        let gaps: Vec<f64> =
            arrivals.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((0.9..1.1).contains(&(variance.sqrt() / mean)), "{}", variance.sqrt() / mean);
    }
}
