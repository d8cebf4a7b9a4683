//! Sound crosses from prefill to decode workers as text does: its keys and values are KV blocks.

use std::path::Path;

use baton_proto::drain::is_draining;
use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{
    AlignRequest, AudioWindow, DescribeRequest, GenerateRequest, PrefillPeer, SamplingParams,
    SpeechRules, Started, Task, WorkerDescription,
};
use baton_tests::binaries::repository;
use baton_tests::cluster::Builder;
use baton_tests::{Cluster, Role, Worker, grpc};
use tonic::Code;

/// Positions of a window.
const SPAN: u32 = 1504;

/// A seeded, untrained model of Whisper's architecture.
fn cluster() -> Builder {
    let model = repository().join("tests/reference/whisper/small-ct2");
    Cluster::builder().worker_arg("--model", model.to_str().expect("a path in UTF-8"))
}

fn sound(name: &str) -> AudioWindow {
    let path = repository().join(format!("tests/reference/whisper/{name}.s16"));
    AudioWindow { samples: read(&path).into() }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

async fn describe(worker: &Worker) -> WorkerDescription {
    let reply = grpc::worker(&worker.address).await.describe(DescribeRequest {}).await;
    reply.expect("a description").into_inner()
}

/// A request for a transcript in a language.
fn request(about: &WorkerDescription, sound_name: &str, language: &str) -> GenerateRequest {
    let card = about.model.as_ref().and_then(|model| model.speech.as_ref()).expect("a speech card");
    GenerateRequest {
        request_id: "a-test".into(),
        prompt_token_ids: vec![
            card.start_of_transcript,
            card.languages[language],
            card.transcribe,
            card.no_timestamps,
        ],
        sampling: Some(SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens: 40,
            ignore_eos: true,
            speech: Some(SpeechRules { suppress_blank: true, ..SpeechRules::default() }),
            ..SamplingParams::default()
        }),
        handoff_min_tokens: 64,
        timeout_ms: 60_000,
        audio: Some(sound(sound_name)),
        ..GenerateRequest::default()
    }
}

async fn generated(worker: &Worker, request: GenerateRequest) -> (Started, Vec<u32>) {
    let reply = grpc::worker(&worker.address).await.generate(request).await;
    let mut events = reply.expect("a stream").into_inner();
    let (mut started, mut tokens) = (None, Vec::new());
    while let Some(event) = events.message().await.expect("an event") {
        match event.event.expect("an event") {
            Event::Started(it) => started = Some(it),
            Event::Tokens(it) => tokens.extend(it.tokens.iter().map(|token| token.id)),
            Event::Finished(_) => break,
            Event::PromptLogprobs(_) | Event::Released(_) => {}
        }
    }
    (started.expect("a start"), tokens)
}

async fn sound_moves(transport: &str) {
    let cluster = cluster().prefill(1).decode(1).transport(transport).start().await;
    let (prefill, decode) = (cluster.only(Role::Prefill), cluster.only(Role::Decode));
    let about = describe(decode).await;
    let layout = about.kv_layout.expect("a layout");
    let peer = Some(PrefillPeer {
        instance_id: describe(prefill).await.instance_id,
        address: prefill.address.clone(),
        ..Default::default()
    });
    // Computed where it is decoded, under a salt of its own.
    let here = GenerateRequest { cache_salt: "here".into(), ..request(&about, "english", "en") };
    let (local, expected) = generated(decode, here).await;
    assert_eq!((local.handed_off_tokens, local.cached_tokens), (0, 0));
    assert_eq!(expected.len(), 40);

    let away = GenerateRequest { prefill: peer.clone(), ..request(&about, "english", "en") };
    let (started, tokens) = generated(decode, away).await;
    assert_eq!(tokens, expected);
    assert_eq!((started.handed_off_tokens, started.cached_tokens), (SPAN + 4, 0));
    assert_eq!(started.no_speech_probability, local.no_speech_probability);
    assert!(started.no_speech_probability.is_some());
    let status = decode.status().await;
    let blocks = u64::from(SPAN / layout.block_size) + 1;
    assert_eq!(grpc::handoff_bytes(&status), blocks * layout.block_bytes, "{status:?}");
    assert_eq!((status.handoff_requests, status.handoff_failures), (1, 0));

    // The window is known now: another language needs no hand-off.
    let again = GenerateRequest { prefill: peer.clone(), ..request(&about, "english", "de") };
    let (started, _) = generated(decode, again).await;
    assert_eq!((started.handed_off_tokens, started.cached_tokens), (0, SPAN));
    assert!(started.no_speech_probability.is_some());
    assert_eq!(decode.status().await.handoff_requests, 1);

    // Left in the middle of the hand-off, or of the text.
    for wait in [false, true] {
        let salt = format!("{wait}");
        let left = GenerateRequest {
            prefill: peer.clone(),
            cache_salt: salt,
            ..request(&about, "german", "de")
        };
        let reply = grpc::worker(&decode.address).await.generate(left).await;
        let mut events = reply.expect("a stream").into_inner();
        if wait {
            events.message().await.expect("an event");
        }
        drop(events);
        cluster.at_rest().await;
    }
    cluster.finish().await;
}

