//! Histograms of token counts. Their buckets end where the model's context does, so each model has
//! its own.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use baton_proto::v1::ModelCard;
use prometheus::{Histogram, HistogramOpts, Registry};
use tracing::warn;

use super::families::{ENGINE, LABELS};

/// The histograms of one model.
pub(super) struct TokenHistograms {
    pub(super) prompt: Histogram,
    pub(super) generation: Histogram,
    /// Prompt tokens that the worker computed itself.
    pub(super) computed: Histogram,
    /// Tokens that a sequence might have.
    pub(super) max_tokens: Histogram,
    /// Tokens of the longest sequence of a prompt.
    pub(super) longest: Histogram,
}

impl TokenHistograms {
    pub(super) fn new(registry: &Registry, model: &ModelCard) -> Self {
        let make = |name, help| histogram(registry, model, name, help);
        Self {
            prompt: make("vllm:request_prompt_tokens", "Tokens of a sequence's prompt."),
            generation: make("vllm:request_generation_tokens", "Tokens generated for a sequence."),
            computed: make(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens whose KV was computed where the sequence was generated.",
            ),
            max_tokens: make(
                "vllm:request_params_max_tokens",
                "Tokens that a sequence might have had, by `max_tokens` or the context.",
            ),
            longest: make(
                "vllm:request_max_num_generation_tokens",
                "Tokens of the longest of a prompt's `n` sequences.",
            ),
        }
    }
}

fn histogram(registry: &Registry, model: &ModelCard, name: &str, help: &str) -> Histogram {
    let opts = HistogramOpts::new(name, help)
        .const_label(LABELS[0], model.name.as_str())
        .const_label(LABELS[1], ENGINE)
        .buckets(buckets(model.max_model_len));
    let made = Histogram::with_opts(opts).and_then(|histogram| {
        registry.register(Box::new(histogram.clone()))?;
        Ok(histogram)
    });
    made.unwrap_or_else(|error| {
        // A name of a model that Prometheus does not take is counted, and not shown.
        warn!(%error, model = model.name, "a histogram cannot be shown");
        #[expect(clippy::unwrap_used, reason = "these options are constant, and good")]
        Histogram::with_opts(HistogramOpts::new("hidden", "Hidden.")).unwrap()
    })
}

/// 1, 2, 5, 10, 20, 50, … up to the context's length: vLLM's.
fn buckets(max_model_len: u32) -> Vec<f64> {
    let decades = (0..10).map(|exponent| 10_u64.pow(exponent));
    let all = decades.flat_map(|decade| [1, 2, 5].map(|step| step * decade));
    let mut buckets: Vec<f64> =
        all.take_while(|&bound| bound <= max_model_len.into()).map(|bound| bound as f64).collect();
    if buckets.is_empty() {
        buckets.push(1.0);
    }
    buckets
}

/// The sequences of one prompt: what they have in common is observed when the last has ended.
pub struct Siblings {
    tokens: Arc<TokenHistograms>,
    params_n: Histogram,
    n: usize,
    /// How many have begun and ended.
    ended: AtomicUsize,
    longest: AtomicUsize,
}

impl Siblings {
    pub(super) fn new(tokens: Arc<TokenHistograms>, params_n: Histogram, n: usize) -> Self {
        Self { tokens, params_n, n, ended: AtomicUsize::new(0), longest: AtomicUsize::new(0) }
    }

    /// One has ended, with this many tokens.
    pub fn ended(&self, tokens: usize) {
        self.ended.fetch_add(1, Relaxed);
        self.longest.fetch_max(tokens, Relaxed);
    }
}

impl Drop for Siblings {
    fn drop(&mut self) {
        // None has: the request was refused.
        if *self.ended.get_mut() > 0 {
            self.params_n.observe(self.n as f64);
            self.tokens.longest.observe(*self.longest.get_mut() as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_end_with_the_context() {
        assert_eq!(buckets(1), [1.0]);
        assert_eq!(buckets(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(buckets(8192).last(), Some(&5000.0));
        assert!(buckets(u32::MAX).is_sorted());
    }
}
