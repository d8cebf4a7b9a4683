//! Coordinators, and how the pools' scale operations do.

use std::collections::HashMap;

use baton_proto::InstanceRole;
use baton_proto::v1::ScaleOperation;
use prometheus::Registry;

use super::families::{GaugeVec, gauge};

/// What an operator must hear of that nobody who sends requests sees.
pub(super) struct ScaleMetrics {
    coordinators: GaugeVec,
    running: GaugeVec,
    failed: GaugeVec,
}

impl ScaleMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            coordinators: gauge(
                registry,
                "baton_coordinators",
                "Coordinators that are registered.",
                &[],
            )?,
            running: gauge(
                registry,
                "baton_scale_running",
                "Whether a scale operation of the pool runs.",
                &["pool"],
            )?,
            failed: gauge(
                registry,
                "baton_scale_failed",
                "Whether the last scale operation of the pool failed.",
                &["pool"],
            )?,
        };
        metrics.show(&[]);
        Ok(metrics)
    }

    pub(super) fn coordinators(&self, count: usize) {
        self.coordinators.with_label_values::<&str>(&[]).set(count as f64);
    }

    /// `operations` are those that run and the last ones that ended, oldest first.
    pub(super) fn show(&self, operations: &[ScaleOperation]) {
        let (mut running, mut failed) = (HashMap::new(), HashMap::new());
        for operation in operations {
            let state = if operation.ended_ms == 0 { &mut running } else { &mut failed };
            let holds = operation.ended_ms == 0 || operation.phase == "failed";
            state.insert(operation.pool.as_str(), f64::from(u8::from(holds)));
        }
        for role in InstanceRole::WORKERS {
            let pool = role.as_str();
            for (gauge, state) in [(&self.running, &running), (&self.failed, &failed)] {
                gauge.with_label_values(&[pool]).set(state.get(pool).copied().unwrap_or_default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(pool: &str, phase: &str, ended_ms: u64) -> ScaleOperation {
        ScaleOperation { pool: pool.into(), phase: phase.into(), ended_ms, ..Default::default() }
    }

    #[test]
    fn the_last_operation_that_ended_counts_and_those_that_run_do_not() {
        let metrics = ScaleMetrics::new(&Registry::new()).unwrap();
        let of = |gauge: &GaugeVec, pool| gauge.with_label_values(&[pool]).get();
        metrics.show(&[
            operation("decode", "failed", 1),
            operation("prefill", "done", 2),
            operation("prefill", "failed", 3),
            operation("decode", "cancelled", 4),
            operation("prefill", "launch", 0),
        ]);
        assert_eq!((of(&metrics.failed, "decode"), of(&metrics.running, "decode")), (0.0, 0.0));
        assert_eq!((of(&metrics.failed, "prefill"), of(&metrics.running, "prefill")), (1.0, 1.0));
        assert_eq!((of(&metrics.failed, "audio"), of(&metrics.running, "audio")), (0.0, 0.0));
        metrics.show(&[operation("prefill", "done", 5)]);
        assert_eq!((of(&metrics.failed, "prefill"), of(&metrics.running, "prefill")), (0.0, 0.0));
    }
}
