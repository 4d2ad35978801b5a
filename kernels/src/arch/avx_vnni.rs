//! AVX-VNNI: AVX2 with products of bytes that are added into 32 bits.

use super::avx2::{Avx2, ByteProducts};
use crate::isa::{Isa, Kernel};
use core::arch::x86_64::*;

/// Byte products by `vpdpbusd`, which adds four of them into a lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(());

instruction_set!(
    Avx2<Vnni>, Some(Self(Vnni(()))), is_x86_feature_detected: "avx2" "fma" "f16c" "avxvnni"
);

impl Avx2<Vnni> {
    registers! { "avx2,fma,f16c,avxvnni":
        fn add_quads(sums: __m256i, w: __m256i, x: __m256i) -> __m256i = _mm256_dpbusd_avx_epi32(sums, w, x);
        fn flip_signs(w: __m256i) -> __m256i = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    }
}

impl ByteProducts for Vnni {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Avx2<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    /// With their signs flipped, weights are unsigned and 128 too large.
    #[inline(always)]
    fn biased(isa: Avx2<Self>, w: __m256i) -> __m256i {
        isa.flip_signs(w)
    }

    #[inline(always)]
    fn bias(isa: Avx2<Self>, neg_sums: __m256i) -> __m256i {
        isa.shifted(neg_sums, 7)
    }

    #[inline(always)]
    fn dot<const N: usize>(isa: Avx2<Self>, _: u32, w: [__m256i; N], x: [__m256i; N]) -> __m256i {
        let mut sums = isa.zero_sums();
        for n in 0..N {
            sums = isa.add_quads(sums, w[n], x[n]);
        }
        sums
    }

    #[inline(always)]
    fn dot_four(isa: Avx2<Self>, _: u32, sums: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        let low = isa.add_quads(isa.add_quads(sums, w[0], x[0]), w[1], x[1]);
        isa.add_quads(isa.add_quads(low, w[2], x[2]), w[3], x[3])
    }
}
