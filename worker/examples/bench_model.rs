//! Times the model alone: `cargo run --release -p baton-worker --example bench_model -- MODEL`.

use std::path::PathBuf;
use std::time::Instant;

use baton_worker::kv::pool::KvPool;
use baton_worker::model::{SequenceSlice, kv_layout, load};
use clap::Parser;

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
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const BLOCK: usize = 16;
    let arguments = Arguments::parse();
    let mut model = load(&arguments.model, arguments.threads)?.model;
    let sequences = 32;
    let each = 1600 / BLOCK;
    let kv = KvPool::new(kv_layout(model.config(), BLOCK), sequences * each)?;
    let tables: Vec<Vec<u32>> =
        (0..sequences).map(|i| ((i * each) as u32..((i + 1) * each) as u32).collect()).collect();
    let tokens: Vec<u32> = (0..1600u32).map(|i| 1000 + i * 37 % 20_000).collect();
    let mut logits = Vec::new();
    let measure = |name: &str, per_run: usize, run: &mut dyn FnMut()| {
        let mut times: Vec<f64> = (0..arguments.runs)
            .map(|_| {
                let start = Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{name:<28} {:>9.1} tokens/s", per_run as f64 / times[times.len() / 2]);
    };
    for length in [512, 1500] {
        measure(&format!("prefill {length}"), length, &mut || {
            for (i, chunk) in tokens[..length].chunks(512).enumerate() {
                let slice = SequenceSlice {
                    start: i * 512,
                    tokens: chunk,
                    blocks: &tables[0],
                    logits: true,
                };
                model.forward(&[slice], &kv, &mut logits).expect("forward");
            }
        });
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
        let steps = 32;
        measure(&format!("decode {streams} x context {context}"), steps * streams, &mut || {
            for step in 0..steps {
                let batch: Vec<_> = tables[..streams]
                    .iter()
                    .map(|blocks| SequenceSlice {
                        start: context + step,
                        tokens: &tokens[step..=step],
                        blocks,
                        logits: true,
                    })
                    .collect();
                model.forward(&batch, &kv, &mut logits).expect("forward");
            }
        });
    }
    Ok(())
}
