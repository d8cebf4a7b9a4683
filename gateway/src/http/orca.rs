//! How busy a model's workers are, in a header of a reply whose client asked for it: ORCA (Open
//! Request Cost Aggregation), by which load balancers choose. As vLLM has it: of chats and
//! completions that are no streams.

use std::sync::Arc;

use actix_web::HttpResponseBuilder;
use actix_web::http::header::{HeaderMap, HeaderName};
use baton_proto::v1::WorkerStatus;

use crate::workers::{Registry, Served};

/// A request's header: in which format.
const FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
/// The reply's.
const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// How the header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Text,
}

impl Format {
    /// The format that a request with these headers asks for; others ask for nothing.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let asked = headers.get(FORMAT)?.to_str().ok()?.to_ascii_lowercase();
        match asked.as_str() {
            "json" => Some(Self::Json),
            "text" => Some(Self::Text),
            _ => None,
        }
    }
}

/// Tells in a reply how busy the workers are that generate with this model, as they last said.
pub(super) fn tell(
    response: &mut HttpResponseBuilder,
    format: Format,
    registry: &Registry,
    served: &Served,
) {
    let workers = registry.of_model(served);
    let generating = workers.iter().filter(|worker| worker.record.role.generates());
    let statuses: Vec<Arc<WorkerStatus>> =
        generating.filter_map(|worker| worker.status()).collect();
    if !statuses.is_empty() {
        response.insert_header((LOAD, report(format, &statuses)));
    }
}

/// The header. Its numbers are the metrics of these names.
fn report(format: Format, workers: &[Arc<WorkerStatus>]) -> String {
    let sum = |of: fn(&WorkerStatus) -> u64| workers.iter().map(|status| of(status)).sum::<u64>();
    let owned = sum(|status| status.kv_blocks_requests + status.kv_blocks_handoff);
    let blocks = sum(|status| status.kv_blocks_total);
    let waiting = sum(|status| status.waiting.into());
    let metrics = [
        ("kv_cache_usage_perc", owned as f64 / blocks.max(1) as f64),
        ("num_requests_waiting", waiting as f64),
    ];
    // Whole numbers have a point too, as in Python.
    match format {
        Format::Json => {
            let metrics = metrics.map(|(name, value)| format!("\"{name}\": {value:?}"));
            format!("JSON {{\"named_metrics\": {{{}}}}}", metrics.join(", "))
        }
        Format::Text => {
            let metrics = metrics.map(|(name, value)| format!("named_metrics.{name}={value:?}"));
            format!("TEXT {}", metrics.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    #[test]
    fn two_formats_are_known() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT, HeaderValue::from_str(value).unwrap());
            Format::of(&headers)
        };
        assert_eq!((of("JSON"), of("json")), (Some(Format::Json), Some(Format::Json)));
        assert_eq!((of("TEXT"), of("Text")), (Some(Format::Text), Some(Format::Text)));
        assert_eq!((of("BIN"), of(""), Format::of(&HeaderMap::new())), (None, None, None));
    }

    #[test]
    fn a_report_is_of_all_workers_together() {
        let worker = |requests, handoff, waiting| {
            Arc::new(WorkerStatus {
                kv_blocks_total: 10,
                kv_blocks_requests: requests,
                kv_blocks_handoff: handoff,
                waiting,
                ..WorkerStatus::default()
            })
        };
        let workers = [worker(5, 1, 0), worker(2, 0, 3)];
        assert_eq!(
            report(Format::Json, &workers),
            r#"JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}"#
        );
        assert_eq!(
            report(Format::Text, &[worker(0, 0, 0)]),
            "TEXT named_metrics.kv_cache_usage_perc=0.0, named_metrics.num_requests_waiting=0.0"
        );
    }
}
