//! NEON; byte products by `P`, with or without the dot-product instructions.

use crate::isa::{Isa, Kernel};
use bytemuck::must_cast;
use core::arch::aarch64::*;
use half::{bf16, f16};

/// Proof that the CPU has NEON, and what the byte products `P` need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<P>(P);

/// The methods of [`Isa`] in which levels of NEON differ.
pub(crate) trait ByteProducts: Copy {
    fn leaf<K: Kernel>(isa: Neon<Self>, kernel: K) -> K::Output;
    /// `sums + Σ w · x` over the four bytes of a lane, exact.
    fn dot(isa: Neon<Self>, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

/// Byte products by widening multiplies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widening(());

/// Byte products by `sdot`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dotprod(());

instruction_set!(Neon<Widening>, Some(Self(Widening(()))), is_aarch64_feature_detected: "neon");
instruction_set!(Neon<Dotprod>, Some(Self(Dotprod(()))), is_aarch64_feature_detected: "neon" "dotprod");

impl<P> Neon<P> {
    registers! { "neon":
        fn widen_f16(x: uint16x4_t) -> float32x4_t = vcvt_f32_f16(vreinterpret_f16_u16(x));
        fn splat_16(x: u16) -> uint16x4_t = vdup_n_u16(x);
        fn widen_bf16(x: uint16x4_t) -> float32x4_t = vreinterpretq_f32_u32(vshll_n_u16::<16>(x));
        fn exp2i(n: float32x4_t) -> float32x4_t = {
            let n = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
        };
        fn eight_to_f32(x: int8x8_t, upper: bool) -> float32x4_t = {
            let wide = vmovl_s8(x);
            vcvtq_f32_s32(vmovl_s16(if upper { vget_high_s16(wide) } else { vget_low_s16(wide) }))
        };
        fn signed_nibbles(packed: uint8x8_t, low: bool) -> int8x8_t = {
            // As upper halves of signed bytes.
            let nibbles = if low { vshl_n_u8::<4>(packed) } else { vand_u8(packed, vdup_n_u8(0xf0)) };
            vreinterpret_s8_u8(veor_u8(nibbles, vdup_n_u8(0x80)))
        };
        fn select_lanes(set: u32, x: float32x4_t, y: float32x4_t) -> float32x4_t = {
            let lane = vcombine_u32(vcreate_u32(0x2_0000_0001), vcreate_u32(0x8_0000_0004));
            vbslq_f32(vtstq_u32(vdupq_n_u32(set), lane), x, y)
        };
        fn round_to_i32(v: float32x4_t) -> int32x4_t = vcvtnq_s32_f32(v);
        fn narrow(v: [int32x4_t; 4]) -> int8x16_t = {
            let low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
            let high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
            vcombine_s8(vmovn_s16(low), vmovn_s16(high))
        };
        fn splat_sums(x: i32) -> int32x4_t = vdupq_n_s32(x);
        fn field(bytes: uint8x16_t, up: i8, mask: u8) -> int8x16_t =
            vreinterpretq_s8_u8(vandq_u8(vshlq_u8(bytes, vdupq_n_s8(up)), vdupq_n_u8(mask)));
        fn bits_of(word: [u8; 2], byte: u8) -> int8x16_t = {
            let bytes = vcombine_u8(vdup_n_u8(word[0]), vdup_n_u8(word[1]));
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            vreinterpretq_s8_u8(vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(byte)))
        };
        fn shifted(x: int32x4_t, by: u32) -> int32x4_t = vshlq_s32(x, vdupq_n_s32(by.cast_signed()));
        fn spread_lane<const LANE: i32>(x: int8x16_t) -> int8x16_t =
            vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(x)));
        fn turn_lanes(a: [int32x4_t; 4]) -> [int32x4_t; 4] = {
            let (ab, cd) = (vtrn1q_s32(a[0], a[1]), vtrn1q_s32(a[2], a[3]));
            let (odd_ab, odd_cd) = (vtrn2q_s32(a[0], a[1]), vtrn2q_s32(a[2], a[3]));
            let low = |a, b| vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
            let high = |a, b| vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
            [low(ab, cd), low(odd_ab, odd_cd), high(ab, cd), high(odd_ab, odd_cd)]
        };
        fn sum_lanes(a: [int32x4_t; 4]) -> int32x4_t = vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3]));
        fn four_bytes(x: u32, signed: bool) -> float32x4_t = {
            let bytes = vreinterpret_u8_u32(vdup_n_u32(x));
            if signed {
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes)))))
            } else {
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
            }
        };
    }
}

