//! Recordings in, text out: every form, what is refused, and what is left behind.

use std::time::Duration;

use baton_tests::binaries::{WHISPER_NAME, whisper_tiny_en};
use baton_tests::http::{RawClient, form};
use baton_tests::prometheus::Scrape;
use baton_tests::speech::{SENTENCES, convert, made, say, word_error_rate};
use baton_tests::{Cluster, eventually};
use serde_json::Value;

const TRANSCRIPTIONS: &str = "/v1/audio/transcriptions";
const TRANSLATIONS: &str = "/v1/audio/translations";
/// A synthetic voice is hard to understand for so small a model.
const WORD_ERROR_RATE: f64 = 0.2;

async fn hears() -> Cluster {
    Cluster::builder().audio(1).start().await
}

/// A recording of some of the sentences.
fn recording(sentences: std::ops::Range<usize>) -> (String, Vec<u8>) {
    let text = SENTENCES[sentences].join(" ");
    let wav = say(&text, "en-us");
    (text, wav)
}

async fn text(cluster: &Cluster, file: &[u8], fields: &[(&str, &str)]) -> String {
    let reply = cluster.api.form(TRANSCRIPTIONS, fields, Some(file)).await.ok();
    reply["text"].as_str().expect("a text").to_owned()
}

fn close(expected: &str, heard: &str) {
    let rate = word_error_rate(expected, heard);
    println!("word error rate {rate:.3}: {heard}");
    assert!(rate <= WORD_ERROR_RATE, "{rate}: {heard} for {expected}");
}

fn seconds(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// Every way to ask for the text of one recording.
#[tokio::test]
async fn a_recording_becomes_text_in_every_form_of_reply() {
    let cluster = hears().await;
    let (said, wav) = recording(0..2);
    let form = |format| [("model", WHISPER_NAME), ("language", "en"), ("response_format", format)];

    let reply = cluster.api.form(TRANSCRIPTIONS, &form("json"), Some(&wav)).await;
    let json = reply.ok();
    let heard = json["text"].as_str().expect("a text").to_owned();
    close(&said, &heard);
    assert_eq!(json["usage"]["type"], "duration");
    let plain = cluster.api.form(TRANSCRIPTIONS, &form("text"), Some(&wav)).await;
    assert_eq!((plain.status.as_u16(), plain.text.trim_end()), (200, &*heard));
    assert_eq!(plain.header("content-type"), "text/plain; charset=utf-8");

    let verbose = cluster.api.form(TRANSCRIPTIONS, &form("verbose_json"), Some(&wav)).await.ok();
    assert_eq!((&verbose["task"], &verbose["language"]), (&"transcribe".into(), &"english".into()));
    assert_eq!(verbose["text"], *heard);
    let duration = seconds(&verbose["duration"]);
    assert_eq!(json["usage"]["seconds"], duration.ceil() as u64);
    let segments = verbose["segments"].as_array().expect("segments");
    let joined: String = segments.iter().map(|it| it["text"].as_str().expect("a text")).collect();
    assert_eq!(joined.trim(), heard);
    for segment in segments {
        assert!(seconds(&segment["start"]) < seconds(&segment["end"]), "{segment}");
        assert!(seconds(&segment["end"]) <= duration + 0.01, "{segment}");
        let logprob = seconds(&segment["avg_logprob"]);
        assert!((-1.0..0.0).contains(&logprob), "{segment}");
        assert!((0.0..1.0).contains(&seconds(&segment["no_speech_prob"])), "{segment}");
        assert!(seconds(&segment["compression_ratio"]) > 0.5, "{segment}");
        assert_eq!((&segment["seek"], &segment["temperature"]), (&0.into(), &0.0.into()));
        assert!(segment["tokens"].as_array().is_some_and(|tokens| tokens.len() > 3), "{segment}");
    }

    let srt = cluster.api.form(TRANSCRIPTIONS, &form("srt"), Some(&wav)).await.text;
    assert!(srt.starts_with("1\n00:00:0") && srt.contains(" --> 00:00:0"), "{srt}");
    let cue = segments[0]["text"].as_str().expect("a text").trim();
    assert_eq!(srt.lines().nth(2), Some(cue), "{srt}");
    let vtt = cluster.api.form(TRANSCRIPTIONS, &form("vtt"), Some(&wav)).await.text;
    assert!(vtt.starts_with("WEBVTT\n\n00:00:0") && vtt.contains(cue), "{vtt}");

    // As a stream.
    let fields = [("language", "en"), ("stream", "true"), ("stream_include_usage", "true")];
    let events = cluster.api.form_stream(TRANSCRIPTIONS, &fields, &wav).await.collect().await;
    let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), heard);
    for event in &events {
        assert_eq!(event["object"], "transcription.chunk");
        assert!(event["id"].as_str().is_some_and(|id| id.starts_with("transcribe-")), "{event}");
    }
    let [.., end, usage] = &events[..] else { panic!("{events:?}") };
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert_eq!(usage["choices"], Value::Array(Vec::new()));
    assert!(usage["usage"]["completion_tokens"].as_u64() > Some(10), "{usage}");

    // The language is found out, and the same text comes.
    let found = form("verbose_json");
    let found = [found[0], found[2]];
    let verbose = cluster.api.form(TRANSCRIPTIONS, &found, Some(&wav)).await.ok();
    assert_eq!((&verbose["language"], &verbose["text"]), (&"english".into(), &heard.into()));

    let scrape = cluster.api.get("/metrics").await;
    let scrape = Scrape::parse(&scrape.text).expect("metrics");
    let counted = scrape.sum("baton_audio_seconds_total", &[("model_name", WHISPER_NAME)]);
    assert!(counted.is_some_and(|it| (it / duration - 7.0).abs() < 0.1), "{counted:?} {duration}");
    cluster.finish().await;
}

