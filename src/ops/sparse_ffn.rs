//! The FFN of some neurons as a candle op.
//!
//! ```text
//! list of active neurons, cut into parts by its bytes → each part: products, activation, its own sum of down rows
//! the sums in the order of the parts
//! ```

use super::rows::{like, on, rows};
use crate::tuning::{OP_PART_BYTES, OP_PARTS};
use crate::{
    Weight,
    threads::ranges,
    weight::{Compute, Prepared},
};
use candle_core::{DType, Result, Tensor, bail};
use candle_sparse_core::{Columns, Format, GluActivation, KernelSet, Neurons};
use candle_sparse_kernels::Kernels;
use std::{ops::Range, sync::Arc};

/// The weights of one FFN held neuron by neuron, so that some can be left out; cheap to clone.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Activation, Format, GluActivation, ops::NeuronWeights};
///
/// let relu = GluActivation { act: Activation::Relu, shift: 0.0 };
/// let gate = Tensor::new(&[[1.0_f32, 0.0], [0.0, 1.0], [-1.0, 0.0]], &Device::Cpu)?; // [3, 2]
/// let down = Tensor::new(&[[1.0_f32, 0.0, 1.0], [0.0, 1.0, 1.0]], &Device::Cpu)?; // [2, 3]
/// let weights = NeuronWeights::gated(Format::F32, relu, &gate, &gate, &down)?;
/// assert_eq!((weights.intermediate_size(), weights.hidden_size()), (3, 2));
/// // Rows of gate, up and down.
/// assert_eq!(weights.neuron_bytes(), 3 * 2 * 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct NeuronWeights {
    form: Form,
    act: GluActivation,
}

#[derive(Clone, Debug)]
enum Form {
    /// `gate` `[intermediate_size, hidden_size]`, `up_down` `[2 · intermediate_size, hidden_size]`.
    Gated { gate: Weight, up_down: Weight },
    /// `rows` `[2 · intermediate_size, hidden_size]`: row of W1, column of W2.
    Plain { rows: Weight, b1: Option<Arc<[f32]>>, b2: Option<Arc<[f32]>> },
}

impl NeuronWeights {
    /// `y = W_down · (act(W_gate·x − shift) · W_up·x)`, the FFN of Llama: `gate` and `up` `[intermediate_size,
    /// hidden_size]`, `down` `[hidden_size, intermediate_size]` as in a checkpoint.
    ///
    /// `down` is transposed, so a block format quantises it along `hidden_size`; where that is no whole number of
    /// blocks the tensors' dtype is kept. Memory beside the result: a copy of `down`.
    ///
    /// # Errors
    /// Shapes that do not fit together, a dtype other than F32, F16, BF16, or a device other than the CPU.
    pub fn gated(
        format: Format,
        act: GluActivation,
        gate: &Tensor,
        up: &Tensor,
        down: &Tensor,
    ) -> Result<Self> {
        if gate.dims() != up.dims() {
            bail!("sparse-ffn: gate is {:?}, up {:?}: they must be equal", gate.dims(), up.dims());
        }
        let up_down = side_by_side(format, up, down)?;
        let gate = Weight::from_tensor(gate, format)?;
        Ok(Self { form: Form::Gated { gate, up_down }, act })
    }

    /// The same from weights that are neuron-major already: `gate` `[intermediate_size, hidden_size]`, `up_down`
    /// `[2 · intermediate_size, hidden_size]` with up row and down column of a neuron side by side.
    ///
    /// # Errors
    /// Shapes or formats that do not fit together.
    pub fn from_gate_up_down(act: GluActivation, gate: Weight, up_down: Weight) -> Result<Self> {
        let (g, ud) = ([gate.rows(), gate.cols()], [up_down.rows(), up_down.cols()]);
        if ud != [2 * g[0], g[1]] || gate.format().is_quantized() != up_down.format().is_quantized() {
            bail!(
                "sparse-ffn: gate {g:?} in {} and up_down {ud:?} in {}: give [n, h] and [2 n, h] in one format",
                gate.format().name(),
                up_down.format().name()
            );
        }
        Ok(Self { form: Form::Gated { gate, up_down }, act })
    }

