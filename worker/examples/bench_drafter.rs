//! Times a guess: `cargo run --release -p baton-worker --example bench_drafter`.

use std::time::Instant;

use baton_worker::scheduler::drafter::Drafter;

/// Prints microseconds for each token of a growing text whose tokens are as frequent as words.
fn main() {
    for length in [1_000, 8_000, 128_000] {
        // Zipf's law: the word of rank r has a share of about 1 / r.
        let mut state = 1u64;
        let text: Vec<u32> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let uniform = (state >> 33) as f64 / (1u64 << 31) as f64;
                40_000f64.powf(uniform) as u32
            })
            .collect();
        let mut drafter = Drafter::new(2, 4);
        let (mut draft, mut guesses) = (Vec::new(), 0);
        let mut slowest = 0.0f64;
        let start = Instant::now();
        for end in 1..=text.len() {
            let start = Instant::now();
            draft.clear();
            drafter.draft(&text[..end], 4, &mut draft);
            guesses += usize::from(!draft.is_empty());
            slowest = slowest.max(start.elapsed().as_secs_f64());
        }
        let mean = start.elapsed().as_secs_f64() / length as f64;
        println!(
            "{length:>7} tokens: {:.2} µs a token, {:.0} µs the slowest, {guesses} guesses",
            mean * 1e6,
            slowest * 1e6
        );
    }
}
