//! How near a step comes to what the GPU can do at most: decode to the rate at which memory is read,
//! prefill to the rate of cuBLAS's matrix product, both measured first.
//!
//! `roofline [--shape 1b|8b] [--batch N]... [--parts] [--no-graphs] [--no-overlap] [--narrow-rows N]`
//!
//! Weights are random in the shapes of Llama 3.2 1B and Llama 3.1 8B, both unless one is named. A
//! decode step reads all weights but the embedding, and the keys and values of 512 positions of each
//! sequence. Times are the device's, from a step's inputs to its logits on the device, the median of
//! many; beside it stands what a caller of `forward` waits, logits on the host included. `--parts` adds
//! what each part of a layer takes by itself.
//!
//! With the GPU double a tiny shape is run, and nothing is timed.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use baton_cuda::{
    Decoder, Device, Error, KvMemory, LayerWeights, Limits, Loader, Projections, Shape, Slice,
    bf16, measure,
};

/// Positions of each sequence before the decode steps that are timed.
const CONTEXT: usize = 512;
/// Decode steps that are timed, after a few that are not.
const STEPS: usize = 40;
const WARM: usize = 4;
const BLOCK: usize = 16;

/// What is to be reached, of the roofline.
const DECODE_1: f64 = 0.80;
const DECODE_64: f64 = 0.60;
const PREFILL: f64 = 0.55;

fn shape(name: &str) -> Option<Shape> {
    let (layers, hidden, heads, kv_heads, head_dim, ffn, vocab) = match name {
        "1b" => (16, 2048, 32, 8, 64, 8192, 128_256),
        "8b" => (32, 4096, 32, 8, 128, 14_336, 128_256),
        "tiny" => (2, 256, 8, 2, 32, 512, 1000),
        _ => return None,
    };
    Some(Shape {
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        rope_theta: 500_000.0,
        interleaved: false,
        rms_eps: 1e-5,
        block_size: BLOCK,
    })
}

/// Random numbers that keep activations about as large as they were.
fn matrix(outputs: usize, inputs: usize) -> Vec<bf16> {
    let mut state = (outputs * 31 + inputs) as u32;
    let scale = 3.4 / (inputs as f32).sqrt() / (1 << 24) as f32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32(((state >> 8) as f32 - (1 << 23) as f32) * scale)
    })
    .take(outputs * inputs)
    .collect()
}

fn load(device: &Arc<Device>, shape: &Shape, limits: Limits) -> Result<Decoder, Error> {
    let (hidden, d, ffn) = (shape.hidden, shape.head_dim, shape.ffn);
    let ones = vec![1.0; hidden];
    let (query, key) = (matrix(shape.heads * d, hidden), matrix(shape.kv_heads * d, hidden));
    let (output, down) = (matrix(hidden, shape.heads * d), matrix(hidden, ffn));
    let gate = matrix(ffn, hidden);
    // The same numbers in every layer, each with memory of its own: that is what counts.
    let weights = LayerWeights {
        attention_norm: &ones,
        projections: Projections { query: &query, key: &key, value: &key },
        biases: None,
        query_norm: None,
        key_norm: None,
        output: &output,
        ffn_norm: &ones,
        gate: &gate,
        up: &gate,
        down: &down,
    };
    let mut loader = Loader::new(device, shape.clone())?;
    let embedding = matrix(shape.vocab, hidden);
    loader.embedding(&embedding)?;
    (0..shape.layers).try_for_each(|i| loader.layer(i, &weights))?;
    loader.norm(&ones)?;
    loader.finish(limits)
}

struct Bench {
    decoder: Decoder,
    kv: Arc<KvMemory>,
    /// Blocks of each sequence.
    per: usize,
    logits: Vec<f32>,
}

impl Bench {
    fn blocks(&self, sequence: usize) -> Vec<u32> {
        let first = (sequence * self.per) as u32;
        (first..first + self.per as u32).collect()
    }

