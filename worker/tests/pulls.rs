//! Hand-offs from the decode worker's side, with peers that refuse, say nothing, or say what cannot
//! be.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_membership::traces::Span;
use baton_proto::v1::prefill_event::Event as Out;
use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::{
    self, BlockData, KvDtype, PrefillAccepted, PrefillEvent, PrefillFinished, PrefillPeer,
    PrefillRequest, SharedMemoryRegion, Token, Transport,
};
use baton_worker::engine::{
    Engine, Event, Finish, NewRequest, PullOrder, Purpose, RequestHandle, Settings,
};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, kv_layout, load};
use baton_worker::transfer::pull::{Ask, Puller};
use baton_worker::transfer::{TransferError, Transports};
use futures::stream::{self, BoxStream, StreamExt as _};
use parking_lot::Mutex;
use tonic::{Code, Request, Response, Status};

use crate::{ended, limits, reference, request};

fn engine() -> Engine {
    let model = load(&reference("small/qwen3"), 1, Precision::Sixteen).unwrap().model;
    let pool = KvPool::new(kv_layout(model.config(), 16, KvDtype::I16), 40).unwrap();
    let limits = limits(40);
    let settings = Settings { limits, eos_token_ids: Vec::new(), speech: None, step_timeout: None };
    Engine::start(model, pool, settings).unwrap()
}

