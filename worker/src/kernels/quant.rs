//! GGUF block formats, decoded to float32.
//!
//! The formats are those of ggml's `ggml-quants.c`. Blocks of the types that chat models use on a
//! CPU ([`Q4_0`], [`Q4_1`], [`Q8_0`]) are decoded straight into registers; every other type that
//! candle knows is decoded by candle, a row at a time.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, GgmlType,
};

use super::lanes::{LANES, Lanes};

/// Elements that [`Format::decode`] gives at once.
pub const GROUP: usize = 2 * LANES;

/// A block format of 32 elements that kernels decode in registers.
pub trait Format {
    /// Bytes of a block.
    const BYTES: usize;
    /// The 32 values of a block, in order.
    ///
    /// # Safety
    /// `block` points to `BYTES` readable bytes; `V`'s instruction set is available.
    unsafe fn decode<V: Lanes>(block: *const u8) -> (V, V);
}

/// `d · (q − 8)`, four bits each.
pub struct Q4_0;
/// `d · q + m`, four bits each.
pub struct Q4_1;
/// `d · q`, eight bits each.
pub struct Q8_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    #[inline(always)]
    unsafe fn decode<V: Lanes>(block: *const u8) -> (V, V) {
        // SAFETY: 2 + 16 bytes, granted by the caller.
        unsafe {
            let d = V::from_half(block);
            V::from_nibbles(block.add(2), d, d.mul(V::splat(-8.0)))
        }
    }
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    #[inline(always)]
    unsafe fn decode<V: Lanes>(block: *const u8) -> (V, V) {
        // SAFETY: 2 + 2 + 16 bytes, granted by the caller.
        unsafe {
            let (d, m) = V::from_two_halves(block);
            V::from_nibbles(block.add(4), d, m)
        }
    }
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    #[inline(always)]
    unsafe fn decode<V: Lanes>(block: *const u8) -> (V, V) {
        // SAFETY: 2 + 32 bytes, granted by the caller.
        unsafe {
            let d = V::from_half(block);
            let q = block.add(2).cast::<i8>();
            (V::from_i8(q).mul(d), V::from_i8(q.add(LANES)).mul(d))
        }
    }
}

/// Whether [`decode_row`] knows a type.
pub fn supported(dtype: GgmlDType) -> bool {
    use GgmlDType as D;
    matches!(
        dtype,
        D::F32
            | D::F16
            | D::BF16
            | D::Q4_0
            | D::Q4_1
            | D::Q5_0
            | D::Q5_1
            | D::Q8_0
            | D::Q2K
            | D::Q3K
            | D::Q4K
            | D::Q5K
            | D::Q6K
    )
}

/// Decodes one row of any supported type.
///
/// # Panics
/// When `bytes` is not exactly the row, or the type is not [`supported`].
pub fn decode_row(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len() / dtype.type_size() * dtype.block_size(), out.len(), "a row's bytes");
    match dtype {
        GgmlDType::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        GgmlDType::F16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = half::f16::from_le_bytes(*bytes).to_f32();
            }
        }
        GgmlDType::BF16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = half::bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        GgmlDType::Q4_0 => decode_blocks::<Q4_0>(bytes, out),
        GgmlDType::Q4_1 => decode_blocks::<Q4_1>(bytes, out),
        GgmlDType::Q8_0 => decode_blocks::<Q8_0>(bytes, out),
        GgmlDType::Q5_0 => decode_with_candle::<BlockQ5_0>(bytes, out),
        GgmlDType::Q5_1 => decode_with_candle::<BlockQ5_1>(bytes, out),
        GgmlDType::Q2K => decode_with_candle::<BlockQ2K>(bytes, out),
        GgmlDType::Q3K => decode_with_candle::<BlockQ3K>(bytes, out),
        GgmlDType::Q4K => decode_with_candle::<BlockQ4K>(bytes, out),
        GgmlDType::Q5K => decode_with_candle::<BlockQ5K>(bytes, out),
        GgmlDType::Q6K => decode_with_candle::<BlockQ6K>(bytes, out),
        other => unreachable!("{other:?} is refused at load"),
    }
}

