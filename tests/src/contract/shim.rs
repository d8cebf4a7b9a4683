//! A peer that knows an earlier contract, in front of a worker of today.
//!
//! Both sides see what they would see of a program that was built against that contract: a field
//! that it does not know is not in any message, in either direction, and a call that it does not
//! know is UNIMPLEMENTED. What it would do otherwise than a worker of today is not imitated.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use baton_proto::{MAX_MESSAGE_BYTES, endpoint};
use futures::{Stream, StreamExt as _};
use prost::DecodeError;
use prost::bytes::{Buf as _, BufMut as _, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, encode_key, encode_varint, skip_field};
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, BoxStream, Service, http};
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// A peer of an earlier contract. It is gone when it is dropped.
#[derive(Debug)]
pub struct Earlier {
    /// Its address.
    pub address: String,
    counts: Arc<Counts>,
    server: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Counts {
    messages: AtomicU64,
    fields: AtomicU64,
    calls: AtomicU64,
}

impl Earlier {
    /// Listens, and calls the worker at `worker` once it is called.
    pub async fn of(contract: &FileDescriptorSet, worker: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let counts = Arc::new(Counts::default());
        let shim = Shim {
            known: Arc::new(Known::of(contract)),
            worker: endpoint(worker).expect("an address").connect_lazy(),
            counts: counts.clone(),
        };
        let server = tonic::transport::Server::builder().add_service(shim);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = tokio::spawn(async move {
            server.serve_with_incoming(incoming).await.expect("it serves");
        });
        Self { address, counts, server }
    }

    /// Messages that crossed, fields of them that did not, and calls that were not known.
    pub fn counts(&self) -> (u64, u64, u64) {
        let Counts { messages, fields, calls } = &*self.counts;
        let [messages, fields, calls] =
            [messages, fields, calls].map(|it| it.load(Ordering::Relaxed));
        (messages, fields, calls)
    }
}

impl Drop for Earlier {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What the contract knows.
struct Known {
    /// Of each method's path, the messages that are sent and answered.
    methods: HashMap<String, (String, String)>,
    /// Of each message, its fields by number; of those that are messages, which.
    messages: HashMap<String, HashMap<u32, Option<String>>>,
}

impl Known {
    fn of(contract: &FileDescriptorSet) -> Self {
        let mut known = Self { methods: HashMap::new(), messages: HashMap::new() };
        for file in &contract.file {
            file.message_type.iter().for_each(|it| known.add(&format!(".{}", file.package()), it));
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let types = (method.input_type().to_owned(), method.output_type().to_owned());
                    known.methods.insert(path, types);
                }
            }
        }
        known
    }

    fn add(&mut self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        message.nested_type.iter().for_each(|it| self.add(&name, it));
        let fields = message.field.iter().map(|field| {
            let message = field.r#type() == Type::Message;
            (field.number() as u32, message.then(|| field.type_name().to_owned()))
        });
        self.messages.insert(name, fields.collect());
    }

    /// Appends what is known of a message. Returns how many fields are not.
    fn keep(&self, message: &str, mut from: Bytes, to: &mut Vec<u8>) -> Result<u64, DecodeError> {
        let fields = &self.messages[message];
        let mut dropped = 0;
        while from.has_remaining() {
            let whole = from.clone();
            let (number, wire) = decode_key(&mut from)?;
            let value = from.clone();
            skip_field(wire, number, &mut from, DecodeContext::default())?;
            match fields.get(&number) {
                None => dropped += 1,
                Some(Some(inner)) => {
                    let mut value = value.slice(..value.len() - from.len());
                    prost::encoding::decode_varint(&mut value)?;
                    let mut kept = Vec::with_capacity(value.len());
                    dropped += self.keep(inner, value, &mut kept)?;
                    encode_key(number, WireType::LengthDelimited, to);
                    encode_varint(kept.len() as u64, to);
                    to.extend(kept);
                }
                Some(None) => to.extend_from_slice(&whole[..whole.len() - from.len()]),
            }
        }
        Ok(dropped)
    }
}

/// The service that passes calls on.
#[derive(Clone)]
struct Shim {
    known: Arc<Known>,
    worker: Channel,
    counts: Arc<Counts>,
}

