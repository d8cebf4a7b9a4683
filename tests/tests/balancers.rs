//! Two gateways behind a real HAProxy and a real nginx, with the configurations of
//! `deploy/balancers`.

use std::ffi::OsString;
use std::time::Duration;

use baton_tests::balancer::{Balancer, Kind};
use baton_tests::binaries::{MODEL_NAME, program};
use baton_tests::http::{RawClient, streamed_ids};
use baton_tests::process::{Process, Spec};
use baton_tests::prometheus::Scrape;
use baton_tests::{Api, Cluster, eventually, grpc, ports};
use futures::future::join_all;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const PATH: &str = "/v1/completions";
/// By when all that is under way has happened.
const SOON: Duration = Duration::from_secs(20);

/// Each test with each balancer.
macro_rules! with_each {
    ($($test:ident),* $(,)?) => {
        mod haproxy {
            use super::Kind;
            $(#[tokio::test] async fn $test() { super::$test(Kind::Haproxy).await })*
        }
        mod nginx {
            use super::Kind;
            $(#[tokio::test] async fn $test() { super::$test(Kind::Nginx).await })*
        }
    };
}

with_each![
    every_token_goes_out_at_once,
    a_gateway_that_is_killed_while_idle_costs_no_request,
    a_gateway_that_is_killed_takes_only_its_own_requests_along,
    a_gateway_that_drains_takes_no_new_requests,
    any_gateway_answers_for_any_stored_response,
    a_client_that_leaves_ends_its_generation,
    ids_are_kept_and_errors_have_the_api_s_form,
];

struct Gateway {
    spec: Spec,
    process: Process,
    /// Its own address.
    api: Api,
}

impl Gateway {
    /// So many answers of a status to this method at this route.
    async fn answers(&self, method: &str, handler: &str, status: &str) -> f64 {
        let scrape = Scrape::parse(&self.api.get("/metrics").await.text).expect("metrics");
        let labels = [("method", method), ("handler", handler), ("status", status)];
        scrape.sum("http_requests_total", &labels).unwrap_or(0.0)
    }

    async fn load(&self) -> u64 {
        self.api.get("/load").await.ok()["server_load"].as_u64().expect("a number")
    }

    async fn serves(&self) {
        eventually("the gateway serves", SOON, async || {
            let reply = self.api.send(Method::GET, "/health", None, "").await;
            match reply {
                Ok(reply) if reply.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
}

/// A cluster, two gateways of it, and a balancer before them.
struct Front {
    /// Has a gateway of its own, which only tells whether all is at rest.
    cluster: Cluster,
    gateways: Vec<Gateway>,
    balancer: Balancer,
    kind: Kind,
    /// Through the balancer.
    api: Api,
}

impl Front {
    async fn start(kind: Kind) -> Self {
        let cluster = Cluster::builder().unified(1).start().await;
        let mut gateways = Vec::new();
        for n in 0..2 {
            let listen = format!("127.0.0.1:{}", ports::free());
            let common = ["--listen", &listen, "--etcd", cluster.etcd.url(), "--lease-ttl", "5"];
            // Time enough for a stream, however busy the machine is.
            let args = [&common[..], &["--drain-timeout", "200"]].concat();
            let spec = Spec::new(format!("gateway-{n}"), program("baton-gateway"), args);
            let mut process = Process::start(&spec, cluster.dir());
            let api = Api::new(&process.ready().await, None);
            let gateway = Gateway { spec, process, api };
            gateway.serves().await;
            gateways.push(gateway);
        }
        let addresses = [gateways[0].api.base(), gateways[1].api.base()];
        let balancer = Balancer::start(kind, "127.0.0.1", addresses, cluster.dir());
        let api = Api::new(balancer.url(), None);
        let front = Self { cluster, gateways, balancer, kind, api };
        front.found().await;
        front
    }

    /// Waits until the balancer has found both gateways.
    async fn found(&self) {
        eventually("the balancer has found both", SOON, async || {
            if self.kind == Kind::Haproxy {
                self.balancer.found_both().await?;
            }
            // nginx looks for nobody; it takes a gateway when its turn comes.
            let reply = self.api.send(Method::GET, "/health", None, "").await;
            match reply {
                Ok(reply) if reply.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// Streams that are open on each gateway.
    async fn loads(&self) -> Vec<u64> {
        join_all(self.gateways.iter().map(Gateway::load)).await
    }

    /// Waits until each gateway has requests, so many together; how many.
    async fn shared_out(&self, together: u64) -> Vec<u64> {
        let (loads, _) = eventually("both gateways have requests", SOON, async || {
            let loads = self.loads().await;
            let shared = loads.iter().sum::<u64>() == together && !loads.contains(&0);
            if shared { Ok(loads) } else { Err(format!("{loads:?}")) }
        })
        .await;
        loads
    }

    /// Waits until the worker has no request and no block that one owns.
    async fn at_rest(&self) {
        eventually("the worker is at rest", SOON, async || {
            let status = self.cluster.workers[0].status().await;
            let busy = u64::from(status.running + status.waiting) + grpc::owned_blocks(&status);
            if busy == 0 { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
    }

    /// Short requests one after the other, then all at once; each must be answered right.
    async fn all_are_answered(&self, count: usize) {
        let body = json!({"model": MODEL_NAME, "prompt": "One two", "max_tokens": 2});
        for _ in 0..count {
            let reply = self.api.ok(PATH, &body).await;
            assert_eq!(reply["usage"]["completion_tokens"], 2, "{reply}");
        }
        let together = (0..count).map(|_| self.api.ok(PATH, &body));
        for reply in join_all(together).await {
            assert_eq!(reply["usage"]["completion_tokens"], 2, "{reply}");
        }
    }

    async fn finish(mut self) {
        self.at_rest().await;
        self.balancer.kill();
        for gateway in &mut self.gateways {
            if gateway.process.exited().is_none() {
                gateway.process.stop().await;
            }
        }
        // One that was killed is registered until its lease ends.
        eventually("only the cluster's own gateway is left", SOON, async || {
            let left = self.cluster.etcd.instances();
            let gateways = left.iter().filter(|it| it.role.as_str() == "gateway").count();
            if gateways == 1 { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
        self.cluster.finish().await;
    }
}

fn long(tokens: u64) -> Value {
    json!({
        "model": MODEL_NAME, "prompt": format!("Tell {}.", rand::random::<u32>()),
        "max_tokens": tokens, "ignore_eos": true, "temperature": 0, "stream": true,
        "return_token_ids": true,
    })
}

/// A stream that is read all the time: how many tokens have come, and in the end all of them, or a
/// panic that says why not.
fn read(api: &Api, body: Value) -> (watch::Receiver<usize>, JoinHandle<usize>) {
    let (api, (sender, tokens)) = (api.clone(), watch::channel(0));
    let task = tokio::spawn(async move {
        let mut stream = api.stream(PATH, &body).await;
        let mut got = 0;
        while let Some(event) = stream.next().await {
            assert!(event["error"].is_null(), "{event}");
            got += streamed_ids(&[event], 0).len();
            sender.send_replace(got);
        }
        got
    });
    (tokens, task)
}

/// While the worker stands still, the client has every token that the gateway has had.
async fn every_token_goes_out_at_once(kind: Kind) {
    let front = Front::start(kind).await;
    let worker = &front.cluster.workers[0];
    let most = 400;
    let (mut tokens, task) = read(&front.api, long(most));
    let had = async || {
        let mut had = 0.0;
        for gateway in &front.gateways {
            let text = gateway.api.get("/metrics").await.text;
            let scrape = Scrape::parse(&text).expect("metrics");
            had += scrape.sum("vllm:generation_tokens_total", &[]).expect("tokens");
        }
        had as usize
    };
    for wanted in [1, 20, 60] {
        let come = tokio::time::timeout(SOON, tokens.wait_for(|have| *have >= wanted)).await;
        come.expect("tokens in time").expect("the stream goes on");
        worker.process.signal(Signal::SIGSTOP);
        let (stood, _) = eventually("all tokens have come", SOON, async || {
            let (before, have) = (had().await, *tokens.borrow());
            // Nothing is on its way when a while changes nothing.
            tokio::time::sleep(Duration::from_millis(200)).await;
            match (had().await, *tokens.borrow()) {
                (had, now) if had == before && had == now && now == have => Ok(now),
                other => Err(format!("{before} had, {have} here, then {other:?}")),
            }
        })
        .await;
        worker.process.signal(Signal::SIGCONT);
        assert!(stood >= wanted && stood < most as usize, "{stood} tokens");
    }
    assert_eq!(task.await.expect("a stream"), most as usize);
    front.finish().await;
}

async fn a_gateway_that_is_killed_while_idle_costs_no_request(kind: Kind) {
    let mut front = Front::start(kind).await;
    front.all_are_answered(10).await;
    for n in [1, 0] {
        front.gateways[n].process.kill();
        front.all_are_answered(20).await;
        // It comes back, and gets requests again.
        let gateway = &mut front.gateways[n];
        gateway.process = Process::start(&gateway.spec, front.cluster.dir());
        gateway.process.ready().await;
        gateway.serves().await;
        front.found().await;
        let gateway = &front.gateways[n];
        eventually("it gets requests again", SOON, async || {
            front.all_are_answered(2).await;
            let answers = gateway.answers("POST", PATH, "200").await;
            if answers > 0.0 { Ok(()) } else { Err(format!("{answers}")) }
        })
        .await;
    }
    front.finish().await;
}

async fn a_gateway_that_is_killed_takes_only_its_own_requests_along(kind: Kind) {
    let mut front = Front::start(kind).await;
    let streams: Vec<_> = (0..4).map(|_| read(&front.api, long(300)).1).collect();
    front.shared_out(4).await;
    // Of whole answers no byte has come: they may have begun all the same.
    let wholes: Vec<_> = (0..4)
        .map(|_| {
            let (api, mut body) = (front.api.clone(), long(300));
            body["stream"] = false.into();
            tokio::spawn(async move { api.post(PATH, &body).await })
        })
        .collect();
    let loads = front.shared_out(8).await;
    front.gateways[1].process.kill();
    let answered = front.gateways[0].answers("POST", PATH, "200").await;
    front.all_are_answered(5).await;

    let mut lost = 0;
    for stream in join_all(streams).await {
        match stream {
            Ok(tokens) => assert_eq!(tokens, 300),
            Err(broken) => {
                println!("{broken}");
                lost += 1;
            }
        }
    }
    let mut right = 0.0;
    for reply in join_all(wholes).await {
        let reply = reply.expect("a reply");
        if reply.status == 200 {
            right += 1.0;
            assert_eq!(reply.ok()["usage"]["completion_tokens"], 300);
        } else {
            reply.error(502).expect("the gateway's death, told in the API's form");
            lost += 1;
        }
    }
    assert_eq!(lost, loads[1], "of {loads:?}");
    // None was sent to the other one again: it has answered its own, and the short ones.
    let now = front.gateways[0].answers("POST", PATH, "200").await;
    assert_eq!(now - answered, right + 10.0);
    front.finish().await;
}

async fn a_gateway_that_drains_takes_no_new_requests(kind: Kind) {
    let mut front = Front::start(kind).await;
    let streams: Vec<_> = (0..2).map(|_| read(&front.api, long(600)).1).collect();
    front.shared_out(2).await;
    let draining = &front.gateways[1];
    draining.process.signal(Signal::SIGTERM);
    eventually("it drains", SOON, async || {
        let status = draining.api.get("/health").await.status;
        if status == 503 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    // Its stream alone, which may not have begun when it was told to drain.
    eventually("its stream has begun", SOON, async || {
        let answers = draining.answers("POST", PATH, "200").await;
        if answers == 1.0 { Ok(()) } else { Err(answers.to_string()) }
    })
    .await;
    front.all_are_answered(10).await;
    assert_eq!(draining.answers("POST", PATH, "200").await, 1.0);
    assert_eq!(draining.load().await, 1, "its stream is still open");
    for stream in join_all(streams).await {
        assert_eq!(stream.expect("a stream"), 600);
    }
    let ended = front.gateways[1].process.end(SOON).await;
    assert!(ended.success(), "{ended}");
    front.all_are_answered(5).await;
    front.finish().await;
}

async fn any_gateway_answers_for_any_stored_response(kind: Kind) {
    const RESPONSES: &str = "/v1/responses";
    let front = Front::start(kind).await;
    let body = json!({
        "model": MODEL_NAME, "input": "Count to a thousand.", "temperature": 0,
        "max_output_tokens": 12,
    });
    let response = front.api.ok(RESPONSES, &body).await;
    let path = |response: &Value| format!("{RESPONSES}/{}", response["id"].as_str().expect("id"));
    for _ in 0..8 {
        assert_eq!(front.api.get(&path(&response)).await.ok(), response);
    }
    for gateway in &front.gateways {
        let got = gateway.answers("GET", "/v1/responses/{id}", "200").await;
        assert!(got >= 1.0, "one gateway has given {got} of 8");
    }

    // Made by the one, followed and cancelled through the other.
    let mut endless = body.clone();
    for (field, value) in [("background", json!(true)), ("stream", json!(true))] {
        endless[field] = value;
    }
    (endless["ignore_eos"], endless["max_output_tokens"]) = (json!(true), json!(1800));
    for (one, other) in [(0, 1), (1, 0)] {
        let (one, other) = (&front.gateways[one].api, &front.gateways[other].api);
        let mut made = one.named(Method::POST, RESPONSES, Some(&endless)).await;
        let created = made.next().await.expect("an event");
        let path = path(&created["response"]);
        let follow = format!("{path}?stream=true");
        let mut followed = other.named(Method::GET, &follow, None).await;
        let mut through = front.api.named(Method::GET, &follow, None).await;
        let first = followed.next().await.expect("an event");
        assert_eq!(through.next().await.expect("an event"), first);
        let cancel = format!("{path}/cancel");
        let reply = other.send(Method::POST, &cancel, None, "").await.expect("a reply");
        assert_eq!(reply.ok()["status"], "cancelled");
        front.at_rest().await;
        assert_eq!(front.api.get(&path).await.ok()["status"], "cancelled");
        for stream in [made, followed, through] {
            stream.collect().await;
        }
    }
    front.finish().await;
}

async fn a_client_that_leaves_ends_its_generation(kind: Kind) {
    let front = Front::start(kind).await;
    let worker = &front.cluster.workers[0];
    for stream in [true, false] {
        // While its answer is written, and while its prompt is computed.
        for (words, most) in [(1, 1500), (3500, 4)] {
            let before = worker.status().await.generation_tokens;
            let mut body = long(most);
            body["stream"] = stream.into();
            let from = rand::random_range(1000..20_000);
            body["prompt"] = (from..from + words).collect::<Vec<u32>>().into();
            let client = RawClient::post(&front.api, PATH, &body).await;
            eventually("it is under way", SOON, async || {
                let status = worker.status().await;
                let writes = status.generation_tokens > before + 4;
                let under_way = status.running > 0 && (words > 1 || writes);
                if under_way { Ok(()) } else { Err(format!("{status:?}")) }
            })
            .await;
            client.leave();
            front.at_rest().await;
            let written = worker.status().await.generation_tokens - before;
            assert!(written < most, "{written} tokens for nobody; stream {stream}");
            eventually("the gateways have noticed", SOON, async || {
                let loads = front.loads().await;
                if loads == [0, 0] { Ok(()) } else { Err(format!("{loads:?}")) }
            })
            .await;
        }
    }
    front.finish().await;
}

async fn ids_are_kept_and_errors_have_the_api_s_form(kind: Kind) {
    let mut front = Front::start(kind).await;
    let body = |id: Value| {
        let mut body = json!({"model": MODEL_NAME, "prompt": "One", "max_tokens": 1});
        body["request_id"] = id;
        body.to_string()
    };
    let json = ("Content-Type", "application/json");
    let of_header = [json, ("X-Request-Id", "of-the-header")];
    let api = &front.api;
    let reply = api.send_with(Method::POST, PATH, &of_header, &body("of-the-body".into())).await;
    assert_eq!(reply.header("x-request-id"), "of-the-header");
    assert_eq!(reply.ok()["id"], "cmpl-of-the-header");
    let reply = api.send_with(Method::POST, PATH, &[json], &body("of-the-body".into())).await;
    assert_eq!(reply.header("x-request-id"), "of-the-body");
    // What is wrong with a request is told by the gateway.
    let large = "x".repeat(9 * 1024 * 1024);
    // A client that still writes may find the connection closed before it has read the answer.
    eventually("the gateway's own words arrive", SOON, async || {
        let reply = api.send(Method::POST, PATH, Some("application/json"), large.clone()).await;
        reply.map_err(|error| format!("{error:?}"))?.error(413)
    })
    .await;

    for gateway in &mut front.gateways {
        gateway.process.kill();
    }
    for _ in 0..3 {
        let reply = api.send_with(Method::POST, PATH, &[json], &body(Value::Null)).await;
        let status = reply.status.as_u16();
        assert!([502, 503].contains(&status), "{status}: {}", reply.text);
        reply.error(status).expect("an error of the API's form");
        assert_eq!(reply.header("retry-after"), "1");
    }
    front.finish().await;
}

/// The configurations are what their programs take as they are, not only as tests have them.
#[test]
fn haproxy_takes_the_configuration_as_it_is() {
    let file = baton_tests::binaries::repository().join("deploy/balancers/haproxy.cfg");
    let args: [OsString; 3] = ["-c".into(), "-f".into(), file.into()];
    let output = std::process::Command::new("haproxy").args(args).output().expect("run haproxy");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
