//! AVX-512 with BF16: products of pairs of BF16s.

use super::{
    avx2::{Avx2, Avx2Products},
    avx512::{Avx512, PairProducts},
};
use crate::isa::Kernel;
use core::{
    arch::x86_64::{__m512, __m512bh, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps},
    mem::transmute,
};

/// Pairs of BF16s by `vdpbf16ps`. Subnormal numbers are zeros to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16(());

instruction_set!(
    Avx512<Bf16>, Avx2::<Avx2Products>::detect().map(|avx2| Self(avx2, Bf16(()))),
    is_x86_feature_detected:
        "avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni" "avx512bf16"
);

impl PairProducts for Bf16 {
    #[inline(always)]
    fn leaf<K: Kernel>(isa: Avx512<Self>, kernel: K) -> K::Output {
        isa.call(kernel)
    }

    #[inline(always)]
    fn round_pairs(isa: Avx512<Self>, a: __m512, b: __m512) -> __m512 {
        isa.rounded(a, b)
    }

    #[inline(always)]
    fn add_pairs(isa: Avx512<Self>, w: __m512, x: __m512, acc: __m512) -> __m512 {
        isa.added(w, x, acc)
    }
}

impl Avx512<Bf16> {
    #[inline(always)]
    fn rounded(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token `self` proves AVX-512 BF16. Any 64 bytes are a vector of either type; no safe function casts them.
        unsafe { transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(b, a)) }
    }

    #[inline(always)]
    fn added(self, w: __m512, x: __m512, acc: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let (w, x) = (transmute::<__m512, __m512bh>(w), transmute::<__m512, __m512bh>(x));
            _mm512_dpbf16_ps(acc, w, x)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, pairs};

    /// `vdpbf16ps` rounds twice, the second product first, and so does the definition; neither has subnormal numbers here.
    #[test]
    fn pairs_are_those_of_the_definition() {
        let Some(isa) = Avx512::<Bf16>::detect() else {
            println!("skipped: no AVX-512 BF16");
            return;
        };
        let mut seed = 1_u32;
        let mut numbers = || {
            let mut x = [0.0_f32; 16];
            for x in &mut x {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Exponents of 2^-20 to 2^20, both signs.
                *x = f32::from_bits(
                    (seed & 0x8000_0000) | (107 + (seed >> 8) % 41) << 23 | (seed & 0x007f_ffff),
                );
            }
            isa.load(&x, 0)
        };
        let bits = |v| {
            let mut x = [0.0; 16];
            isa.store(v, &mut x, 0);
            x.map(f32::to_bits)
        };
        for _ in 0..10_000 {
            let (a, b, c, d, acc) = (numbers(), numbers(), numbers(), numbers(), numbers());
            let (w, x) = (isa.round_pairs(a, b), isa.round_pairs(c, d));
            assert_eq!(bits(w), bits(pairs::round(isa, a, b)));
            assert_eq!(bits(isa.add_pairs(w, x, acc)), bits(pairs::add(isa, w, x, acc)));
        }
    }
}