/// A request whose prompt, of one block, is to be pulled.
async fn order(engine: &Engine) -> (RequestHandle, PullOrder) {
    let request = NewRequest {
        purpose: Purpose::Generate { pull_from: Some(1) },
        ..request(vec![5, 6, 7], 4)
    };
    let mut handle = engine.submit(request).unwrap();
    loop {
        match handle.next().await.unwrap() {
            Event::Pull(order) => return (handle, order),
            Event::Admitted { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// The tokens of a request, and how it ended.
async fn pull(
    puller: &Puller,
    peer: &PrefillPeer,
    order: PullOrder,
) -> Result<(Transport, Option<f32>), TransferError> {
    let kv_layout = Some(*order.pool().layout());
    let request = PrefillRequest { kv_layout, ..PrefillRequest::default() };
    let deadline = Instant::now() + Duration::from_secs(60);
    let ask = Ask::Compute(Box::new(request));
    puller.pull(peer, ask, order, deadline, &mut Span::default()).await
}

fn peer(instance_id: &str, address: impl std::fmt::Display) -> PrefillPeer {
    let (instance_id, address) = (instance_id.to_owned(), format!("http://{address}"));
    PrefillPeer { instance_id, address, ..PrefillPeer::default() }
}

#[tokio::test]
async fn a_first_token_that_the_model_does_not_have_is_drawn_here_instead() {
    let engine = engine();
    let mut ends = Vec::new();
    for id in [255, 256, u32::MAX] {
        let (handle, mut order) = order(&engine).await;
        let zeros = vec![0u8; order.block_bytes()];
        order.fill(0, &zeros).unwrap();
        order.complete(Token { id, ..Token::default() }).unwrap();
        let (tokens, finish) = ended(handle).await;
        assert_eq!(finish, Finish::Length, "{id}");
        assert_eq!(tokens.len(), 4, "{id}");
        ends.push(tokens);
    }
    assert_eq!(ends[0][0], 255, "the last of the vocabulary");
    assert!(ends[1] == ends[2] && ends[1].iter().all(|token| *token < 256), "{ends:?}");
}

#[tokio::test]
async fn a_peer_that_does_not_answer_costs_one_request_and_not_each() {
    let engine = engine();
    // The system accepts connections to it, and nobody reads them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let puller = Puller::new(Transports::new(&[Transport::Grpc]));
    let mut took = Vec::new();
    // Both before the first: the peer is left alone for a second only.
    let orders = [order(&engine).await, order(&engine).await];
    let mut handles = Vec::new();
    for (handle, order) in orders {
        let start = Instant::now();
        let pulled = pull(&puller, &peer("a", address), order).await;
        took.push(start.elapsed());
        assert!(matches!(pulled, Err(TransferError::NoAnswer(_))), "{pulled:?}");
        handles.push(handle);
    }
    for handle in handles {
        let (tokens, finish) = ended(handle).await;
        assert_eq!((tokens.len(), finish), (4, Finish::Length), "it is computed here");
    }
    println!("{took:?}");
    assert!(took[0] > Duration::from_secs(1) && took[1] < took[0] / 4, "{took:?}");
    // Another instance at the same address is asked.
    let (_handle, order) = order(&engine).await;
    let other = peer("b", address);
    let anew = tokio::time::timeout(Duration::from_millis(300), pull(&puller, &other, order));
    assert!(anew.await.is_err(), "it is left alone for what another did");
}

/// A prefill worker that answers as it was told, and notes what it was asked.
#[derive(Default)]
struct Scripted {
    /// Events, or a refusal.
    answers: Mutex<VecDeque<Option<Vec<Out>>>>,
    asked: Mutex<Vec<PrefillRequest>>,
}

type Events<T> = BoxStream<'static, Result<T, Status>>;

macro_rules! scripted {
    ($($other:ident($request:ty) -> $reply:ty;)*) => {
        #[tonic::async_trait]
        impl Worker for Scripted {
            type FetchTokenizerStream = Events<v1::ModelChunk>;
            type GenerateStream = Events<v1::GenerateEvent>;
            type PrefillStream = Events<PrefillEvent>;
            type WatchBlocksStream = Events<v1::BlockChanges>;
            type FetchBlocksStream = Events<PrefillEvent>;
            type WatchStatusStream = Events<v1::WorkerStatus>;

            async fn prefill(
                &self,
                request: Request<PrefillRequest>,
            ) -> Result<Response<Self::PrefillStream>, Status> {
                self.asked.lock().push(request.into_inner());
                let answer = self.answers.lock().pop_front().flatten();
                let events = answer.ok_or_else(|| Status::resource_exhausted("it is full"))?;
                let events = events.into_iter().map(|event| Ok(PrefillEvent { event: Some(event) }));
                Ok(Response::new(stream::iter(events.collect::<Vec<_>>()).boxed()))
            }

            $(
                async fn $other(
                    &self,
                    _request: Request<$request>,
                ) -> Result<Response<$reply>, Status> {
                    Err(Status::unimplemented("it computes prompts alone"))
                }
            )*
        }
    };
}

scripted! {
    describe(v1::DescribeRequest) -> v1::WorkerDescription;
    fetch_tokenizer(v1::FetchTokenizerRequest) -> Events<v1::ModelChunk>;
    generate(v1::GenerateRequest) -> Events<v1::GenerateEvent>;
    fetch_blocks(v1::FetchBlocksRequest) -> Events<PrefillEvent>;
    pool(v1::PoolRequest) -> v1::PoolResponse;
    align(v1::AlignRequest) -> v1::AlignResponse;
    watch_status(v1::WatchStatusRequest) -> Events<v1::WorkerStatus>;
    watch_blocks(v1::WatchBlocksRequest) -> Events<v1::BlockChanges>;
    load_adapter(v1::LoadAdapterRequest) -> v1::AdapterList;
    unload_adapter(v1::UnloadAdapterRequest) -> v1::AdapterList;
    list_adapters(v1::ListAdaptersRequest) -> v1::AdapterList;
    drain(v1::DrainRequest) -> v1::DrainResponse;
    undrain(v1::UndrainRequest) -> v1::UndrainResponse;
    set_role(v1::SetRoleRequest) -> v1::SetRoleResponse;
}

/// Blocks as messages: all that a prompt of one block has.
fn sent(engine: &Engine) -> Vec<Out> {
    let accepted =
        PrefillAccepted { transport: Transport::Grpc.into(), ..PrefillAccepted::default() };
    let payload = vec![0u8; engine.pool().block_bytes()].into();
    let first_token = Some(Token { id: 1, ..Token::default() });
    vec![
        Out::Accepted(accepted),
        Out::Block(BlockData { index: 0, payload }),
        Out::Finished(PrefillFinished { first_token, ..PrefillFinished::default() }),
    ]
}

#[tokio::test]
async fn what_is_known_of_a_peer_outlives_a_refusal() {
    let engine = engine();
    let elsewhere = PrefillAccepted {
        transport: Transport::SharedMemory.into(),
        region: Some(SharedMemoryRegion {
            host_id: "another".into(),
            ..SharedMemoryRegion::default()
        }),
        ..PrefillAccepted::default()
    };
    let out_of_reach = vec![Out::Accepted(elsewhere)];
    let answers = [Some(out_of_reach), Some(sent(&engine)), None, Some(sent(&engine))];
    let scripted = Scripted { answers: Mutex::new(answers.into()), ..Scripted::default() };
    let scripted = Arc::new(scripted);

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let incoming = stream::unfold((listener, counted), |(listener, counted)| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        counted.fetch_add(1, Ordering::Relaxed);
        Some((accepted, (listener, counted)))
    });
    let service = WorkerServer::from_arc(scripted.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    let server = tokio::spawn(server.serve_with_incoming(incoming));

    let puller = Puller::new(Transports::new(&[Transport::SharedMemory, Transport::Grpc]));
    let peer = peer("a", address);
    for refused in [false, true, false] {
        let (_handle, order) = order(&engine).await;
        match pull(&puller, &peer, order).await {
            Ok((transport, _)) => assert!(!refused && transport == Transport::Grpc),
            Err(TransferError::Peer(status)) => {
                assert!(refused && status.code() == Code::ResourceExhausted, "{status}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    let offered: Vec<Vec<Transport>> =
        scripted.asked.lock().iter().map(|asked| asked.transports().collect()).collect();
    let (both, grpc) = (vec![Transport::SharedMemory, Transport::Grpc], vec![Transport::Grpc]);
    assert_eq!(offered, [both, grpc.clone(), grpc.clone(), grpc]);
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    server.abort();
}
