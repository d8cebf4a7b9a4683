//! Times the model alone: `cargo run --release -p baton-worker --example bench_model -- MODEL`.
//!
//! With `--json` it measures on demand, so that other engines can be measured in turn with it
//! (`tests/bench`): a line such as `{"measure":"prefill","tokens":512}` on stdin is answered by a
//! line such as `{"seconds":1.25,"top":283}`, or by `{"error":"..."}`.

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use baton_worker::config::{ActivationBits, KvCacheDtype};
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Model, SequenceSlice, kv_layout, load};
use clap::Parser;
use serde::Deserialize;
use serde_json::{Value, json};

const BLOCK: usize = 16;
const SEQUENCES: usize = 32;
/// Positions of each sequence.
const POSITIONS: usize = 1600;
/// Tokens of a prompt that are computed together.
const CHUNK: usize = 512;
/// Computed before the clock starts, so that a process that slept finds its weights in the caches.
const WAKE_TOKENS: usize = 32;
const WAKE_STEPS: usize = 4;

/// Prints tokens per second of prefill and decode.
#[derive(Parser)]
struct Arguments {
    /// A GGUF file.
    model: PathBuf,
    /// Threads to compute with.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Runs of each measure; the median is printed.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// As of the worker.
    #[arg(long, default_value = "16")]
    activation_bits: ActivationBits,
    /// As of the worker.
    #[arg(long, default_value = "int16")]
    kv_cache_dtype: KvCacheDtype,
    /// Take measures from stdin, one JSON object per line, and answer each with one.
    #[arg(long)]
    json: bool,
}

/// A line on stdin.
#[derive(Deserialize)]
#[serde(tag = "measure", rename_all = "lowercase")]
enum Measure {
    /// What this engine is; nothing is timed.
    About,
    /// From the file to the first token computed, in a second copy of the model.
    Load,
    /// One prompt.
    Prefill { tokens: usize },
    /// `steps` tokens of each of `streams` sequences, the first at position `context`.
    Decode { streams: usize, context: usize, steps: usize },
}

/// A model and a cache to measure it with.
struct Bench {
    model: Box<dyn Model>,
    kv: KvPool,
    tables: Vec<Vec<u32>>,
    /// The text of every sequence: the token at a position is the same in all measures, so the
    /// cache of one is valid for the next.
    tokens: Vec<u32>,
    /// Positions that each sequence has in the cache.
    filled: Vec<usize>,
    logits: Vec<f32>,
}

impl Bench {
    fn new(arguments: &Arguments, sequences: usize) -> Result<Self, Box<dyn Error>> {
        let activations = arguments.activation_bits.into();
        let model = load(&arguments.model, arguments.threads, activations)?.model;
        let each = POSITIONS / BLOCK;
        Ok(Self {
            kv: KvPool::new(
                kv_layout(model.config(), BLOCK, arguments.kv_cache_dtype.into()),
                sequences * each,
            )?,
            model,
            tables: (0..sequences)
                .map(|i| ((i * each) as u32..((i + 1) * each) as u32).collect())
                .collect(),
            tokens: (0..POSITIONS as u32).map(|i| 1000 + i * 37 % 20_000).collect(),
            filled: vec![0; sequences],
            logits: Vec::new(),
        })
    }

    /// Computes the first `length` tokens of a sequence; the logits are those of the last one.
    fn prompt(&mut self, sequence: usize, length: usize) -> Result<(), Box<dyn Error>> {
        for start in (0..length).step_by(CHUNK) {
            let end = length.min(start + CHUNK);
            let slice = SequenceSlice {
                start,
                tokens: &self.tokens[start..end],
                blocks: &self.tables[sequence],
                logits: usize::from(end == length),
                ..SequenceSlice::default()
            };
            self.model.forward(&[slice], &self.kv, &mut self.logits)?;
        }
        self.filled[sequence] = self.filled[sequence].max(length);
        Ok(())
    }

