//! How fast threads can read memory: what decode, which reads all weights for each step, is bound by.
//!
//! `cargo run --release -p baton-worker --example bench_memory -- --threads 2 --megabytes 1024`
//! prints `{"bytes_per_second":...}`. A size that fits the last cache tells that cache's speed, and
//! the weights of a small model may live there; measure with their size, and with a large one.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use clap::Parser;

/// Prints the best rate of some passes over fresh memory.
#[derive(Parser)]
struct Arguments {
    /// Threads that read, each its own part.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Memory to read, in units of 10^6 bytes.
    #[arg(long, default_value_t = 1024)]
    megabytes: usize,
    /// Passes over the memory; the fastest counts.
    #[arg(long, default_value_t = 8)]
    passes: usize,
}

fn main() {
    let arguments = Arguments::parse();
    let words = arguments.megabytes * 1_000_000 / size_of::<u64>();
    let each = words.div_ceil(arguments.threads.max(1)).max(1);
    // Not zeros: those pages would all be one page.
    let memory: Vec<u64> = (0..words as u64).collect();
    let fastest = (0..arguments.passes.max(1))
        .map(|_| {
            let start = Instant::now();
            thread::scope(|scope| {
                for part in memory.chunks(each) {
                    scope.spawn(move || black_box(sum(part)));
                }
            });
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    println!(r#"{{"bytes_per_second":{:.0}}}"#, (words * size_of::<u64>()) as f64 / fastest);
}

/// Eight sums at once: one would wait for its own additions, not for memory.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    let (lines, rest) = words.as_chunks::<8>();
    for line in lines {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}
