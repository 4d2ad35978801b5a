//! AVX2 with FMA and F16C.

use crate::isa::Isa;
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

// SAFETY: `Avx2::new` is the only constructor and demands the instruction set.
unsafe impl Isa for Avx2 {
    type V = __m256;
    type I = __m256i;
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
    fn load_i8(self, x: &[i8; 32]) -> __m256i {
        proven!(_mm256_loadu_si256(x.as_ptr().cast()))
    }

    #[inline(always)]
    fn load_u4(self, x: &[u8; 16]) -> __m256i {
        proven!({
            let packed = _mm_loadu_si128(x.as_ptr().cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
            _mm256_and_si256(both, _mm256_set1_epi8(0x0f))
        })
    }

    #[inline(always)]
    fn dot_i8(self, w: __m256i, x: __m256i) -> __m256 {
        proven!({
            // maddubs wants one unsigned operand: |w| · (x with w's sign). |−128| is 128 as a byte, and x has no −128,
            // so signs stay right; 2 · 128 · 127 fits i16.
            let pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w));
            _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn dot_u4(self, w: __m256i, x: __m256i, start: i32) -> __m256 {
        proven!({
            // 2 · 15 · 128 fits i16.
            let sums = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
            let start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start));
            _mm256_cvtepi32_ps(_mm256_add_epi32(sums, start))
        })
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) -> i32 {
        let v = |i| proven!(_mm256_cvtps_epi32(self.mul(self.load(x, i), self.splat(scale))));
        let (a, b, c, d) = (v(0), v(1), v(2), v(3));
        proven!({
            let words = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            // Packing works inside 128-bit halves: restore the order of the groups of four.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(words, order));
            let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            let h = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let h = _mm_add_epi32(h, _mm_shuffle_epi32::<0b01_00_11_10>(h));
            _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32::<0b10_11_00_01>(h)))
        })
    }
}
