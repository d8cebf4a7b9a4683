//! Times a speech model alone: `cargo run --release -p baton-worker --example bench_whisper -- MODEL
//! SOUND.raw`, the sound as 16 kHz mono, signed 16-bit little-endian.
//!
//! The windows follow each other as in the reference implementation: the next one begins at the
//! last time that the model wrote, without the text before it. With `--json` each line on stdin is
//! answered by a run, so that other engines can be measured in turn with it (`tests/bench/speech.py`).

use std::error::Error;
use std::io::BufRead;
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::{Duration, Instant};

use baton_proto::v1::{KvDtype, SamplingParams, SpeechRules};
use baton_worker::engine::{Engine, Event, Finish, NewRequest, Purpose, Settings};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, kv_layout, load};
use baton_worker::scheduler::{Limits, Speculation};
use bytes::Bytes;
use clap::Parser;
use serde_json::json;

const BLOCK: usize = 16;
const BLOCKS: usize = 1024;
/// Bytes of half a minute, and of the 0.02 s between two times.
const WINDOW: usize = 960_000;
const STEP: usize = 640;

/// Prints seconds, tokens and text of runs over a file.
#[derive(Parser)]
struct Arguments {
    /// A Whisper folder.
    model: PathBuf,
    /// The sound.
    sound: PathBuf,
    /// Threads to compute with.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Runs; the median is printed.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// A run for each line on stdin, told as JSON.
    #[arg(long)]
    json: bool,
}

struct Run {
    seconds: f64,
    /// Until each window's first token.
    first: Vec<f64>,
    windows: usize,
    tokens: Vec<u32>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let loaded = load(&arguments.model, arguments.threads, Precision::Sixteen)?;
    let card = loaded.speech.ok_or("no speech model")?;
    let tokenizer = tokenizers::Tokenizer::from_str(&loaded.tokenizer.tokenizer_json)
        .map_err(|error| error.to_string())?;
    let config = loaded.model.config().clone();
    let leading = loaded.model.audio_positions().next_multiple_of(BLOCK);
    let pool = KvPool::new(kv_layout(&config, BLOCK, KvDtype::I16), BLOCKS)?;
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
    let eos_token_ids = loaded.eos_token_ids;
    let settings =
        Settings { limits, eos_token_ids, speech: Some(card.clone()), step_timeout: None };
    let engine = Engine::start(loaded.model, pool, settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let sound = Bytes::from(std::fs::read(&arguments.sound)?);
    let mut prompt = vec![card.start_of_transcript];
    if let Some(english) = card.languages.get("en") {
        prompt.extend([*english, card.transcribe]);
    }
    let mut count = 0;
    let mut run = || -> Result<Run, Box<dyn Error>> {
        // What a run before left in the prefix cache is not what is measured.
        count += 1;
        let begin = Instant::now();
        let (mut at, mut done) =
            (0, Run { seconds: 0.0, first: vec![], windows: 0, tokens: vec![] });
        while at < sound.len() {
            let window = sound.slice(at..sound.len().min(at + WINDOW));
            let length = window.len();
            let started = Instant::now();
            let mut handle = engine.submit(NewRequest {
                prompt: prompt.clone(),
                audio: Some(window),
                output: Vec::new(),
                sampling: SamplingParams {
                    max_tokens: 224,
                    speech: Some(SpeechRules {
                        timestamps: true,
                        max_initial_timestamp: Some(50),
                        suppress_blank: true,
                        ..SpeechRules::default()
                    }),
                    ..SamplingParams::default()
                },
                constraint: None,
                priority: 0,
                salt: count.to_string(),
                adapter: None,
                purpose: Purpose::Generate { pull_from: None },
                deadline: Instant::now() + Duration::from_secs(600),
                returning: false,
            })?;
            let mut tokens = Vec::new();
            loop {
                match runtime.block_on(handle.next()).ok_or("the engine ended")? {
                    Event::Token(token) => {
                        if tokens.is_empty() {
                            done.first.push(started.elapsed().as_secs_f64());
                        }
                        tokens.push(token.id);
                    }
                    Event::Finished(Finish::Stop(_) | Finish::Length) => break,
                    Event::Finished(other) => return Err(format!("{other:?}").into()),
                    _ => {}
                }
            }
            let is_time = |token: &&u32| **token >= card.timestamp_begin;
            let text = &tokens
                [..tokens.len() - usize::from(tokens.last() < Some(&card.start_of_transcript))];
            let mut pairs = text.windows(2).filter(|pair| pair.iter().all(|token| is_time(&token)));
            let last =
                pairs.next_back().map(|pair| (pair[0] - card.timestamp_begin) as usize * STEP);
            let single = text.iter().rev().take_while(is_time).count() == 1;
            at += match last {
                Some(last) if !single && last > 0 => last,
                _ => length,
            };
            done.windows += 1;
            done.tokens.extend(tokens);
        }
        done.seconds = begin.elapsed().as_secs_f64();
        Ok(done)
    };
    let text = |tokens: &[u32]| tokenizer.decode(tokens, true).map_err(|error| error.to_string());
    if arguments.json {
        for line in std::io::stdin().lock().lines() {
            line?;
            let done = run()?;
            let text = text(&done.tokens)?;
            let (seconds, tokens) = (done.seconds, done.tokens.len());
            println!(
                "{}",
                json!({"seconds": seconds, "windows": done.windows, "tokens": tokens, "text": text})
            );
        }
        return Ok(());
    }
    let mut runs = (0..arguments.runs).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    println!("{}", text(&runs[0].tokens)?);
    runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let median = &runs[runs.len() / 2];
    println!(
        "{:.3} s, {} windows, {} tokens, to the first tokens {:.3?}",
        median.seconds,
        median.windows,
        median.tokens.len(),
        median.first
    );
    Ok(())
}
