//! Prompts asked of a worker itself, without a gateway.

use std::time::{Duration, Instant};

use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{GenerateRequest, PrefillPeer, SamplingParams, Started};
use tokio::sync::mpsc;

use crate::grpc;

/// A prompt of random tokens, which shares no block with any other.
pub fn prompt(length: usize) -> Vec<u32> {
    (0..length).map(|_| rand::random_range(1000..40_000)).collect()
}

/// A request for exactly `max_tokens` greedy tokens after `prompt`.
pub fn request(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "bench".into(),
        prompt_token_ids: prompt,
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        handoff_min_tokens: 1,
        timeout_ms: 600_000,
        ..GenerateRequest::default()
    }
}

/// The time to the first token of `prompt` on `worker`; with a `peer`, the prompt must be handed
/// off from there.
pub async fn first_token(worker: &str, peer: Option<&str>, prompt: Vec<u32>) -> Duration {
    let mut client = grpc::worker(worker).await;
    let mut request = request(prompt, 1);
    request.prefill = peer.map(|address| PrefillPeer {
        instance_id: "peer".into(),
        address: address.into(),
        ..Default::default()
    });
    let start = Instant::now();
    let mut events = client.generate(request).await.expect("accepted").into_inner();
    let mut took = None;
    while let Some(event) = events.message().await.expect("an event") {
        match event.event {
            Some(Event::Started(Started { handed_off_tokens, .. })) => {
                assert_eq!(handed_off_tokens > 0, peer.is_some(), "{handed_off_tokens} handed off");
            }
            Some(Event::Tokens(_)) => took = took.or(Some(start.elapsed())),
            _ => {}
        }
    }
    took.expect("a token")
}

/// A stream that begins anew when it ends, for as long as the receiver lives. Yields the times
/// between its tokens; returns once the first token is there.
pub async fn background(worker: &str, prompt_tokens: usize) -> mpsc::UnboundedReceiver<Duration> {
    let (sender, mut gaps) = mpsc::unbounded_channel();
    let worker = worker.to_owned();
    tokio::spawn(async move {
        loop {
            let mut client = grpc::worker(&worker).await;
            let reply = client.generate(request(prompt(prompt_tokens), 4000)).await;
            let mut events = reply.expect("accepted").into_inner();
            let mut last = None;
            while let Ok(Some(event)) = events.message().await {
                if !matches!(event.event, Some(Event::Tokens(_))) {
                    continue;
                }
                let now = Instant::now();
                // The first token ends the prompt, it follows no other.
                let gap = last.replace(now).map_or(Duration::ZERO, |last| now - last);
                if sender.send(gap).is_err() {
                    return;
                }
            }
        }
    });
    gaps.recv().await;
    gaps
}
