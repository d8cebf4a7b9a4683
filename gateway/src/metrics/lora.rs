//! `vllm:lora_requests_info`: which adapters' requests wait and run, as this gateway sees them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use prometheus::{GaugeVec, Opts, Registry};

use crate::workers::Registry as Workers;

/// vLLM's labels: the most adapters that a worker holds, and two lists of names.
const LABELS: [&str; 3] = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"];

/// Requests in progress, by adapter: waiting, running.
type Counts = Mutex<BTreeMap<String, [usize; 2]>>;

/// The gauge, and what it shows.
pub(crate) struct LoraRequests {
    counts: Arc<Counts>,
    info: GaugeVec,
}

/// A request with an adapter. Dropping it takes the request off the count.
pub(crate) struct LoraRequest {
    counts: Arc<Counts>,
    name: String,
    running: bool,
}

impl LoraRequests {
    pub(crate) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let help = "Adapters whose requests wait and run; the value is the time.";
        let info = GaugeVec::new(Opts::new("vllm:lora_requests_info", help), &LABELS)?;
        registry.register(Box::new(info.clone()))?;
        Ok(Self { counts: Arc::default(), info })
    }

    /// A request waits from now on.
    pub(crate) fn begin(&self, adapter: &str) -> LoraRequest {
        self.counts.lock().entry(adapter.to_owned()).or_default()[0] += 1;
        LoraRequest { counts: self.counts.clone(), name: adapter.to_owned(), running: false }
    }

    /// Sets the gauge; without adapters there is none.
    pub(crate) fn show(&self, workers: &Workers) {
        self.info.reset();
        let served = workers.adapters();
        let Some(most) = served.iter().map(|served| served.description.max_loras).max() else {
            return;
        };
        let counts = self.counts.lock();
        let [waiting, running] = [0, 1].map(|at| {
            let names = counts.iter().filter(|(_, count)| count[at] > 0);
            names.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",")
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        self.info.with_label_values(&[most.to_string(), waiting, running]).set(now);
    }
}

impl LoraRequest {
    /// Its prompt has been computed.
    pub(crate) fn runs(&mut self) {
        if !std::mem::replace(&mut self.running, true)
            && let Some(count) = self.counts.lock().get_mut(&self.name)
        {
            count[0] -= 1;
            count[1] += 1;
        }
    }
}

impl Drop for LoraRequest {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.name) {
            count[usize::from(self.running)] -= 1;
            if *count == [0, 0] {
                counts.remove(&self.name);
            }
        }
    }
}
