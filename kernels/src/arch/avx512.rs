//! AVX-512 F, BW, DQ, VL and VNNI: 16 lanes of f32; byte products of four blocks at once. Products of BF16s by `P`.

use super::avx2::{Avx2, Avx2Products};
use crate::isa::{Isa, Kernel, fours, pairs};
use bytemuck::must_cast;
use core::arch::x86_64::*;
use half::{bf16, f16};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI, all of AVX2's token, and what the products `P` need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<P>(pub(super) Avx2<Avx2Products>, pub(super) P);

/// The methods of [`Isa`] in which AVX-512 with and without BF16 differ.
pub(crate) trait PairProducts: Copy {
    fn leaf<K: Kernel>(isa: Avx512<Self>, kernel: K) -> K::Output;

    #[inline(always)]
    fn round_pairs(isa: Avx512<Self>, a: __m512, b: __m512) -> __m512 {
        pairs::round(isa, a, b)
    }

    #[inline(always)]
    fn add_pairs(isa: Avx512<Self>, w: __m512, x: __m512, acc: __m512) -> __m512 {
        pairs::add(isa, w, x, acc)
    }
}

/// No products of pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fma(());

instruction_set!(
    Avx512<Fma>, Avx2::<Avx2Products>::detect().map(|avx2| Self(avx2, Fma(()))),
    is_x86_feature_detected: "avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni"
);

impl PairProducts for Fma {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Avx512<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }
}

impl<P> Avx512<P> {
    /// Without products of pairs.
    pub(super) fn plain(self) -> Avx512<Fma> {
        Avx512(self.0, Fma(()))
    }

