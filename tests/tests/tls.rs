//! HTTPS, as curl sees it, with certificates that openssl made.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use baton_tests::authority::Authority;
use baton_tests::binaries::{MODEL_NAME, program};
use baton_tests::process::{Process, Spec};
use baton_tests::{Cluster, eventually, grpc};
use serde_json::json;

/// Another gateway of the cluster, with these flags.
async fn gateway(cluster: &Cluster, args: &[&str]) -> (Process, String) {
    let common = ["--listen", "127.0.0.1:0", "--etcd", cluster.etcd.url(), "--lease-ttl", "5"];
    let spec = Spec::new("tls-gateway", program("baton-gateway"), common.iter().chain(args));
    let mut process = Process::start(&spec, cluster.dir());
    let address = process.ready().await;
    assert!(address.starts_with("https://"), "{address}");
    (process, address)
}

fn curl(args: &[&str]) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]).args(args);
    command
}

/// What curl prints, or why it fails.
async fn fetch(args: &[&str]) -> Result<String, String> {
    let mut command = curl(args);
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("a thread");
    let output = output.expect("curl runs");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn completion(stream: bool) -> String {
    json!({
        "model": MODEL_NAME, "prompt": "One two", "max_tokens": 6000, "ignore_eos": true,
        "stream": stream,
    })
    .to_string()
}

#[tokio::test]
async fn clients_that_leave_are_noticed_under_tls() {
    let cluster = Cluster::unified().await;
    let authority = Authority::new(cluster.dir().join("tls"));
    authority.sign("server");
    let (certificate, key) = (authority.file("server.pem"), authority.file("server.key"));
    let (mut process, url) =
        gateway(&cluster, &["--ssl-certfile", &certificate, "--ssl-keyfile", &key]).await;
    let ca = authority.file("ca.pem");
    let version = format!("{url}/version");
    let reply =
        fetch(&["--cacert", &ca, "-w", " %{http_version}", &version]).await.expect("a reply");
    assert!(reply.contains("\"version\"") && reply.ends_with(" 1.1"), "{reply}");
    fetch(&[&version]).await.expect_err("a certificate that nobody knows");
    fetch(&[&version.replace("https", "http")]).await.expect_err("HTTP at the port of HTTPS");

    let health = format!("{url}/health");
    eventually("the gateway finds the worker", Duration::from_secs(10), async || {
        fetch(&["--cacert", &ca, "--fail", &health]).await
    })
    .await;
    let worker = &cluster.workers[0];
    for stream in [false, true] {
        let body = completion(stream);
        let json = "Content-Type: application/json";
        let route = format!("{url}/v1/completions");
        let mut client = curl(&["--no-buffer", "--cacert", &ca, "-H", json, "-d", &body, &route])
            .stdout(Stdio::null())
            .spawn()
            .expect("curl runs");
        let before = worker.status().await.generation_tokens;
        eventually("tokens flow", Duration::from_secs(30), async || {
            let status = worker.status().await;
            let flows = status.generation_tokens > before + 4;
            if flows { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        client.kill().expect("kill curl");
        client.wait().expect("wait for curl");
        let (_, took) = eventually("all is freed", Duration::from_secs(2), async || {
            let status = worker.status().await;
            let left = u64::from(status.running) + grpc::owned_blocks(&status);
            if left == 0 { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        println!("stream {stream}: freed after {took:?}");
    }
    process.stop().await;
    cluster.still_serves().await;
    cluster.finish().await;
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let cluster = Cluster::builder().start().await;
    let (old, new) =
        (Authority::new(cluster.dir().join("old")), Authority::new(cluster.dir().join("new")));
    old.sign("server");
    new.sign("server");
    let used = cluster.dir().join("used.pem");
    let place = |authority: &Authority| {
        // Both in one file, put there as a whole.
        let both: Vec<u8> = ["server.pem", "server.key"]
            .iter()
            .flat_map(|name| std::fs::read(authority.file(name)).expect("read"))
            .collect();
        let beside = used.with_extension("new");
        std::fs::write(&beside, both).expect("write");
        std::fs::rename(&beside, &used).expect("rename");
    };
    place(&old);
    let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
    let (mut process, url) = gateway(&cluster, &["--ssl-certfile", &path(&used)]).await;
    let version = format!("{url}/version");
    let (old_ca, new_ca) = (old.file("ca.pem"), new.file("ca.pem"));
    fetch(&["--cacert", &old_ca, &version]).await.expect("a reply");
    fetch(&["--cacert", &new_ca, &version]).await.expect_err("not yet");

    // What cannot be used changes nothing, and is told.
    std::fs::write(&used, "half a certifi").expect("write");
    eventually("the bad file is noticed", Duration::from_secs(10), async || {
        let log = process.stderr();
        if log.contains("--ssl-certfile") && log.contains("WARN") { Ok(()) } else { Err(log) }
    })
    .await;
    fetch(&["--cacert", &old_ca, &version]).await.expect("still the old one");
    place(&new);
    eventually("the new certificate is used", Duration::from_secs(10), async || {
        fetch(&["--cacert", &new_ca, &version]).await
    })
    .await;
    fetch(&["--cacert", &old_ca, &version]).await.expect_err("the old one has gone");
    process.stop().await;
    cluster.finish().await;
}

#[tokio::test]
async fn clients_show_certificates_when_they_must() {
    let cluster = Cluster::builder().start().await;
    let ours = Authority::new(cluster.dir().join("ours"));
    let theirs = Authority::new(cluster.dir().join("theirs"));
    ours.sign("server");
    ours.sign("client");
    theirs.sign("client");
    let (certificate, key, ca) =
        (ours.file("server.pem"), ours.file("server.key"), ours.file("ca.pem"));
    for (reqs, open) in [("1", true), ("2", false)] {
        let (mut process, url) = gateway(
            &cluster,
            &[
                "--ssl-certfile",
                &certificate,
                "--ssl-keyfile",
                &key,
                "--ssl-ca-certs",
                &ca,
                "--ssl-cert-reqs",
                reqs,
            ],
        )
        .await;
        let version = format!("{url}/version");
        let none = fetch(&["--cacert", &ca, &version]).await;
        assert_eq!(none.is_ok(), open, "--ssl-cert-reqs {reqs}: {none:?}");
        let with = async |authority: &Authority| {
            let (pem, key) = (authority.file("client.pem"), authority.file("client.key"));
            fetch(&["--cacert", &ca, "--cert", &pem, "--key", &key, &version]).await
        };
        with(&ours).await.expect("a reply");
        with(&theirs).await.expect_err("another authority's client");
        process.stop().await;
    }
    cluster.finish().await;
}
