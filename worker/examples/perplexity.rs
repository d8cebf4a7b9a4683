//! What coarser arithmetic costs in quality: perplexity of some text under each setting.
//!
//! `cargo run --release -p baton-worker --example perplexity -- MODEL FILE...` cuts the text into
//! windows, computes all of them together token by token, and prints a row for each setting. The
//! windows are the same for all, so the differences are the settings' alone.

use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr as _;

use baton_proto::v1::KvDtype;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::{Precision, SequenceSlice, kv_layout, load};
use clap::Parser;

const BLOCK: usize = 16;
/// Windows that are computed together.
const BATCH: usize = 32;

/// Prints the perplexity of text.
#[derive(Parser)]
struct Arguments {
    /// A GGUF file or a model's folder.
    model: PathBuf,
    /// Plain text.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Tokens of a window; the first is not scored.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Threads that compute.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let mut text = String::new();
    for file in &arguments.files {
        text += &std::fs::read_to_string(file)?;
    }
    println!("| activations | KV | tokens | perplexity | against the first |");
    println!("| --- | --- | --- | --- | --- |");
    let mut first = None;
    for activations in [Precision::Sixteen, Precision::Eight] {
        for kv in [KvDtype::I16, KvDtype::I8] {
            let (loss, tokens) = measure(&arguments, &text, activations, kv)?;
            let perplexity = (loss / tokens as f64).exp();
            let change = (perplexity / *first.get_or_insert(perplexity) - 1.0) * 100.0;
            println!(
                "| {activations:?} bits | {} | {tokens} | {perplexity:.4} | {change:+.3} % |",
                kv.as_str_name().trim_start_matches("KV_DTYPE_")
            );
        }
    }
    Ok(())
}

/// The sum of the negative log-likelihoods of all scored tokens, and how many there are.
fn measure(
    arguments: &Arguments,
    text: &str,
    activations: Precision,
    dtype: KvDtype,
) -> Result<(f64, usize), Box<dyn Error>> {
    let loaded = load(&arguments.model, arguments.threads, activations)?;
    let mut model = loaded.model;
    let tokenizer = tokenizers::Tokenizer::from_str(&loaded.tokenizer.tokenizer_json)
        .map_err(|error| format!("the model's tokenizer: {error}"))?;
    let encoding = tokenizer.encode(text, false).map_err(|error| error.to_string())?;
    let windows: Vec<&[u32]> = encoding.get_ids().chunks_exact(arguments.window).collect();
    if windows.is_empty() {
        return Err(format!("the text has fewer than {} tokens", arguments.window).into());
    }
    let each = arguments.window.div_ceil(BLOCK);
    let kv = KvPool::new(kv_layout(model.config(), BLOCK, dtype), BATCH * each)?;
    let tables: Vec<Vec<u32>> =
        (0..BATCH).map(|i| ((i * each) as u32..((i + 1) * each) as u32).collect()).collect();
    let vocab = model.config().vocab;
    let (mut loss, mut scored, mut logits) = (0.0, 0, Vec::new());
    for windows in windows.chunks(BATCH) {
        for at in 0..arguments.window - 1 {
            let batch: Vec<_> = windows
                .iter()
                .zip(&tables)
                .map(|(window, blocks)| SequenceSlice {
                    start: at,
                    tokens: &window[at..=at],
                    blocks,
                    logits: 1,
                    ..SequenceSlice::default()
                })
                .collect();
            model.forward(&batch, &kv, &mut logits)?;
            for (window, row) in windows.iter().zip(logits.chunks_exact(vocab)) {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
                loss += sum.ln() - f64::from(row[window[at + 1] as usize] - largest);
                scored += 1;
            }
        }
    }
    Ok((loss, scored))
}
