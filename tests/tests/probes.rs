//! Probes: a process is ready when it can serve, and alive when it answers.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::time::Duration;

use baton_proto::v1::{DrainRequest, UndrainRequest};
use baton_tests::binaries::{model, program};
use baton_tests::process::{Process, Spec};
use baton_tests::{Cluster, Role, eventually, grpc, ports};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const WORKER: &str = "baton.v1.Worker";
const COORDINATOR: &str = "baton.v1.Coordinator";

/// What a gRPC probe of Kubernetes is told.
async fn check(address: &str, service: &str) -> Result<ServingStatus, tonic::Code> {
    let endpoint = Endpoint::from_shared(address.to_owned()).expect("an address");
    let channel = endpoint.connect().await.expect("it listens");
    let request = HealthCheckRequest { service: service.into() };
    let reply = HealthClient::new(channel).check(request).await;
    reply.map(|reply| reply.into_inner().status()).map_err(|status| status.code())
}

#[tokio::test]
async fn a_worker_that_drains_is_alive_and_not_ready() {
    let cluster = Cluster::builder().unified(1).coordinator().start().await;
    let worker = &cluster.only(Role::Unified).address;
    let is = async |service: &str, expected| {
        eventually("the probe", Duration::from_secs(2), async || {
            let told = check(worker, service).await;
            if told == Ok(expected) { Ok(()) } else { Err(format!("{service}: {told:?}")) }
        })
        .await;
    };
    is("", ServingStatus::Serving).await;
    is(WORKER, ServingStatus::Serving).await;
    let mut client = grpc::worker(worker).await;
    client.drain(DrainRequest { timeout_ms: 60_000 }).await.expect("it drains");
    is(WORKER, ServingStatus::NotServing).await;
    is("", ServingStatus::Serving).await;
    client.undrain(UndrainRequest {}).await.expect("it serves again");
    is(WORKER, ServingStatus::Serving).await;
    assert_eq!(check(worker, COORDINATOR).await, Err(tonic::Code::NotFound));

    for service in ["", COORDINATOR] {
        assert_eq!(check(cluster.coordinator(), service).await, Ok(ServingStatus::Serving));
    }
    cluster.finish().await;
}

/// A probe by TCP alone must not find a worker that is loading: a file of this one never ends.
#[tokio::test]
async fn a_worker_takes_no_connection_before_it_serves() {
    let dir = tempfile::tempdir().expect("a folder");
    let fifo = dir.path().join("template.jinja");
    let made = Command::new("mkfifo").arg(&fifo).status().expect("run mkfifo");
    assert!(made.success());
    let port = ports::free();
    let listen = format!("127.0.0.1:{port}");
    let model = model();
    let args = [
        ["--role", "unified"],
        ["--listen", &listen],
        ["--model", model.to_str().expect("UTF-8")],
        ["--chat-template", fifo.to_str().expect("UTF-8")],
    ];
    let spec = Spec::new("baton-worker", program("baton-worker"), args.concat());
    let mut process = Process::start(&spec, dir.path());
    // Open as soon as the worker reads it, which it does after it has taken its address.
    let open = tokio::task::spawn_blocking(move || File::options().write(true).open(fifo));
    let open = tokio::time::timeout(Duration::from_secs(20), open).await;
    let _open = open.unwrap_or_else(|_| panic!("it does not read: {}", process.stderr()));
    let error = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(process.exited().is_none(), "{}", process.stderr());
    process.kill();
}

#[tokio::test]
async fn a_gateway_without_workers_is_alive_and_not_ready() {
    let cluster = Cluster::builder().start().await;
    assert_eq!(cluster.api.get("/health").await.status, 503);
    assert_eq!(cluster.api.get("/live").await.status, 200);
    cluster.finish().await;
}
