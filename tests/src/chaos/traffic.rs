//! Steady requests whose answers are known, and what came of each.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use rand::RngExt as _;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};

use crate::binaries::MODEL_NAME;
use crate::http::{Api, Reply, ids};
use crate::load::arrivals::poisson;

/// A request that takes longer hangs.
const HUNG_AFTER: Duration = Duration::from_secs(60);
/// Header in which HAProxy names the gateway that answered.
pub const GATEWAY: &str = "x-gateway";

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With every token right.
    Right,
    /// With an error of the API's form.
    Refused(String),
    /// The connection broke, or HAProxy said that it did.
    Cut(String),
    /// With another answer, or in a form that is none.
    Wrong(String),
    /// Not at all.
    Hung,
}

/// One request.
#[derive(Clone)]
pub struct Sent {
    /// When it was sent.
    pub at: Instant,
    /// From its sending to its end.
    pub took: Duration,
    /// The gateway that answered, when one began to.
    pub gateway: Option<String>,
    /// Whether its answer was streamed.
    pub streamed: bool,
    /// How it ended.
    pub ending: Ending,
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = if self.streamed { "a stream" } else { "a whole answer" };
        let gateway = self.gateway.as_deref().unwrap_or("no gateway");
        write!(f, "{form} of {gateway} after {:.1?}: {:?}", self.took, self.ending)
    }
}

/// A request and its undisturbed answer.
#[derive(Debug)]
struct Case {
    body: Value,
    answer: Vec<u32>,
}

/// Requests all the time.
#[derive(Debug)]
pub struct Traffic {
    url: String,
    cases: Arc<Vec<Case>>,
    stop: Arc<AtomicBool>,
    sent: Arc<Mutex<Vec<Sent>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Learns the answers from the undisturbed cluster at `url`.
    pub async fn learn(url: &str) -> Self {
        let api = Api::new(url, None);
        let mut cases = Vec::new();
        for n in 0..8 {
            let body = body(n);
            let reply = api.ok("/v1/completions", &body).await;
            let answer = ids(&reply["choices"][0]["token_ids"]);
            assert_eq!(answer.len() as u64, body["max_tokens"].as_u64().unwrap_or(0), "{reply}");
            cases.push(Case { body, answer });
        }
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::default());
        Self { url: url.to_owned(), cases: Arc::new(cases), stop, sent, clients: Vec::new() }
    }

    /// So many clients of completions, each with one request at a time and pauses between.
    pub fn clients(mut self, count: usize, pause: Range<u64>) -> Self {
        for number in 0..count {
            let (url, cases) = (self.url.clone(), self.cases.clone());
            self.client(pause.clone(), move |http, round| {
                let (url, cases) = (url.clone(), cases.clone());
                async move {
                    let case = &cases[(number * 3 + round) % cases.len()];
                    ask(&http, &url, case, (number + round).is_multiple_of(2)).await
                }
            });
        }
        self
    }

    /// A client of responses that are kept.
    pub fn responses(mut self, pause: Range<u64>) -> Self {
        let url = self.url.clone();
        self.client(pause, move |http, _| {
            let url = url.clone();
            async move { store(&http, &url).await }
        });
        self
    }

    /// Completions that arrive as a Poisson process of this rate, requests a second, for so long.
    pub fn arrivals(mut self, rate: f64, span: Duration) -> Self {
        let (url, cases, sent) = (self.url.clone(), self.cases.clone(), self.sent.clone());
        self.clients.push(tokio::spawn(async move {
            let (http, began) = (client(), tokio::time::Instant::now());
            let mut open = JoinSet::new();
            let arrivals = poisson(rate, span, &mut rand::rng());
            for (n, at) in arrivals.into_iter().enumerate() {
                tokio::time::sleep_until(began + at).await;
                let (http, url, cases, sent) =
                    (http.clone(), url.clone(), cases.clone(), sent.clone());
                open.spawn(async move {
                    let case = &cases[n % cases.len()];
                    let one = ask(&http, &url, case, n.is_multiple_of(2)).await;
                    sent.lock().expect("the list").push(one);
                });
            }
            open.join_all().await;
        }));
        self
    }

    /// A client that does `ask` over and over.
    fn client<F, A>(&mut self, pause: Range<u64>, ask: F)
    where
        F: Fn(reqwest::Client, usize) -> A + Send + 'static,
        A: Future<Output = Sent> + Send,
    {
        let (stop, sent) = (self.stop.clone(), self.sent.clone());
        self.clients.push(tokio::spawn(async move {
            let http = client();
            for round in 0.. {
                if stop.load(Relaxed) {
                    return;
                }
                let one = ask(http.clone(), round).await;
                sent.lock().expect("the list").push(one);
                let pause = rand::rng().random_range(pause.clone());
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }));
    }

    /// What came of the requests so far, in a few words.
    pub fn summary(&self) -> String {
        let (sent, failed) = self.so_far();
        match failed.last() {
            None => format!("{sent} requests, all right"),
            Some(last) => format!("{sent} requests, {} not right, at last {last:?}", failed.len()),
        }
    }

    /// How many requests have ended, and with which of them something was wrong.
    pub fn so_far(&self) -> (usize, Vec<Sent>) {
        let sent = self.sent.lock().expect("the list");
        (sent.len(), sent.iter().filter(|it| it.ending != Ending::Right).cloned().collect())
    }

    /// Ends the traffic; everything that was sent.
    pub async fn stop(self) -> Vec<Sent> {
        self.stop.store(true, Relaxed);
        for client in self.clients {
            client.await.expect("a client does not panic");
        }
        std::mem::take(&mut *self.sent.lock().expect("the list"))
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().expect("an HTTP client")
}

/// A request whose every token depends on those before, some long enough to be handed over.
fn body(n: usize) -> Value {
    json!({
        "model": MODEL_NAME,
        "prompt": format!("Story {n}. {} And then", "The sea is wide and blue. ".repeat(4 + 5 * n)),
        "max_tokens": 12 + 4 * n,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    })
}

/// Asks for a completion.
async fn ask(http: &reqwest::Client, url: &str, case: &Case, streamed: bool) -> Sent {
    let mut body = case.body.clone();
    body["stream"] = streamed.into();
    // Half of the prompts are computed and handed over anew: nobody has cached them.
    if rand::rng().random() {
        body["cache_salt"] = rand::rng().random::<u64>().to_string().into();
    }
    let (mut sent, answer) = send(http, &format!("{url}/v1/completions"), body, streamed).await;
    if let Some((tokens, _)) = answer.filter(|(tokens, _)| *tokens != case.answer) {
        sent.ending = Ending::Wrong(format!("{tokens:?} for {:?}", case.answer));
    }
    sent
}

/// Asks for a response that is kept, and for it again.
async fn store(http: &reqwest::Client, url: &str) -> Sent {
    let body = json!({
        "model": MODEL_NAME, "input": "The sea is", "max_output_tokens": 4, "temperature": 0,
    });
    let (mut sent, answer) = send(http, &format!("{url}/v1/responses"), body, false).await;
    let Some((_, response)) = answer else { return sent };
    if response["store"] == false {
        sent.ending = Ending::Refused("answered, and not kept".into());
        return sent;
    }
    let again = format!("{url}/v1/responses/{}", response["id"].as_str().unwrap_or_default());
    sent.ending = match http.get(again).timeout(HUNG_AFTER).send().await {
        Ok(reply) if reply.status().is_success() => match whole(reply).await.json() {
            kept if kept["output"] == response["output"] => Ending::Right,
            kept => Ending::Wrong(format!("{kept} for {response}")),
        },
        Ok(reply) if reply.status() == StatusCode::NOT_FOUND => {
            Ending::Wrong(format!("said to be kept, but {}", whole(reply).await.text))
        }
        Ok(reply) => refused(whole(reply).await),
        Err(error) => broken(&error),
    };
    sent
}

/// Sends a request and reads its answer: its tokens and, of a whole one, its body.
async fn send(
    http: &reqwest::Client,
    url: &str,
    body: Value,
    streamed: bool,
) -> (Sent, Option<(Vec<u32>, Value)>) {
    let at = Instant::now();
    let mut gateway = None;
    let answer = async {
        let reply = http.post(url).json(&body).send().await.map_err(|e| broken(&e))?;
        let name = reply.headers().get(GATEWAY).and_then(|name| name.to_str().ok());
        gateway = name.map(str::to_owned);
        if !reply.status().is_success() {
            return Err(refused(whole(reply).await));
        }
        if streamed {
            return Ok((events(reply).await?, Value::Null));
        }
        let text = reply.text().await.map_err(|e| broken(&e))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| Ending::Wrong(format!("{e}")))?;
        Ok((ids(&json["choices"][0]["token_ids"]), json))
    };
    let (ending, answer) = match tokio::time::timeout(HUNG_AFTER, answer).await {
        Err(_) => (Ending::Hung, None),
        Ok(Err(ending)) => (ending, None),
        Ok(Ok(answer)) => (Ending::Right, Some(answer)),
    };
    (Sent { at, took: at.elapsed(), gateway, streamed, ending }, answer)
}

