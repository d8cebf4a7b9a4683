//! How vectors are written: as JSON numbers, as base64, or as bytes.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use half::{bf16, f16};
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

/// `encoding_format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// JSON numbers.
    #[default]
    Float,
    /// Base64 of the values' bytes.
    Base64,
    /// The body is the values' bytes; the header `metadata` tells the rest.
    Bytes,
    /// The same without the header.
    BytesOnly,
}

/// `embed_dtype`: how a value is written, where it is written in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// IEEE 754, 32 bits.
    #[default]
    Float32,
    /// IEEE 754, 16 bits.
    Float16,
    /// The upper half of 32 bits.
    Bfloat16,
    /// Eight bits, four of them of the exponent, without infinities.
    Fp8E4m3,
    /// Eight bits, five of them of the exponent.
    Fp8E5m2,
}

/// `endianness`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Endianness {
    /// As this machine has it.
    #[default]
    Native,
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

/// How bytes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binary {
    /// Each value.
    pub dtype: Dtype,
    /// Its bytes.
    pub endianness: Endianness,
}

impl Dtype {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Fp8E4m3 | Self::Fp8E5m2 => 1,
        }
    }
}

impl Binary {
    /// The bytes of some values.
    pub fn bytes(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * self.dtype.size());
        let big = match self.endianness {
            Endianness::Native => cfg!(target_endian = "big"),
            Endianness::Little => false,
            Endianness::Big => true,
        };
        for value in values {
            let bits = match self.dtype {
                Dtype::Float32 => value.to_bits(),
                Dtype::Float16 => f16::from_f32(*value).to_bits().into(),
                Dtype::Bfloat16 => bf16::from_f32(*value).to_bits().into(),
                Dtype::Fp8E4m3 => small(*value, 4, 3, false),
                Dtype::Fp8E5m2 => small(*value, 5, 2, true),
            };
            let size = self.dtype.size();
            match big {
                true => bytes.extend_from_slice(&bits.to_be_bytes()[4 - size..]),
                false => bytes.extend_from_slice(&bits.to_le_bytes()[..size]),
            }
        }
        bytes
    }

    /// The same as base64.
    pub fn base64(self, values: &[f32]) -> String {
        BASE64_STANDARD.encode(self.bytes(values))
    }
}

/// Rounds to the nearest number, ties to even, of a format with so many bits. Without infinities,
/// the largest exponent holds numbers but for one NaN, as in OCP's E4M3; what is too large becomes
/// infinity, or that NaN.
fn small(value: f32, exponent_bits: u32, mantissa_bits: u32, infinities: bool) -> u32 {
    let sign = u32::from(value.is_sign_negative()) << (exponent_bits + mantissa_bits);
    let top = (1u32 << exponent_bits) - 1;
    let nan = sign | (top << mantissa_bits) | ((1 << mantissa_bits) - 1);
    let beyond = if infinities { sign | (top << mantissa_bits) } else { nan };
    let magnitude = f64::from(value.abs());
    if magnitude.is_nan() {
        return nan;
    }
    if magnitude.is_infinite() {
        return beyond;
    }
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    // Subnormal numbers share the lowest exponent.
    let exponent = match magnitude {
        0.0 => 1 - bias,
        _ => (((magnitude.to_bits() >> 52) as i32) - 1023).max(1 - bias),
    };
    // Exact: a power of two, and far fewer bits than a double has.
    let steps = magnitude * 2f64.powi(mantissa_bits as i32 - exponent);
    // With the implicit bit on top; a carry out of the mantissa raises the exponent by itself.
    let code = ((exponent + bias - 1) as u32) << mantissa_bits;
    let code = code + steps.round_ties_even() as u32;
    let largest = match infinities {
        true => (top << mantissa_bits) - 1,
        false => (top << mantissa_bits) + (1 << mantissa_bits) - 2,
    };
    if code > largest { beyond } else { sign | code }
}

/// A vector, or a matrix, as it stands in a reply.
#[derive(Clone, Debug)]
pub enum Written {
    /// Numbers.
    Vector(Vec<f32>),
    /// Numbers, row by row, so many in each.
    Rows(Vec<f32>, usize),
    /// Base64.
    Base64(String),
}

impl Serialize for Written {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Vector(values) => values.serialize(serializer),
            Self::Rows(values, width) => {
                serializer.collect_seq(values.chunks_exact((*width).max(1)))
            }
            Self::Base64(text) => text.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(dtype: Dtype, endianness: Endianness, values: &[f32]) -> String {
        let bytes = Binary { dtype, endianness }.bytes(values);
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn bytes_are_in_the_order_asked_for() {
        assert_eq!(hex(Dtype::Float32, Endianness::Little, &[1.0, -2.0]), "0000803f000000c0");
        assert_eq!(hex(Dtype::Float32, Endianness::Big, &[1.0, -2.0]), "3f800000c0000000");
        assert_eq!(hex(Dtype::Float16, Endianness::Big, &[1.0]), "3c00");
        assert_eq!(hex(Dtype::Float16, Endianness::Little, &[1.0]), "003c");
        assert_eq!(hex(Dtype::Bfloat16, Endianness::Big, &[1.0]), "3f80");
        let native = if cfg!(target_endian = "big") { "3f800000" } else { "0000803f" };
        assert_eq!(hex(Dtype::Float32, Endianness::Native, &[1.0]), native);
        assert_eq!(Binary::default().base64(&[1.0]), "AACAPw==");
    }

    /// Values of the tables in "OCP 8-bit Floating Point Specification", revision 1.0.
    #[test]
    fn eight_bits_are_as_the_specification_has_them() {
        let e4m3 = |value| hex(Dtype::Fp8E4m3, Endianness::Big, &[value]);
        let e5m2 = |value| hex(Dtype::Fp8E5m2, Endianness::Big, &[value]);
        assert_eq!([e4m3(448.0), e4m3(0.015_625), e4m3(0.001_953_125)], ["7e", "08", "01"]);
        assert_eq!([e4m3(1.0), e4m3(-1.0), e4m3(0.0), e4m3(1.0625)], ["38", "b8", "00", "38"]);
        assert_eq!([e4m3(500.0), e4m3(f32::INFINITY), e4m3(f32::NAN)], ["7f", "7f", "7f"]);
        let smallest = 2f32.powi(-16);
        assert_eq!([e5m2(57_344.0), e5m2(2f32.powi(-14)), e5m2(smallest)], ["7b", "04", "01"]);
        assert_eq!([e5m2(1.0), e5m2(70_000.0), e5m2(f32::NEG_INFINITY)], ["3c", "7c", "fc"]);
    }

    proptest! {
        #[test]
        fn few_bits_are_rounded_as_a_library_rounds_sixteen(value in -1e6f32..1e6, scale in -45i32..10) {
            let value = value * 2f32.powi(scale);
            prop_assert_eq!(small(value, 5, 10, true), u32::from(f16::from_f32(value).to_bits()));
            prop_assert_eq!(small(value, 8, 7, true), u32::from(bf16::from_f32(value).to_bits()));
        }
    }
}