#[tokio::test]
async fn words_are_told_with_their_times() {
    let cluster = hears().await;
    let (said, wav) = recording(0..2);
    let fields = [
        ("language", "en"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "word"),
    ];
    let reply = cluster.api.form(TRANSCRIPTIONS, &fields, Some(&wav)).await.ok();
    assert!(reply.get("segments").is_none(), "{reply}");
    let words = reply["words"].as_array().expect("words");
    let spoken: Vec<&str> = words.iter().map(|it| it["word"].as_str().expect("a word")).collect();
    close(&said, &spoken.join(" "));
    let mut last = 0.0;
    for word in words {
        let (start, end) = (seconds(&word["start"]), seconds(&word["end"]));
        assert!(last <= start && start <= end, "{words:?}");
        last = end;
    }
    // The first sentence and the second are about as long.
    let duration = seconds(&reply["duration"]);
    let second = words.iter().find(|it| it["word"] == "Today");
    let second = second.map(|it| seconds(&it["start"]) / duration);
    assert!(second.is_some_and(|at| (0.35..0.65).contains(&at)), "{words:?}");
    assert!(last > 0.85 * duration, "{words:?}");
    let both = [&fields[..], &[("timestamp_granularities[]", "segment")]].concat();
    let reply = cluster.api.form(TRANSCRIPTIONS, &both, Some(&wav)).await.ok();
    assert!(reply["segments"].is_array() && reply["words"].is_array(), "{reply}");
    cluster.finish().await;
}

#[tokio::test]
async fn every_container_and_rate_says_the_same() {
    let cluster = Cluster::builder().audio_model(1, whisper_tiny_en(), "tiny").start().await;
    let (said, wav) = recording(1..3);
    let expected = text(&cluster, &wav, &[]).await;
    close(&said, &expected);
    for (told, end) in [
        ("-ar 8000", "wav"),
        ("-ar 48000 -ac 2", "flac"),
        ("-b:a 48k", "mp3"),
        ("-c:a libvorbis", "ogg"),
        ("-c:a libopus -b:a 24k", "ogg"),
        ("-c:a libopus -b:a 32k", "webm"),
        ("-c:a aac -b:a 64k", "m4a"),
    ] {
        let heard = text(&cluster, &convert(&wav, told, end), &[]).await;
        let rate = word_error_rate(&expected, &heard);
        println!("{end} ({told}): {rate:.3}");
        assert!(rate <= 0.15, "{end} ({told}): {heard} for {expected}");
    }
    // It knows English, and says what it does not do.
    let reply = cluster.api.form(TRANSCRIPTIONS, &[("language", "de")], Some(&wav)).await;
    assert_eq!(reply.error(400).expect("an error")["param"], "language");
    let reply = cluster.api.form(TRANSLATIONS, &[("model", "tiny")], Some(&wav)).await;
    let error = reply.error(400).expect("an error");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("transcribes")), "{error}");
    cluster.finish().await;
}

