//! AVX2 with FMA and F16C; byte products by `P`, with or without AVX-VNNI.

use crate::isa::{Isa, Kernel};
use bytemuck::must_cast;
use core::arch::x86_64::*;
use half::{bf16, f16};

/// Proof that the CPU has AVX2, FMA and F16C, and what the byte products `P` need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2<P>(pub(super) P);

/// The methods of [`Isa`] in which AVX2 and AVX-VNNI differ.
pub(crate) trait ByteProducts: Copy {
    fn leaf<K: Kernel>(isa: Avx2<Self>, kernel: K) -> K::Output;
    fn biased(isa: Avx2<Self>, w: __m256i) -> __m256i;
    fn bias(isa: Avx2<Self>, neg_sums: __m256i) -> __m256i;
    fn dot<const N: usize>(isa: Avx2<Self>, bits: u32, w: [__m256i; N], x: [__m256i; N]) -> __m256i;
    fn dot_four(isa: Avx2<Self>, bits: u32, sums: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i;
}

/// Byte products by `vpmaddubsw`, which adds two of them into 16 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2Products(());

instruction_set!(
    Avx2<Avx2Products>, Some(Self(Avx2Products(()))), is_x86_feature_detected: "avx2" "fma" "f16c"
);

impl<P> Avx2<P> {
    registers! { "avx2,fma,f16c":
        pub(super) fn widen_f16(x: __m128i) -> __m256 = _mm256_cvtph_ps(x);
        pub(super) fn widen_bf16(x: __m128i) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
        pub(super) fn select_lanes(set: u32, x: __m256, y: __m256) -> __m256 = {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(set.cast_signed()), lane);
            _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))
        };
        pub(super) fn widen_i8(x: u64) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(x.cast_signed())));
        pub(super) fn splat_16(x: u16) -> __m128i = _mm_set1_epi16(x.cast_signed());
        pub(super) fn splat_sums(x: i32) -> __m256i = _mm256_set1_epi32(x);
        pub(super) fn splat_64(x: u64) -> __m256i = _mm256_set1_epi64x(x.cast_signed());
        pub(super) fn low_64s(a: __m128i, b: __m128i) -> __m128i = _mm_unpacklo_epi64(a, b);
        pub(super) fn pair(a: __m128i, b: __m128i) -> __m256i = _mm256_set_m128i(b, a);
        pub(super) fn shift_64s(x: __m256i, left: [i64; 2], right: [i64; 2]) -> __m256i = _mm256_srlv_epi64(
            _mm256_sllv_epi64(x, _mm256_setr_epi64x(left[0], left[0], left[1], left[1])),
            _mm256_setr_epi64x(right[0], right[0], right[1], right[1])
        );
        pub(super) fn and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        pub(super) fn equal_bytes(a: __m256i, b: __m256i) -> __m256i = _mm256_cmpeq_epi8(a, b);
        pub(super) fn shuffle(bytes: __m256i, index: __m256i) -> __m256i = _mm256_shuffle_epi8(bytes, index);
        pub(super) fn splat_byte(x: u8) -> __m256i = _mm256_set1_epi8(x.cast_signed());
        pub(super) fn shifted(x: __m256i, by: u32) -> __m256i =
            _mm256_sll_epi32(x, _mm_cvtsi32_si128(by.cast_signed()));
        pub(super) fn low_lanes(a: __m256i, b: __m256i) -> __m256i = _mm256_unpacklo_epi32(a, b);
        pub(super) fn high_lanes(a: __m256i, b: __m256i) -> __m256i = _mm256_unpackhi_epi32(a, b);
        pub(super) fn even_64s(a: __m256i, b: __m256i) -> __m256i = _mm256_unpacklo_epi64(a, b);
        pub(super) fn odd_64s(a: __m256i, b: __m256i) -> __m256i = _mm256_unpackhi_epi64(a, b);
        pub(super) fn spread_lane<const LANE: i32>(x: __m256i) -> __m256i = _mm256_shuffle_epi32::<LANE>(x);
        pub(super) fn zip_halves(x: __m256i) -> __m256i =
            _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        pub(super) fn join_8(x: [u16; 8]) -> __m128i = {
            let x: [i16; 8] = must_cast(x);
            _mm_setr_epi16(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])
        };
        pub(super) fn pair_f32(a: __m128, b: __m128) -> __m256 = _mm256_set_m128(b, a);
        pub(super) fn bits_of_f32(x: __m256) -> __m256i = _mm256_castps_si256(x);
        pub(super) fn unsigned_to_f32(x: u64) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x.cast_signed())));
        pub(super) fn spread_128(x: __m128, first: i32) -> __m256 = _mm256_permutevar8x32_ps(
            _mm256_castps128_ps256(x),
            _mm256_setr_epi32(first, first, first, first, first + 1, first + 1, first + 1, first + 1)
        );
        pub(super) fn turn_pairs(a: __m256, b: __m256, upper: bool) -> __m256 = {
            let (x, y) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let zipped = if upper { _mm256_unpackhi_ps(x, y) } else { _mm256_unpacklo_ps(x, y) };
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(zipped)))
        };
        pub(super) fn add_halves(v: __m256) -> __m128 =
            _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        pub(super) fn round_to_i32(v: __m256) -> __m256i = _mm256_cvtps_epi32(v);
        pub(super) fn exp2i(n: __m256) -> __m256 = {
            let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
        };
        pub(super) fn nibbles_to_f32(packed: u64, low: bool) -> __m256 = {
            let packed = _mm_cvtsi64_si128(packed.cast_signed());
            let nibbles = if low { _mm_slli_epi16::<4>(packed) } else { packed };
            // As upper halves of signed bytes.
            let bytes = _mm_and_si128(nibbles, _mm_set1_epi8(0xf0_u8.cast_signed()));
            let signed = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed))
        };
        pub(super) fn pack_to_i8(v: [__m256i; 4]) -> __m256i = {
            let words = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
            // Packing works inside 128-bit halves: restore the order of the groups of four.
            _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
        };
    }
}

