//! NEON, with and without the dot-product instructions.

use crate::isa::Isa;
use candle_sparse_core::BlockQ8_0;
use core::arch::aarch64::*;
use half::{bf16, f16};

/// Proof that the CPU has NEON, and FEAT_DotProd if `DOTPROD`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<const DOTPROD: bool>(());

impl<const DOTPROD: bool> Neon<DOTPROD> {
    /// # Safety
    /// The CPU has NEON, and FEAT_DotProd if `DOTPROD`.
    #[inline(always)]
    pub(crate) const unsafe fn new() -> Self {
        Self(())
    }
}

impl<const DOTPROD: bool> Neon<DOTPROD> {
    /// `sums + w · x` of one half.
    #[inline(always)]
    fn dot(self, sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        proven!({
            if DOTPROD {
                sdot(sums, w, x)
            } else {
                // Pairs of lanes are added up last, so that lanes are those of `sdot`. A product of bytes fits i16, a sum
                // of two may not (−128 · −128 twice): widen first.
                let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                let high = vpaddlq_s16(vmull_high_s8(w, x));
                vaddq_s32(sums, vpaddq_s32(low, high))
            }
        })
    }
}

/// `acc + Σ a·b` over groups of four bytes. The intrinsic is not stable in Rust 1.95.
///
/// # Safety
/// The CPU has FEAT_DotProd.
#[inline(always)]
unsafe fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut acc = acc;
    // SAFETY: the caller promises FEAT_DotProd; only registers are touched. The directive makes the assembler accept
    // an instruction that the surrounding compilation unit does not enable.
    unsafe {
        core::arch::asm!(
            ".arch_extension dotprod",
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

// SAFETY: `Neon::new` is the only constructor and demands the instruction set.
unsafe impl<const DOTPROD: bool> Isa for Neon<DOTPROD> {
    type V = float32x4_t;
    type I = int8x16_t;
    type S = int32x4_t;
    const LANES: usize = 4;
    const COLUMNS: usize = 4;
    const COLUMNS_T: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        proven!(vdupq_n_f32(x))
    }

    #[inline(always)]
    fn splat_f16(self, x: f16) -> float32x4_t {
        proven!(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.to_bits()))))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 32], i: usize) -> float32x4_t {
        let x = &x[i * 4..i * 4 + 4];
        proven!(vld1q_f32(x.as_ptr()))
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 32], i: usize) -> float32x4_t {
        let x = &x[i * 4..i * 4 + 4];
        proven!(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> float32x4_t {
        let x = &x[i * 4..i * 4 + 4];
        proven!(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn store(self, v: float32x4_t, x: &mut [f32; 32], i: usize) {
        let x = &mut x[i * 4..i * 4 + 4];
        proven!(vst1q_f32(x.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        proven!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vmaxq_f32(a, b))
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        proven!(vminq_f32(a, b))
    }

    #[inline(always)]
    fn abs(self, v: float32x4_t) -> float32x4_t {
        proven!(vabsq_f32(v))
    }

    #[inline(always)]
    fn round(self, v: float32x4_t) -> float32x4_t {
        proven!(vrndnq_f32(v))
    }

    #[inline(always)]
    fn exp2i(self, v: float32x4_t) -> float32x4_t {
        proven!({
            let n = vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
        })
    }

    #[inline(always)]
    fn select_lt(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        proven!(vbslq_f32(vcltq_f32(a, b), x, y))
    }

    #[inline(always)]
    fn reduce_add(self, v: float32x4_t) -> f32 {
        proven!(vaddvq_f32(v))
    }

    #[inline(always)]
    fn reduce_max(self, v: float32x4_t) -> f32 {
        proven!(vmaxvq_f32(v))
    }

    #[inline(always)]
    fn load_lanes(self, x: &[f32; 16], i: usize) -> float32x4_t {
        let x = &x[i * 4..i * 4 + 4];
        proven!(vld1q_f32(x.as_ptr()))
    }

    #[inline(always)]
    fn load_quants(self, x: &[i8; 64], i: usize) -> int8x16_t {
        let x = &x[i * 16..i * 16 + 16];
        proven!(vld1q_s8(x.as_ptr()))
    }

    #[inline(always)]
    fn scales(self, d: [f16; 4], i: usize) -> float32x4_t {
        self.splat_f16(d[i])
    }

    #[inline(always)]
    fn q8_0(self, w: &[BlockQ8_0; 4], i: usize) -> [int8x16_t; 2] {
        let (low, high) = w[i].qs.split_at(16);
        proven!([vld1q_s8(low.as_ptr()), vld1q_s8(high.as_ptr())])
    }

    #[inline(always)]
    fn fields(self, bytes: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> int8x16_t {
        proven!({
            let moved = vshlq_u8(vld1q_u8(bytes[i].as_ptr()), vdupq_n_s8(up[i]));
            vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(mask)))
        })
    }

    #[inline(always)]
    fn fifth_bits(self, words: [u16; 4], i: usize) -> int8x16_t {
        let [low, high] = words[i].to_le_bytes();
        proven!({
            let bytes = vcombine_u8(vdup_n_u8(low), vdup_n_u8(high));
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            vreinterpretq_s8_u8(vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(16)))
        })
    }

    #[inline(always)]
    fn or(self, a: int8x16_t, b: int8x16_t) -> int8x16_t {
        proven!(vorrq_s8(a, b))
    }

    #[inline(always)]
    fn ones(self) -> int8x16_t {
        proven!(vdupq_n_s8(1))
    }

    #[inline(always)]
    fn zero_sums(self) -> int32x4_t {
        proven!(vdupq_n_s32(0))
    }

    #[inline(always)]
    fn start_i8(self, _: &[i32; 16], _: usize) -> int32x4_t {
        self.zero_sums()
    }

    #[inline(always)]
    fn start_shifted<const SHIFT: u32>(self, neg_sums: &[i32; 16], i: usize) -> int32x4_t {
        let sums = &neg_sums[i * 4..i * 4 + 4];
        proven!(vshlq_s32(vld1q_s32(sums.as_ptr()), vdupq_n_s32(SHIFT.cast_signed())))
    }

    #[inline(always)]
    fn dot_i8(self, sums: int32x4_t, w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
        self.dot(self.dot(sums, w[0], x[0]), w[1], x[1])
    }

    #[inline(always)]
    fn dot_u6(self, sums: int32x4_t, w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
        self.dot_i8(sums, w, x)
    }

    #[inline(always)]
    fn block_scales(self, scales: u32, i: usize) -> int32x4_t {
        proven!(vdupq_n_s32(i32::from((scales >> (8 * i)) as u8)))
    }

    #[inline(always)]
    fn half_scales(self, scales: u64, i: usize) -> [int32x4_t; 2] {
        let scales = scales >> (16 * i);
        proven!([vdupq_n_s32(i32::from(scales as i8)), vdupq_n_s32(i32::from((scales >> 8) as i8))])
    }

    #[inline(always)]
    fn dot_by_block(self, w: [int8x16_t; 2], x: [int8x16_t; 2], scales: int32x4_t) -> int32x4_t {
        proven!(vmulq_s32(self.dot_u6(self.zero_sums(), w, x), scales))
    }

    #[inline(always)]
    fn dot_by_half<const OFFSET: i8>(
        self,
        w: [int8x16_t; 2],
        x: [int8x16_t; 2],
        scales: [int32x4_t; 2],
    ) -> int32x4_t {
        proven!({
            let offset = vdupq_n_s8(OFFSET);
            let low = self.dot(self.zero_sums(), vsubq_s8(w[0], offset), x[0]);
            let high = self.dot(self.zero_sums(), vsubq_s8(w[1], offset), x[1]);
            vmlaq_s32(vmulq_s32(low, scales[0]), high, scales[1])
        })
    }

    #[inline(always)]
    fn scale_neg_sums(self, neg_sums: &[i32; 16], scales: int32x4_t, i: usize) -> int32x4_t {
        let sums = &neg_sums[i * 4..i * 4 + 4];
        proven!(vmulq_s32(vld1q_s32(sums.as_ptr()), scales))
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: int32x4_t) -> float32x4_t {
        proven!(vcvtq_f32_s32(sums))
    }

    #[inline(always)]
    fn neg_sums(self, x: [int8x16_t; 2], out: &mut [i32; 16], i: usize) {
        let out = &mut out[i * 4..i * 4 + 4];
        proven!({
            let quads = |x| vpaddlq_s16(vpaddlq_s8(x));
            vst1q_s32(out.as_mut_ptr(), vnegq_s32(vaddq_s32(quads(x[0]), quads(x[1]))));
        });
    }

    #[inline(always)]
    fn prefetch<T>(self, row: &[T], byte: usize) {
        // The intrinsic is not stable in Rust 1.95.
        proven!(core::arch::asm!(
            "prfm pldl1keep, [{x}]",
            x = in(reg) row.as_ptr().cast::<u8>().wrapping_add(byte),
            options(readonly, nostack, preserves_flags)
        ));
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; 32], i: usize) -> float32x4_t {
        let half = &x[i / 2 * 8..i / 2 * 8 + 8];
        proven!({
            let wide = vmovl_s8(vld1_s8(half.as_ptr()));
            let part = if i.is_multiple_of(2) { vget_low_s16(wide) } else { vget_high_s16(wide) };
            vcvtq_f32_s32(vmovl_s16(part))
        })
    }

    #[inline(always)]
    fn widen_nibbles(self, qs: &[u8; 16], i: usize) -> float32x4_t {
        let bytes = &qs[i / 2 % 2 * 8..i / 2 % 2 * 8 + 8];
        proven!({
            let packed = vld1_u8(bytes.as_ptr());
            let nibbles = if i < 4 { vshl_n_u8::<4>(packed) } else { vand_u8(packed, vdup_n_u8(0xf0)) };
            // As upper halves of signed bytes.
            let wide = vmovl_s8(vreinterpret_s8_u8(veor_u8(nibbles, vdup_n_u8(0x80))));
            let part = if i.is_multiple_of(2) { vget_low_s16(wide) } else { vget_high_s16(wide) };
            vcvtq_f32_s32(vmovl_s16(part))
        })
    }

    #[inline(always)]
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) {
        for half in 0..2 {
            let v = |i| proven!(vcvtnq_s32_f32(self.mul(self.load(x, half * 4 + i), self.splat(scale))));
            let out = &mut out[half * 16..half * 16 + 16];
            proven!({
                let low = vcombine_s16(vmovn_s32(v(0)), vmovn_s32(v(1)));
                let high = vcombine_s16(vmovn_s32(v(2)), vmovn_s32(v(3)));
                vst1q_s8(out.as_mut_ptr(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
            });
        }
    }
}
