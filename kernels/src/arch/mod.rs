//! One file per instruction set: its token and its `Isa`, nothing else.

/// Intrinsics on values and on memory that a slice borrow guarantees, inside a method of a token.
macro_rules! proven {
    ($e:expr) => {{
        // SAFETY: the token `self` proves the instruction set; pointers come from slices of the width read or written.
        #[allow(clippy::macro_metavars_in_unsafe, unused_unsafe, reason = "the reason is said once for all")]
        unsafe {
            $e
        }
    }};
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