    /// Computes the token at `position` of the first `streams` sequences.
    fn step(&mut self, streams: usize, position: usize) -> Result<(), Box<dyn Error>> {
        let batch: Vec<_> = self.tables[..streams]
            .iter()
            .map(|blocks| SequenceSlice {
                start: position,
                tokens: &self.tokens[position..=position],
                blocks,
                logits: 1,
                ..SequenceSlice::default()
            })
            .collect();
        Ok(self.model.forward(&batch, &self.kv, &mut self.logits)?)
    }

    /// Seconds of one prompt.
    fn prefill(&mut self, tokens: usize) -> Result<f64, Box<dyn Error>> {
        if !(1..=POSITIONS).contains(&tokens) {
            return Err(format!("prompts have 1 to {POSITIONS} tokens, not {tokens}").into());
        }
        self.prompt(0, WAKE_TOKENS)?;
        let start = Instant::now();
        self.prompt(0, tokens)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds of `steps` steps.
    fn decode(
        &mut self,
        streams: usize,
        context: usize,
        steps: usize,
    ) -> Result<f64, Box<dyn Error>> {
        if !(1..=self.tables.len()).contains(&streams) || context + steps > POSITIONS {
            return Err(
                format!("at most {} streams and {POSITIONS} positions", self.tables.len()).into()
            );
        }
        for sequence in 0..streams {
            if self.filled[sequence] < context {
                self.prompt(sequence, context)?;
            }
        }
        for _ in 0..WAKE_STEPS {
            self.step(streams, context)?;
        }
        let start = Instant::now();
        for step in 0..steps {
            self.step(streams, context + step)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// The most likely token by the logits of the last pass.
    fn top(&self) -> Option<usize> {
        (0..self.logits.len()).max_by(|&a, &b| self.logits[a].total_cmp(&self.logits[b]))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let bench = Bench::new(&arguments, SEQUENCES)?;
    if arguments.json { serve(bench, &arguments) } else { print_all(bench, arguments.runs) }
}

/// Answers the measures on stdin until it ends.
fn serve(mut bench: Bench, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    for line in std::io::stdin().lock().lines() {
        let answer = answer(&mut bench, arguments, &line?)
            .unwrap_or_else(|error| json!({ "error": error.to_string() }));
        writeln!(std::io::stdout(), "{answer}")?;
    }
    Ok(())
}

fn answer(bench: &mut Bench, arguments: &Arguments, line: &str) -> Result<Value, Box<dyn Error>> {
    Ok(match serde_json::from_str(line)? {
        Measure::About => json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kv_bytes_per_token": bench.kv.layout().block_bytes as usize / BLOCK,
            "notes": format!(
                "prompts in chunks of {CHUNK}; activations of {:?} bits, KV in {:?}",
                arguments.activation_bits, arguments.kv_cache_dtype
            ).to_lowercase(),
        }),
        Measure::Load => {
            let start = Instant::now();
            Bench::new(arguments, 1)?.prompt(0, 1)?;
            json!({ "seconds": start.elapsed().as_secs_f64() })
        }
        Measure::Prefill { tokens } => {
            let seconds = bench.prefill(tokens)?;
            json!({ "seconds": seconds, "top": bench.top() })
        }
        Measure::Decode { streams, context, steps } => {
            json!({ "seconds": bench.decode(streams, context, steps)? })
        }
    })
}

/// Prints a table of medians.
fn print_all(mut bench: Bench, runs: usize) -> Result<(), Box<dyn Error>> {
    const STEPS: usize = 32;
    for tokens in [512, 1500] {
        let seconds = median(runs, || bench.prefill(tokens))?;
        println!("{:<28} {:>9.1} tokens/s", format!("prefill {tokens}"), tokens as f64 / seconds);
    }
    for (streams, context) in [
        (1, 64),
        (1, 1024),
        (2, 64),
        (4, 64),
        (8, 64),
        (12, 64),
        (16, 64),
        (24, 64),
        (32, 64),
        (8, 1024),
    ] {
        let seconds = median(runs, || bench.decode(streams, context, STEPS))?;
        println!(
            "{:<28} {:>9.1} tokens/s",
            format!("decode {streams} x context {context}"),
            (STEPS * streams) as f64 / seconds
        );
    }
    Ok(())
}

fn median(
    runs: usize,
    mut measure: impl FnMut() -> Result<f64, Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut times = (0..runs).map(|_| measure()).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
