//! Counts texts that were embedded, classified or compared: each is a request, as vLLM has it.

use std::sync::Arc;
use std::time::Instant;

use baton_proto::v1::ModelCard;

use super::Metrics;
use super::families::ENGINE;
use crate::pool::Pooled;

/// The texts of one request, while they are computed. Dropped before its end, they were given up.
pub struct PoolingRecord {
    metrics: Arc<Metrics>,
    card: ModelCard,
    lengths: Vec<usize>,
    arrived: Instant,
    ended: bool,
}

impl Metrics {
    /// Texts of these lengths are about to be computed.
    pub fn pooling(
        self: &Arc<Self>,
        card: &ModelCard,
        lengths: &[usize],
        arrived: Instant,
    ) -> PoolingRecord {
        PoolingRecord {
            metrics: self.clone(),
            card: card.clone(),
            lengths: lengths.to_vec(),
            arrived,
            ended: false,
        }
    }
}

impl PoolingRecord {
    /// They have been computed.
    pub fn done(&mut self, pooled: &Pooled) {
        let labels = [self.card.name.as_str(), ENGINE];
        let metrics = &self.metrics;
        let tokens: usize = self.lengths.iter().sum();
        metrics.prompt_tokens.with_label_values(&labels).inc_by(tokens as u64);
        let queue = metrics.queue.with_label_values(&labels);
        let inference = metrics.inference.with_label_values(&labels);
        let histograms = metrics.tokens(&self.card);
        for length in &self.lengths {
            queue.observe(pooled.queue.as_secs_f64());
            inference.observe(pooled.compute.as_secs_f64());
            histograms.prompt.observe(*length as f64);
        }
        self.end("stop");
    }

    /// They could not be.
    pub fn failed(&mut self) {
        self.end("error");
    }

    fn end(&mut self, reason: &str) {
        self.ended = true;
        let labels = [self.card.name.as_str(), ENGINE];
        let finished =
            self.metrics.finished.with_label_values(&[self.card.name.as_str(), ENGINE, reason]);
        finished.inc_by(self.lengths.len() as u64);
        let e2e = self.metrics.e2e.with_label_values(&labels);
        let took = self.arrived.elapsed().as_secs_f64();
        self.lengths.iter().for_each(|_| e2e.observe(took));
    }
}

impl Drop for PoolingRecord {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}