    /// Seconds of the device and of the caller.
    fn step(&mut self, slices: &[Slice<'_>]) -> Result<(f64, f64), Error> {
        let begun = Instant::now();
        self.decoder.forward(slices, &self.kv, &mut self.logits, &AtomicBool::new(false))?;
        Ok((self.decoder.device_seconds()?, begun.elapsed().as_secs_f64()))
    }

    /// Fills the sequences' first positions, some sequences at a time, and gives the median times.
    fn prefill(
        &mut self,
        sequences: usize,
        tokens: usize,
        at_once: usize,
    ) -> Result<(f64, f64), Error> {
        let prompt: Vec<u32> = (0..tokens as u32).map(|i| i * 7919 % 1000).collect();
        let mut times = Vec::new();
        for first in (0..sequences).step_by(at_once) {
            let blocks: Vec<Vec<u32>> =
                (first..(first + at_once).min(sequences)).map(|i| self.blocks(i)).collect();
            let slices: Vec<Slice<'_>> = blocks
                .iter()
                .map(|blocks| Slice { start: 0, tokens: &prompt, blocks, logits: 1 })
                .collect();
            times.push(self.step(&slices)?);
        }
        Ok(median(times))
    }

    fn decode(&mut self, batch: usize, timed: bool) -> Result<(f64, f64), Error> {
        let blocks: Vec<Vec<u32>> = (0..batch).map(|i| self.blocks(i)).collect();
        let mut times = Vec::new();
        let steps = if timed { STEPS } else { 4 };
        for i in 0..WARM + steps {
            let token = [(i * 31 % 1000) as u32];
            let slices: Vec<Slice<'_>> = blocks
                .iter()
                .map(|blocks| Slice { start: CONTEXT + i, tokens: &token, blocks, logits: 1 })
                .collect();
            times.push(self.step(&slices)?);
        }
        Ok(median(times.split_off(WARM)))
    }
}

fn median(mut times: Vec<(f64, f64)>) -> (f64, f64) {
    let mut of = |which: fn(&(f64, f64)) -> f64| {
        times.sort_by(|a, b| which(a).total_cmp(&which(b)));
        times.get(times.len() / 2).map_or(f64::NAN, which)
    };
    (of(|times| times.0), of(|times| times.1))
}

struct Report {
    timed: bool,
    parts: bool,
    batches: Vec<usize>,
    missed: bool,
}

impl Report {
    fn line(&mut self, what: &str, (device, caller): (f64, f64), least: f64, wanted: f64) {
        if !self.timed {
            return println!("{what}: ran");
        }
        let ratio = least / device;
        let met = ratio >= wanted;
        self.missed |= !met;
        println!(
            "{what}: {:.3} ms, at least {:.3} ms: {:.1} % (wanted {:.0} %: {}); for the caller {:.3} ms, {:.1} %",
            device * 1e3,
            least * 1e3,
            ratio * 100.0,
            wanted * 100.0,
            if met { "met" } else { "MISSED" },
            caller * 1e3,
            least / caller * 100.0
        );
    }
}

fn run(
    device: &Arc<Device>,
    name: &str,
    limits: impl Fn(Limits) -> Limits,
    (memory, matrix): (f64, f64),
    report: &mut Report,
) -> Result<(), Error> {
    let Some(shape) = shape(name) else {
        return Err(Error::Mismatch(format!("--shape {name}: 1b or 8b")));
    };
    let (batch, prompt, rows) = if report.timed { (64, 2048, 8192) } else { (5, 70, 280) };
    let context = prompt.max(CONTEXT + WARM + STEPS);
    let per = context.div_ceil(BLOCK);
    let begun = Instant::now();
    let decoder = load(device, &shape, limits(Limits::new(rows, batch, context)))?;
    let kv = KvMemory::new(device, &shape, batch * per)?;
    println!("{name}: loaded in {:.1} s", begun.elapsed().as_secs_f64());
    let mut bench = Bench { decoder, kv, per, logits: Vec::new() };
    bench.decoder.measure()?;

    // Prompts first, twice: the first time has cuBLAS choose and load its kernels.
    let at_once = rows / prompt;
    bench.prefill(at_once, prompt, at_once)?;
    let times =
        (0..5).map(|_| bench.prefill(at_once, prompt, at_once)).collect::<Result<Vec<_>, _>>()?;
    let times = median(times);
    let head = shape.vocab * shape.hidden;
    let layers = shape.streamed_weights() - head;
    let seen = prompt * (prompt + 1) / 2;
    let attention = 4 * shape.layers * shape.heads * shape.head_dim * at_once * seen;
    let operations = 2 * (layers * at_once * prompt + head * at_once) + attention;
    let what = format!("{name} prefill, {at_once} prompts of {prompt}");
    report.line(&what, times, operations as f64 / matrix, PREFILL);

    bench.prefill(batch, CONTEXT.min(prompt), rows / CONTEXT.min(prompt))?;
    for most in report.batches.clone() {
        let batch = most.min(bench.kv.blocks() / per);
        let wanted = if batch == 1 { DECODE_1 } else { DECODE_64 };
        let times = bench.decode(batch, report.timed)?;
        let position = bench.kv.block_bytes() / BLOCK;
        let read = 2 * shape.streamed_weights() + batch * position * (CONTEXT + WARM + STEPS / 2);
        report.line(&format!("{name} decode, batch {batch}"), times, read as f64 / memory, wanted);
        if report.parts {
            let parts = bench.decoder.parts(&bench.kv)?;
            for (part, seconds) in parts.into_iter().filter(|_| report.timed) {
                println!("    {part}: {:.1} us", seconds * 1e6);
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let (mut shapes, mut graphs, mut overlap, mut narrow) = (Vec::new(), true, true, None);
    let (mut batches, mut parts) = (Vec::<usize>::new(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--shape" => shapes.extend(arguments.next()),
            "--batch" => {
                batches.extend(arguments.next().and_then(|batch| batch.parse::<usize>().ok()))
            }
            "--parts" => parts = true,
            "--no-graphs" => graphs = false,
            "--no-overlap" => overlap = false,
            "--narrow-rows" => narrow = arguments.next().and_then(|rows| rows.parse().ok()),
            other => {
                eprintln!(
                    "{other}: --shape 1b|8b, --batch N, --parts, --no-graphs, --no-overlap, \
                     --narrow-rows N"
                );
                return ExitCode::from(2);
            }
        }
    }
    let limits = |limits: Limits| Limits {
        graphs,
        overlap,
        narrow_rows: narrow.unwrap_or(limits.narrow_rows),
        ..limits
    };
    let mut all = || -> Result<bool, Error> {
        let device = Device::open(0)?;
        let timed = !device.name().contains("double");
        if batches.is_empty() {
            batches = vec![1, 8, 64];
        }
        let batches = std::mem::take(&mut batches);
        let mut report = Report { timed, parts, batches, missed: false };
        if !timed {
            println!("{}: everything is run, nothing is timed", device.name());
            run(&device, "tiny", limits, (1.0, 1.0), &mut report)?;
            return Ok(true);
        }
        let memory = measure::memory_rate(&device, 4 << 30)?;
        let matrix = measure::matrix_rate(&device, 8192)?;
        println!(
            "{}: memory is read at {:.2} TB/s, matrices are multiplied at {:.0} TFLOP/s",
            device.name(),
            memory / 1e12,
            matrix / 1e12
        );
        if shapes.is_empty() {
            shapes = ["1b", "8b"].map(str::to_owned).to_vec();
        }
        for name in &shapes {
            run(&device, name, limits, (memory, matrix), &mut report)?;
        }
        Ok(!report.missed)
    };
    match all() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