    registers! { "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni":
        fn widen_f16(x: __m256i) -> __m512 = _mm512_cvtph_ps(x);
        fn widen_bf16(x: __m256i) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)));
        fn select_lanes(set: u16, x: __m512, y: __m512) -> __m512 = _mm512_mask_blend_ps(set, y, x);
        fn widen_i8(x: __m128i) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
        fn splat_16(x: u16) -> __m256i = _mm256_set1_epi16(x.cast_signed());
        fn join_16(x: [u16; 16]) -> __m256i = {
            let x: [i16; 16] = must_cast(x);
            _mm256_setr_epi16(
                x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]
            )
        };
        fn join_16s(x: [u16; 4]) -> __m256i = {
            let a = _mm256_set1_epi16(x[0].cast_signed());
            let ab = _mm256_mask_set1_epi16(a, 0x00f0, x[1].cast_signed());
            let abc = _mm256_mask_set1_epi16(ab, 0x0f00, x[2].cast_signed());
            _mm256_mask_set1_epi16(abc, 0xf000, x[3].cast_signed())
        };
        fn low_nibbles(x: __m128i) -> __m512 = _mm512_permutexvar_ps(
            // The table is indexed by the lower four bits, whatever the upper ones are.
            _mm512_cvtepu8_epi32(x),
            _mm512_setr_ps(
                -128.0, -112.0, -96.0, -80.0, -64.0, -48.0, -32.0, -16.0, 0.0, 16.0, 32.0, 48.0, 64.0,
                80.0, 96.0, 112.0
            )
        );
        fn high_nibbles(x: __m128i) -> __m512 = {
            // As the last bits of 2²³ + 16 · q, which is two operations. Ternary logic, because LLVM sees through others
            // and widens twice.
            let base = _mm512_castps_si512(_mm512_set1_ps(8_388_608.0));
            let wide = _mm512_cvtepu8_epi32(x);
            let high = _mm512_ternarylogic_epi32::<0xf8>(base, wide, _mm512_set1_epi32(0xf0));
            _mm512_sub_ps(_mm512_castsi512_ps(high), _mm512_set1_ps(8_388_608.0 + 128.0))
        };
        fn pair(a: __m256i, b: __m256i) -> __m512i = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        fn even_pairs(a: __m512i, b: __m512i) -> __m512i =
            _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), b);
        fn odd_pairs(a: __m512i, b: __m512i) -> __m512i =
            _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), b);
        fn lower_half(v: __m512) -> __m256 = _mm512_castps512_ps256(v);
        fn upper_half(v: __m512) -> __m256 = _mm512_extractf32x8_ps::<1>(v);
        fn of_blocks(x: [u64; 4]) -> __m512i = {
            let (a, b) = (x[0].cast_signed(), x[1].cast_signed());
            let (c, d) = (x[2].cast_signed(), x[3].cast_signed());
            _mm512_setr_epi64(a, a, b, b, c, c, d, d)
        };
        fn rotate_64s(x: __m512i, by: __m512i) -> __m512i = _mm512_rolv_epi64(x, by);
        fn splat_byte(x: u8) -> __m512i = _mm512_set1_epi8(x.cast_signed());
        fn and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        fn flip_signs(w: __m512i) -> __m512i = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
        fn of_mask(mask: u64, byte: u8) -> __m512i = _mm512_maskz_set1_epi8(mask, byte.cast_signed());
        fn add_quads(sums: __m512i, w: __m512i, x: __m512i) -> __m512i = _mm512_dpbusd_epi32(sums, w, x);
        fn shifted<const SHIFT: u32>(x: __m512i) -> __m512i = _mm512_slli_epi32::<SHIFT>(x);
        fn low_lanes(a: __m512i, b: __m512i) -> __m512i = _mm512_unpacklo_epi32(a, b);
        fn high_lanes(a: __m512i, b: __m512i) -> __m512i = _mm512_unpackhi_epi32(a, b);
        fn low_64s(a: __m512i, b: __m512i) -> __m512i = _mm512_unpacklo_epi64(a, b);
        fn high_64s(a: __m512i, b: __m512i) -> __m512i = _mm512_unpackhi_epi64(a, b);
        fn spread_lane<const LANE: i32>(x: __m512i) -> __m512i = _mm512_shuffle_epi32::<LANE>(x);
        fn exchange(x: __m512i) -> __m512i = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x
        );
        fn exchange_f32(x: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), _mm512_castps_si512(x)
        ));
        fn join_fours(x: [__m128; 4]) -> __m512 = {
            let low = _mm512_insertf32x4::<1>(_mm512_castps128_ps512(x[0]), x[1]);
            _mm512_insertf32x4::<3>(_mm512_insertf32x4::<2>(low, x[2]), x[3])
        };
        fn bits_of_f32(x: __m512) -> __m512i = _mm512_castps_si512(x);
        fn spread_128(x: __m128) -> __m512 = _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm512_castps128_ps512(x)
        );
        fn unsigned_to_f32(x: __m128i) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
        fn upper_128(v: __m256) -> __m128 = _mm256_extractf128_ps::<1>(v);
        fn lower_128(v: __m256) -> __m128 = _mm256_castps256_ps128(v);
        fn add_128(a: __m128, b: __m128) -> __m128 = _mm_add_ps(a, b);
        fn words_of(a: __m512i, b: __m512i, at: __m512i) -> __m128i =
            _mm512_castsi512_si128(_mm512_permutex2var_epi16(a, at, b));
    }
}

impl<P: PairProducts> Isa for Avx512<P> {
    type V = __m512;
    type B = __m512i;
    type S = __m512i;
    const LANES: usize = 16;
    const PAIRS: bool = true;
    const COLUMNS_T: usize = 8;

