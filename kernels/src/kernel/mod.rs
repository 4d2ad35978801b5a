//! Kernel bodies, once each, generic over the instruction set; no unsafe code here.

pub(crate) mod activation;
pub(crate) mod axpy_rows;
mod exp;
pub(crate) mod matmul;
pub(crate) mod matmul_t;
pub(crate) mod prefetch;
pub(crate) mod quantize;
pub(crate) mod rms_norm;
pub(crate) mod softmax;
pub(crate) mod sparse_ffn;
pub(crate) mod vector;

/// A short rest as a whole block, filled up with `fill`.
#[inline(always)]
pub(crate) fn padded<T: Copy>(rest: &[T], fill: T) -> [T; 32] {
    let mut block = [fill; 32];
    block[..rest.len()].copy_from_slice(rest);
    block
}

/// Room in whole cache lines: vectors that cross lines are twice as slow.
#[repr(align(64))]
pub(crate) struct Lines<T>(pub(crate) T);
