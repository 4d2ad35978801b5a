//! Products with some rows of a matrix, and the FFN of some neurons.
//!
//! ```text
//! for four active neurons at a time:
//!     for each: gate row · x, up row · x, asking for those rows of a neuron further on
//!     activation of the four
//!     y += Σ activation · down row of the four before, asking for down rows further on      (y stays in L1)
//! ```
//!
//! Asking ahead makes a gather faster than plain loads of the same rows: the hardware prefetcher starts anew at each run. It
//! has to keep step with the computation, a fixed number of bytes ahead (`RowsOf::ahead`): bursts of whole rows fill the
//! buffers of pending misses, and a third less bandwidth was the result (Zen 5).
//!
//! A row's product is that of `matmul` with one column; each down row is added with one multiply-add per element, in
//! order. So a neuron computed in another set, or among all, has the same bits.

use super::{
    activation::gated,
    axpy_rows::{ROOM, TOGETHER, Together},
};
use crate::{
    format::{Element, RowsKernel, RowsOf},
    isa::{Isa, Kernel},
};
use candle_sparse_core::{Columns, GluActivation};

/// [`candle_sparse_core::KernelSet::matvec_rows`].
pub(crate) struct MatvecRows<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) x: Columns<'a>,
    pub(crate) y: &'a mut [f32],
}

impl RowsKernel for MatvecRows<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, w: RowsOf<'_, T>) {
        let Some(last) = self.rows.len().checked_sub(1) else { return };
        let (x, distance) = (T::columns(self.x), w.ahead());
        let at = |i: usize| w.row(self.rows[i.min(last)] as usize);
        for (i, y) in self.y.iter_mut().enumerate() {
            *y = T::dot(isa, at(i), x, at(i + distance));
        }
    }
}

/// [`candle_sparse_core::KernelSet::sparse_ffn`].
pub(crate) struct SparseFfn<'a> {
    pub(crate) rows_per_neuron: usize,
    pub(crate) act: GluActivation,
    pub(crate) active: &'a [u32],
    pub(crate) x: Columns<'a>,
    pub(crate) gate: &'a mut [f32],
    pub(crate) y: &'a mut [f32],
}

impl RowsKernel for SparseFfn<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, w: RowsOf<'_, T>) {
        let Self { rows_per_neuron, act, active, x, gate, y } = self;
        let (n, x, distance) = (active.len(), T::columns(x), w.ahead());
        let down_distance = distance.next_multiple_of(TOGETHER);
        // The `back`-th row before the down row of a neuron.
        let at = |i: usize, back: usize| {
            w.row(active[i.min(n - 1)] as usize * rows_per_neuron + rows_per_neuron - 1 - back)
        };
        let mut room = ROOM;
        let mut before = [0.0; TOGETHER];
        // A down row is added four neurons after its neuron's products: what is in between, the activation of few neurons, is
        // a long chain of dependent instructions.
        for first in (0..n + TOGETHER).step_by(TOGETHER).take_while(|_| n > 0) {
            // Without an up row the activation stands alone.
            let ones = if rows_per_neuron == 1 { 1.0 } else { 0.0 };
            let (mut g, mut a) = ([0.0; TOGETHER], [ones; TOGETHER]);
            for i in first..n.min(first + TOGETHER) {
                // One call for both rows: the code of a product is long.
                for back in (1..rows_per_neuron).rev() {
                    let product = T::dot(isa, at(i, back), x, at(i + distance, back));
                    if back == 2 {
                        gate[i] = product;
                    } else {
                        a[i - first] = product;
                    }
                }
                g[i - first] = gate[i];
            }
            a = isa.leaf(GatedFew { act, gate: g, y: a });
            if let Some(first) = first.checked_sub(TOGETHER) {
                let a = &before[..TOGETHER.min(n - first)];
                T::add_rows(isa, Together::new(a, &mut room, |i| at(first + i, 0), down_distance), y);
            }
            before = a;
        }
    }
}

/// The activations of a few neurons; a function of its own, for it is long.
struct GatedFew {
    act: GluActivation,
    gate: [f32; TOGETHER],
    y: [f32; TOGETHER],
}

impl Kernel for GatedFew {
    type Output = [f32; TOGETHER];

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> [f32; TOGETHER] {
        gated(isa, self.act.act, self.act.shift, &self.gate, &mut self.y);
        self.y
    }
}
