//! AVX-512 F, BW, DQ, VL and VNNI: 16 lanes of f32; byte products of four blocks at once.

use super::avx2::Avx2;
use crate::isa::Isa;
use candle_sparse_core::BlockQ4_0;
use candle_sparse_core::BlockQ8_0;
use core::arch::x86_64::*;
use half::{bf16, f16};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI, and all of AVX2's token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VNNI, and AVX2, FMA, F16C.
    #[inline(always)]
    pub(crate) const unsafe fn new() -> Self {
        // SAFETY: the caller's promise includes the one of `Avx2::new`.
        Self(unsafe { Avx2::new() })
    }
}

impl Avx512 {
    /// `w · x` of one half.
    #[inline(always)]
    fn dot(self, w: __m512i, x: __m512i) -> __m512i {
        proven!(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x))
    }

    /// In each lane of block `b`, the bytes of `bytes` (repeated every eight) that the bytes of `first + step · b` name, 0 for
    /// 0x80.
    #[inline(always)]
    fn spread(self, bytes: __m512i, first: u32, step: u32) -> __m512i {
        let twice = |index: u32| (u64::from(index) * 0x1_0000_0001).cast_signed();
        let (a, b) = (twice(first), twice(first + step));
        let (c, d) = (twice(first + 2 * step), twice(first + 3 * step));
        proven!(_mm512_shuffle_epi8(bytes, _mm512_setr_epi64(a, a, b, b, c, c, d, d)))
    }
}