    registers! { "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni":
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn abs(v: __m512) -> __m512 = _mm512_abs_ps(v);
        fn round(v: __m512) -> __m512 =
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        fn scale2(x: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(x, n);
        fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x);
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        fn zero_sums() -> __m512i = _mm512_setzero_si512();
        fn add_sums(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn sums_to_f32(sums: __m512i) -> __m512 = _mm512_cvtepi32_ps(sums);
    }

    #[inline(always)]
    fn leaf<K: Kernel>(self, kernel: K) -> K::Output {
        P::leaf(self, kernel)
    }

    #[inline(always)]
    fn round_pairs(self, a: __m512, b: __m512) -> __m512 {
        P::round_pairs(self, a, b)
    }

    #[inline(always)]
    fn add_pairs(self, w: __m512, x: __m512, acc: __m512) -> __m512 {
        P::add_pairs(self, w, x, acc)
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m512 {
        self.widen_f16(self.splat_16(x.to_bits()))
    }

    #[inline(always)]
    fn splat_four(self, [a, b, c, d]: [f16; 4], _: usize) -> __m512 {
        self.widen_f16(self.join_16s([a.to_bits(), b.to_bits(), c.to_bits(), d.to_bits()]))
    }

    #[inline(always)]
    fn load<const N: usize>(self, x: &[f32; N], i: usize) -> __m512 {
        must_cast(x.as_chunks::<16>().0[i])
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> __m512 {
        self.widen_f16(must_cast(x.as_chunks::<16>().0[i]))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> __m512 {
        self.widen_bf16(must_cast(x.as_chunks::<16>().0[i]))
    }

    #[inline(always)]
    fn load_pairs(self, x: &[bf16; 64], i: usize) -> __m512 {
        must_cast(x.as_chunks::<32>().0[i])
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 32], i: usize) -> __m512 {
        self.widen_i8(must_cast(x.as_chunks::<16>().0[i]))
    }

    #[inline(always)]
    fn select_bits(self, bits: u32, i: usize, x: __m512, y: __m512) -> __m512 {
        self.select_lanes((bits >> (16 * i)) as u16, x, y)
    }

    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 16], i: usize) -> __m512 {
        if i == 0 { self.low_nibbles(must_cast(*x)) } else { self.high_nibbles(must_cast(*x)) }
    }

    #[inline(always)]
    fn store<const N: usize>(self, v: __m512, x: &mut [f32; N], i: usize) {
        x.as_chunks_mut::<16>().0[i] = must_cast(v);
    }

    #[inline(always)]
    fn store_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        self.0.store_i8(x, scale, out);
    }

    #[inline(always)]
    fn reduce_add(self, v: __m512) -> f32 {
        self.0.reduce_add(self.0.add(self.lower_half(v), self.upper_half(v)))
    }

    #[inline(always)]
    fn reduce_max(self, v: __m512) -> f32 {
        self.0.reduce_max(self.0.max(self.lower_half(v), self.upper_half(v)))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[i8; 64], _: usize) -> __m512i {
        must_cast(*x)
    }

    #[inline(always)]
    fn load_halves(self, [a, b, c, d]: [&[i8; 32]; 4], _: usize) -> [__m512i; 2] {
        let (ab, cd) = (self.pair(must_cast(*a), must_cast(*b)), self.pair(must_cast(*c), must_cast(*d)));
        [self.even_pairs(ab, cd), self.odd_pairs(ab, cd)]
    }

    #[inline(always)]
    fn fields(self, [a, b, c, d]: [&[u8; 16]; 4], up: [i8; 4], mask: u8, _: usize) -> __m512i {
        let count = |up: i8| (i64::from(up) & 63).cast_unsigned();
        let low = self.0.pair(must_cast(*a), must_cast(*b));
        let packed = self.pair(low, self.0.pair(must_cast(*c), must_cast(*d)));
        let counts = self.of_blocks([count(up[0]), count(up[1]), count(up[2]), count(up[3])]);
        self.and(self.rotate_64s(packed, counts), self.splat_byte(mask))
    }

    #[inline(always)]
    fn bits(self, words: [u16; 4], byte: u8, _: usize) -> __m512i {
        let word = |i: usize| u64::from(words[i]) << (16 * i);
        self.of_mask(word(0) | word(1) | word(2) | word(3), byte)
    }

    #[inline(always)]
    fn store_bytes(self, v: __m512i, x: &mut [i8; 64], _: usize) {
        *x = must_cast(v);
    }

    #[inline(always)]
    fn spread(self, x: __m512i) -> [__m512i; 4] {
        [
            self.spread_lane::<0x00>(x),
            self.spread_lane::<0x55>(x),
            self.spread_lane::<0xaa>(x),
            self.spread_lane::<0xff>(x),
        ]
    }