fn decode_blocks<F: Format>(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(F::BYTES).zip(out.chunks_exact_mut(GROUP)) {
        // SAFETY: the chunks have the lengths that decode and store need; `Portable` runs anywhere.
        unsafe {
            let (low, high) = F::decode::<super::lanes::Portable>(block.as_ptr());
            low.store(out.as_mut_ptr());
            high.store(out.as_mut_ptr().add(LANES));
        }
    }
}

fn decode_with_candle<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    // Blocks hold half floats, so candle's types want two-byte alignment, and the block sizes are
    // even: a file whose data section starts at an odd byte is the only exception, copied here.
    if bytes.as_ptr().align_offset(align_of::<B>()) == 0 {
        // SAFETY: aligned, the length is a whole number of blocks (checked by the caller), and any
        // bytes are a valid block.
        let blocks = unsafe {
            std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), bytes.len() / size_of::<B>())
        };
        B::to_float(blocks, out);
    } else {
        let mut blocks = vec![B::zeros(); bytes.len() / size_of::<B>()];
        // SAFETY: the vector has exactly these bytes, and any bytes are a valid block.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), blocks.as_mut_ptr().cast(), bytes.len());
        }
        B::to_float(&blocks, out);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4_1, BlockQ8_0};
    use proptest::prelude::*;

    use super::super::cpu::{Isa, dispatch};
    use super::*;

    fn agrees<B: GgmlType>(dtype: GgmlDType, values: &[f32]) {
        let mut blocks = vec![B::zeros(); values.len() / B::BLCK_SIZE];
        B::from_float(values, &mut blocks);
        let mut expected = vec![0.0; values.len()];
        B::to_float(&blocks, &mut expected);
        let len = size_of_val(&blocks[..]);
        // SAFETY: plain data of known size.
        let bytes = unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), len) };
        let mut got = vec![0.0; values.len()];
        decode_row(dtype, bytes, &mut got);
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= expected.abs() * 2e-7 + 1e-12, "{got} {expected}");
        }
        // The same bytes at an odd address.
        let mut shifted = vec![0u8; len + 1];
        shifted[1..].copy_from_slice(bytes);
        decode_row(dtype, &shifted[1..], &mut got);
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= expected.abs() * 2e-7 + 1e-12, "{got} {expected}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn rows_decode_as_candle_decodes_them(values in prop::collection::vec(-4f32..4.0, 512)) {
            agrees::<BlockQ4_0>(GgmlDType::Q4_0, &values);
            agrees::<BlockQ4_1>(GgmlDType::Q4_1, &values);
            agrees::<BlockQ5_0>(GgmlDType::Q5_0, &values);
            agrees::<BlockQ5_1>(GgmlDType::Q5_1, &values);
            agrees::<BlockQ8_0>(GgmlDType::Q8_0, &values);
            agrees::<BlockQ2K>(GgmlDType::Q2K, &values);
            agrees::<BlockQ3K>(GgmlDType::Q3K, &values);
            agrees::<BlockQ4K>(GgmlDType::Q4K, &values);
            agrees::<BlockQ5K>(GgmlDType::Q5K, &values);
            agrees::<BlockQ6K>(GgmlDType::Q6K, &values);
        }
    }

    #[inline(always)]
    unsafe fn halves_kernel<V: Lanes>(from: *const u8, out: *mut f32) {
        // SAFETY: four bytes and room for three times sixteen floats, granted by the caller.
        unsafe {
            let (first, second) = V::from_two_halves(from);
            let all = [V::from_half(from), first, second];
            all.iter().enumerate().for_each(|(i, lanes)| lanes.store(out.add(i * LANES)));
        }
    }
    dispatch! { unsafe fn halves(from: *const u8, out: *mut f32) => halves_kernel; }

    #[test]
    fn every_finite_half_is_exact() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits);
            if !expected.is_finite() {
                continue;
            }
            let second = half::f16::from_bits(bits ^ 0x8001 & 0x83ff);
            let bytes = [expected.to_le_bytes(), second.to_le_bytes()].concat();
            for isa in Isa::available() {
                let mut out = [0.0; 3 * LANES];
                // SAFETY: the instruction set is there; four bytes, and room for the result.
                unsafe { halves(isa, bytes.as_ptr(), out.as_mut_ptr()) };
                for (i, got) in out.iter().enumerate() {
                    let expected = if i < 2 * LANES { expected } else { second };
                    assert_eq!(got.to_bits(), expected.to_f32().to_bits(), "{isa:?} {bits}");
                }
            }
        }
    }
}
