//! What came of a run: latencies, throughput, goodput, errors.

use std::collections::BTreeMap;

use serde::Serialize;

use super::client::{Answered, Sent};
use super::stats::percentile;

/// What a request must keep to, to count as good. In seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Slo {
    /// Longest time to the first token.
    pub ttft: f64,
    /// Longest mean time between its tokens.
    pub itl: f64,
}

impl Slo {
    fn kept(&self, answered: &Answered) -> bool {
        let gaps = &answered.gaps;
        let mean = gaps.iter().sum::<f64>() / gaps.len().max(1) as f64;
        answered.ttft <= self.ttft && mean <= self.itl
    }
}

/// Half of the values are at most the first, all but a hundredth at most the second. Milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
}

impl Spread {
    fn of(seconds: &[f64]) -> Self {
        Self { p50: percentile(seconds, 0.5) * 1e3, p99: percentile(seconds, 0.99) * 1e3 }
    }
}

/// One run at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Requests a second that were sent.
    pub offered: f64,
    /// How many were sent.
    pub sent: usize,
    /// How many were answered to the end.
    pub answered: usize,
    /// Failures by status; 0 is a broken connection.
    pub failed: BTreeMap<u16, usize>,
    /// Answered requests a second, from the first arrival to the last answer.
    pub throughput: f64,
    /// Generated tokens a second, over the same time.
    pub tokens_per_second: f64,
    /// Requests that kept the SLO, a second, over the time of the arrivals.
    pub goodput: f64,
    /// The share of all requests that kept it.
    pub good: f64,
    /// Times to the first token.
    pub ttft: Spread,
    /// Times between tokens, of all requests together.
    pub itl: Spread,
    /// Times to the end.
    pub e2e: Spread,
}

impl Outcome {
    /// Sums up `sent`, which arrived over `span` and were all over after `took` seconds.
    pub fn of(sent: &[Sent], span: f64, took: f64, slo: Slo) -> Self {
        let mut failed = BTreeMap::new();
        let mut answered = Vec::new();
        for one in sent {
            match one {
                Sent::Answered(one) => answered.push(one),
                Sent::Failed(status) => *failed.entry(*status).or_default() += 1,
            }
        }
        let each = |of: fn(&Answered) -> f64| -> Vec<f64> {
            answered.iter().map(|answered| of(answered)).collect()
        };
        let gaps: Vec<f64> = answered.iter().flat_map(|one| one.gaps.iter().copied()).collect();
        let tokens: usize = answered.iter().map(|one| one.tokens).sum();
        let good = answered.iter().filter(|one| slo.kept(one)).count() as f64;
        Self {
            offered: sent.len() as f64 / span,
            sent: sent.len(),
            answered: answered.len(),
            failed,
            throughput: answered.len() as f64 / took,
            tokens_per_second: tokens as f64 / took,
            goodput: good / span,
            good: good / sent.len().max(1) as f64,
            ttft: Spread::of(&each(|one| one.ttft)),
            itl: Spread::of(&gaps),
            e2e: Spread::of(&each(|one| one.total)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_requests_keep_both_bounds_and_failures_count_as_sent() {
        let slo = Slo { ttft: 1.0, itl: 0.1 };
        let answered = |ttft: f64, gap: f64| {
            let (gaps, total) = (vec![gap, gap], ttft + 2.0 * gap);
            Sent::Answered(Answered { ttft, gaps, total, prompt: 5, tokens: 3 })
        };
        let sent = [
            answered(1.0, 0.1),
            answered(1.1, 0.05),
            answered(0.5, 0.2),
            Sent::Failed(429),
            Sent::Failed(429),
            Sent::Failed(0),
        ];
        let got = Outcome::of(&sent, 2.0, 3.0, slo);
        assert_eq!((got.offered, got.sent, got.answered), (3.0, 6, 3));
        assert_eq!(got.failed, BTreeMap::from([(0, 1), (429, 2)]));
        assert_eq!((got.throughput, got.tokens_per_second), (1.0, 3.0));
        assert_eq!((got.goodput, got.good), (0.5, 1.0 / 6.0));
        assert_eq!((got.ttft.p50, got.ttft.p99), (1000.0, 1100.0));
        assert_eq!((got.itl.p50, got.itl.p99), (100.0, 200.0));
    }

    #[test]
    fn one_token_has_no_gap_to_miss() {
        let slo = Slo { ttft: 1.0, itl: 0.1 };
        assert!(slo.kept(&Answered { ttft: 0.5, ..Answered::default() }));
    }
}
