//! Times the kernels alone, on one thread: matrix products and attention of a decoder, with the
//! weights of a model, and without one those of encoders.
//!
//! `cargo run --release -p baton-worker --example bench_kernels -- [MODEL]` prints, for every
//! instruction set that the CPU has, the best rate of some runs: the machine's other work then
//! counts little. A multiplication with its addition is one operation. Beside the encoders' products
//! stands their share of what the CPU multiplies in registers alone.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use baton_proto::v1::KvDtype;
use baton_worker::checkpoint::{self, TensorBytes};
use baton_worker::kernels::activations::{Activations, Precision};
use baton_worker::kernels::arena::Arena;
use baton_worker::kernels::attention::{self, Queries};
use baton_worker::kernels::bidirectional::{self, Span};
use baton_worker::kernels::cpu::{Isa, SUMS, multiply_adds};
use baton_worker::kernels::elementwise::{gelu, layer_norm_in_place};
use baton_worker::kernels::lanes::LANES;
use baton_worker::kernels::linear::{Linear, multiply, multiply_paired};
use baton_worker::kernels::page::Shape;
use baton_worker::kernels::pool::ThreadPool;
use baton_worker::kernels::strassen::Pairing;
use baton_worker::kv::pool::KvPool;
use baton_worker::model::kv_layout;
use candle_core::quantized::GgmlDType;
use clap::Parser;

/// Prints thousand million multiply-adds a second.
#[derive(Parser)]
struct Arguments {
    /// A GGUF file or a model's folder; without, an encoder's operations are measured.
    model: Option<PathBuf>,
    /// Runs of each measure; the fastest counts.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// Only the widest instruction set.
    #[arg(long)]
    best: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let mut isas = Isa::available();
    isas.truncate(if arguments.best { 1 } else { isas.len() });
    let Some(model) = &arguments.model else {
        return isas.into_iter().try_for_each(|isa| encoder(isa, arguments.runs));
    };
    let checkpoint = checkpoint::open(model)?;
    let config = checkpoint.config()?;
    let mut pool = ThreadPool::new(1)?;
    let mut arena = Arena::default();
    for isa in isas {
        for name in [
            "blk.0.attn_q.weight",
            "blk.0.ffn_up.weight",
            "blk.0.ffn_down.weight",
            "token_embd.weight",
        ] {
            let tensor = checkpoint.tensor(name)?;
            let dtype = tensor.dtype;
            let linear = Linear::new(&mut pool, &mut arena, tensor)
                .ok_or("a tensor that is not supported")?;
            for (precision, rows) in [Precision::Sixteen, Precision::Eight]
                .into_iter()
                .flat_map(|precision| [1, 2, 4, 8, 32, 512].map(|rows| (precision, rows)))
            {
                if rows == 512 && name == "token_embd.weight" {
                    continue;
                }
                let mut x = Activations::new(precision);
                x.fill(isa, &mut pool, rows, linear.inputs(), |row, out| noise(row as u64, out));
                let mut y = vec![0.0; rows * linear.outputs()];
                let work = rows * linear.outputs() * linear.inputs();
                let rate = fastest(arguments.runs, work, || {
                    multiply(isa, &mut pool, x.view(), [linear.set(&mut y)]);
                });
                println!("{isa:?} {precision:?} {name} {dtype:?} x {rows:<4} {rate:7.1}");
            }
        }
        for dtype in [KvDtype::I16, KvDtype::I8] {
            const BLOCK: usize = 16;
            let shape = Shape {
                dtype,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                block_size: BLOCK,
            };
            let width = config.heads * config.head_dim;
            for (sequences, start, count) in
                [(1, 0, 512), (1, 1024, 512), (1, 1024, 1), (8, 1024, 1)]
            {
                let each = (start + count) / BLOCK + 1;
                let kv = KvPool::new(kv_layout(&config, BLOCK, dtype), sequences * each)?;
                let tables: Vec<Vec<u32>> = (0..sequences)
                    .map(|i| ((i * each) as u32..((i + 1) * each) as u32).collect())
                    .collect();
                let queries: Vec<Queries<'_>> = tables
                    .iter()
                    .enumerate()
                    .map(|(i, blocks)| Queries { row: i * count, count, start, blocks })
                    .collect();
                let mut q = vec![0.0; sequences * count * width];
                noise(7, &mut q);
                let (mut out, mut scratch) = (vec![0.0; q.len()], attention::Scratch::default());
                let keys = count * start + count * (count + 1) / 2;
                let rate = fastest(arguments.runs, 2 * sequences * keys * width, || {
                    attention::attend(
                        isa,
                        &mut pool,
                        &kv,
                        &shape,
                        0,
                        None,
                        &queries,
                        &mut scratch,
                        &q,
                        &mut out,
                    );
                });
                println!(
                    "{isa:?} {dtype:?} attention {sequences} x {count} from {start} {rate:7.1}"
                );
            }
        }
    }
    Ok(())
}

