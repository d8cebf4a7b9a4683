//! Sends one streaming request and notes when each token came.

use std::time::Instant;

use serde_json::json;

use super::lengths::Lengths;
use crate::MODEL_NAME;
use crate::bench::direct::prompt;

/// What came of one request. Times are in seconds.
#[derive(Clone, Debug, PartialEq)]
pub enum Sent {
    /// It was answered to the end.
    Answered(Answered),
    /// It was refused with this status, or with 0 when the connection or the stream broke.
    Failed(u16),
}

/// A request that was answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answered {
    /// From sending to the first token.
    pub ttft: f64,
    /// Between tokens.
    pub gaps: Vec<f64>,
    /// From sending to the end.
    pub total: f64,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the answer.
    pub tokens: usize,
}

/// The body of a request for exactly `lengths.answer` greedy tokens after `prompt`.
pub fn body(prompt: &[u32], answer: usize) -> String {
    json!({
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
    })
    .to_string()
}

/// Sends a request of random tokens to the gateway at `base`.
pub async fn send(client: &reqwest::Client, base: &str, lengths: Lengths) -> Sent {
    send_prompt(client, base, &prompt(lengths.prompt), lengths.answer).await
}

/// Sends a request to the gateway at `base`.
pub async fn send_prompt(
    client: &reqwest::Client,
    base: &str,
    prompt: &[u32],
    answer: usize,
) -> Sent {
    let request = client
        .post(format!("{base}/v1/completions"))
        .header("content-type", "application/json")
        .body(body(prompt, answer));
    let start = Instant::now();
    let Ok(mut reply) = request.send().await else { return Sent::Failed(0) };
    if !reply.status().is_success() {
        return Sent::Failed(reply.status().as_u16());
    }
    let mut frames = Frames::default();
    let mut times = Vec::with_capacity(answer);
    loop {
        match reply.chunk().await {
            Ok(Some(chunk)) => {
                let tokens = frames.push(&chunk);
                times.resize(times.len() + tokens, start.elapsed().as_secs_f64());
            }
            Ok(None) => break,
            Err(_) => return Sent::Failed(0),
        }
    }
    let (true, Some(&ttft)) = (frames.done, times.first()) else { return Sent::Failed(0) };
    Sent::Answered(Answered {
        ttft,
        gaps: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        total: start.elapsed().as_secs_f64(),
        prompt: prompt.len(),
        tokens: times.len(),
    })
}

/// Reads a stream of events as it comes: a token is an event that does not end its answer.
#[derive(Debug, Default)]
struct Frames {
    rest: Vec<u8>,
    done: bool,
}

impl Frames {
    /// Takes in bytes; how many tokens they completed.
    fn push(&mut self, bytes: &[u8]) -> usize {
        self.rest.extend_from_slice(bytes);
        let mut tokens = 0;
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].windows(2).position(|pair| pair == b"\n\n") {
            let frame = &self.rest[begin..begin + length];
            begin += length + 2;
            let Some(data) = frame.strip_prefix(b"data: ") else { continue };
            if data == b"[DONE]" {
                self.done = true;
            } else if contains(data, b"\"finish_reason\":null") {
                tokens += 1;
            }
        }
        self.rest.drain(..begin);
        tokens
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_however_the_bytes_are_cut() {
        let stream = b": still working\n\ndata: {\"choices\":[{\"finish_reason\":null}]}\n\n\
            data: {\"choices\":[{\"finish_reason\":null}]}\n\n\
            data: {\"choices\":[{\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n";
        for size in [1, 7, 50, stream.len()] {
            let mut frames = Frames::default();
            let tokens: usize = stream.chunks(size).map(|chunk| frames.push(chunk)).sum();
            assert_eq!((tokens, frames.done), (2, true), "cut at {size}");
        }
    }
}
