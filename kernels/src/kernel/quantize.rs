//! Activations to bytes; equal to the scalar definition bit for bit.

use crate::isa::{Isa, Kernel};
use candle_sparse_core::{ActivationGroup, BLOCK_LEN, GROUP_LEN, kernel::quantize::check_quantize};

/// [`candle_sparse_core::KernelSet::quantize`].
pub(crate) struct Quantize<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) groups: &'a mut [ActivationGroup],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x, groups } = self;
        check_quantize(x, groups);
        for (group, blocks) in groups.iter_mut().zip(x.as_chunks().0.chunks(GROUP_LEN / BLOCK_LEN)) {
            let missing = GROUP_LEN / BLOCK_LEN - blocks.len();
            if missing > 0 {
                *group = ActivationGroup::ZERO;
            }
            for (b, x) in blocks.iter().enumerate() {
                let (d, qs) = block(isa, x);
                group.set_block(missing + b, d, &qs);
            }
        }
    }
}

#[inline(always)]
fn block<I: Isa>(isa: I, x: &[f32; BLOCK_LEN]) -> (f32, [i8; BLOCK_LEN]) {
    let (mut max, mut poison) = (isa.splat(0.0), isa.splat(0.0));
    for i in 0..32 / I::LANES {
        let v = isa.load(x, i);
        max = isa.max(isa.abs(v), max);
        poison = isa.mul_add(v, isa.splat(0.0), poison);
    }
    // NaN where any element is not finite, else 0: garbage must not be rounded to plausible numbers.
    let poison = isa.reduce_add(poison);
    let d = isa.reduce_max(max) / 127.0 + poison;
    let scale = if d >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 };
    let mut qs = [0; BLOCK_LEN];
    if !poison.is_nan() {
        isa.store_i8(x, scale, &mut qs);
    }
    (d, qs)
}
