//! AVX-512 F, BW, DQ, VL and VNNI: 16 lanes of f32, byte products in 256 bits (as fast as 512 on Zen 4).

use super::avx2::Avx2;
use crate::isa::Isa;
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

// SAFETY: `Avx512::new` is the only constructor and demands the instruction set.
unsafe impl Isa for Avx512 {
    type V = __m512;
    type I = __m256i;
    const LANES: usize = 16;
    const COLUMNS: usize = 4;
    const COLUMNS_T: usize = 4;

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
    fn load_i8(self, x: &[i8; 32]) -> __m256i {
        self.0.load_i8(x)
    }

    #[inline(always)]
    fn load_u4(self, x: &[u8; 16]) -> __m256i {
        self.0.load_u4(x)
    }

    #[inline(always)]
    fn dot_i8(self, w: __m256i, x: __m256i) -> __m512 {
        proven!({
            // The signs as in `Avx2::dot_i8`; the upper eight lanes are zero.
            let zero = _mm256_setzero_si256();
            let sums = _mm256_dpbusd_epi32(zero, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm512_zextps256_ps512(_mm256_cvtepi32_ps(sums))
        })
    }

    #[inline(always)]
    fn dot_u4(self, w: __m256i, x: __m256i, start: i32) -> __m512 {
        proven!({
            let start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start));
            _mm512_zextps256_ps512(_mm256_cvtepi32_ps(_mm256_dpbusd_epi32(start, w, x)))
        })
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> __m512 {
        let x = &x[i * 16..i * 16 + 16];
        proven!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) -> i32 {
        self.0.round_to_i8(x, scale, out)
    }
}