/// Products, attention and what is between, in the shapes of MiniLM and of Whisper's encoder.
fn encoder(isa: Isa, runs: usize) -> Result<(), Box<dyn Error>> {
    let (mut pool, mut arena) = (ThreadPool::new(1)?, Arena::default());
    let peak = fastest(runs, 0x10000 * SUMS * LANES, || {
        // SAFETY: the CPU has the instruction set.
        unsafe { multiply_adds(isa, 0x10000) }
    });
    println!("{isa:?} multiply-adds in registers {peak:7.1}");
    for (outputs, inputs) in [(384, 384), (1536, 384), (384, 1536)] {
        let mut values = vec![0.0; outputs * inputs];
        noise(3, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = TensorBytes::anonymous(&bytes, GgmlDType::F32, vec![outputs, inputs]);
        for (dtype, precision) in [
            (GgmlDType::F32, Precision::Float),
            (GgmlDType::BF16, Precision::Float),
            (GgmlDType::BF16, Precision::BFloat16),
            (GgmlDType::Q8_0, Precision::Sixteen),
            (GgmlDType::Q8_0, Precision::Eight),
        ] {
            let mut linear = Linear::rounded(&mut pool, &mut arena, tensor.clone(), dtype)
                .ok_or("a tensor that is not supported")?;
            if dtype == GgmlDType::F32 {
                linear.for_pairs(&mut pool, &mut arena);
            }
            for rows in [1, 10, 128, 512] {
                let mut x = Activations::new(precision);
                x.fill(isa, &mut pool, rows, inputs, |row, out| noise(row as u64, out));
                let mut y = vec![0.0; rows * outputs];
                let rate = fastest(runs, rows * outputs * inputs, || {
                    multiply(isa, &mut pool, x.view(), [linear.set(&mut y)]);
                });
                println!(
                    "{isa:?} {precision:?} {inputs} to {outputs} {dtype:?} x {rows:<4} {rate:7.1} \
                     {:4.0} %",
                    100.0 * rate / peak
                );
                let mut pairing = Pairing::default();
                pairing.push(rows);
                if dtype != GgmlDType::F32 || !pairing.pairs_rows() {
                    continue;
                }
                let rate = fastest(runs, rows * outputs * inputs, || {
                    let product = [linear.set(&mut y)];
                    multiply_paired(isa, &mut pool, x.view(), &pairing, product, &[]);
                });
                println!(
                    "{isa:?} {precision:?} {inputs} to {outputs} in pairs x {rows:<4} {rate:7.1} \
                     {:4.0} %",
                    100.0 * rate / peak
                );
            }
        }
    }
    // All products of six layers: few rows are as fast as their weights come from memory.
    let shapes = [(384, 384), (384, 384), (384, 384), (384, 384), (1536, 384), (384, 1536)];
    for (dtype, precision) in
        [(GgmlDType::F32, Precision::Float), (GgmlDType::BF16, Precision::BFloat16)]
    {
        let mut layers = Vec::new();
        for (outputs, inputs) in shapes.repeat(6) {
            let bytes = vec![0x3c; outputs * inputs * 4];
            let tensor = TensorBytes::anonymous(&bytes, GgmlDType::F32, vec![outputs, inputs]);
            let linear = Linear::rounded(&mut pool, &mut arena, tensor, dtype);
            layers.push(linear.ok_or("a tensor that is not supported")?);
        }
        for rows in [1, 10, 24, 128] {
            let mut x = [384, 1536].map(|_| Activations::new(precision));
            x[0].fill(isa, &mut pool, rows, 384, |row, out| noise(row as u64, out));
            x[1].fill(isa, &mut pool, rows, 1536, |row, out| noise(row as u64, out));
            let mut y = vec![0.0; rows * 1536];
            let work = layers.iter().map(|l| rows * l.outputs() * l.inputs()).sum();
            let rate = fastest(runs, work, || {
                for linear in &layers {
                    let y = &mut y[..rows * linear.outputs()];
                    let x = &x[usize::from(linear.inputs() == 1536)];
                    multiply(isa, &mut pool, x.view(), [linear.set(y)]);
                }
            });
            println!(
                "{isa:?} {precision:?} six layers {dtype:?} x {rows:<4} {rate:7.1} {:4.0} %",
                100.0 * rate / peak
            );
        }
    }
    for (heads, head_dim, count) in [(12, 32, 10), (12, 32, 100), (12, 32, 256), (8, 64, 1500)] {
        let width = heads * head_dim;
        let mut q = vec![0.0; 3 * count * width];
        noise(5, &mut q);
        let (q, rest) = q.split_at(count * width);
        let (k, v) = rest.split_at(count * width);
        let (mut out, mut scratch) = (vec![0.0; q.len()], bidirectional::Scratch::default());
        let spans = [Span { row: 0, count }];
        let rate = fastest(runs, 2 * count * count * width, || {
            bidirectional::attend(
                isa,
                &mut pool,
                heads,
                head_dim,
                None,
                &spans,
                &mut scratch,
                q,
                k,
                v,
                &mut out,
            );
        });
        println!(
            "{isa:?} attention of {heads} x {head_dim} over {count} {rate:7.1} {:4.0} %",
            100.0 * rate / peak
        );
    }
    let mut x = vec![0.0; 384 * 64];
    noise(6, &mut x);
    let (weight, bias) = (vec![1.0; 384], vec![0.1; 384]);
    let norm = fastest(runs, x.len(), || {
        x.chunks_exact_mut(384)
            .for_each(|x| layer_norm_in_place(isa, x, &weight, Some(&bias), 1e-12));
    });
    let gelu = fastest(runs, x.len(), || gelu(isa, &mut x));
    println!("{isa:?} layer norm {norm:.2}, gelu {gelu:.2} thousand million elements a second");
    Ok(())
}

fn noise(seed: u64, out: &mut [f32]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for x in out {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *x = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    }
}

/// The best rate of some runs, in thousand million units of work a second.
fn fastest(runs: usize, work: usize, mut run: impl FnMut()) -> f64 {
    run();
    let times = (0..runs).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    work as f64 / times.fold(f64::INFINITY, f64::min) / 1e9
}
