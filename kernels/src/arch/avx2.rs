//! AVX2 with FMA and F16C.

use crate::isa::Isa;
use candle_sparse_core::BlockQ8_0;
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
    /// `sums` + pairs of sums of products.
    #[inline(always)]
    fn add_pairs(self, sums: __m256i, pairs: __m256i) -> __m256i {
        proven!(_mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
    }

    /// 16 bytes and 16 others.
    #[inline(always)]
    pub(super) fn pair<T: Copy>(self, a: &[T; 16], b: &[T; 16]) -> __m256i {
        const { assert!(size_of::<T>() == 1) };
        proven!(_mm256_set_m128i(_mm_loadu_si128(b.as_ptr().cast()), _mm_loadu_si128(a.as_ptr().cast())))
    }

    /// In each 16 bits of block `b` of vector `i`, the bytes of `bytes` (repeated every eight) that the bytes of
    /// `first + step · b` name, 0 for 0x80.
    #[inline(always)]
    fn spread(self, bytes: __m256i, first: u16, step: u16, i: usize) -> __m256i {
        let a = first + step * 2 * i as u16;
        proven!({
            let b = _mm_set1_epi16((a + step).cast_signed());
            _mm256_shuffle_epi8(bytes, _mm256_set_m128i(b, _mm_set1_epi16(a.cast_signed())))
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
    fn scales(self, d: [f16; 4], i: usize) -> __m256 {
        let repeat = |d: f16| proven!(_mm_set1_epi16(d.to_bits().cast_signed()));
        proven!(_mm256_cvtph_ps(_mm_unpacklo_epi64(repeat(d[2 * i]), repeat(d[2 * i + 1]))))
    }

    #[inline(always)]
    fn q8_0(self, w: &[BlockQ8_0; 4], i: usize) -> [__m256i; 2] {
        let (a, b) = (w[2 * i].qs.as_chunks().0, w[2 * i + 1].qs.as_chunks().0);
        [self.pair(&a[0], &b[0]), self.pair(&a[1], &b[1])]
    }

    #[inline(always)]
    fn fields(self, bytes: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> __m256i {
        let (a, b) = (i64::from(up[2 * i]), i64::from(up[2 * i + 1]));
        proven!({
            let counts = |a: i64, b: i64| _mm256_setr_epi64x(a.max(0), a.max(0), b.max(0), b.max(0));
            let packed = self.pair(bytes[2 * i], bytes[2 * i + 1]);
            // At most one of the two is left in the code: counts are constants, and those of a vector go one way.
            let moved = _mm256_srlv_epi64(_mm256_sllv_epi64(packed, counts(a, b)), counts(-a, -b));
            _mm256_and_si256(moved, _mm256_set1_epi8(mask.cast_signed()))
        })
    }

    #[inline(always)]
    fn fifth_bits(self, words: [u16; 4], i: usize) -> __m256i {
        let words = u32::from(words[2 * i]) | (u32::from(words[2 * i + 1]) << 16);
        proven!({
            let byte =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(words.cast_signed()), byte);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        })
    }

    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_or_si256(a, b))
    }

    #[inline(always)]
    fn ones(self) -> __m256i {
        proven!(_mm256_set1_epi8(1))
    }

    #[inline(always)]
    fn zero_sums(self) -> __m256i {
        proven!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn start_i8(self, _: &[i32; 16], _: usize) -> __m256i {
        self.zero_sums()
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
    fn dot_i8(self, sums: __m256i, w: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
        // maddubs wants one unsigned operand: |w| · (x with w's sign). |−128| is 128 as a byte, and x has no −128, so
        // signs stay right; 2 · 128 · 127 fits i16.
        proven!({
            let pairs = |w, x| _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w));
            self.add_pairs(self.add_pairs(sums, pairs(w[0], x[0])), pairs(w[1], x[1]))
        })
    }

    #[inline(always)]
    fn dot_u6(self, sums: __m256i, w: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
        // 4 · 63 · 128 fits i16.
        proven!({
            let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x[0]), _mm256_maddubs_epi16(w[1], x[1]));
            self.add_pairs(sums, pairs)
        })
    }

    // Scales fill both 16-bit halves of a lane, for pairs of sums of products.
    #[inline(always)]
    fn block_scales(self, scales: u32, i: usize) -> __m256i {
        self.spread(proven!(_mm256_set1_epi32(scales.cast_signed())), 0x8000, 1, i)
    }

    #[inline(always)]
    fn half_scales(self, scales: u64, i: usize) -> [__m256i; 2] {
        // As upper bytes of 16 bits, for their signs.
        proven!({
            let scales = _mm256_set1_epi64x(scales.cast_signed());
            let low = _mm256_srai_epi16::<8>(self.spread(scales, 0x0080, 0x200, i));
            [low, _mm256_srai_epi16::<8>(self.spread(scales, 0x0180, 0x200, i))]
        })
    }

    #[inline(always)]
    fn dot_by_block(self, w: [__m256i; 2], x: [__m256i; 2], scales: __m256i) -> __m256i {
        // 4 · 31 · 128 fits i16.
        proven!({
            let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x[0]), _mm256_maddubs_epi16(w[1], x[1]));
            _mm256_madd_epi16(pairs, scales)
        })
    }

    #[inline(always)]
    fn dot_by_half<const OFFSET: i8>(
        self,
        w: [__m256i; 2],
        x: [__m256i; 2],
        scales: [__m256i; 2],
    ) -> __m256i {
        // 2 · 63 · 128 fits i16.
        proven!({
            let offset = _mm256_set1_epi8(OFFSET);
            let pairs = |w, x| _mm256_sub_epi16(_mm256_maddubs_epi16(w, x), _mm256_maddubs_epi16(offset, x));
            let low = _mm256_madd_epi16(pairs(w[0], x[0]), scales[0]);
            _mm256_add_epi32(low, _mm256_madd_epi16(pairs(w[1], x[1]), scales[1]))
        })
    }

    #[inline(always)]
    fn scale_neg_sums(self, neg_sums: &[i32; 16], scales: __m256i, i: usize) -> __m256i {
        let sums = &neg_sums[i * 8..i * 8 + 8];
        // The lower 16 bits are the sum, the upper ones its sign.
        proven!({
            let sums = _mm256_loadu_si256(sums.as_ptr().cast());
            _mm256_madd_epi16(_mm256_and_si256(sums, _mm256_set1_epi32(0xffff)), scales)
        })
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: __m256i) -> __m256 {
        proven!(_mm256_cvtepi32_ps(sums))
    }

    #[inline(always)]
    fn neg_sums(self, x: [__m256i; 2], out: &mut [i32; 16], i: usize) {
        let out = &mut out[i * 8..i * 8 + 8];
        proven!({
            let sums = self.dot_u6(self.zero_sums(), [self.ones(); 2], x);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_sub_epi32(self.zero_sums(), sums));
        });
    }

    #[inline(always)]
    fn prefetch<T>(self, row: &[T], byte: usize) {
        proven!(_mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(byte)));
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> __m256 {
        let x = &x[i * 8..i * 8 + 8];
        proven!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn widen_nibbles(self, qs: &[u8; 16], i: usize) -> __m256 {
        let bytes = &qs[i % 2 * 8..i % 2 * 8 + 8];
        proven!({
            let packed = _mm_loadl_epi64(bytes.as_ptr().cast());
            let nibbles = if i < 2 { _mm_slli_epi16::<4>(packed) } else { packed };
            // As upper halves of signed bytes.
            let bytes = _mm_and_si128(nibbles, _mm_set1_epi8(0xf0_u8.cast_signed()));
            let signed = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed))
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
