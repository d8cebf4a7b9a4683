//! Traces: where a request's time went, as OpenTelemetry spans that are exported by OTLP.
//!
//! * [`TraceArgs`]: the flags; the standard `OTEL_*` variables are read too.
//! * [`Traces`]: the exporter of this process. Without one no span exists, and nothing here costs
//!   more than a look at a static.
//! * [`Span`]: a piece of work. It ends when it is dropped.
//! * [`Parent`]: what spans hang on. It crosses processes as W3C's `traceparent` and `tracestate`,
//!   whether or not this process exports.
//!
//! Spans hold numbers, names and ids. What a client wrote or a model said is in none of them, and
//! as messages of errors may quote it, errors are told by their code alone.

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant, SystemTime};

use baton_proto::{InstanceRecord, InstanceRole};
use clap::Args;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{self as sdk, SdkTracer, SdkTracerProvider, SpanData};
use tonic::Code;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tracing::{info, warn};

use crate::config::without_password;
use crate::daemon::{Exit, Failure};

/// How long the last spans may take to be sent when the process stops.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);
/// The longest `tracestate` that is passed on: what W3C asks for at least.
const MAX_TRACESTATE: usize = 512;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Whether this process exports spans.
pub fn exporting() -> bool {
    TRACER.get().is_some()
}

/// Flags of traces, by vLLM's names.
#[derive(Clone, Debug, Default, Args)]
pub struct TraceArgs {
    /// Where spans are sent, by OTLP over gRPC: http://HOST:4317. By default
    /// OTEL_EXPORTER_OTLP_ENDPOINT; without either there are no traces.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
}

impl TraceArgs {
    /// Where spans go, if anywhere.
    pub fn endpoint(&self) -> Option<String> {
        if variable("OTEL_SDK_DISABLED").is_some_and(|it| it.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|it| it == "none")
        {
            return None;
        }
        let given = self.otlp_traces_endpoint.clone().filter(|it| !it.is_empty());
        given.or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"))
    }
}

/// A variable of the environment; an empty one counts as unset, as OpenTelemetry has it.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The exporter of this process.
#[derive(Debug)]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts to export, if the flags ask for it. Belongs to a runtime of tokio, once in a process.
    ///
    /// Spans wait in a bounded queue for a thread that sends them in batches; what finds it full is
    /// dropped.
    pub fn start(
        args: &TraceArgs,
        cluster: &str,
        instance: &InstanceRecord,
    ) -> Result<Self, Failure> {
        let Some(endpoint) = args.endpoint() else { return Ok(Self(None)) };
        let shown = without_password(&endpoint);
        let wrong = |error: &dyn std::fmt::Display| {
            let message = format!("--otlp-traces-endpoint {shown}: {error}");
            Failure::new(Exit::Config, message)
        };
        let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            .or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
        if let Some(protocol) = protocol.filter(|protocol| protocol != "grpc") {
            return Err(wrong(&format!("the protocol `{protocol}` is not spoken; set it to grpc")));
        }
        // vLLM's users give HOST:PORT too.
        let url = match endpoint.contains("://") {
            true => endpoint.clone(),
            false => format!("http://{endpoint}"),
        };
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(url).build();
        let exporter = exporter.map_err(|error| wrong(&error))?;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(Telling { exporter, failing: false.into(), lost: 0.into() })
            .with_resource(resource(cluster, instance))
            .build();
        let _ = TRACER.set(provider.tracer("baton"));
        info!(endpoint = shown, "spans are exported");
        Ok(Self(Some(provider)))
    }

    /// Sends what is left. A collector that does not answer holds the process up for two seconds
    /// at most.
    pub async fn stop(self) {
        let Some(provider) = self.0 else { return };
        // It blocks; what goes wrong is in the log.
        let flush = move || provider.shutdown_with_timeout(FLUSH_WITHIN);
        let _ = tokio::task::spawn_blocking(flush).await;
    }
}

