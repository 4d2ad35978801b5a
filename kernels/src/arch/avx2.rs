//! AVX2 with FMA and F16C.

use crate::isa::Isa;
use candle_sparse_core::{BlockQ4_0, BlockQ8_0};
use core::arch::x86_64::*;
use half::{bf16, f16};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) const unsafe fn new() -> Self {
        Self(())
    }
}

impl Avx2 {
    /// Two f16, four times each.
    #[inline(always)]
    fn two_scales(self, a: f16, b: f16) -> __m256 {
        let repeat = |d: f16| proven!(_mm_set1_epi16(d.to_bits().cast_signed()));
        proven!(_mm256_cvtph_ps(_mm_unpacklo_epi64(repeat(a), repeat(b))))
    }

    /// `sums + w · x`; no sum of two neighbouring products may leave i16.
    #[inline(always)]
    fn dot_u8(self, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
        proven!({
            let quads = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
            _mm256_add_epi32(sums, quads)
        })
    }
}

// SAFETY: `Avx2::new` is the only constructor and demands the instruction set.
unsafe impl Isa for Avx2 {
    type V = __m256;
    type I = __m256i;
    type S = __m256i;
    const LANES: usize = 8;
    const COLUMNS: usize = 3;
    const COLUMNS_T: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        proven!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m256 {
        // Broadcasting first keeps the load out of any accumulator register.
        proven!(_mm256_cvtph_ps(_mm_set1_epi16(x.to_bits().cast_signed())))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn store(self, v: __m256, x: &mut [f32; 32], i: usize) {
        let x = &mut x[i * 8..i * 8 + 8];
        proven!(_mm256_storeu_ps(x.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        proven!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, v: __m256) -> __m256 {
        proven!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), v))
    }

    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        proven!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn exp2i(self, v: __m256) -> __m256 {
        proven!({
            let n = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
        })
    }

    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        proven!(_mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }

    #[inline(always)]
    fn reduce_add(self, v: __m256) -> f32 {
        proven!({
            let h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let h = _mm_add_ps(h, _mm_movehl_ps(h, h));
            _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)))
        })
    }

    #[inline(always)]
    fn reduce_max(self, v: __m256) -> f32 {
        proven!({
            let h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let h = _mm_max_ps(h, _mm_movehl_ps(h, h));
            _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)))
        })
    }

    #[inline(always)]
    fn load_lanes(self, x: &[f32; 16], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn load_quants(self, x: &[i8; 64], i: usize) -> __m256i {
        let x = &x[i * 32..i * 32 + 32];
        proven!(_mm256_loadu_si256(x.as_ptr().cast()))
    }

    #[inline(always)]
    fn q8_0(self, w: &[BlockQ8_0; 4], i: usize) -> ([__m256i; 2], __m256) {
        let (a, b) = (&w[2 * i], &w[2 * i + 1]);
        proven!({
            let half = |at: usize| {
                let part = |w: &BlockQ8_0| _mm_loadu_si128(w.qs[at..at + 16].as_ptr().cast());
                _mm256_set_m128i(part(b), part(a))
            };
            ([half(0), half(16)], self.two_scales(a.d, b.d))
        })
    }

    #[inline(always)]
    fn q4_0(self, w: &[BlockQ4_0; 4], i: usize) -> ([__m256i; 2], __m256) {
        let (a, b) = (&w[2 * i], &w[2 * i + 1]);
        proven!({
            let part = |w: &BlockQ4_0| _mm_loadu_si128(w.qs.as_ptr().cast());
            let packed = _mm256_set_m128i(part(b), part(a));
            let mask = _mm256_set1_epi8(0x0f);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
            ([_mm256_and_si256(packed, mask), high], self.two_scales(a.d, b.d))
        })
    }

    #[inline(always)]
    fn start_i8(self, _: &[i32; 16], _: usize) -> __m256i {
        proven!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn start_shifted<const SHIFT: u32>(self, neg_sums: &[i32; 16], i: usize) -> __m256i {
        let sums = &neg_sums[i * 8..i * 8 + 8];
        proven!(_mm256_sll_epi32(
            _mm256_loadu_si256(sums.as_ptr().cast()),
            _mm_cvtsi32_si128(SHIFT.cast_signed())
        ))
    }

    #[inline(always)]
    fn dot_i8(self, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // maddubs wants one unsigned operand: |w| · (x with w's sign). |−128| is 128 as a byte, and x has no −128, so
        // signs stay right; 2 · 128 · 127 fits i16.
        proven!(self.dot_u8(sums, _mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w)))
    }

    #[inline(always)]
    fn dot_u6(self, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // 2 · 63 · 128 fits i16.
        self.dot_u8(sums, w, x)
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: __m256i) -> __m256 {
        proven!(_mm256_cvtepi32_ps(sums))
    }

    #[inline(always)]
    fn neg_sums(self, x: [__m256i; 2], out: &mut [i32; 16], i: usize) {
        let out = &mut out[i * 8..i * 8 + 8];
        proven!({
            let (zero, ones) = (_mm256_setzero_si256(), _mm256_set1_epi8(1));
            let sums = self.dot_u6(self.dot_u6(zero, ones, x[0]), ones, x[1]);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_sub_epi32(zero, sums));
        });
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &T) {
        proven!(_mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(x).cast()));
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn widen_q4_0(self, w: &BlockQ4_0, i: usize) -> __m256 {
        let bytes = &w.qs[i % 2 * 8..i % 2 * 8 + 8];
        proven!({
            let packed = _mm_loadl_epi64(bytes.as_ptr().cast());
            let half = if i < 2 { packed } else { _mm_srli_epi16::<4>(packed) };
            let wide = _mm256_cvtepu8_epi32(_mm_and_si128(half, _mm_set1_epi8(0x0f)));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(8)))
        })
    }

    #[inline(always)]
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        let v = |i| proven!(_mm256_cvtps_epi32(self.mul(self.load(x, i), self.splat(scale))));
        proven!({
            let words = _mm256_packs_epi16(_mm256_packs_epi32(v(0), v(1)), _mm256_packs_epi32(v(2), v(3)));
            // Packing works inside 128-bit halves: restore the order of the groups of four.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(words, order));
        });
    }
}