    /// `y = W2 · act(W1·x + b1 − shift) + b2`, the FFN of OPT or BERT: `w1` `[intermediate_size, hidden_size]`, `w2`
    /// `[hidden_size, intermediate_size]`, `b1` `[intermediate_size]`, `b2` `[hidden_size]`.
    ///
    /// `w2` is transposed, with the consequences named at [`Self::gated`].
    ///
    /// # Errors
    /// As [`Self::gated`].
    pub fn two_matrix(
        format: Format,
        act: GluActivation,
        (w1, b1): (&Tensor, Option<&Tensor>),
        (w2, b2): (&Tensor, Option<&Tensor>),
    ) -> Result<Self> {
        let rows = side_by_side(format, w1, w2)?;
        let b1 = b1.map(|b| vector("sparse-ffn", "b1", b, rows.rows() / 2)).transpose()?;
        let b2 = b2.map(|b| vector("sparse-ffn", "b2", b, rows.cols())).transpose()?;
        Ok(Self { form: Form::Plain { rows, b1, b2 }, act })
    }

    /// Neurons.
    #[must_use]
    pub fn intermediate_size(&self) -> usize {
        self.pairs().rows() / 2
    }

    /// Elements of input and output.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.pairs().cols()
    }

    /// Bytes that a neuron takes.
    #[must_use]
    pub fn neuron_bytes(&self) -> usize {
        let row = |w: &Weight| w.format().row_bytes(w.cols());
        match &self.form {
            Form::Gated { gate, up_down } => row(gate) + 2 * row(up_down),
            Form::Plain { rows, .. } => 2 * row(rows),
        }
    }

    /// The matrix with two rows per neuron.
    fn pairs(&self) -> &Weight {
        match &self.form {
            Form::Gated { up_down: pairs, .. } | Form::Plain { rows: pairs, .. } => pairs,
        }
    }

    /// `y += Σ` over the neurons of a list, on the calling thread.
    fn add_neurons(&self, kernels: &Kernels, active: &[u32], x: Columns<'_>, y: &mut [f32]) {
        let mut gate = vec![0.0; active.len()];
        match &self.form {
            Form::Gated { gate: w, up_down } => {
                kernels.matvec_rows(w.matrix(), active, x, &mut gate);
                kernels.sparse_ffn(Neurons::UpDown(up_down.matrix()), self.act, active, x, &mut gate, y);
            }
            Form::Plain { rows, b1, .. } => {
                let m = rows.matrix();
                kernels.matvec_rows(m.every(0, 2), active, x, &mut gate);
                if let Some(b1) = b1 {
                    active.iter().zip(&mut gate).for_each(|(&n, g)| *g += b1[n as usize]);
                }
                let mut a = vec![1.0; active.len()];
                kernels.gated(self.act.act, self.act.shift, &gate, &mut a);
                kernels.axpy_rows(m.every(1, 2), active, &a, y);
            }
        }
    }

    /// The FFN of the neurons of a checked list.
    fn forward(&self, on: Compute<'_>, active: &[u32], x: &[f32]) -> Vec<f32> {
        let (hidden, format) = (self.hidden_size(), self.pairs().format());
        let mut prepared = Prepared::default();
        let x = on.column(format, x, &mut prepared);
        let mut y = match &self.form {
            Form::Plain { b2: Some(b2), .. } => b2.to_vec(),
            _ => vec![0.0; hidden],
        };
        add_in_parts(on, active.len(), self.neuron_bytes(), &mut y, |r, y| {
            self.add_neurons(on.kernels, &active[r], x, y);
        });
        y
    }
}

/// `y += Σ` over the `n` entries of a list, `bytes` read for each, where `add` adds those of a range. The cut depends on
/// the list, so threads do not change a bit.
fn add_in_parts(
    on: Compute<'_>,
    n: usize,
    bytes: usize,
    y: &mut [f32],
    add: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let parts = (n * bytes / OP_PART_BYTES).clamp(1, OP_PARTS);
    let mut sums = vec![0.0; parts * y.len()];
    let tasks = ranges(n, parts, 1).zip(sums.chunks_exact_mut(y.len()));
    on.threads.for_each(tasks, |(r, sum)| add(r, sum));
    sums.chunks_exact(y.len()).for_each(|sum| on.kernels.axpy(1.0, sum, y));
}