impl<P: ByteProducts> Isa for Avx2<P> {
    type V = __m256;
    type B = __m256i;
    type S = __m256i;
    const LANES: usize = 8;
    const PAIRS: bool = false;
    const COLUMNS_T: usize = 2;

    registers! { "avx2,fma,f16c":
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn abs(v: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), v);
        fn round(v: __m256) -> __m256 =
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        fn select_lt(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 =
            _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
        fn reduce_add(v: __m256) -> f32 = {
            let h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let h = _mm_add_ps(h, _mm_movehl_ps(h, h));
            _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)))
        };
        fn reduce_max(v: __m256) -> f32 = {
            let h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let h = _mm_max_ps(h, _mm_movehl_ps(h, h));
            _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)))
        };
        fn or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        fn zero_sums() -> __m256i = _mm256_setzero_si256();
        fn add_sums(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn sums_to_f32(sums: __m256i) -> __m256 = _mm256_cvtepi32_ps(sums);
    }

    #[inline(always)]
    fn leaf<K: Kernel>(self, kernel: K) -> K::Output {
        P::leaf(self, kernel)
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m256 {
        // Broadcasting first keeps the load out of any accumulator register.
        self.widen_f16(self.splat_16(x.to_bits()))
    }

    #[inline(always)]
    fn splat_four(self, x: [f16; 4], i: usize) -> __m256 {
        let (a, b) = (self.splat_16(x[2 * i].to_bits()), self.splat_16(x[2 * i + 1].to_bits()));
        self.widen_f16(self.low_64s(a, b))
    }

    #[inline(always)]
    fn load<const N: usize>(self, x: &[f32; N], i: usize) -> __m256 {
        must_cast(x.as_chunks::<8>().0[i])
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> __m256 {
        self.widen_f16(must_cast(x.as_chunks::<8>().0[i]))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> __m256 {
        self.widen_bf16(must_cast(x.as_chunks::<8>().0[i]))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 32], i: usize) -> __m256 {
        self.widen_i8(must_cast(x.as_chunks::<8>().0[i]))
    }

    #[inline(always)]
    fn select_bits(self, bits: u32, i: usize, x: __m256, y: __m256) -> __m256 {
        self.select_lanes(bits >> (8 * i), x, y)
    }

    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 16], i: usize) -> __m256 {
        self.nibbles_to_f32(must_cast(x.as_chunks::<8>().0[i % 2]), i < 2)
    }

    #[inline(always)]
    fn store<const N: usize>(self, v: __m256, x: &mut [f32; N], i: usize) {
        x.as_chunks_mut::<8>().0[i] = must_cast(v);
    }

    #[inline(always)]
    fn store_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        let mut v = [self.zero_sums(); 4];
        for i in 0..4 {
            v[i] = self.round_to_i32(self.mul(self.load(x, i), self.splat(scale)));
        }
        *out = must_cast(self.pack_to_i8(v));
    }

    #[inline(always)]
    fn scale2(self, x: __m256, n: __m256) -> __m256 {
        // In halves, so that neither factor leaves the range of normal numbers.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(x, self.exp2i(half)), self.exp2i(self.sub(n, half)))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[i8; 64], i: usize) -> __m256i {
        must_cast(x.as_chunks::<32>().0[i])
    }

    #[inline(always)]
    fn load_halves(self, blocks: [&[i8; 32]; 4], i: usize) -> [__m256i; 2] {
        let (a, b) = (blocks[2 * i].as_chunks::<16>().0, blocks[2 * i + 1].as_chunks::<16>().0);
        [self.pair(must_cast(a[0]), must_cast(b[0])), self.pair(must_cast(a[1]), must_cast(b[1]))]
    }

    #[inline(always)]
    fn fields(self, blocks: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> __m256i {
        let (a, b) = (i64::from(up[2 * i]), i64::from(up[2 * i + 1]));
        let packed = self.pair(must_cast(*blocks[2 * i]), must_cast(*blocks[2 * i + 1]));
        // At most one of the two shifts is left in the code: counts are constants, and those of a vector go one way.
        let moved = self.shift_64s(packed, [a.max(0), b.max(0)], [-a.min(0), -b.min(0)]);
        self.and(moved, self.splat_byte(mask))
    }

    #[inline(always)]
    fn bits(self, words: [u16; 4], byte: u8, i: usize) -> __m256i {
        let words = u32::from(words[2 * i]) | (u32::from(words[2 * i + 1]) << 16);
        let of_each = must_cast([0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303_u64]);
        let bytes = self.shuffle(self.splat_sums(words.cast_signed()), of_each);
        let bit = self.splat_64(0x8040_2010_0804_0201);
        self.and(self.equal_bytes(self.and(bytes, bit), bit), self.splat_byte(byte))
    }

    #[inline(always)]
    fn store_bytes(self, v: __m256i, x: &mut [i8; 64], i: usize) {
        x.as_chunks_mut::<32>().0[i] = must_cast(v);
    }

    #[inline(always)]
    fn spread(self, x: __m256i) -> [__m256i; 4] {
        [
            self.spread_lane::<0x00>(x),
            self.spread_lane::<0x55>(x),
            self.spread_lane::<0xaa>(x),
            self.spread_lane::<0xff>(x),
        ]
    }

    #[inline(always)]
    fn turn(self, [a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
        let (ab, cd) = (self.low_lanes(a, b), self.low_lanes(c, d));
        let (upper_ab, upper_cd) = (self.high_lanes(a, b), self.high_lanes(c, d));
        [
            self.even_64s(ab, cd),
            self.odd_64s(ab, cd),
            self.even_64s(upper_ab, upper_cd),
            self.odd_64s(upper_ab, upper_cd),
        ]
    }

    #[inline(always)]
    fn biased(self, w: __m256i) -> __m256i {
        P::biased(self, w)
    }

    #[inline(always)]
    fn bias(self, neg_sums: __m256i) -> __m256i {
        P::bias(self, neg_sums)
    }

    #[inline(always)]
    fn dot<const N: usize>(self, bits: u32, w: [__m256i; N], x: [__m256i; N]) -> __m256i {
        P::dot(self, bits, w, x)
    }

    #[inline(always)]
    fn dot_four(self, bits: u32, sums: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        P::dot_four(self, bits, sums, w, x)
    }

    #[inline(always)]
    fn shift_sums<const SHIFT: u32>(self, sums: __m256i) -> __m256i {
        self.shifted(sums, SHIFT)
    }

    #[inline(always)]
    fn sum_blocks(self, [a, b, c, d]: [__m256i; 4]) -> __m256i {
        let ab = self.add_sums(self.low_lanes(a, b), self.high_lanes(a, b));
        let cd = self.add_sums(self.low_lanes(c, d), self.high_lanes(c, d));
        self.zip_halves(self.add_sums(self.even_64s(ab, cd), self.odd_64s(ab, cd)))
    }

    #[inline(always)]
    fn load_sums(self, x: &[i32; 16], i: usize) -> __m256i {
        must_cast(x.as_chunks::<8>().0[i])
    }

    #[inline(always)]
    fn load_fours(self, x: [&[f32; 4]; 4], q: usize) -> __m256 {
        self.pair_f32(must_cast(*x[2 * q]), must_cast(*x[2 * q + 1]))
    }

    #[inline(always)]
    fn load_four_sums(self, x: [&[i32; 4]; 4], q: usize) -> __m256i {
        self.bits_of_f32(self.pair_f32(must_cast(*x[2 * q]), must_cast(*x[2 * q + 1])))
    }

    #[inline(always)]
    fn widen_fours(self, x: [[f16; 4]; 4], q: usize) -> __m256 {
        self.widen_f16(self.join_8(must_cast([x[2 * q], x[2 * q + 1]])))
    }

    #[inline(always)]
    fn bytes_to_f32(self, x: [[u8; 4]; 4], q: usize) -> __m256 {
        self.unsigned_to_f32(must_cast([x[2 * q], x[2 * q + 1]]))
    }

    #[inline(always)]
    fn signed_to_f32(self, x: [[u8; 4]; 4], q: usize) -> __m256 {
        self.widen_i8(must_cast([x[2 * q], x[2 * q + 1]]))
    }

    #[inline(always)]
    fn turn_fours(self, v: [__m256; 4]) -> [__m256; 4] {
        [self.turn_pairs(v[0], v[1], false), self.turn_pairs(v[0], v[1], true), v[2], v[3]]
    }

    #[inline(always)]
    fn spread_four(self, x: &[f32; 4], i: usize) -> __m256 {
        self.spread_128(must_cast(*x), 2 * i as i32)
    }

    #[inline(always)]
    fn spread_four_sums(self, x: &[i32; 4], i: usize) -> __m256i {
        self.bits_of_f32(self.spread_128(must_cast(*x), 2 * i as i32))
    }

    #[inline(always)]
    fn sum_fours(self, v: [__m256; 4]) -> [f32; 4] {
        must_cast(self.add_halves(self.add(v[0], v[1])))
    }
}

impl Avx2<Avx2Products> {
    registers! { "avx2,fma,f16c":
        fn pairs(w: __m256i, x: __m256i) -> __m256i = _mm256_maddubs_epi16(w, x);
        fn abs_bytes(w: __m256i) -> __m256i = _mm256_abs_epi8(w);
        fn with_sign_of(w: __m256i, x: __m256i) -> __m256i = _mm256_sign_epi8(x, w);
        fn add_pairs(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi16(a, b);
        fn sum_pairs(pairs: __m256i) -> __m256i = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }

    /// maddubs wants one unsigned operand: |w| · (x with w's sign). |−128| is 128 as a byte, and x has no −128, so
    /// signs stay right; 2 · 128 · 127 fits i16.
    #[inline(always)]
    fn signed_quads(self, w: __m256i, x: __m256i) -> __m256i {
        self.sum_pairs(self.pairs(self.abs_bytes(w), self.with_sign_of(w, x)))
    }
}

impl ByteProducts for Avx2Products {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Avx2<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    #[inline(always)]
    fn biased(_: Avx2<Self>, w: __m256i) -> __m256i {
        w
    }

    #[inline(always)]
    fn bias(isa: Avx2<Self>, _: __m256i) -> __m256i {
        isa.zero_sums()
    }

    #[inline(always)]
    fn dot<const N: usize>(isa: Avx2<Self>, bits: u32, w: [__m256i; N], x: [__m256i; N]) -> __m256i {
        if bits == 8 {
            let mut sums = isa.signed_quads(w[0], x[0]);
            for n in 1..N {
                sums = isa.add_sums(sums, isa.signed_quads(w[n], x[n]));
            }
            return sums;
        }
        // 4 · 63 · 127 fits i16.
        let mut pairs = isa.pairs(w[0], x[0]);
        for n in 1..N {
            pairs = isa.add_pairs(pairs, isa.pairs(w[n], x[n]));
        }
        isa.sum_pairs(pairs)
    }

    #[inline(always)]
    fn dot_four(isa: Avx2<Self>, bits: u32, sums: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        if bits > 5 {
            let low = isa.add_sums(sums, Self::dot(isa, bits, [w[0], w[1]], [x[0], x[1]]));
            return isa.add_sums(low, Self::dot(isa, bits, [w[2], w[3]], [x[2], x[3]]));
        }
        // 8 · 31 · 127 fits i16.
        let low = isa.add_pairs(isa.pairs(w[0], x[0]), isa.pairs(w[1], x[1]));
        let high = isa.add_pairs(isa.pairs(w[2], x[2]), isa.pairs(w[3], x[3]));
        isa.add_sums(sums, isa.sum_pairs(isa.add_pairs(low, high)))
    }
}
