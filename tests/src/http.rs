//! A client of the gateway that also checks the framing of what it reads.

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, StatusCode};
use serde_json::Value;

/// No request of a test takes longer: one that does hangs.
const REPLY_WITHIN: Duration = Duration::from_secs(120);

/// The gateway's HTTP API.
#[derive(Clone, Debug)]
pub struct Api {
    base: String,
    key: Option<String>,
    client: reqwest::Client,
}

impl Api {
    /// A client of the gateway at `base`, which sends `key` when there is one.
    pub fn new(base: &str, key: Option<&str>) -> Self {
        let client = reqwest::Client::builder().timeout(REPLY_WITHIN).no_proxy().build();
        let client = client.expect("an HTTP client");
        Self { base: base.to_owned(), key: key.map(str::to_owned), client }
    }

    /// The same client with another key, or none.
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Self { key: key.map(str::to_owned), ..self.clone() }
    }

    /// The gateway's address.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a request with any body.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: impl Into<reqwest::Body>,
    ) -> Result<Reply, reqwest::Error> {
        let mut request = self.client.request(method, format!("{}{path}", self.base)).body(body);
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let reply = request.send().await?;
        let (status, headers) = (reply.status(), reply.headers().clone());
        let text = String::from_utf8(reply.bytes().await?.to_vec()).expect("a body in UTF-8");
        Ok(Reply { status, headers, text })
    }

    /// Sends a request with these headers, and the client's key.
    pub async fn send_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Reply {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let reply = request.body(body.to_owned()).send().await;
        let reply = reply.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        let (status, headers) = (reply.status(), reply.headers().clone());
        let text = reply.text().await.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        Reply { status, headers, text }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Reply {
        let reply = self.send(Method::GET, path, None, "").await;
        reply.unwrap_or_else(|e| panic!("GET {path}: {e:?}"))
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        let reply = self.send(Method::POST, path, Some("application/json"), body.to_string()).await;
        reply.unwrap_or_else(|e| panic!("POST {path}: {e:?}"))
    }

    /// `POST path` with a JSON body that must succeed; the body of the reply.
    pub async fn ok(&self, path: &str, body: &Value) -> Value {
        self.post(path, body).await.ok()
    }

    /// `POST path` with a JSON body whose reply must be a success of bytes.
    pub async fn bytes(&self, path: &str, body: &Value) -> (HeaderMap, Vec<u8>) {
        let mut request = self.client.post(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        let reply = request.send().await.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        assert_eq!(reply.status(), StatusCode::OK, "{path}");
        assert_eq!(reply.headers()[CONTENT_TYPE], "application/octet-stream");
        let headers = reply.headers().clone();
        (headers, reply.bytes().await.expect("a body").to_vec())
    }

    /// `POST path` with a JSON body whose reply must be a stream.
    pub async fn stream(&self, path: &str, body: &Value) -> Sse {
        let bytes = self.events(Method::POST, path, Some(body)).await;
        Sse { bytes, buffer: Vec::new(), done: false }
    }

    /// A request whose reply must be a stream of events that have names.
    pub async fn named(&self, method: Method, path: &str, body: Option<&Value>) -> Named {
        Named { bytes: self.events(method, path, body).await, buffer: Vec::new() }
    }

    /// `POST path` with a form of these fields and, if there is one, a file.
    pub async fn form(&self, path: &str, fields: &[(&str, &str)], file: Option<&[u8]>) -> Reply {
        let (media, body) = form(fields, file);
        let reply = self.send(Method::POST, path, Some(&media), body).await;
        reply.unwrap_or_else(|e| panic!("POST {path}: {e:?}"))
    }

    /// The same, whose reply must be a stream.
    pub async fn form_stream(&self, path: &str, fields: &[(&str, &str)], file: &[u8]) -> Sse {
        let (media, body) = form(fields, Some(file));
        let mut request = self.client.post(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let reply = request.header(CONTENT_TYPE, media).body(body).send().await;
        let reply = reply.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        assert_eq!(reply.status(), StatusCode::OK, "{path}");
        assert_eq!(reply.headers()[CONTENT_TYPE], "text/event-stream; charset=utf-8");
        let bytes = reply.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed();
        Sse { bytes, buffer: Vec::new(), done: false }
    }

    async fn events(&self, method: Method, path: &str, body: Option<&Value>) -> Chunks {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let reply = request.send().await.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        if reply.status() != StatusCode::OK {
            panic!("{path}: {} {:?}", reply.status(), reply.text().await);
        }
        let content_type = reply.headers()[CONTENT_TYPE].to_str().expect("a media type");
        assert_eq!(content_type, "text/event-stream; charset=utf-8");
        reply.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed()
    }
}

/// A form's media type and body.
pub fn form(fields: &[(&str, &str)], file: Option<&[u8]>) -> (String, Vec<u8>) {
    let boundary = "where-one-part-ends";
    let mut body = Vec::new();
    for (name, value) in fields {
        let part = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
        );
        body.extend(part.into_bytes());
    }
    if let Some(file) = file {
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        body.extend(head.into_bytes());
        body.extend(file);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{boundary}--\r\n").into_bytes());
    (format!("multipart/form-data; boundary={boundary}"), body)
}

/// A whole reply.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub text: String,
}

impl Reply {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text)
            .unwrap_or_else(|e| panic!("{e}: status {}, body {:?}", self.status, self.text))
    }

    /// The body of a reply that must be a success.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        self.json()
    }

    /// A header's text; empty when there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("a header in ASCII"))
    }

    /// Why this is not the contract's error body, or its `error` object.
    pub fn error(&self, status: u16) -> Result<Value, String> {
        let shown = format!("{} {}", self.status, self.text);
        if self.status.as_u16() != status {
            return Err(format!("expected status {status}: {shown}"));
        }
        let body: Value = serde_json::from_str(&self.text).map_err(|e| format!("{e}: {shown}"))?;
        let error = &body["error"];
        let Some(fields) = error.as_object() else {
            return Err(format!("no error: {shown}"));
        };
        let mut keys: Vec<&str> = fields.keys().map(String::as_str).collect();
        keys.sort_unstable();
        let good = keys == ["code", "message", "param", "type"]
            && error["code"] == status
            && error["type"].is_string()
            && (error["param"].is_null() || error["param"].is_string())
            && error["message"].as_str().is_some_and(|message| !message.is_empty());
        if good { Ok(error.clone()) } else { Err(format!("an odd error object: {shown}")) }
    }
}