impl NamedService for Shim {
    const NAME: &'static str = "baton.v1.Worker";
}

impl Service<http::Request<Body>> for Shim {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let Some((sent, answered)) = self.known.methods.get(&path).cloned() else {
            self.counts.calls.fetch_add(1, Ordering::Relaxed);
            let response = Status::unimplemented("").into_http();
            return Box::pin(async move { Ok(response) });
        };
        let call = Call { shim: self.clone(), path, sent, answered };
        Box::pin(async move {
            let grpc = tonic::server::Grpc::new(Raw);
            let mut grpc = grpc
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            // To HTTP a single message is a stream of one.
            Ok(grpc.streaming(call, request).await)
        })
    }
}

impl Shim {
    /// The messages of a stream as the contract knows them.
    fn strip(
        &self,
        message: String,
        stream: Streaming<Bytes>,
    ) -> impl Stream<Item = Result<Bytes, Status>> + Send + use<> {
        let Self { known, counts, .. } = self.clone();
        stream.map(move |bytes| -> Result<Bytes, Status> {
            let mut kept = Vec::new();
            let dropped = known.keep(&message, bytes?, &mut kept);
            let dropped = dropped.map_err(|error| Status::internal(error.to_string()))?;
            counts.messages.fetch_add(1, Ordering::Relaxed);
            counts.fields.fetch_add(dropped, Ordering::Relaxed);
            Ok(kept.into())
        })
    }
}

/// One call on its way.
struct Call {
    shim: Shim,
    path: String,
    sent: String,
    answered: String,
}

impl Service<Request<Streaming<Bytes>>> for Call {
    type Response = Response<BoxStream<Bytes>>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (shim, answered) = (self.shim.clone(), self.answered.clone());
        let path = self.path.parse().expect("a path that was called");
        let (metadata, _, stream) = request.into_parts();
        // A stream that breaks ends: the caller is gone.
        let stream = shim.strip(self.sent.clone(), stream);
        let stream =
            stream.take_while(|it| std::future::ready(it.is_ok())).filter_map(async |it| it.ok());
        let request = Request::from_parts(metadata, http::Extensions::new(), stream);
        Box::pin(async move {
            let client = tonic::client::Grpc::new(shim.worker.clone());
            let mut client = client
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let response = client.streaming(request, path, Raw).await?;
            let (metadata, stream, extensions) = response.into_parts();
            let stream: BoxStream<Bytes> = Box::pin(shim.strip(answered, stream));
            Ok(Response::from_parts(metadata, stream, extensions))
        })
    }
}

/// Messages as they are.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{GenerateRequest, PrefillPeer, WorkerStatus};
    use prost::Message as _;

    use super::*;

    #[test]
    fn an_earlier_peer_sees_what_it_knows_at_every_depth() {
        let known = Known::of(&crate::contract::read("tests/contracts/before-draining"));
        let keep = |message: &str, bytes: Vec<u8>| {
            let mut kept = Vec::new();
            let dropped = known.keep(message, bytes.into(), &mut kept).expect("a message");
            (dropped, kept)
        };
        let peer = |held_id: &str| PrefillPeer {
            instance_id: "id".into(),
            address: "http://a:1".into(),
            held_id: held_id.into(),
            held_positions: 0,
        };
        let request = |held_id: &str, movable| GenerateRequest {
            prompt_token_ids: vec![1, 2, 300],
            prefill: Some(peer(held_id)),
            movable,
            ..GenerateRequest::default()
        };
        let (dropped, kept) =
            keep(".baton.v1.GenerateRequest", request("held", true).encode_to_vec());
        assert_eq!(dropped, 2);
        assert_eq!(GenerateRequest::decode(&*kept).expect("a request"), request("", false));

        let status = WorkerStatus { running: 3, ttft_by_us: vec![1, 2], ..WorkerStatus::default() };
        let (dropped, kept) = keep(".baton.v1.WorkerStatus", status.encode_to_vec());
        let left = WorkerStatus { running: 3, ..WorkerStatus::default() };
        assert_eq!((dropped, kept), (1, left.encode_to_vec()));
    }
}