// SAFETY: `Avx512::new` is the only constructor and demands the instruction set.
unsafe impl Isa for Avx512 {
    type V = __m512;
    type I = __m512i;
    type S = __m512i;
    const LANES: usize = 16;
    const COLUMNS: usize = 4;
    const COLUMNS_T: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        proven!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m512 {
        proven!(_mm512_cvtph_ps(_mm256_set1_epi16(x.to_bits().cast_signed())))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 32], i: usize) -> __m512 {
        let x = &x[i * 16..i * 16 + 16];
        proven!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> __m512 {
        let x = &x[i * 16..i * 16 + 16];
        proven!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> __m512 {
        let x = &x[i * 16..i * 16 + 16];
        proven!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn store(self, v: __m512, x: &mut [f32; 32], i: usize) {
        let x = &mut x[i * 16..i * 16 + 16];
        proven!(_mm512_storeu_ps(x.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, v: __m512) -> __m512 {
        proven!(_mm512_abs_ps(v))
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        proven!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn exp2i(self, v: __m512) -> __m512 {
        proven!({
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        })
    }

    #[inline(always)]
    fn scale2(self, x: __m512, n: __m512) -> __m512 {
        proven!(_mm512_scalef_ps(x, n))
    }

    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        proven!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }

    #[inline(always)]
    fn reduce_add(self, v: __m512) -> f32 {
        proven!(self.0.reduce_add(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))))
    }

    #[inline(always)]
    fn reduce_max(self, v: __m512) -> f32 {
        proven!(self.0.reduce_max(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))))
    }

    #[inline(always)]
    fn load_lanes(self, x: &[f32; 16], _: usize) -> __m512 {
        proven!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn load_quants(self, x: &[i8; 64], _: usize) -> __m512i {
        proven!(_mm512_loadu_si512(x.as_ptr().cast()))
    }

    #[inline(always)]
    fn scales(self, d: [f16; 4], _: usize) -> __m512 {
        let bits = |d: f16| d.to_bits().cast_signed();
        proven!({
            let ab = _mm256_mask_set1_epi16(_mm256_set1_epi16(bits(d[0])), 0x00f0, bits(d[1]));
            let abc = _mm256_mask_set1_epi16(ab, 0x0f00, bits(d[2]));
            _mm512_cvtph_ps(_mm256_mask_set1_epi16(abc, 0xf000, bits(d[3])))
        })
    }

    #[inline(always)]
    fn scales_q4_0(self, w: &[BlockQ4_0; 4], _: usize) -> __m512 {
        const { assert!(size_of::<[BlockQ4_0; 4]>() >= 64) };
        proven!({
            // Words 0, 9, 18 and 27.
            let index = _mm512_castsi256_si512(_mm256_setr_epi64x(
                0,
                0x0009_0009_0009_0009,
                0x0012_0012_0012_0012,
                0x001b_001b_001b_001b,
            ));
            let d = _mm512_permutexvar_epi16(index, _mm512_loadu_si512(w.as_ptr().cast()));
            _mm512_cvtph_ps(_mm512_castsi512_si256(d))
        })
    }

    #[inline(always)]
    fn q8_0(self, w: &[BlockQ8_0; 4], _: usize) -> [__m512i; 2] {
        proven!({
            let load = |w: &BlockQ8_0| _mm256_loadu_si256(w.qs.as_ptr().cast());
            let pair = |a, b| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load(a)), load(b));
            // Unsigned, 128 too large: `start_i8` takes it off again.
            let flip = _mm512_set1_epi8(-128);
            let (ab, cd) =
                (_mm512_xor_si512(pair(&w[0], &w[1]), flip), _mm512_xor_si512(pair(&w[2], &w[3]), flip));
            let low = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), cd);
            let high = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), cd);
            [low, high]
        })
    }

    #[inline(always)]
    fn fields(self, bytes: [&[u8; 16]; 4], up: [i8; 4], mask: u8, _: usize) -> __m512i {
        let turn = |up: i8| i64::from(up) & 63;
        let (a, b, c, d) = (turn(up[0]), turn(up[1]), turn(up[2]), turn(up[3]));
        proven!({
            let packed = _mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(self.0.pair(bytes[0], bytes[1])),
                self.0.pair(bytes[2], bytes[3]),
            );
            let moved = _mm512_rolv_epi64(packed, _mm512_setr_epi64(a, a, b, b, c, c, d, d));
            _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed()))
        })
    }

    #[inline(always)]
    fn fifth_bits(self, words: [u16; 4], _: usize) -> __m512i {
        let word = |i: usize| u64::from(words[i]) << (16 * i);
        proven!(_mm512_maskz_set1_epi8(word(0) | word(1) | word(2) | word(3), 16))
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn ones(self) -> __m512i {
        proven!(_mm512_set1_epi8(1))
    }

    #[inline(always)]
    fn zero_sums(self) -> __m512i {
        proven!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn start_i8(self, neg_sums: &[i32; 16], i: usize) -> __m512i {
        self.start_shifted::<7>(neg_sums, i)
    }

    #[inline(always)]
    fn start_shifted<const SHIFT: u32>(self, neg_sums: &[i32; 16], _: usize) -> __m512i {
        proven!(_mm512_slli_epi32::<SHIFT>(_mm512_loadu_si512(neg_sums.as_ptr().cast())))
    }

    #[inline(always)]
    fn dot_i8(self, sums: __m512i, w: [__m512i; 2], x: [__m512i; 2]) -> __m512i {
        self.dot_u6(sums, w, x)
    }

    #[inline(always)]
    fn dot_u6(self, sums: __m512i, w: [__m512i; 2], x: [__m512i; 2]) -> __m512i {
        proven!(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, w[0], x[0]), w[1], x[1]))
    }

    // Scales are the lower 16 bits of a lane, and so are sums but for their signs, which then meet zeros.
    #[inline(always)]
    fn block_scales(self, scales: u32, _: usize) -> __m512i {
        self.spread(proven!(_mm512_set1_epi32(scales.cast_signed())), 0x8080_8000, 1)
    }

    #[inline(always)]
    fn half_scales(self, scales: u64, _: usize) -> [__m512i; 2] {
        // As upper bytes of 16 bits, for their signs.
        proven!({
            let scales = _mm512_set1_epi64(scales.cast_signed());
            let low = _mm512_srai_epi16::<8>(self.spread(scales, 0x8080_0080, 0x200));
            [low, _mm512_srai_epi16::<8>(self.spread(scales, 0x8080_0180, 0x200))]
        })
    }

    #[inline(always)]
    fn dot_by_block(self, w: [__m512i; 2], x: [__m512i; 2], scales: __m512i) -> __m512i {
        // 8 · 31 · 128 fits i16.
        proven!(_mm512_madd_epi16(self.dot_u6(self.zero_sums(), w, x), scales))
    }

    #[inline(always)]
    fn dot_by_half<const OFFSET: i8>(
        self,
        w: [__m512i; 2],
        x: [__m512i; 2],
        scales: [__m512i; 2],
    ) -> __m512i {
        proven!({
            let offset = _mm512_set1_epi8(OFFSET);
            // 4 · 32 · 128 fits i16.
            let low = _mm512_sub_epi32(self.dot(w[0], x[0]), self.dot(offset, x[0]));
            let high = _mm512_sub_epi32(self.dot(w[1], x[1]), self.dot(offset, x[1]));
            _mm512_dpwssd_epi32(_mm512_madd_epi16(low, scales[0]), high, scales[1])
        })
    }

    #[inline(always)]
    fn scale_neg_sums(self, neg_sums: &[i32; 16], scales: __m512i, _: usize) -> __m512i {
        proven!(_mm512_madd_epi16(_mm512_loadu_si512(neg_sums.as_ptr().cast()), scales))
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: __m512i) -> __m512 {
        proven!(_mm512_cvtepi32_ps(sums))
    }

    #[inline(always)]
    fn neg_sums(self, x: [__m512i; 2], out: &mut [i32; 16], _: usize) {
        proven!({
            let sums = self.dot_u6(self.zero_sums(), [self.ones(); 2], x);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_sub_epi32(self.zero_sums(), sums));
        });
    }

    #[inline(always)]
    fn prefetch<T>(self, row: &[T], byte: usize) {
        self.0.prefetch(row, byte);
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> __m512 {
        let x = &x[i * 16..i * 16 + 16];
        proven!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn widen_nibbles(self, qs: &[u8; 16], i: usize) -> __m512 {
        proven!({
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(qs.as_ptr().cast()));
            if i == 0 {
                // The table is looked up by the lower four bits, whatever the upper ones are.
                let low = _mm512_setr_ps(
                    -128.0, -112.0, -96.0, -80.0, -64.0, -48.0, -32.0, -16.0, 0.0, 16.0, 32.0, 48.0, 64.0,
                    80.0, 96.0, 112.0,
                );
                _mm512_permutexvar_ps(wide, low)
            } else {
                // As the last bits of 2²³ + 16 · q, which is two operations. Ternary logic, because LLVM sees through
                // others and widens twice.
                let base = _mm512_castps_si512(_mm512_set1_ps(8_388_608.0));
                let high = _mm512_ternarylogic_epi32::<0xf8>(base, wide, _mm512_set1_epi32(0xf0));
                _mm512_sub_ps(_mm512_castsi512_ps(high), _mm512_set1_ps(8_388_608.0 + 128.0))
            }
        })
    }

    #[inline(always)]
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        self.0.round_to_i8(x, scale, out);
    }
}
