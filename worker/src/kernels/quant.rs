//! GGUF block formats, decoded to float32 by candle, a row at a time: embedding lookups, and weights
//! that have no repacked form. The formats are those of ggml's `ggml-quants.c`.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, GgmlType,
};

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
        GgmlDType::Q4_0 => decode_with_candle::<BlockQ4_0>(bytes, out),
        GgmlDType::Q4_1 => decode_with_candle::<BlockQ4_1>(bytes, out),
        GgmlDType::Q8_0 => decode_with_candle::<BlockQ8_0>(bytes, out),
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

/// Rounds floats, a multiple of 32, to `BF16` or `Q8_0`; `None` for other types.
pub(super) fn encode(dtype: GgmlDType, values: &[f32]) -> Option<Vec<u8>> {
    match dtype {
        GgmlDType::BF16 => {
            Some(values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect())
        }
        GgmlDType::Q8_0 => {
            let mut blocks = vec![BlockQ8_0::zeros(); values.len() / BlockQ8_0::BLCK_SIZE];
            BlockQ8_0::from_float(values, &mut blocks);
            // SAFETY: blocks are plain bytes.
            let bytes = unsafe {
                std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), size_of_val(&blocks[..]))
            };
            Some(bytes.to_vec())
        }
        _ => None,
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
    use proptest::prelude::*;

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
}