/// The tokens of a stream, to its end.
async fn events(reply: reqwest::Response) -> Result<Vec<u32>, Ending> {
    let mut bytes = reply.bytes_stream();
    let (mut buffer, mut tokens) = (Vec::new(), Vec::new());
    while let Some(chunk) = bytes.next().await {
        buffer.extend(chunk.map_err(|e| broken(&e))?);
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let frame: Vec<u8> = buffer.drain(..end + 2).collect();
            let frame = String::from_utf8_lossy(&frame).into_owned();
            if frame.starts_with(": ") {
                continue;
            }
            let Some(data) = frame.trim_end().strip_prefix("data: ") else {
                return Err(Ending::Wrong(frame));
            };
            if data == "[DONE]" {
                return Ok(tokens);
            }
            let event: Value =
                serde_json::from_str(data).map_err(|e| Ending::Wrong(format!("{e}: {data}")))?;
            if event["error"]["message"].is_string() {
                return Err(Ending::Refused(event["error"].to_string()));
            }
            tokens.extend(ids(&event["choices"][0]["token_ids"]));
        }
    }
    Err(Ending::Cut(format!("the stream ended after {} tokens without [DONE]", tokens.len())))
}

async fn whole(reply: reqwest::Response) -> Reply {
    let (status, headers) = (reply.status(), reply.headers().clone());
    let text = reply.text().await.unwrap_or_else(|error| error.to_string());
    Reply { status, headers, text }
}

/// An error is clear when it has the API's form. HAProxy's own, which names no gateway, says that
/// one was lost.
fn refused(reply: Reply) -> Ending {
    match reply.error(reply.status.as_u16()) {
        Ok(_) if reply.header(GATEWAY).is_empty() => {
            Ending::Cut(format!("HAProxy: {}", reply.status))
        }
        Ok(error) => Ending::Refused(format!("{}: {error}", reply.status)),
        Err(why) => Ending::Wrong(why),
    }
}

fn broken(error: &reqwest::Error) -> Ending {
    Ending::Cut(format!("{error:?}"))
}
