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
        fn add_scaled(sums: __m256i, a: __m256i, factors: __m256i) -> __m256i =
            _mm256_dpwssd_avx_epi32(sums, a, factors);
        fn scaled(a: __m256i, factors: __m256i) -> __m256i = _mm256_madd_epi16(a, factors);
        fn flip_signs(w: __m256i) -> __m256i = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        fn splat_index(block: [u32; 2]) -> __m256i = {
            let (a, b) = (block[0].cast_signed(), block[1].cast_signed());
            _mm256_setr_epi32(a, a, a, a, b, b, b, b)
        };
    }
}

impl ByteProducts for Vnni {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Avx2<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    #[inline(always)]
    fn dot_i8(isa: Avx2<Self>, w: [__m256i; 2], x: [__m256i; 2], neg_sums: __m256i) -> __m256i {
        // With their signs flipped, weights are unsigned and 128 too large.
        let start = isa.shift_sums(neg_sums, 7);
        isa.dot_u6(start, [isa.flip_signs(w[0]), isa.flip_signs(w[1])], x)
    }

    #[inline(always)]
    fn dot_u6(isa: Avx2<Self>, sums: __m256i, w: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
        isa.add_quads(isa.add_quads(sums, w[0], x[0]), w[1], x[1])
    }

    /// Factors are the lower 16 bits of a lane, and so are sums but for their signs, which then meet zeros.
    #[inline(always)]
    fn factors(isa: Avx2<Self>, bytes: __m256i, [a, b]: [u8; 2], signed: bool) -> __m256i {
        // The byte as lower one of 16 bits, or as upper one and then moved down, for its sign.
        let index = |byte: u8| {
            if signed { 0x8080_0080 | u32::from(byte) << 8 } else { 0x8080_8000 | u32::from(byte) }
        };
        let spread = isa.shuffle(bytes, isa.splat_index([index(a), index(b)]));
        if signed { isa.upper_bytes_of_16(spread) } else { spread }
    }

    #[inline(always)]
    fn dot_scaled<const N: usize, const OFFSET: u8>(
        isa: Avx2<Self>,
        sums: __m256i,
        w: [__m256i; N],
        x: [__m256i; N],
        factors: __m256i,
    ) -> __m256i {
        // 4 · N · 128 · |w − OFFSET| fits i16.
        let mut quads = isa.zero_sums();
        let mut offset = isa.zero_sums();
        for n in 0..N {
            quads = isa.add_quads(quads, w[n], x[n]);
            if OFFSET > 0 {
                offset = isa.add_quads(offset, isa.splat_byte(OFFSET), x[n]);
            }
        }
        isa.add_scaled(sums, isa.sub_sums(quads, offset), factors)
    }

    #[inline(always)]
    fn scale_sums(isa: Avx2<Self>, sums: __m256i, factors: __m256i) -> __m256i {
        isa.scaled(sums, factors)
    }
}