type Chunks = BoxStream<'static, Result<Vec<u8>, reqwest::Error>>;

/// A stream of events that have names, as the Responses API sends them. Dropping it closes the
/// connection.
pub struct Named {
    bytes: Chunks,
    buffer: Vec<u8>,
}

impl Named {
    /// The next event, or `None` at the stream's end; its name must be its `type`.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let frame: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let frame = String::from_utf8(frame).expect("a frame in UTF-8");
                if frame.starts_with(": ") {
                    continue;
                }
                let [event, data] = frame.trim_end().split('\n').collect::<Vec<_>>()[..] else {
                    panic!("an odd frame: {frame:?}");
                };
                let name = event.strip_prefix("event: ").unwrap_or_else(|| panic!("{frame:?}"));
                let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("{frame:?}"));
                let data: Value = serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(data["type"], name);
                return Some(data);
            }
            match self.bytes.next().await {
                Some(chunk) => self.buffer.extend(chunk.expect("the stream goes on")),
                None => {
                    assert!(self.buffer.is_empty(), "ended in a frame: {:?}", self.buffer);
                    return None;
                }
            }
        }
    }

    /// All events to the end.
    pub async fn collect(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// A stream of server-sent events. Dropping it closes the connection.
pub struct Sse {
    bytes: Chunks,
    buffer: Vec<u8>,
    done: bool,
}

impl Sse {
    /// The next event, or `None` after `[DONE]`; a stream that ends without it is an error.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let frame: Vec<u8> = self.buffer.drain(..end + 2).collect();
                assert!(!self.done, "a frame after [DONE]: {:?}", String::from_utf8_lossy(&frame));
                // A sign of life while a long prompt is computed.
                if frame.starts_with(b": ") {
                    continue;
                }
                let frame = String::from_utf8(frame).expect("a frame in UTF-8");
                let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("{frame:?}"));
                let data = data.trim_end_matches('\n');
                assert!(!data.contains('\n'), "a frame of several lines: {frame:?}");
                if data == "[DONE]" {
                    self.done = true;
                    continue;
                }
                return Some(serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}: {data}")));
            }
            match self.bytes.next().await {
                Some(chunk) => self.buffer.extend(chunk.expect("the stream goes on")),
                None => {
                    let rest = String::from_utf8_lossy(&self.buffer);
                    assert!(self.done && rest.is_empty(), "ended without [DONE]; rest {rest:?}");
                    return None;
                }
            }
        }
    }

    /// All events to the end.
    pub async fn collect(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// The text that a stream's events give to choice `index`, of either route.
pub fn streamed_text(events: &[Value], index: u64) -> String {
    choices(events, index)
        .filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()))
        .collect()
}

/// The token ids that a stream's events give to choice `index`.
pub fn streamed_ids(events: &[Value], index: u64) -> Vec<u32> {
    choices(events, index).flat_map(|choice| ids(&choice["token_ids"])).collect()
}

/// The choices of a stream's events with this index.
pub fn choices(events: &[Value], index: u64) -> impl Iterator<Item = &Value> {
    let all = events.iter().flat_map(|event| event["choices"].as_array().into_iter().flatten());
    all.filter(move |choice| choice["index"] == index)
}

/// A JSON list of token ids; empty when there is none.
pub fn ids(list: &Value) -> Vec<u32> {
    let ids = list.as_array().into_iter().flatten();
    ids.map(|id| id.as_u64().and_then(|id| id.try_into().ok()).expect("a token id")).collect()
}

/// A client that sends a request byte by byte and can leave at any time.
pub struct RawClient {
    stream: tokio::net::TcpStream,
}

impl RawClient {
    /// Connects and sends a whole `POST`; does not wait for the reply.
    pub async fn post(api: &Api, path: &str, body: &Value) -> Self {
        Self::send(api, path, "application/json", body.to_string().as_bytes()).await
    }

    /// The same with a body of any kind.
    pub async fn send(api: &Api, path: &str, media: &str, body: &[u8]) -> Self {
        use tokio::io::AsyncWriteExt;
        let host = api.base.strip_prefix("http://").expect("an http address");
        let mut stream = tokio::net::TcpStream::connect(host).await.expect("connect");
        let key =
            api.key.as_ref().map_or(String::new(), |k| format!("Authorization: Bearer {k}\r\n"));
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {media}\r\n{key}\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        let request = [request.as_bytes(), body].concat();
        stream.write_all(&request).await.expect("send the request");
        Self { stream }
    }

    /// Waits until the first bytes of the reply are here.
    pub async fn first_bytes(&mut self) -> Vec<u8> {
        use tokio::io::AsyncReadExt;
        let mut bytes = vec![0; 4096];
        let n = tokio::time::timeout(REPLY_WITHIN, self.stream.read(&mut bytes)).await;
        let n = n.expect("a reply in time").expect("a reply");
        bytes.truncate(n);
        bytes
    }

    /// Closes the connection and says when.
    pub fn leave(self) -> Instant {
        drop(self.stream);
        Instant::now()
    }
}
