//! Recordings of every kind, made with ffmpeg out of speech by espeak-ng.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use actix_web::web::Bytes;
use proptest::test_runner::{RngAlgorithm, TestRng};
use rand::Rng as _;

use super::windows::{Decoders, Windows};
use super::*;
use crate::error::ApiError;

/// Name, what ffmpeg is told, and how alike the sound must be to the original.
const KINDS: [(&str, &str, f64); 24] = [
    ("a.wav", "", 0.999),
    ("8-bit.wav", "-c:a pcm_u8", 0.98),
    ("24-bit.wav", "-c:a pcm_s24le -ar 48000 -ac 2", 0.98),
    ("float.wav", "-c:a pcm_f32le -ar 44100 -ac 2", 0.98),
    ("law.wav", "-c:a pcm_mulaw -ar 16000", 0.98),
    ("adpcm.wav", "-c:a adpcm_ima_wav", 0.98),
    ("telephone.wav", "-ar 8000", 0.9),
    ("a.aiff", "-ar 44100", 0.98),
    ("a.caf", "-ar 48000", 0.98),
    ("a.flac", "-ar 96000 -ac 2", 0.98),
    ("a.mp3", "-b:a 64k", 0.97),
    ("v.mp3", "-q:a 2 -ar 44100 -ac 2", 0.97),
    ("a.mp2", "-c:a mp2 -ar 32000 -b:a 128k", 0.97),
    ("a.ogg", "-c:a libvorbis -ar 44100", 0.95),
    ("flac.ogg", "-c:a flac", 0.98),
    ("silk.opus", "-c:a libopus -b:a 16k -application voip -ar 16000", 0.85),
    ("hybrid.opus", "-c:a libopus -b:a 28k -application voip -ar 48000", 0.9),
    ("celt.opus", "-c:a libopus -b:a 96k -application audio -ar 48000 -ac 2", 0.95),
    ("lowdelay.opus", "-c:a libopus -b:a 64k -application lowdelay -frame_duration 5", 0.9),
    ("browser.webm", "-c:a libopus -b:a 48k -ar 48000", 0.9),
    ("a.mka", "-c:a libvorbis -ar 48000", 0.95),
    ("a.m4a", "-c:a aac -b:a 96k -ar 44100", 0.95),
    ("lossless.m4a", "-c:a alac -ar 44100", 0.98),
    ("a.aac", "-c:a aac -b:a 96k -ar 48000", 0.95),
];

fn run(command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{command}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {said}");
}

/// A folder with the original, and one file for each kind.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("baton-audio-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name).display().to_string();
        let text = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue \
                    background.";
        run("espeak-ng", &["-w", &path("said.wav"), text]);
        let said = path("said.wav");
        for (name, told, _) in KINDS {
            let (out, mut all) = (path(name), vec!["-v", "error", "-y", "-i", &said]);
            all.extend(told.split_whitespace());
            all.push(&out);
            run("ffmpeg", &all);
        }
        folder
    })
}

fn read(name: &str) -> Bytes {
    std::fs::read(folder().join(name)).unwrap().into()
}

async fn open(file: Bytes) -> Result<Windows, ApiError> {
    Decoders::new(2, 100).open(file, Instant::now() + Duration::from_secs(60)).await
}

/// All samples, read in pieces.
async fn samples(file: Bytes) -> Result<Vec<i16>, ApiError> {
    let mut windows = open(file).await?;
    let mut all = Vec::new();
    loop {
        let piece = windows.read(all.len(), 12_345).await?;
        if piece.is_empty() {
            assert!(all.len().abs_diff(windows.length()) <= 2, "{}", all.len());
            return Ok(all);
        }
        all.extend_from_slice(piece);
    }
}

