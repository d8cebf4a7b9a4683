//! The metrics of the HTTP server, by the names of prometheus-fastapi-instrumentator, which vLLM
//! uses.

use std::time::Duration;

use prometheus::{HistogramVec, Registry};

use super::families::{CounterVec, counter, histogram_by};

/// Handlers that are not measured, as vLLM leaves them out: probes would hide the requests.
const ASIDE: [&str; 7] =
    ["/metrics", "/health", "/load", "/ping", "/live", "/version", "/server_info"];

/// Buckets of the time of an exchange, in seconds.
const COARSE: &[f64] = &[0.1, 0.5, 1.0];
const FINE: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0,
    7.5, 10.0, 30.0, 60.0,
];
/// Buckets of the size of a body, in bytes.
const BYTES: &[f64] = &[100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

pub(super) struct HttpMetrics {
    requests: CounterVec,
    duration: HistogramVec,
    duration_fine: HistogramVec,
    request_bytes: HistogramVec,
    response_bytes: HistogramVec,
}

impl HttpMetrics {
    pub(super) fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            requests: counter(
                r,
                "http_requests_total",
                "HTTP requests answered.",
                &["handler", "method", "status"],
            )?,
            duration: histogram_by(
                r,
                "http_request_duration_seconds",
                "From a request's arrival to the last byte of its answer.",
                COARSE,
                &["handler", "method"],
            )?,
            duration_fine: histogram_by(
                r,
                "http_request_duration_highr_seconds",
                "The same over all handlers, in finer steps.",
                FINE,
                &[],
            )?,
            request_bytes: histogram_by(
                r,
                "http_request_size_bytes",
                "Bytes of requests' bodies, as announced.",
                BYTES,
                &["handler"],
            )?,
            response_bytes: histogram_by(
                r,
                "http_response_size_bytes",
                "Bytes of answers' bodies, streams included.",
                BYTES,
                &["handler"],
            )?,
        })
    }

    pub(super) fn answered(&self, handler: &str, method: &str, status: u16) {
        if !ASIDE.contains(&handler) {
            let status = status.to_string();
            self.requests.with_label_values(&[handler, method, &status]).inc();
        }
    }

    pub(super) fn exchanged(
        &self,
        handler: &str,
        method: &str,
        took: Duration,
        request: u64,
        response: u64,
    ) {
        if !ASIDE.contains(&handler) {
            let seconds = took.as_secs_f64();
            self.duration.with_label_values(&[handler, method]).observe(seconds);
            self.duration_fine.with_label_values::<&str>(&[]).observe(seconds);
            self.request_bytes.with_label_values(&[handler]).observe(request as f64);
            self.response_bytes.with_label_values(&[handler]).observe(response as f64);
        }
    }
}