    #[inline(always)]
    fn turn(self, [a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
        let (ab, cd) = (self.low_lanes(a, b), self.low_lanes(c, d));
        let (upper_ab, upper_cd) = (self.high_lanes(a, b), self.high_lanes(c, d));
        [
            self.low_64s(ab, cd),
            self.high_64s(ab, cd),
            self.low_64s(upper_ab, upper_cd),
            self.high_64s(upper_ab, upper_cd),
        ]
    }

    /// With their signs flipped, weights are unsigned and 128 too large.
    #[inline(always)]
    fn biased(self, w: __m512i) -> __m512i {
        self.flip_signs(w)
    }

    #[inline(always)]
    fn bias(self, neg_sums: __m512i) -> __m512i {
        self.shifted::<7>(neg_sums)
    }

    #[inline(always)]
    fn dot<const N: usize>(self, _: u32, w: [__m512i; N], x: [__m512i; N]) -> __m512i {
        let mut sums = self.zero_sums();
        for n in 0..N {
            sums = self.add_quads(sums, w[n], x[n]);
        }
        sums
    }

    #[inline(always)]
    fn dot_four(self, _: u32, sums: __m512i, w: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
        let low = self.add_quads(self.add_quads(sums, w[0], x[0]), w[1], x[1]);
        self.add_quads(self.add_quads(low, w[2], x[2]), w[3], x[3])
    }

    #[inline(always)]
    fn shift_sums<const SHIFT: u32>(self, sums: __m512i) -> __m512i {
        self.shifted::<SHIFT>(sums)
    }

    #[inline(always)]
    fn sum_blocks(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
        let ab = self.add_sums(self.low_lanes(a, b), self.high_lanes(a, b));
        let cd = self.add_sums(self.low_lanes(c, d), self.high_lanes(c, d));
        self.exchange(self.add_sums(self.low_64s(ab, cd), self.high_64s(ab, cd)))
    }

    #[inline(always)]
    fn load_sums(self, x: &[i32; 16], _: usize) -> __m512i {
        must_cast(*x)
    }

    #[inline(always)]
    fn load_fours(self, [a, b, c, d]: [&[f32; 4]; 4], _: usize) -> __m512 {
        self.join_fours([must_cast(*a), must_cast(*b), must_cast(*c), must_cast(*d)])
    }

    #[inline(always)]
    fn load_four_sums(self, [a, b, c, d]: [&[i32; 4]; 4], _: usize) -> __m512i {
        self.bits_of_f32(self.join_fours([must_cast(*a), must_cast(*b), must_cast(*c), must_cast(*d)]))
    }

    #[inline(always)]
    fn widen_fours(self, x: [[f16; 4]; 4], _: usize) -> __m512 {
        self.widen_f16(self.join_16(must_cast(x)))
    }

    /// Taken out of whole vectors, where the first 64 bytes of four blocks have all four: word by word takes five times as many
    /// operations.
    #[inline(always)]
    fn widen_words<const N: usize, const AT: usize>(self, x: [&[[u16; N]; 4]; 4], q: usize) -> __m512 {
        let [Some(a), Some(b), Some(c), Some(d)] = x.map(|x| x.as_flattened().first_chunk::<32>()) else {
            return self.widen_fours(fours::<N, AT>(x), q);
        };
        if 3 * N + AT >= 32 {
            return self.widen_fours(fours::<N, AT>(x), q);
        }
        let at = must_cast(const { places(N, AT) });
        let ab = self.words_of(must_cast(*a), must_cast(*b), at);
        self.widen_f16(self.0.pair(ab, self.words_of(must_cast(*c), must_cast(*d), at)))
    }

    #[inline(always)]
    fn bytes_to_f32(self, x: [[u8; 4]; 4], _: usize) -> __m512 {
        self.unsigned_to_f32(must_cast(x))
    }

    #[inline(always)]
    fn signed_to_f32(self, x: [[u8; 4]; 4], _: usize) -> __m512 {
        self.widen_i8(must_cast(x))
    }

    #[inline(always)]
    fn turn_fours(self, v: [__m512; 4]) -> [__m512; 4] {
        [self.exchange_f32(v[0]), v[1], v[2], v[3]]
    }

    #[inline(always)]
    fn spread_four(self, x: &[f32; 4], _: usize) -> __m512 {
        self.spread_128(must_cast(*x))
    }

    #[inline(always)]
    fn spread_four_sums(self, x: &[i32; 4], _: usize) -> __m512i {
        self.bits_of_f32(self.spread_128(must_cast(*x)))
    }

    #[inline(always)]
    fn sum_fours(self, v: [__m512; 4]) -> [f32; 4] {
        let half = self.0.add(self.lower_half(v[0]), self.upper_half(v[0]));
        must_cast(self.add_128(self.lower_128(half), self.upper_128(half)))
    }
}

/// Where word `at` of each of four blocks of `n` words lies in a vector, and then in a second one.
const fn places(n: usize, at: usize) -> [u16; 32] {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 8 {
        places[i] = (i / 4 * 32 + i % 4 * n + at) as u16;
        i += 1;
    }
    places
}
