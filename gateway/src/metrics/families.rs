//! How metrics are made: labels, buckets, registration.

use prometheus::core::{AtomicF64, AtomicU64, Collector, GenericCounterVec, GenericGaugeVec};
use prometheus::{HistogramOpts, HistogramVec, Opts, Registry};

pub(super) type CounterVec = GenericCounterVec<AtomicU64>;
/// Counts what is not whole.
pub(super) type SecondsVec = GenericCounterVec<AtomicF64>;
pub(super) type GaugeVec = GenericGaugeVec<AtomicF64>;

/// vLLM's labels. `engine` is the index of a data-parallel engine; seen from outside, a Baton
/// cluster is one.
pub(super) const LABELS: [&str; 2] = ["model_name", "engine"];
pub(super) const ENGINE: &str = "0";

/// Buckets of the time to the first token, in seconds.
pub(super) const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of the time between tokens, in seconds.
pub(super) const INTER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Buckets of a request's phases, in seconds.
pub(super) const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Buckets of the number of sequences of a prompt.
pub(super) const SEQUENCES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

pub(super) fn register<T: Collector + Clone + 'static>(
    registry: &Registry,
    metric: T,
) -> Result<T, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

pub(super) fn counter(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<CounterVec, prometheus::Error> {
    register(registry, CounterVec::new(Opts::new(name, help), labels)?)
}

pub(super) fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<GaugeVec, prometheus::Error> {
    register(registry, GaugeVec::new(Opts::new(name, help), labels)?)
}

pub(super) fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> Result<HistogramVec, prometheus::Error> {
    histogram_by(registry, name, help, buckets, &LABELS)
}

pub(super) fn histogram_by(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
    labels: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, HistogramVec::new(opts, labels)?)
}
