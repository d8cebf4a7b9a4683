//! What a device can do at most, measured: what a step's time is compared to.

use std::sync::Arc;

use half::bf16;

use crate::blas::{Blas, Outcome};
use crate::driver::{Buffer, Event, Stream};
use crate::kernels::read_all;
use crate::{Device, Error};

/// The best of several runs, in seconds of the device.
fn best(
    stream: &Stream,
    runs: usize,
    mut work: impl FnMut() -> Result<(), Error>,
) -> Result<f64, Error> {
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        end.synchronize()?;
        best = best.min(end.since(&start)?);
    }
    Ok(best)
}

/// Bytes a second at which `bytes` of device memory, many times the caches, are read.
pub fn memory_rate(device: &Arc<Device>, bytes: usize) -> Result<f64, Error> {
    let stream = Stream::new(device)?;
    let memory = Buffer::<u8>::new(device, bytes, "memory to read")?;
    memory.zero(&stream)?;
    let sums = Buffer::<f32>::new(device, 1 << 16, "sums")?;
    let kernel = device.function("read_all", 0)?;
    let seconds = best(&stream, 8, || read_all(&stream, kernel, &memory, bytes, &sums))?;
    Ok(bytes as f64 / seconds)
}

/// Operations a second (two for each product of two numbers) of cuBLAS's bf16 product of square
/// matrices of this width.
pub fn matrix_rate(device: &Arc<Device>, width: usize) -> Result<f64, Error> {
    let stream = Stream::new(device)?;
    let blas = Blas::new(&stream)?;
    // Not zeros: those take less power, and a GPU is faster by it than it is in use.
    let mut state = 1u32;
    let values: Vec<bf16> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 24) as f32 - 0.5)
    })
    .take(width * width)
    .collect();
    let [x, w] = [0, 1].map(|_| Buffer::of(&stream, &values, "a matrix"));
    let (x, w) = (x?, w?);
    let out = Buffer::<bf16>::new(device, width * width, "a matrix")?;
    let seconds = best(&stream, 8, || {
        let (x, w, out) = (x.address(0), w.address(0), out.address(0));
        // SAFETY: three square matrices of bf16.
        unsafe { blas.multiply(x, w, out, width, width, width, Outcome::Store) }
    })?;
    Ok(2.0 * (width as f64).powi(3) / seconds)
}