#[tokio::test]
async fn a_long_recording_is_heard_window_by_window() {
    let cluster = hears().await;
    let text = [SENTENCES, SENTENCES].concat().join(" ");
    let wav = say(&text, "en-us");
    let fields = [("language", "en"), ("response_format", "verbose_json")];
    let reply = cluster.api.form(TRANSCRIPTIONS, &fields, Some(&wav)).await.ok();
    let duration = seconds(&reply["duration"]);
    assert!(duration > 60.0, "{duration}");
    close(&text, reply["text"].as_str().expect("a text"));
    let segments = reply["segments"].as_array().expect("segments");
    let (mut last, mut seek, mut windows) = (0.0, 0.0, 1);
    for segment in segments {
        assert!(seconds(&segment["start"]) >= last - 0.01, "{segment} after {last}");
        last = seconds(&segment["end"]);
        if seconds(&segment["seek"]) > seek {
            windows += 1;
        }
        seek = seconds(&segment["seek"]);
    }
    assert!(windows >= 3 && last <= duration + 0.01 && last > duration - 5.0, "{segments:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn silence_and_noise_say_nothing() {
    let cluster = hears().await;
    for (what, source) in [
        ("silence", "anullsrc=r=16000:cl=mono:d=40"),
        ("dither", "anoisesrc=r=16000:a=0.00005:d=35:seed=1"),
        ("noise", "anoisesrc=r=16000:a=0.1:d=12:seed=1"),
        ("rumble", "anoisesrc=r=16000:a=0.1:c=brown:d=12:seed=1"),
    ] {
        let wav = made(source, "", "wav");
        for language in [&[][..], &[("language", "en")]] {
            let heard = text(&cluster, &wav, language).await;
            assert_eq!(heard, "", "{what} {language:?}");
        }
    }
    // Silence before and after speech adds nothing to it.
    let (said, wav) = recording(0..1);
    let padded = convert(&wav, "-af adelay=34000:all=1,apad=pad_dur=40", "wav");
    let heard = text(&cluster, &padded, &[("language", "en")]).await;
    close(&said, &heard);
    cluster.finish().await;
}

#[tokio::test]
async fn speech_of_another_language_becomes_english() {
    let cluster = hears().await;
    let text = "Buenos días a todos. Hoy hace mucho calor en Madrid. Mi hermano trabaja en un \
                hospital. Me gusta mucho la música.";
    let wav = say(text, "es");
    let verbose = [("response_format", "verbose_json")];
    let reply = cluster.api.form(TRANSCRIPTIONS, &verbose, Some(&wav)).await.ok();
    assert_eq!(reply["language"], "spanish", "{reply}");
    close(text, reply["text"].as_str().expect("a text"));
    let reply = cluster.api.form(TRANSLATIONS, &verbose, Some(&wav)).await.ok();
    assert_eq!((&reply["task"], &reply["language"]), (&"translate".into(), &"english".into()));
    let english = reply["text"].as_str().expect("a text").to_lowercase();
    assert!(english.contains("good morning") && english.contains("music"), "{english}");
    let reply = cluster.api.form(TRANSLATIONS, &[], Some(&wav)).await.ok();
    assert_eq!(reply.as_object().map(|it| it.len()), Some(1), "{reply}");
    cluster.finish().await;
}

#[tokio::test]
async fn what_cannot_be_heard_is_refused_and_named() {
    let cluster = Cluster::builder()
        .audio_model(1, whisper_tiny_en(), "tiny")
        .gateway_arg("--max-audio-filesize-mb", "1")
        .gateway_arg("--max-audio-seconds", "60")
        .start()
        .await;
    let (_, wav) = recording(0..1);
    let hour = made("anullsrc=r=16000:cl=mono:d=3600", "-c:a flac", "flac");
    let dolby = convert(&wav, "-c:a ac3", "mka");
    // espeak-ng writes to a pipe, and does not know the length.
    let whole = convert(&wav, "", "wav");
    let cut = &whole[..whole.len() / 2];
    for (what, file, says) in [
        ("nothing", &b""[..], "empty"),
        ("a text", b"Good morning, this is no sound.", "not a sound file"),
        ("half a recording", cut, "cut off"),
        ("an hour", &hour, "--max-audio-seconds"),
        ("a codec that is not known", &dolby, "codec"),
    ] {
        for stream in ["false", "true"] {
            let reply = cluster.api.form(TRANSCRIPTIONS, &[("stream", stream)], Some(file)).await;
            let error = reply.error(400).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(error["param"], "file", "{what}");
            let message = error["message"].as_str().expect("a message");
            assert!(message.contains(says), "{what}: {message}");
        }
    }
    let big = vec![0; 1024 * 1024 + 1];
    let error = cluster.api.form(TRANSCRIPTIONS, &[], Some(&big)).await.error(400);
    assert_eq!(error.expect("an error")["param"], "audio_filesize_mb");
    let error = cluster.api.form(TRANSCRIPTIONS, &[("file", "a text")], None).await.error(422);
    assert_eq!(error.expect("an error")["param"], "file");
    let error = cluster.api.form(TRANSCRIPTIONS, &[], None).await.error(400);
    assert_eq!(error.expect("an error")["param"], "file");
    for (field, value) in [
        ("response_format", "pdf"),
        ("temperature", "hot"),
        ("language", "klingon"),
        ("to_language", "de"),
        ("n", "3"),
    ] {
        let reply = cluster.api.form(TRANSCRIPTIONS, &[(field, value)], Some(&wav)).await;
        assert_eq!(reply.error(400).expect("an error")["param"], field);
    }
    let reply = cluster.api.form(TRANSCRIPTIONS, &[("model", "gpt-17")], Some(&wav)).await;
    assert_eq!(reply.error(404).expect("an error")["param"], "model");
    let (media, mut body) = form(&[], Some(&wav));
    body.truncate(body.len() - 40);
    let reply = cluster.api.send(reqwest::Method::POST, TRANSCRIPTIONS, Some(&media), body).await;
    reply.expect("a reply").error(400).expect("a form that is cut off");
    let reply = cluster.api.post(TRANSCRIPTIONS, &serde_json::json!({"file": "a"})).await;
    reply.error(400).expect("JSON is no form");
    let body = serde_json::json!({"model": "tiny", "prompt": "a"});
    let error = cluster.api.post("/v1/completions", &body).await.error(400).expect("another task");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("transcribes")), "{error}");
    // Fields that nobody knows are named, and change nothing.
    let reply = cluster.api.form(TRANSCRIPTIONS, &[("temprature", "1")], Some(&wav)).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(reply.header("warning").contains("temprature"), "{:?}", reply.headers);
    cluster.finish().await;
}

