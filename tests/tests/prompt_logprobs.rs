//! How likely a prompt's tokens were: against an independent implementation, and against what the
//! same tokens were when they were generated.

use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{GenerateRequest, PromptTokenLogprob, SamplingParams, Token};
use baton_tests::{Cluster, Role, grpc, reference};
use tonic::{Code, Status};

/// As in `exactness.rs`: sixteen bits against float32.
const TOLERANCE: f64 = 1.5e-2;

fn request(prompt: Vec<u32>, prompt_logprobs: Option<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "a-test".into(),
        prompt_token_ids: prompt,
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens,
            ignore_eos: true,
            prompt_logprobs,
            logprobs: Some(4),
            ..SamplingParams::default()
        }),
        handoff_min_tokens: 1,
        timeout_ms: 120_000,
        ..GenerateRequest::default()
    }
}

struct Output {
    prompt: Vec<PromptTokenLogprob>,
    pieces: usize,
    tokens: Vec<Token>,
    cached: u32,
}

async fn generate(address: &str, request: GenerateRequest) -> Result<Output, Status> {
    let client = grpc::worker(address).await;
    let mut client = client.max_decoding_message_size(baton_proto::MAX_MESSAGE_BYTES);
    let mut events = client.generate(request).await?.into_inner();
    let mut output = Output { prompt: vec![], pieces: 0, tokens: vec![], cached: 0 };
    while let Some(event) = events.message().await? {
        match event.event.expect("an event") {
            Event::PromptLogprobs(piece) => {
                assert!(output.tokens.is_empty(), "before the first token");
                output.pieces += 1;
                output.prompt.extend(piece.tokens);
            }
            Event::Started(started) => output.cached = started.cached_tokens,
            Event::Tokens(tokens) => output.tokens.extend(tokens.tokens),
            Event::Finished(_) => {}
            Event::Released(_) => panic!("the worker does not drain"),
        }
    }
    Ok(output)
}

#[tokio::test]
async fn they_are_those_of_the_reference_and_of_the_same_tokens_generated() {
    let cluster = Cluster::unified().await;
    let worker = &cluster.only(Role::Unified).address;
    let (mut compared, mut worst) = (0, 0.0_f64);
    for case in reference::greedy().into_iter().filter(|case| case.prompt.len() < 300) {
        let steps = case.output.len() as u32;
        let generated = generate(worker, request(case.prompt.clone(), None, steps)).await;
        let generated = generated.expect("an output").tokens;
        let text: Vec<u32> =
            case.prompt.iter().copied().chain(generated.iter().map(|token| token.id)).collect();
        let scored = generate(worker, request(text.clone(), Some(4), 1)).await.expect("scores");
        assert_eq!((scored.prompt.len(), scored.cached), (text.len() - 1, 0), "{}", case.name);
        let ids: Vec<u32> = scored.prompt.iter().map(|score| score.id).collect();
        assert_eq!(ids, text[1..]);
        // The kernels give a row the same bits in any batch.
        let after = &scored.prompt[case.prompt.len() - 1..];
        for (score, token) in after.iter().zip(&generated) {
            assert_eq!(Some(score.logprob), token.logprob, "{}", case.name);
            assert_eq!((score.rank, &score.top), (1, &token.top), "{}: greedy", case.name);
        }
        for ((score, expected), token) in after.iter().zip(&case.top).zip(&generated) {
            let Some((best, best_logit)) = expected.first().copied() else { continue };
            if token.id != best {
                // A tie went the other way: from here on it is another text.
                break;
            }
            for (id, logit) in &expected[1..] {
                let Some(other) = score.top.iter().find(|top| top.id == *id) else { continue };
                let difference =
                    f64::from(score.logprob - other.logprob) - f64::from(best_logit - logit);
                worst = worst.max(difference.abs());
                compared += 1;
            }
        }
    }
    println!("{compared} differences of logits, the largest error {worst:.5}");
    assert!(compared > 1000 && worst < TOLERANCE, "{compared}, {worst}");
    cluster.finish().await;
}

/// Long prompts, several at once, beside others; all alternatives; a cache that holds the prompt.
#[tokio::test]
async fn they_are_complete_whatever_else_is_computed() {
    let cluster = Cluster::builder().unified(1).kv_memory("32MiB").start().await;
    let worker = &cluster.only(Role::Unified).address;
    let prompt: Vec<u32> = (0..300).map(|i| 1000 + i * 7 % 900).collect();
    let alone = generate(worker, request(prompt.clone(), Some(2), 1)).await.expect("scores");
    let calls = (0..6).map(|i| {
        let prompt = if i % 2 == 0 { prompt.clone() } else { vec![2000 + i; 400] };
        generate(worker, request(prompt, (i % 2 == 0).then_some(2), 60))
    });
    for output in futures::future::join_all(calls).await {
        let output = output.expect("an output");
        assert_eq!(output.tokens.len(), 60);
        assert!(output.prompt.is_empty() || output.prompt == alone.prompt);
    }
    // The whole vocabulary: in pieces, and probabilities that sum to one.
    let all = generate(worker, request(prompt[..100].to_vec(), Some(u32::MAX), 1)).await;
    let all = all.expect("scores");
    assert!(all.prompt.len() == 99 && all.pieces > 10, "{} in {}", all.prompt.len(), all.pieces);
    for (score, short) in all.prompt.iter().zip(&alone.prompt) {
        let sum: f64 = score.top.iter().map(|top| f64::from(top.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-3, "{sum}");
        assert_eq!(score.top[..2], short.top);
        assert_eq!(score.top[score.rank as usize - 1].logprob, score.logprob);
    }
    let much = generate(worker, request(vec![5; 1000], Some(u32::MAX), 1)).await;
    let status = much.err().expect("too much");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("prompt_logprobs"), "{status}");
    // One token has none.
    let one = generate(worker, request(vec![5], Some(1), 2)).await.expect("an output");
    assert_eq!((one.prompt.len(), one.tokens.len()), (0, 2));
    cluster.finish().await;
}
