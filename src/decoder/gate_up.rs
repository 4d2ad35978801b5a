//! The matrices between an FFN's input and its activations, whichever way the FFN is held.

use super::{DenseFfn, Ffn, add_bias};
use crate::weight::Activations;
use candle_sparse_core::{Config, Format, KernelSet, Matrix, Neurons};
use candle_sparse_kernels::Kernels;
use std::ops::Range;

/// What is activated, and what that is multiplied with.
#[derive(Clone, Copy)]
pub(super) struct GateUp<'a> {
    /// `gate_proj`; of an FFN without a gate `up_proj`, which stands in its place.
    gate: Matrix<'a>,
    gate_bias: Option<&'a [f32]>,
    /// `up_proj` beside a gate.
    up: Option<Matrix<'a>>,
    up_bias: Option<&'a [f32]>,
}

impl<'a> GateUp<'a> {
    pub(super) fn of(ffn: &'a Ffn) -> Self {
        match ffn {
            Ffn::Dense(f) => Self::of_dense(f),
            Ffn::Sparse(f) => {
                let up = match f.neurons() {
                    Neurons::UpDown(m) => Some(m.every(0, 2)),
                    Neurons::Down(_) | Neurons::GateUpDown(_) => None,
                };
                Self { gate: f.gate.matrix(), gate_bias: None, up, up_bias: None }
            }
        }
    }

    pub(super) fn of_dense(f: &'a DenseFfn) -> Self {
        let (first, second) = match &f.gate_proj {
            Some(gate) => (gate, Some(&f.up_proj)),
            None => (&f.up_proj, None),
        };
        Self {
            gate: first.weight.matrix(),
            gate_bias: first.bias.as_deref(),
            up: second.map(|p| p.weight.matrix()),
            up_bias: second.and_then(|p| p.bias.as_deref()),
        }
    }

    /// What the input is wanted in.
    pub(super) fn formats(&self) -> impl Iterator<Item = Format> + Clone {
        [Some(self.gate.format()), self.up.map(|up| up.format())].into_iter().flatten()
    }

    /// Bytes of all of it.
    pub(super) fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.map_or(0, |up| up.bytes())
    }

    /// `up = act(gate_proj · x − gate_shift) · (up_proj · x)`, or `act(up_proj · x − gate_shift)`, of the neurons `r` of each row
    /// of `x`; `gate` becomes what was activated.
    pub(super) fn activations(
        &self,
        kernels: &Kernels,
        c: &Config,
        x: Activations<'_>,
        r: Range<usize>,
        gate: &mut [&mut [f32]],
        up: &mut [&mut [f32]],
    ) {
        x.multiply(kernels, self.gate.slice_rows(r.clone()), gate);
        match self.up {
            Some(w) => x.multiply(kernels, w.slice_rows(r.clone()), up),
            None => up.iter_mut().for_each(|up| up.fill(1.0)),
        }
        for (gate, up) in gate.iter_mut().zip(up) {
            add_bias(gate, self.gate_bias.map(|b| &b[r.clone()]));
            add_bias(up, self.up_bias.map(|b| &b[r.clone()]));
            kernels.gated(c.hidden_act, c.gate_shift, gate, up);
        }
    }
}