/// The correlation of two sounds, and the shift, of at most 0.1 s, that makes it the highest.
fn alike(one: &[i16], two: &[i16]) -> (f64, isize) {
    let dot = |a: &[i16], b: &[i16]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let scale = (dot(one, one) * dot(two, two)).sqrt();
    let at = |shift: isize| match shift {
        0.. => dot(&one[shift as usize..], two),
        _ => dot(one, &two[-shift as usize..]),
    };
    let shifts = -1600..=1600;
    let best = shifts.map(|shift| (at(shift) / scale, shift));
    best.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn message(error: &ApiError) -> String {
    let body = error.body();
    assert_eq!((&body["error"]["code"], &body["error"]["param"]), (&400.into(), &"file".into()));
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_kind_of_recording_is_the_same_sound() {
    let original = samples(read("said.wav")).await.unwrap();
    assert!(original.len() > 4 * RATE);
    let mut bad = Vec::new();
    for (name, _, least) in KINDS {
        let made = samples(read(name)).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let (like, shift) = alike(&made, &original);
        println!("{name}: {like:.4} at {shift}, {} of {} samples", made.len(), original.len());
        bad.extend((like < least).then(|| format!("{name}: {like}")));
        // Some encoders add silence at both ends and do not say so.
        assert!(shift.abs() < 900, "{name}: {shift}");
        assert!(made.len().abs_diff(original.len()) < RATE / 8, "{name}: {}", made.len());
    }
    assert!(bad.is_empty(), "{bad:?}");
}

#[tokio::test]
async fn what_is_no_recording_is_refused_and_named() {
    let folder = folder();
    let path = |name: &str| folder.join(name).display().to_string();
    let said = path("said.wav");
    for (name, told) in [
        ("dolby.mka", &["-c:a", "ac3"][..]),
        ("windows.wma", &["-c:a", "wmav2"]),
        ("surround.opus", &["-c:a", "libopus", "-ac", "6", "-mapping_family", "1"]),
        ("nothing.wav", &["-t", "0"]),
    ] {
        let (out, mut all) = (path(name), vec!["-v", "error", "-y", "-i", &said]);
        all.extend(told);
        all.push(&out);
        run("ffmpeg", &all);
    }
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let noise: Vec<u8> = (0..50_000).map(|_| rng.next_u32() as u8).collect();
    let text = "This is no sound at all.\n".repeat(100);
    for (what, file, says) in [
        ("nothing", Bytes::new(), "is empty"),
        ("a text", text.clone().into(), "is not a sound file"),
        ("a text that says it is sound", format!("RIFF{text}").into(), "is not a sound file"),
        ("noise", noise.into(), "is "),
        (
            "a picture",
            Bytes::from_static(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01"),
            "is not a sound file",
        ),
        ("a codec of Dolby's", read("dolby.mka"), "codec"),
        ("more than two channels of Opus", read("surround.opus"), "6 channels"),
        ("a container of Microsoft's", read("windows.wma"), "is not a sound file"),
        ("no samples", read("nothing.wav"), "no sound"),
    ] {
        let error = open(file).await.err().unwrap_or_else(|| panic!("{what} is heard"));
        let message = message(&error);
        assert!(message.starts_with("`file` ") && message.contains(says), "{what}: {message}");
    }
}

#[tokio::test]
async fn a_recording_that_is_cut_off_is_refused() {
    for name in ["a.wav", "a.flac", "a.m4a", "lossless.m4a", "a.aiff", "v.mp3"] {
        let whole = read(name);
        let error = open(whole.slice(..whole.len() * 6 / 10)).await.err();
        let message = message(&error.unwrap_or_else(|| panic!("{name} is heard")));
        println!("{name}: {message}");
        let told = ["cut off", "damaged", "cannot be read", "can be read"];
        assert!(told.iter().any(|words| message.contains(words)), "{name}: {message}");
    }
    // A stream has no length of its own: what there is of it is heard.
    for name in ["a.ogg", "celt.opus", "a.aac"] {
        let whole = read(name);
        let heard = samples(whole.slice(..whole.len() * 6 / 10)).await;
        let heard = heard.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(heard.len() > RATE, "{name}: {}", heard.len());
    }
}

/// A file of frames alone has no end of its own: others may follow, and a guess by its first
/// frames, of silence, is far off.
#[tokio::test]
async fn frames_without_a_container_are_heard_to_their_end() {
    for name in ["a.mp3", "v.mp3", "a.mp2", "a.aac"] {
        let file = read(name);
        let twice = [&file[..], &file[..]].concat();
        let once = samples(file).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let twice = samples(twice.into()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        println!("{name}: {} and {} samples", once.len(), twice.len());
        assert!(twice.len().abs_diff(2 * once.len()) < RATE / 8, "{name}: {}", twice.len());
    }
    let original = samples(read("said.wav")).await.unwrap();
    let (said, folder) = (folder().join("said.wav").display().to_string(), folder());
    for (name, told) in
        [("quiet.mp3", "-q:a 2 -write_xing 0"), ("quiet.aac", "-c:a aac -b:a 96k -ar 48000")]
    {
        let out = folder.join(name).display().to_string();
        let mut all = vec!["-v", "error", "-y", "-i", &said, "-af", "adelay=3000"];
        all.extend(told.split_whitespace());
        all.push(&out);
        run("ffmpeg", &all);
        let heard = samples(read(name)).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        println!("{name}: {} of {} samples", heard.len(), original.len() + 3 * RATE);
        assert!(heard.len().abs_diff(original.len() + 3 * RATE) < RATE / 8, "{name}");
    }
}

/// Some bytes of a header would have a decoder make room for sixteen gigabytes.
#[tokio::test]
async fn packets_longer_than_any_are_refused() {
    let mut file = read("a.caf").to_vec();
    let desc = file.windows(4).position(|four| four == b"desc").unwrap();
    // Behind the chunk's size: rate, format, flags, bytes of a packet.
    let frames = desc + 12 + 8 + 4 + 4 + 4;
    assert_eq!(file[frames..frames + 4], [0, 0, 0, 1]);
    file[frames..frames + 4].fill(0xff);
    let error = open(file.into()).await.err().expect("it is heard");
    assert!(message(&error).contains("packets are longer"), "{}", message(&error));
}

/// A program that writes to a pipe does not know the length and says the longest there is.
#[tokio::test]
async fn a_recording_without_a_length_is_heard() {
    let original = samples(read("a.wav")).await.unwrap();
    // As ffmpeg and espeak-ng write it.
    for length in [u32::MAX, 0x7fff_f000] {
        let mut file = read("a.wav").to_vec();
        let data = file.windows(4).position(|four| four == b"data").unwrap();
        file[4..8].copy_from_slice(&length.to_le_bytes());
        file[data + 4..data + 8].copy_from_slice(&length.to_le_bytes());
        let heard = samples(file.into()).await.unwrap();
        assert!(heard.len().abs_diff(original.len()) < 1200, "{} {}", heard.len(), original.len());
    }
}

#[tokio::test]
async fn damage_anywhere_is_survived() {
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let (mut heard, mut refused) = (0, 0);
    for (name, _, _) in KINDS {
        let whole = read(name).to_vec();
        for round in 0..12 {
            let mut file = whole.clone();
            // Headers first: they steer the most.
            let within = if round % 3 == 0 { file.len().min(400) } else { file.len() };
            for _ in 0..1 + round * 4 {
                let at = rng.next_u64() as usize % within;
                file[at] = rng.next_u32() as u8;
            }
            let began = Instant::now();
            match samples(file.into()).await {
                Ok(_) => heard += 1,
                Err(error) => {
                    message(&error);
                    refused += 1;
                }
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{name}: {:?}", began.elapsed());
        }
    }
    println!("{heard} heard, {refused} refused");
}

#[tokio::test]
async fn a_recording_that_is_too_long_is_refused_before_it_is_decoded_to_its_end() {
    let file = read("a.mp3");
    let until = Instant::now() + Duration::from_secs(60);
    let error = Decoders::new(1, 2).open(file, until).await.err().unwrap();
    assert!(message(&error).contains("--max-audio-seconds"), "{error}");
}

#[tokio::test]
async fn windows_may_leave_sound_out_and_overlap() {
    let all = samples(read("a.flac")).await.unwrap();
    let mut windows = open(read("a.flac")).await.unwrap();
    for (start, count) in [(0, 1000), (500, 20_000), (30_000, 10_000), (39_000, RATE * 30)] {
        let expected = &all[start..all.len().min(start + count)];
        assert_eq!(windows.read(start, count).await.unwrap(), expected, "{start}");
    }
    assert_eq!(windows.read(windows.length(), 10).await.unwrap(), [] as [i16; 0]);
}

#[test]
fn silence_is_told_from_the_faintest_word() {
    assert!(is_silent(&[]));
    assert!(is_silent(&[0; 48_000]));
    // Dither.
    let dither: Vec<i16> = (0..48_000).map(|i| (i * 7 % 5 - 2) as i16).collect();
    assert!(is_silent(&dither));
    let mut word = dither;
    for (i, sample) in word[30_000..31_000].iter_mut().enumerate() {
        *sample = if i % 40 < 20 { 40 } else { -40 };
    }
    assert!(!is_silent(&word));
}
