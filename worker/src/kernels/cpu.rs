//! Which instruction set runs the kernels: the one place that decides.

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 as below, with dot products of bfloat16.
    Bf16,
    /// AVX-512 as below, with integer dot products of bytes.
    Vnni,
    /// AVX-512F with its byte, doubleword and vector-length parts.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The widest one that this CPU has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| *Self::available().first().unwrap_or(&Self::Portable))
    }

    /// All that this CPU has, widest first.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                if is_x86_feature_detected!("avx512vnni") {
                    if is_x86_feature_detected!("avx512bf16") {
                        all.push(Self::Bf16);
                    }
                    all.push(Self::Vnni);
                }
                all.push(Self::Avx512);
            }
            if avx2 {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }
}

/// Defines a safe function that runs a kernel, generic over `Lanes`, on a chosen instruction set.
///
/// The kernel is compiled once inside a function with each target feature, so that it is inlined
/// there with its vector instructions.
macro_rules! dispatch {
    (
        $(#[$meta:meta])*
        $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) => $kernel:ident;
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: $crate::kernels::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { $kernel::<$crate::kernels::lanes::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { $kernel::<$crate::kernels::lanes::Avx2>($($arg),*) }
            }
            match isa {
                // SAFETY: `Isa::available` found the features; the rest is the caller's promise.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Bf16
                | $crate::kernels::cpu::Isa::Vnni
                | $crate::kernels::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the caller's promise.
                _ => unsafe { $kernel::<$crate::kernels::lanes::Portable>($($arg),*) },
            }
        }
    };
}
pub(crate) use dispatch;

/// As [`dispatch`], for a kernel generic over `Dot`; `$vnni` is the implementation for VNNI.
macro_rules! dispatch_dot {
    (unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) => $kernel:ident, $vnni:ident;) => {
        unsafe fn $name(isa: $crate::kernels::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(
                enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
            )]
            unsafe fn vnni($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { $kernel::<$crate::kernels::dot::$vnni>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { $kernel::<$crate::kernels::dot::Avx2Dot>($($arg),*) }
            }
            match isa {
                // SAFETY: `Isa::available` found the features; the rest is the caller's promise.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Bf16 | $crate::kernels::cpu::Isa::Vnni => unsafe {
                    vnni($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx512 | $crate::kernels::cpu::Isa::Avx2 => unsafe {
                    avx2($($arg),*)
                },
                // SAFETY: the caller's promise.
                _ => unsafe { $kernel::<$crate::kernels::dot::PortableDot>($($arg),*) },
            }
        }
    };
}
pub(crate) use dispatch_dot;
