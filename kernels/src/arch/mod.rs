//! One file per instruction set: its token, which proves that the CPU has it, and its `Isa`.
//!
//! A token comes from `detect` alone. Methods on registers are written through [`registers`], which has the compiler check
//! that they need nothing but the instruction set; memory is read and written by value, through arrays.

use crate::{
    isa::{Isa, Kernel},
    level::Level,
};

/// Methods that compute on registers: each is compiled a second time as safe code with the features enabled, where an access
/// through a pointer is an error. Features cannot be enabled on the method itself, which has to be inlined everywhere.
macro_rules! registers {
    ($features:literal: $(
        $vis:vis fn $name:ident $(<$(const $generic:ident: $of:ty),*>)?
            ($($arg:ident: $t:ty),*) -> $out:ty = $e:expr;
    )*) => {$(
        #[inline(always)]
        $vis fn $name $(<$(const $generic: $of),*>)? (self, $($arg: $t),*) -> $out {
            #[target_feature(enable = $features)]
            #[allow(dead_code, reason = "only checked")]
            fn needs_the_features_only $(<$(const $generic: $of),*>)? ($($arg: $t),*) -> $out {
                $e
            }
            // SAFETY: the token `self` proves the features, and the function above that nothing else is needed.
            unsafe { $e }
        }
    )*};
}

/// The token of an instruction set from its detection, and a function that runs bodies with it.
macro_rules! instruction_set {
    ($token:ty, $make:expr, $detected:ident: $($feature:tt)*) => {
        impl $token {
            /// The token, where the CPU has the instruction set.
            pub(crate) fn detect() -> Option<Self> {
                if $($crate::arch::$detected!($feature))&&* { $make } else { None }
            }

            #[inline(always)]
            fn call<K: $crate::isa::Kernel>(self, kernel: K) -> K::Output {
                #[inline(never)]
                $(#[target_feature(enable = $feature)])*
                fn leaf<K: $crate::isa::Kernel>(isa: $token, kernel: K) -> K::Output {
                    kernel.run(isa)
                }
                // SAFETY: the token `self` proves the features.
                unsafe { leaf(self, kernel) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
#[cfg(target_arch = "x86_64")]
use std::arch::is_x86_feature_detected;

/// The instruction set of a level other than scalar.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Token {
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<avx2::Avx2Products>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(avx2::Avx2<avx_vnni::Vnni>),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512<avx512::Fma>),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(avx512::Avx512<avx512_bf16::Bf16>),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon<neon::Widening>),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(neon::Neon<neon::Dotprod>),
}

impl Token {
    /// The instruction set of a level, where this CPU has it.
    pub(crate) fn detect(level: Level) -> Option<Self> {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::Avx2::<avx2::Avx2Products>::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => avx2::Avx2::<avx_vnni::Vnni>::detect().map(Self::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::Avx512::<avx512::Fma>::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => avx512::Avx512::<avx512_bf16::Bf16>::detect().map(Self::Avx512Bf16),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::Neon::<neon::Widening>::detect().map(Self::Neon),
            #[cfg(target_arch = "aarch64")]
            Level::NeonDotprod => neon::Neon::<neon::Dotprod>::detect().map(Self::NeonDotprod),
            _ => None,
        }
    }

    /// Runs a body with the instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.leaf(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(isa) => isa.leaf(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.leaf(kernel),
            // What has no BF16 matrix is compiled once.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(isa) => isa.plain().leaf(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.leaf(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod(isa) => isa.leaf(kernel),
        }
    }

    /// Whether the level multiplies pairs of BF16s.
    pub(crate) fn multiplies_pairs(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => true,
            _ => false,
        }
    }

    /// Runs a body that multiplies pairs of BF16s, where the level has such products.
    #[inline]
    pub(crate) fn run_pairs<K: Kernel>(self, kernel: K) -> Result<K::Output, K> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(isa) => Ok(isa.leaf(kernel)),
            _ => Err(kernel),
        }
    }
}

/// Asks for the cache line with a byte of `row`, or of what follows it.
#[inline(always)]
pub(crate) fn prefetch<T>(row: &[T], byte: usize) {
    prefetch_at(row.as_ptr().addr().wrapping_add(byte));
}

/// The same for an address, whatever is there.
#[inline(always)]
pub(crate) fn prefetch_at(address: usize) {
    let address = core::ptr::without_provenance::<u8>(address);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: asking for memory is allowed at any address; every x86-64 CPU has the instruction.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: asking for memory is allowed at any address. The intrinsic is not stable in Rust 1.95.
    unsafe {
        core::arch::asm!(
            "prfm pldl1keep, [{x}]",
            x = in(reg) address,
            options(readonly, nostack, preserves_flags)
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}