/// `[2 · intermediate_size, hidden_size]`: row of `first`, then column of `second`, neuron by neuron.
fn side_by_side(format: Format, first: &Tensor, second: &Tensor) -> Result<Weight> {
    let (n, h) = first.dims2()?;
    if second.dims() != [h, n] || n == 0 || h == 0 {
        bail!(
            "sparse-ffn: {:?} into the neurons and {:?} out of them do not fit: give [n, h] and [h, n]",
            first.dims(),
            second.dims()
        );
    }
    let order: Vec<u32> = (0..n as u32).collect();
    Weight::interleaved(format, h, 2, &order, |part| if part == 0 { Ok(first.clone()) } else { second.t() })
}

/// `[len]` numbers of any dtype.
pub(super) fn vector(op: &str, name: &str, t: &Tensor, len: usize) -> Result<Arc<[f32]>> {
    if t.dims() != [len] {
        bail!("{op}: {name} is {:?}, expected {:?}", t.dims(), [len]);
    }
    Ok(t.to_dtype(DType::F32)?.to_vec1()?.into())
}

fn check_active(active: &[u32], n: usize) -> Result<()> {
    if let Some(i) = active.windows(2).position(|w| w[0] >= w[1]) {
        bail!(
            "sparse-ffn: active[{}] = {} follows {}: sort the neurons and name each once",
            i + 1,
            active[i + 1],
            active[i]
        );
    }
    match active.last() {
        Some(&last) if last as usize >= n => {
            bail!("sparse-ffn: active neuron {last} is past the last of {n}")
        }
        _ => Ok(()),
    }
}

/// `y = Σ_i act(gate_i·x − shift) · (up_i·x) · down_i` over the active neurons i, or `b2 + Σ_i act(W1_i·x + b1_i − shift)
/// · W2_i` for two matrices; `x` `[.., hidden]` in F32, F16 or BF16, and so is `y`: one list of neurons serves all rows.
///
/// `active` is strictly increasing; empty is legal and gives 0 or `b2`. Cost per row: 3 (2) rows of `hidden` multiply-adds and
/// bytes per active neuron, whatever the number of neurons. The result does not depend on the number of threads.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Activation, Format, GluActivation, ops::{NeuronWeights, sparse_ffn}};
///
/// let relu = GluActivation { act: Activation::Relu, shift: 0.0 };
/// let gate = Tensor::new(&[[1.0_f32, 0.0], [0.0, 1.0], [-1.0, 0.0]], &Device::Cpu)?; // [3, 2]
/// let down = Tensor::new(&[[1.0_f32, 0.0, 1.0], [0.0, 1.0, 1.0]], &Device::Cpu)?; // [2, 3]
/// let weights = NeuronWeights::gated(Format::F32, relu, &gate, &gate, &down)?;
/// let x = Tensor::new(&[[2.0_f32, 3.0]], &Device::Cpu)?;
/// // The third gate is shut: without it the result is the same.
/// assert_eq!(sparse_ffn(&x, &weights, &[0, 1])?.to_vec2::<f32>()?, [[4.0, 9.0]]);
/// assert_eq!(sparse_ffn(&x, &weights, &[0, 1, 2])?.to_vec2::<f32>()?, [[4.0, 9.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// `x` is of another width or dtype, not on the CPU or not finite; `active` is not increasing or names no neuron.
pub fn sparse_ffn(x: &Tensor, w: &NeuronWeights, active: &[u32]) -> Result<Tensor> {
    let (hidden, on) = (w.hidden_size(), on()?);
    let values = rows("sparse-ffn", x, hidden)?;
    check_active(active, w.intermediate_size())?;
    let y = values.chunks_exact(hidden).flat_map(|x| w.forward(on, active, x)).collect();
    like(x, y, hidden)
}

#[cfg(test)]
mod tests;
