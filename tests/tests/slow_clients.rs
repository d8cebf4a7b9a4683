//! Clients that send too slowly or too much, or do not read: each has its end, and takes nobody
//! else's.

use std::time::{Duration, Instant};

use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Cluster, eventually};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

fn host(cluster: &Cluster) -> &str {
    cluster.api.base().strip_prefix("http://").expect("an http address")
}

/// Sends `bytes` and nothing more; what the gateway says until it closes, and when it did.
async fn say(cluster: &Cluster, bytes: &[u8]) -> (String, Duration) {
    let mut stream = TcpStream::connect(host(cluster)).await.expect("connect");
    stream.write_all(bytes).await.expect("send");
    let began = Instant::now();
    let mut reply = Vec::new();
    let read = stream.read_to_end(&mut reply);
    let read = tokio::time::timeout(Duration::from_secs(20), read).await.expect("an end in time");
    // A connection that is closed with bytes unread is reset: what came before counts.
    let _ = read;
    (String::from_utf8_lossy(&reply).into_owned(), began.elapsed())
}

#[tokio::test]
async fn a_head_and_a_body_must_arrive_in_time() {
    let cluster = Cluster::builder()
        .gateway_arg("--head-timeout", "1")
        .gateway_arg("--body-timeout", "2")
        .start()
        .await;
    let half_a_head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Le";
    let (reply, took) = say(&cluster, half_a_head).await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply:?}");
    assert!((900..5000).contains(&took.as_millis()), "{took:?}");

    let half_a_body = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                        Content-Length: 100\r\n\r\n{\"pro";
    let (reply, took) = say(&cluster, half_a_body).await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply:?}");
    assert!(reply.contains("x-request-id") && reply.contains("Request Timeout"), "{reply:?}");
    assert!((1900..6000).contains(&took.as_millis()), "{took:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_431() {
    let cluster = Cluster::builder().start().await;
    let long =
        format!("GET /version HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "x".repeat(140_000));
    let lines: String = (0..100).map(|i| format!("X-{i}: y\r\n")).collect();
    let many = format!("GET /version HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
    for head in [long, many] {
        let (reply, _) = say(&cluster, head.as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 431"), "{:?}", &reply[..reply.len().min(200)]);
    }
    // What fits is served.
    let fits = format!(
        "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    let (reply, _) = say(&cluster, fits.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply:?}");
    cluster.finish().await;
}

/// The stream would go on for thousands of tokens, each with kilobytes of log probabilities.
#[tokio::test]
async fn a_client_that_does_not_read_its_stream_is_cut_off() {
    let builder = Cluster::builder().unified(1).gateway_arg("--send-timeout", "2");
    let cluster = builder.gateway_arg("--key-max-concurrent", "1").start().await;
    let worker = &cluster.workers[0];
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let address = host(&cluster).parse().expect("an address");
    let mut stream = socket.connect(address).await.expect("connect");
    let body = json!({
        "model": MODEL_NAME, "prompt": "One two", "max_tokens": 8000, "ignore_eos": true,
        "stream": true, "logprobs": 20,
    })
    .to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("send");
    stream.write_all(body.as_bytes()).await.expect("send");
    let busy = async || {
        let status = worker.status().await;
        if status.running > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    };
    eventually("the request runs", Duration::from_secs(10), busy).await;
    assert_eq!(cluster.api.get("/v1/models").await.status, 429, "the client has one place");
    eventually("the request is given up", Duration::from_secs(60), async || {
        let status = worker.status().await;
        if status.running == 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    let status = worker.status().await;
    assert!(status.generation_tokens < 7900, "it ran to its end: {status:?}");
    eventually("its place is free", Duration::from_secs(5), async || {
        let status = cluster.api.get("/v1/models").await.status;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    println!("cut off after {} tokens", status.generation_tokens);
    drop(stream);
    cluster.finish().await;
}
