//! Times the index of KV blocks: a million of them, of 64 workers, each held by four.
//!
//! `cargo run --release -p baton-gateway --example bench_kv_index` prints what a lookup takes by the
//! length of its prompt, and what a change takes.

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use baton_gateway::routing::kv_index::{KvIndex, Share};
use baton_proto::{BlockHash, block_hashes};
use parking_lot::RwLock;

const BLOCKS: usize = 1_000_000;
const PATH: usize = 500;
const WORKERS: usize = 64;

fn main() {
    let index = Arc::new(RwLock::new(KvIndex::new(2 * BLOCKS)));
    let mut shares: Vec<Share> = (0..WORKERS).filter_map(|_| Share::new(&index)).collect();
    let paths: Vec<Vec<BlockHash>> = (0..BLOCKS / PATH)
        .map(|i| {
            let tokens: Vec<u32> = (0..PATH as u32).map(|j| i as u32 * 1000 + j).collect();
            block_hashes("", &tokens, 1)
        })
        .collect();
    let start = Instant::now();
    let mut changes = 0;
    for (i, path) in paths.iter().enumerate() {
        for holder in 0..4 {
            // Each has less of it than the one before.
            let length = PATH - holder * PATH / 8;
            changes += length;
            shares[(i + holder * 7) % WORKERS].store(path[..length].iter().copied());
        }
    }
    let each = start.elapsed().as_nanos() as usize / changes;
    println!("{} blocks, {each} ns a change", index.read().len());
    println!("| blocks of the prompt | lookup, µs | p99, µs |\n| --- | --- | --- |");
    for length in [8, 64, 256, PATH] {
        let mut times: Vec<f64> = paths
            .iter()
            .map(|path| {
                let start = Instant::now();
                black_box(index.read().depths(black_box(&path[..length])));
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let (typical, worst) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        println!("| {length} | {typical:.1} | {worst:.1} |");
    }
}