/// Who exports.
fn resource(cluster: &str, instance: &InstanceRecord) -> Resource {
    let service = match instance.role {
        InstanceRole::Gateway => "baton-gateway",
        InstanceRole::Coordinator => "baton-coordinator",
        _ => "baton-worker",
    };
    let resource = Resource::builder().with_attributes([
        KeyValue::new("service.version", instance.version.clone()),
        KeyValue::new("service.instance.id", instance.id.clone()),
        KeyValue::new("baton.cluster", cluster.to_owned()),
        KeyValue::new("baton.role", instance.role.as_str()),
    ]);
    let attributes = variable("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let named = attributes.split(',').any(|pair| pair.trim_start().starts_with("service.name="));
    match named || variable("OTEL_SERVICE_NAME").is_some() {
        true => resource.build(),
        false => resource.with_service_name(service).build(),
    }
}

/// An exporter that says once that spans are lost, and once that they are not any more; the SDK
/// would say it of each batch.
#[derive(Debug)]
struct Telling {
    exporter: SpanExporter,
    failing: AtomicBool,
    lost: AtomicU64,
}

impl sdk::SpanExporter for Telling {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len() as u64;
        match self.exporter.export(batch).await {
            Ok(()) if self.failing.swap(false, Relaxed) => {
                let lost = self.lost.swap(0, Relaxed);
                info!(lost, "the collector takes spans again");
            }
            Ok(()) => {}
            Err(error) => {
                self.lost.fetch_add(count, Relaxed);
                if !self.failing.swap(true, Relaxed) {
                    warn!(%error, "the collector does not take spans; they are lost until it does");
                }
            }
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        if self.failing.load(Relaxed) {
            warn!(spans = self.lost.load(Relaxed), "spans were lost");
        }
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// What spans hang on: a span of this process or of another one, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Parent(Option<SpanContext>);

impl Parent {
    /// What the sender of these headers says, if it says something sound.
    pub fn of_headers<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Self {
        // Most requests have none.
        if get("traceparent").is_none() {
            return Self(None);
        }
        let context =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(&get));
        let parent = context.span().span_context().clone();
        Self(parent.is_valid().then_some(parent))
    }

    /// The same of a gRPC call.
    pub fn of_metadata(metadata: &MetadataMap) -> Self {
        Self::of_headers(|name| metadata.get(name)?.to_str().ok())
    }

    /// A gRPC call that tells its server of this parent.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(context) = self.context() {
            let mut metadata = Metadata(request.metadata_mut());
            TraceContextPropagator::new().inject_context(&context, &mut metadata);
        }
        request
    }

    /// The id of the trace, in hexadecimal.
    pub fn trace_id(&self) -> Option<String> {
        self.0.as_ref().map(|context| context.trace_id().to_string())
    }

    /// Begins a piece of this process's work.
    pub fn span(&self, name: impl Into<Cow<'static, str>>) -> Span {
        self.begin(name.into(), SpanKind::Internal, None)
    }

    /// The same for work that began before it was known what it would be.
    pub fn span_since(&self, name: &'static str, began: Instant) -> Span {
        self.begin(name.into(), SpanKind::Internal, SystemTime::now().checked_sub(began.elapsed()))
    }

    /// The same for work that began at a time of the calendar.
    pub fn span_from(&self, name: &'static str, began: SystemTime) -> Span {
        self.begin(name.into(), SpanKind::Internal, Some(began))
    }

    /// Begins to serve somebody.
    pub fn server(&self, name: impl Into<Cow<'static, str>>) -> Span {
        self.begin(name.into(), SpanKind::Server, None)
    }

    /// Begins to serve a call of `baton.v1.Worker`; the last part of the name is the method.
    pub fn rpc_server(&self, method: &'static str) -> Span {
        self.rpc(method, SpanKind::Server)
    }

    /// Calls `baton.v1.Worker` at a URL.
    pub fn rpc_client(&self, method: &'static str, address: &str) -> Span {
        let mut span = self.rpc(method, SpanKind::Client);
        if span.exports() {
            let host = address.split_once("://").map_or(address, |(_, host)| host);
            let (host, port) = host.rsplit_once(':').unwrap_or((host, ""));
            span.set("server.address", host.to_owned());
            span.set("server.port", port.parse::<i64>().unwrap_or_default());
        }
        span
    }

    fn rpc(&self, method: &'static str, kind: SpanKind) -> Span {
        let mut span = self.begin(method.into(), kind, None);
        if let Some((service, method)) = method.split_once('/') {
            span.set("rpc.system", "grpc");
            span.set("rpc.service", service);
            span.set("rpc.method", method);
        }
        span
    }

    fn begin(&self, name: Cow<'static, str>, kind: SpanKind, from: Option<SystemTime>) -> Span {
        let Some(tracer) = TRACER.get() else {
            return Span { live: None, context: self.clone() };
        };
        let mut builder = tracer.span_builder(name).with_kind(kind);
        builder.start_time = from;
        let live = tracer.build_with_context(builder, &self.context().unwrap_or_default());
        let context = Self(Some(live.span_context().clone()).filter(SpanContext::is_valid));
        Span { live: Some(Box::new(live)), context }
    }

    fn context(&self) -> Option<Context> {
        self.0.clone().map(|parent| Context::new().with_remote_span_context(parent))
    }
}