#[tokio::test]
async fn sound_is_handed_over_by_shared_memory() {
    sound_moves("shm").await;
}

#[tokio::test]
async fn sound_is_handed_over_by_grpc() {
    sound_moves("grpc").await;
}

/// The peer is gone: the decode worker hears the window itself.
#[tokio::test]
async fn a_peer_that_fails_costs_time_alone() {
    let cluster = cluster().decode(1).start().await;
    let decode = cluster.only(Role::Decode);
    let about = describe(decode).await;
    let (_, expected) = generated(decode, request(&about, "german", "de")).await;
    let address = "http://127.0.0.1:1".to_owned();
    let peer = Some(PrefillPeer { instance_id: "nobody".into(), address, ..Default::default() });
    let salt = "other".to_owned();
    let away =
        GenerateRequest { prefill: peer, cache_salt: salt, ..request(&about, "german", "de") };
    let (started, tokens) = generated(decode, away).await;
    assert_eq!((tokens, started.handed_off_tokens), (expected, 0));
    assert!(started.no_speech_probability.is_some());
    assert_eq!(decode.status().await.handoff_failures, 1);
    cluster.finish().await;
}

#[tokio::test]
async fn the_card_tells_what_the_model_does_and_bad_requests_are_refused() {
    let cluster = cluster().unified(1).prefill(1).start().await;
    let worker = cluster.only(Role::Unified);
    let about = describe(worker).await;
    let card = about.model.clone().expect("a model");
    let tasks: Vec<Task> = card.tasks().collect();
    assert_eq!(tasks, [Task::Transcribe, Task::Translate]);
    assert_eq!((card.max_model_len, about.max_loras), (448, 0));
    let speech = card.speech.expect("a speech card");
    assert_eq!((speech.max_text_tokens, speech.multilingual), (448, true));

    let whole = request(&about, "german", "de");
    let deaf = GenerateRequest { audio: None, ..whole.clone() };
    let odd = AudioWindow { samples: vec![0; 7].into() };
    let odd = GenerateRequest { audio: Some(odd), ..whole.clone() };
    for (bad, says) in [(deaf, "`audio` is missing"), (odd, "`audio.samples` has 7 bytes")] {
        let error = grpc::worker(&worker.address).await.generate(bad).await.expect_err("refused");
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(says), "{error}");
    }

    let align = AlignRequest {
        request_id: "a-test".into(),
        audio: whole.audio.clone(),
        prompt_token_ids: whole.prompt_token_ids[..3].to_vec(),
        text_token_ids: b"Guten Morgen.".map(u32::from).to_vec(),
        timeout_ms: 60_000,
    };
    let mut client = grpc::worker(&worker.address).await;
    let times = client.align(align.clone()).await.expect("times").into_inner();
    assert_eq!((times.starts.len(), times.probabilities.len()), (14, 14));
    assert!(times.starts.is_sorted() && times.starts[13] < 1500, "{times:?}");
    let none = AlignRequest { text_token_ids: Vec::new(), ..align.clone() };
    let error = client.align(none).await.expect_err("refused");
    assert_eq!(error.code(), Code::InvalidArgument);
    let prefill = &cluster.only(Role::Prefill).address;
    let error = grpc::worker(prefill).await.align(align).await.expect_err("refused");
    // It may have been a decode worker when it was chosen.
    assert!(is_draining(&error), "{error:?}");
    cluster.finish().await;
}