/// An hour takes no more memory than a minute: it is decoded as it is needed.
#[tokio::test]
async fn an_hour_of_sound_is_heard_in_little_memory() {
    let cluster = hears().await;
    let (said, wav) = recording(0..1);
    text(&cluster, &wav, &[("language", "en")]).await;
    let before = resident(&cluster);
    let long = convert(&wav, "-af apad=whole_dur=3600 -ar 16000 -c:a flac", "flac");
    let heard = text(&cluster, &long, &[("language", "en")]).await;
    close(&said, &heard);
    let grown = resident(&cluster).saturating_sub(before);
    println!("{} bytes sent, {grown} KiB more at most", long.len());
    assert!(grown < 64 * 1024, "{grown} KiB more");
    cluster.finish().await;
}

/// The most memory that the gateway has had, in KiB.
fn resident(cluster: &Cluster) -> u64 {
    let status = format!("/proc/{}/status", cluster.gateway().pid());
    let status = std::fs::read_to_string(status).expect("the gateway runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

#[tokio::test]
async fn a_client_that_leaves_leaves_nothing_behind() {
    let cluster = hears().await;
    let text = SENTENCES.join(" ");
    for stream in ["false", "true"] {
        let (media, body) = form(&[("stream", stream)], Some(&say(&text, "en-us")));
        let client = RawClient::send(&cluster.api, TRANSCRIPTIONS, &media, &body).await;
        eventually("a window is heard", Duration::from_secs(60), async || {
            let status = cluster.workers[0].status().await;
            if status.running > 0 { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        let load = cluster.api.get("/load").await.ok();
        assert_eq!(load["server_load"], 1, "{load}");
        client.leave();
        cluster.at_rest().await;
        eventually("its place is free", Duration::from_secs(5), async || {
            let load = cluster.api.get("/load").await.ok();
            if load["server_load"] == 0 { Ok(()) } else { Err(load.to_string()) }
        })
        .await;
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_worker_that_dies_in_the_middle_changes_no_word() {
    let mut cluster = Cluster::builder().audio(2).start().await;
    let wav = say(&SENTENCES.join(" "), "en-us");
    let fields = [("language", "en"), ("response_format", "verbose_json")];
    let expected = cluster.api.form(TRANSCRIPTIONS, &fields, Some(&wav)).await.ok();
    let api = cluster.api.clone();
    // A recording that no worker has in its prefix cache.
    let fresh = convert(&wav, "-af volume=0.9", "wav");
    let told = fresh.clone();
    let running =
        tokio::spawn(async move { api.form(TRANSCRIPTIONS, &fields, Some(&told)).await.ok() });
    let mut busy = 0;
    for _ in 0..2000 {
        let mut statuses = Vec::new();
        for worker in &cluster.workers {
            statuses.push(worker.status().await.running);
        }
        if let Some(at) = statuses.iter().position(|running| *running > 0) {
            busy = at + 1;
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(busy > 0, "nobody was at work");
    cluster.kill_worker(busy - 1);
    let survived = running.await.expect("a reply");
    let again = cluster.api.form(TRANSCRIPTIONS, &fields, Some(&fresh)).await.ok();
    assert_eq!(survived, again);
    let rate = word_error_rate(
        expected["text"].as_str().expect("a text"),
        survived["text"].as_str().expect("a text"),
    );
    assert!(rate < 0.1, "{expected} {survived}");
    cluster.finish().await;
}