/// A piece of work, or nothing where there are no traces. It ends when it is dropped.
#[derive(Debug, Default)]
pub struct Span {
    live: Option<Box<sdk::Span>>,
    /// Its own context, or its parent's where it is nothing.
    context: Parent,
}

impl Span {
    /// What spans within this one hang on.
    pub fn as_parent(&self) -> &Parent {
        &self.context
    }

    /// Whether it will be exported: what costs something to find out need not be otherwise.
    pub fn exports(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.is_recording())
    }

    /// Notes a fact. Each name once.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        if let Some(live) = self.live.as_mut().filter(|live| live.is_recording()) {
            live.set_attribute(KeyValue::new(name, value));
        }
    }

    /// Notes a time, in seconds.
    pub fn set_time(&mut self, name: &'static str, time: Duration) {
        self.set(name, time.as_secs_f64());
    }

    /// Notes that the work failed; `kind` is a word for why, and no message.
    pub fn fail(&mut self, kind: &'static str) {
        self.set("error.type", kind);
        if let Some(live) = &mut self.live {
            live.set_status(Status::error(kind));
        }
    }

    /// Notes that a gRPC call failed.
    pub fn fail_rpc(&mut self, code: Code) {
        self.set("rpc.grpc.status_code", code as i64);
        self.fail(code.description());
    }
}

struct Headers<'f, 'a>(&'f dyn Fn(&str) -> Option<&'a str>);

impl Extractor for Headers<'_, '_> {
    fn get(&self, key: &str) -> Option<&str> {
        (self.0)(key).filter(|value| key != "tracestate" || value.len() <= MAX_TRACESTATE)
    }

    fn keys(&self) -> Vec<&str> {
        Vec::new()
    }
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) =
            (MetadataKey::from_bytes(key.as_bytes()), MetadataValue::try_from(value))
            && !value.is_empty()
        {
            self.0.insert(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn parent(traceparent: &str, tracestate: Option<&str>) -> Parent {
        Parent::of_headers(|name| match name {
            "traceparent" => Some(traceparent),
            "tracestate" => tracestate,
            _ => None,
        })
    }

    #[test]
    fn a_trace_is_read_from_a_sound_traceparent_only() {
        let sound = format!("00-{TRACE}-00f067aa0ba902b7-01");
        assert_eq!(parent(&sound, None).trace_id().as_deref(), Some(TRACE));
        let zeros = "0".repeat(32);
        for bad in
            ["", "00", TRACE, &sound.to_uppercase(), &sound[3..], &sound.replace(TRACE, &zeros)]
        {
            assert_eq!(parent(bad, None).trace_id(), None, "{bad}");
        }
    }

    #[test]
    fn a_parent_crosses_a_call_unchanged_where_nothing_is_exported() {
        let sound = format!("00-{TRACE}-00f067aa0ba902b7-00");
        let across = |tracestate: &str| {
            let span = parent(&sound, Some(tracestate)).server("POST /v1/completions");
            assert!(!span.exports());
            let request = span.as_parent().request(());
            let header =
                |name: &str| request.metadata().get(name)?.to_str().ok().map(str::to_owned);
            (header("traceparent"), header("tracestate"))
        };
        assert_eq!(across("a=1,b=2"), (Some(sound.clone()), Some("a=1,b=2".into())));
        assert_eq!(across(""), (Some(sound.clone()), None));
        assert_eq!(across(&format!("a={}", "x".repeat(600))), (Some(sound.clone()), None));
        assert!(Parent::default().request(()).metadata().is_empty());
    }
}