impl<P: ByteProducts> Isa for Neon<P> {
    type V = float32x4_t;
    type B = int8x16_t;
    type S = int32x4_t;
    const LANES: usize = 4;
    const PAIRS: bool = true;
    const COLUMNS_T: usize = 2;

    registers! { "neon":
        fn splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
        fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
        fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
        fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
        fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
        fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        fn abs(v: float32x4_t) -> float32x4_t = vabsq_f32(v);
        fn round(v: float32x4_t) -> float32x4_t = vrndnq_f32(v);
        fn select_lt(a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t =
            vbslq_f32(vcltq_f32(a, b), x, y);
        // Halves first, as wider vectors are added up.
        fn reduce_add(v: float32x4_t) -> f32 = vaddv_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v)));
        fn reduce_max(v: float32x4_t) -> f32 = vmaxvq_f32(v);
        fn or(a: int8x16_t, b: int8x16_t) -> int8x16_t = vorrq_s8(a, b);
        fn zero_sums() -> int32x4_t = vdupq_n_s32(0);
        fn add_sums(a: int32x4_t, b: int32x4_t) -> int32x4_t = vaddq_s32(a, b);
        fn sums_to_f32(sums: int32x4_t) -> float32x4_t = vcvtq_f32_s32(sums);
    }

    #[inline(always)]
    fn leaf<K: Kernel>(self, kernel: K) -> K::Output {
        P::leaf(self, kernel)
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> float32x4_t {
        self.widen_f16(self.splat_16(x.to_bits()))
    }

    #[inline(always)]
    fn splat_four(self, x: [f16; 4], i: usize) -> float32x4_t {
        self.splat_f16(x[i])
    }

    #[inline(always)]
    fn load<const N: usize>(self, x: &[f32; N], i: usize) -> float32x4_t {
        must_cast(x.as_chunks::<4>().0[i])
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> float32x4_t {
        self.widen_f16(must_cast(x.as_chunks::<4>().0[i]))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> float32x4_t {
        self.widen_bf16(must_cast(x.as_chunks::<4>().0[i]))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 32], i: usize) -> float32x4_t {
        self.eight_to_f32(must_cast(x.as_chunks::<8>().0[i / 2]), !i.is_multiple_of(2))
    }

    #[inline(always)]
    fn select_bits(self, bits: u32, i: usize, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        self.select_lanes(bits >> (4 * i), x, y)
    }

    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 16], i: usize) -> float32x4_t {
        let packed = must_cast(x.as_chunks::<8>().0[i / 2 % 2]);
        self.eight_to_f32(self.signed_nibbles(packed, i < 4), !i.is_multiple_of(2))
    }

    #[inline(always)]
    fn store<const N: usize>(self, v: float32x4_t, x: &mut [f32; N], i: usize) {
        x.as_chunks_mut::<4>().0[i] = must_cast(v);
    }

    #[inline(always)]
    fn store_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut v = [self.zero_sums(); 4];
            for i in 0..4 {
                v[i] = self.round_to_i32(self.mul(self.load(x, half * 4 + i), self.splat(scale)));
            }
            *out = must_cast(self.narrow(v));
        }
    }

    #[inline(always)]
    fn scale2(self, x: float32x4_t, n: float32x4_t) -> float32x4_t {
        // In halves, so that neither factor leaves the range of normal numbers.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(x, self.exp2i(half)), self.exp2i(self.sub(n, half)))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[i8; 64], i: usize) -> int8x16_t {
        must_cast(x.as_chunks::<16>().0[i])
    }

    #[inline(always)]
    fn load_halves(self, blocks: [&[i8; 32]; 4], i: usize) -> [int8x16_t; 2] {
        let halves = blocks[i].as_chunks::<16>().0;
        [must_cast(halves[0]), must_cast(halves[1])]
    }

    #[inline(always)]
    fn fields(self, blocks: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> int8x16_t {
        self.field(must_cast(*blocks[i]), up[i], mask)
    }

    #[inline(always)]
    fn bits(self, words: [u16; 4], byte: u8, i: usize) -> int8x16_t {
        self.bits_of(words[i].to_le_bytes(), byte)
    }

    #[inline(always)]
    fn store_bytes(self, v: int8x16_t, x: &mut [i8; 64], i: usize) {
        x.as_chunks_mut::<16>().0[i] = must_cast(v);
    }

    #[inline(always)]
    fn spread(self, x: int8x16_t) -> [int8x16_t; 4] {
        [
            self.spread_lane::<0>(x),
            self.spread_lane::<1>(x),
            self.spread_lane::<2>(x),
            self.spread_lane::<3>(x),
        ]
    }

    #[inline(always)]
    fn turn(self, rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
        must_cast(self.turn_lanes(must_cast(rows)))
    }

    #[inline(always)]
    fn biased(self, w: int8x16_t) -> int8x16_t {
        w
    }

    #[inline(always)]
    fn bias(self, _: int32x4_t) -> int32x4_t {
        self.zero_sums()
    }

    #[inline(always)]
    fn dot<const N: usize>(self, _: u32, w: [int8x16_t; N], x: [int8x16_t; N]) -> int32x4_t {
        let mut sums = self.zero_sums();
        for n in 0..N {
            sums = P::dot(self, sums, w[n], x[n]);
        }
        sums
    }

    #[inline(always)]
    fn dot_four(self, _: u32, sums: int32x4_t, w: [int8x16_t; 4], x: [int8x16_t; 4]) -> int32x4_t {
        let mut sums = sums;
        for t in 0..4 {
            sums = P::dot(self, sums, w[t], x[t]);
        }
        sums
    }

    #[inline(always)]
    fn shift_sums<const SHIFT: u32>(self, sums: int32x4_t) -> int32x4_t {
        self.shifted(sums, SHIFT)
    }

    #[inline(always)]
    fn sum_blocks(self, sums: [int32x4_t; 4]) -> int32x4_t {
        self.sum_lanes(sums)
    }

    #[inline(always)]
    fn load_sums(self, x: &[i32; 16], i: usize) -> int32x4_t {
        must_cast(x.as_chunks::<4>().0[i])
    }

    #[inline(always)]
    fn load_fours(self, x: [&[f32; 4]; 4], q: usize) -> float32x4_t {
        must_cast(*x[q])
    }

    #[inline(always)]
    fn load_four_sums(self, x: [&[i32; 4]; 4], q: usize) -> int32x4_t {
        must_cast(*x[q])
    }

    #[inline(always)]
    fn widen_fours(self, x: [[f16; 4]; 4], q: usize) -> float32x4_t {
        self.widen_f16(must_cast(x[q]))
    }

    #[inline(always)]
    fn bytes_to_f32(self, x: [[u8; 4]; 4], q: usize) -> float32x4_t {
        self.four_bytes(u32::from_le_bytes(x[q]), false)
    }

    #[inline(always)]
    fn signed_to_f32(self, x: [[u8; 4]; 4], q: usize) -> float32x4_t {
        self.four_bytes(u32::from_le_bytes(x[q]), true)
    }

    #[inline(always)]
    fn turn_fours(self, v: [float32x4_t; 4]) -> [float32x4_t; 4] {
        must_cast(self.turn_lanes(must_cast(v)))
    }

    #[inline(always)]
    fn spread_four(self, x: &[f32; 4], i: usize) -> float32x4_t {
        self.splat(x[i])
    }

    #[inline(always)]
    fn spread_four_sums(self, x: &[i32; 4], i: usize) -> int32x4_t {
        self.splat_sums(x[i])
    }

    #[inline(always)]
    fn sum_fours(self, v: [float32x4_t; 4]) -> [f32; 4] {
        must_cast(self.add(self.add(v[0], v[2]), self.add(v[1], v[3])))
    }
}

impl Neon<Widening> {
    registers! { "neon":
        fn widening_dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t = {
            // Pairs of lanes are added up last, so that lanes are those of `sdot`. A product of bytes fits i16, a sum of
            // two may not (−128 · −128 twice): widen first.
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(w, x));
            vaddq_s32(sums, vpaddq_s32(low, high))
        };
    }
}

impl ByteProducts for Widening {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Neon<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    #[inline(always)]
    fn dot(isa: Neon<Self>, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        isa.widening_dot(sums, w, x)
    }
}

impl ByteProducts for Dotprod {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Neon<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    #[inline(always)]
    fn dot(_: Neon<Self>, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        let mut sums = sums;
        // SAFETY: the token proves FEAT_DotProd; only registers are touched. The intrinsic is not stable in Rust 1.95. The
        // directive has the assembler accept an instruction that the surrounding compilation unit does not enable.
        unsafe {
            core::arch::asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {w:v}.16b, {x:v}.16b",
                sums = inout(vreg) sums, w = in(vreg) w, x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sums
    }
}
