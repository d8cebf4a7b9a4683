//! `vllm:iteration_tokens_total`: how many tokens workers compute in a step.
//!
//! Workers count steps in buckets; here the counts of a model's workers are added up. prometheus'
//! own histogram takes one observation after the other, so this one is a collector of its own.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use baton_proto::STEP_TOKENS;
use baton_proto::v1::WorkerStatus;
use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::families::{ENGINE, LABELS};

const NAME: &str = "vllm:iteration_tokens_total";
const HELP: &str =
    "Tokens computed in a step of a worker: of prompts, generated, and guessed ahead.";

/// Steps of each model.
#[derive(Clone)]
pub(super) struct StepTokens {
    desc: Desc,
    models: Arc<Mutex<BTreeMap<String, Steps>>>,
}

#[derive(Default)]
struct Steps {
    /// By the tokens of a step; each bucket alone.
    counts: [u64; STEP_TOKENS.len() + 1],
    tokens: u64,
}

impl StepTokens {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let labels = LABELS.map(str::to_owned).to_vec();
        let desc = Desc::new(NAME.to_owned(), HELP.to_owned(), labels, HashMap::new())?;
        Ok(Self { desc, models: Arc::default() })
    }

    /// Adds what a worker has done since an earlier status.
    pub(super) fn add(&self, model: &str, before: &WorkerStatus, now: &WorkerStatus) {
        let mut models = self.models.lock();
        let steps = match models.get_mut(model) {
            Some(steps) => steps,
            None => models.entry(model.to_owned()).or_default(),
        };
        for (i, count) in steps.counts.iter_mut().enumerate() {
            let of = |status: &WorkerStatus| status.steps_by_tokens.get(i).copied().unwrap_or(0);
            *count += of(now).saturating_sub(of(before));
        }
        steps.tokens += now.step_tokens.saturating_sub(before.step_tokens);
    }
}

impl Collector for StepTokens {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let models = self.models.lock();
        let metrics = models.iter().map(|(model, steps)| {
            let mut so_far = 0;
            let buckets = STEP_TOKENS.iter().zip(steps.counts).map(|(&most, count)| {
                so_far += count;
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(most.into());
                bucket.set_cumulative_count(so_far);
                bucket
            });
            let mut histogram = Histogram::default();
            histogram.set_bucket(buckets.collect());
            histogram.set_sample_sum(steps.tokens as f64);
            histogram.set_sample_count(steps.counts.iter().sum());
            let labels = LABELS.iter().zip([model.as_str(), ENGINE]).map(|(name, value)| {
                let mut label = LabelPair::default();
                label.set_name((*name).to_owned());
                label.set_value(value.to_owned());
                label
            });
            let mut metric = Metric::default();
            metric.set_label(labels.collect());
            metric.set_histogram(histogram);
            metric
        });
        let mut family = MetricFamily::default();
        family.set_name(NAME.to_owned());
        family.set_help(HELP.to_owned());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(metrics.collect());
        // A family without a metric is an error to the encoder.
        if family.get_metric().is_empty() { Vec::new() } else { vec![family] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_workers_did_since_the_last_look_is_added_up() {
        let status = |first: u64, last: u64, tokens: u64| {
            let mut steps = vec![0; STEP_TOKENS.len() + 1];
            (steps[0], steps[STEP_TOKENS.len()]) = (first, last);
            WorkerStatus { steps_by_tokens: steps, step_tokens: tokens, ..Default::default() }
        };
        let all = StepTokens::new().unwrap();
        all.add("m", &WorkerStatus::default(), &status(3, 0, 3));
        all.add("m", &status(3, 0, 3), &status(5, 1, 20_005));
        // A worker from before there were steps, and another one.
        all.add("m", &WorkerStatus::default(), &WorkerStatus::default());
        all.add("m", &WorkerStatus::default(), &status(1, 0, 1));
        let families = all.collect();
        let histogram = families[0].get_metric()[0].get_histogram();
        assert_eq!((histogram.get_sample_count(), histogram.get_sample_sum()), (7, 20_006.0));
        let buckets = histogram.get_bucket();
        assert!(buckets.iter().all(|bucket| bucket.cumulative_count() == 6));
    }
}
