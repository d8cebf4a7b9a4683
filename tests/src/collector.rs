//! A receiver of OTLP: the collector's own gRPC service, which keeps what it is sent.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::poll::eventually;

/// A running collector; it ends when it is dropped.
#[derive(Debug)]
pub struct Collector {
    url: String,
    kept: Kept,
    task: JoinHandle<()>,
}

#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

/// A span, and who exported it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The span.
    pub span: Span,
    /// Attributes of the process.
    pub resource: Vec<KeyValue>,
}

impl Collector {
    /// Starts one on a free port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let kept = Kept::default();
        let service = TraceServiceServer::new(kept.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        let task = tokio::spawn(async move {
            let served = server.serve_with_incoming(TcpIncoming::from(listener)).await;
            served.expect("the collector serves");
        });
        Self { url, kept, task }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Everything so far, as it was sent.
    pub fn bytes(&self) -> Vec<u8> {
        let kept = self.kept.0.lock().expect("not poisoned");
        kept.iter().flat_map(ExportTraceServiceRequest::encode_to_vec).collect()
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Seen> {
        let kept = self.kept.0.lock().expect("not poisoned");
        let of_process = kept.iter().flat_map(|request| &request.resource_spans);
        of_process
            .flat_map(|process| {
                let resource = process.resource.clone().unwrap_or_default().attributes;
                let spans = process.scope_spans.iter().flat_map(|scope| scope.spans.clone());
                spans.map(move |span| Seen { span, resource: resource.clone() })
            })
            .collect()
    }

    /// The spans of a trace, once they are all there: as many of each name and kind as `expected`
    /// says, sorted. More is a failure.
    pub async fn trace(&self, trace: &str, expected: &[&str]) -> Vec<Seen> {
        let mut expected: Vec<&str> = expected.to_vec();
        expected.sort_unstable();
        let of_trace = || {
            let mut spans = self.spans();
            spans.retain(|seen| hex(&seen.span.trace_id) == trace);
            spans
        };
        eventually("all spans are exported", Duration::from_secs(20), async || {
            let spans = of_trace();
            let mut names: Vec<&str> = spans.iter().map(|seen| &*seen.span.name).collect();
            names.sort_unstable();
            if names == expected { Ok(()) } else { Err(format!("{names:#?}")) }
        })
        .await;
        of_trace()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tonic::async_trait]
impl TraceService for Kept {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().expect("not poisoned").push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Seen {
    /// An attribute of the span, as JSON.
    pub fn get(&self, name: &str) -> serde_json::Value {
        value(&self.span.attributes, name)
    }

    /// An attribute of its process, as JSON.
    pub fn of_process(&self, name: &str) -> serde_json::Value {
        value(&self.resource, name)
    }

    /// Whether it failed.
    pub fn failed(&self) -> bool {
        self.span.status.as_ref().is_some_and(|status| status.code == 2)
    }

    /// Its own id.
    pub fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// Its parent's id; empty for a root.
    pub fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }
}

fn value(attributes: &[KeyValue], name: &str) -> serde_json::Value {
    let mut found = attributes.iter().filter(|attribute| attribute.key == name);
    let value = found.next().and_then(|attribute| attribute.value.clone()?.value);
    assert!(found.next().is_none(), "{name} is there twice");
    match value {
        None => serde_json::Value::Null,
        Some(Value::StringValue(text)) => text.into(),
        Some(Value::IntValue(number)) => number.into(),
        Some(Value::DoubleValue(number)) => number.into(),
        Some(Value::BoolValue(flag)) => flag.into(),
        other => panic!("{name} is {other:?}"),
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
