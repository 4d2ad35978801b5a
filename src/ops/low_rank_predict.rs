//! Which neurons of an FFN a token needs, from a product of low rank, as a candle op.

use super::{
    rows::{on, rows},
    sparse_ffn::vector,
};
use crate::{
    Weight,
    profile::Profile,
    weight::{Compute, Prepared},
};
use candle_core::{Device, Result, Tensor, bail};
use candle_sparse_core::{Format, GluActivation, KernelSet, kernel::select};
use candle_sparse_kernels::Kernels;
use std::sync::Arc;

const OP: &str = "low-rank-predict";

/// A prediction of gate and up, `ĝ = Q_g·P·x` and `û = Q_u·P·x`, and what is known of its errors; cheap to clone.
///
/// A neuron's score is the root of the expected square of what it adds, `E[act(g)²] · (û² + v_u) · n²`, with
/// `E[act(g)²] = (act(ĝ − √v_g)² + act(ĝ + √v_g)²) / 2`, as in [`crate::profile`]. Without `Q_u`, as for the two-matrix
/// FFN, it is `√E[act(g)²] · n`: the predicted activation's size where nothing else is known.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Activation, Format, GluActivation, ops::LowRankPredictor};
///
/// // Rank 1: all three gates are multiples of the sum of the inputs.
/// let p = Tensor::new(&[[1.0_f32, 1.0]], &Device::Cpu)?;
/// let q_gate = Tensor::new(&[[2.0_f32], [-1.0], [0.5]], &Device::Cpu)?;
/// let act = GluActivation { act: Activation::Relu, shift: 0.0 };
/// let predictor = LowRankPredictor::new(Format::F32, act, &p, &q_gate, None)?;
/// let x = Tensor::new(&[[3.0_f32, 1.0]], &Device::Cpu)?;
/// assert_eq!(predictor.scores(&x)?.to_vec2::<f32>()?, [[8.0, 0.0, 2.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LowRankPredictor {
    p: Weight,
    q_gate: Weight,
    q_up: Option<Weight>,
    act: GluActivation,
    bias: Option<Arc<[f32]>>,
    /// `√v_g`
    gate_deviation: Arc<[f32]>,
    up_variance: Arc<[f32]>,
    /// `n²`
    importance: Arc<[f32]>,
}

/// Which neurons a prediction is to name, by their [scores](LowRankPredictor::scores).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Activation, Format, GluActivation, ops::{LowRankPredictor, Wanted, low_rank_predict}};
///
/// // Rank 1: all three gates are multiples of the sum of the inputs.
/// let p = Tensor::new(&[[1.0_f32, 1.0]], &Device::Cpu)?;
/// let q_gate = Tensor::new(&[[2.0_f32], [-1.0], [0.5]], &Device::Cpu)?;
/// let act = GluActivation { act: Activation::Relu, shift: 0.0 };
/// let predictor = LowRankPredictor::new(Format::F32, act, &p, &q_gate, None)?;
/// let x = Tensor::new(&[[3.0_f32, 1.0]], &Device::Cpu)?; // scores 8, 0 and 2
/// for (wanted, neurons) in [
///     (Wanted::Threshold(1.0), &[0, 2][..]),
///     (Wanted::TopK(1), &[0]),
///     // The second is an exact 0.
///     (Wanted::Share(1.0), &[0, 2]),
/// ] {
///     assert_eq!(low_rank_predict(&x, &predictor, wanted)?, neurons);
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// Those whose score is not below it: none with an exact 0 where it is above 0, all where it is not.
    Threshold(f32),
    /// So many with the largest scores; exact zeros are never among them.
    TopK(usize),
    /// This share of all neurons, as [`Self::TopK`]: a target sparsity of 0.9 is a share of 0.1.
    Share(f32),
}

impl LowRankPredictor {
    /// A prediction without known errors, all neurons equally important: `p` `[rank, hidden_size]`, `q_gate` and `q_up`
    /// `[intermediate_size, rank]`, held in `format` where their rows are whole blocks of it.
    ///
    /// # Errors
    /// Shapes that do not fit together, a dtype other than F32, F16, BF16, or a device other than the CPU.
    pub fn new(
        format: Format,
        act: GluActivation,
        p: &Tensor,
        q_gate: &Tensor,
        q_up: Option<&Tensor>,
    ) -> Result<Self> {
        let ((rank, hidden), (n, _)) = (p.dims2()?, q_gate.dims2()?);
        for (name, q) in [("q_gate", Some(q_gate)), ("q_up", q_up)] {
            if let Some(q) = q.filter(|q| q.dims() != [n, rank] || rank * hidden * n == 0) {
                bail!("{OP}: {name} is {:?}, p {:?}: give [n, r] and [r, h]", q.dims(), p.dims());
            }
        }
        Ok(Self {
            p: Weight::from_tensor(p, format)?,
            q_gate: Weight::from_tensor(q_gate, format)?,
            q_up: q_up.map(|q| Weight::from_tensor(q, format)).transpose()?,
            act,
            bias: None,
            gate_deviation: vec![0.0; n].into(),
            up_variance: vec![0.0; n].into(),
            importance: vec![1.0; n].into(),
        })
    }

    /// The prediction of block `layer` of a profile, its neurons in the checkpoint's order.
    ///
    /// # Errors
    /// There is no such block, it has rank 0, or its vectors do not fit together.
    pub fn from_profile(format: Format, act: GluActivation, profile: &Profile, layer: usize) -> Result<Self> {
        let Some(l) = profile.layers.get(layer).filter(|l| l.rank > 0 && !l.p.is_empty()) else {
            bail!("{OP}: the profile has no prediction for layer {layer}: calibrate with a rank");
        };
        let (n, rank) = (l.order.len(), l.rank);
        profile.check_block(layer, l.p.len() / rank, n)?;
        let tensor = |v: &[f32], cols| Tensor::from_slice(v, (v.len() / cols, cols), &Device::Cpu);
        let mut place = vec![0_u32; n];
        l.order.iter().zip(0..).for_each(|(&o, i)| place[o as usize] = i);
        let place = Tensor::new(place, &Device::Cpu)?;
        let moved = |v: &[f32], cols| tensor(v, cols)?.index_select(&place, 0);
        let each = |v: &[f32]| moved(v, 1)?.squeeze(1);
        let (q_gate, q_up) = (moved(&l.q_gate, rank)?, moved(&l.q_up, rank)?);
        let p = tensor(&l.p, l.p.len() / rank)?;
        Self::new(format, act, &p, &q_gate, Some(&q_up))?
            .with_variances(&each(&l.gate_variance)?, &each(&l.up_variance)?)?
            .with_importance(&each(&l.importance)?)
    }

    /// With mean squares of what the prediction misses, `v_g` and `v_u` `[intermediate_size]`; without `q_up` the second
    /// counts nothing.
    ///
    /// # Errors
    /// Another shape, or a value that is negative or not finite.
    pub fn with_variances(self, gate: &Tensor, up: &Tensor) -> Result<Self> {
        let gate = self.not_negative("gate variance", gate)?.iter().map(|v| v.sqrt()).collect();
        Ok(Self { gate_deviation: gate, up_variance: self.not_negative("up variance", up)?, ..self })
    }

    /// With the importance n `[intermediate_size]` of each neuron, the norm of its column of `down_proj`.
    ///
    /// # Errors
    /// As [`Self::with_variances`].
    pub fn with_importance(self, n: &Tensor) -> Result<Self> {
        let importance = self.not_negative("importance", n)?.iter().map(|v| v * v).collect();
        Ok(Self { importance, ..self })
    }

    /// With what is added to the predicted gate `[intermediate_size]`, as `b1` of the two-matrix FFN.
    ///
    /// # Errors
    /// Another shape.
    pub fn with_bias(self, b1: &Tensor) -> Result<Self> {
        Ok(Self { bias: Some(vector(OP, "bias", b1, self.intermediate_size())?), ..self })
    }

    fn not_negative(&self, name: &str, t: &Tensor) -> Result<Arc<[f32]>> {
        let v = vector(OP, name, t, self.intermediate_size())?;
        match v.iter().position(|v| !(*v >= 0.0 && v.is_finite())) {
            Some(i) => bail!("{OP}: {name}[{i}] is {}, it must be 0 or more and finite", v[i]),
            None => Ok(v),
        }
    }

    /// Neurons.
    #[must_use]
    pub fn intermediate_size(&self) -> usize {
        self.q_gate.rows()
    }

    /// Elements of the input.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.p.cols()
    }

    /// The score of each neuron `[.., intermediate_size]` for each row of `x` `[.., hidden]` in F32, F16 or BF16; scores are F32.
    ///
    /// Cost per row: `rank · (hidden + intermediate_size)` multiply-adds, twice the second with `q_up`; all matrices are read
    /// once.
    ///
    /// # Errors
    /// `x` is of another width or dtype, not on the CPU or not finite.
    pub fn scores(&self, x: &Tensor) -> Result<Tensor> {
        let scores: Vec<f32> = self.squares(x)?.into_iter().map(f32::sqrt).collect();
        let mut dims = x.dims().to_vec();
        dims.pop();
        dims.push(self.intermediate_size());
        Tensor::from_vec(scores, dims, x.device())
    }

    /// Expected squares of what neurons add, row after row.
    fn squares(&self, x: &Tensor) -> Result<Vec<f32>> {
        let (hidden, on) = (self.hidden_size(), on()?);
        let values = rows(OP, x, hidden)?;
        Ok(values.chunks_exact(hidden).flat_map(|x| self.row_squares(on, x)).collect())
    }

    fn row_squares(&self, on: Compute<'_>, x: &[f32]) -> Vec<f32> {
        let z = product(on, &self.p, x);
        let mut gate = product(on, &self.q_gate, &z);
        if let Some(bias) = &self.bias {
            gate.iter_mut().zip(&**bias).for_each(|(g, b)| *g += b);
        }
        let mut squares = self.expected_squares(on.kernels, gate);
        let up = self.q_up.as_ref().map(|q| product(on, q, &z));
        for (i, s) in squares.iter_mut().enumerate() {
            let (u, v) = up.as_ref().map_or((1.0, 0.0), |u| (u[i], self.up_variance[i]));
            *s = select::score(*s, u, v) * self.importance[i];
        }
        squares
    }

    /// `E[act(g)²]`
    fn expected_squares(&self, kernels: &Kernels, mut gate: Vec<f32>) -> Vec<f32> {
        let activate = |gate: &[f32]| {
            let mut a = vec![1.0; gate.len()];
            kernels.gated(self.act.act, self.act.shift, gate, &mut a);
            a
        };
        gate.iter_mut().zip(&*self.gate_deviation).for_each(|(g, d)| *g -= d);
        let low = activate(&gate);
        gate.iter_mut().zip(&*self.gate_deviation).for_each(|(g, d)| *g += 2.0 * d);
        low.iter().zip(activate(&gate)).map(|(l, h)| select::expected_square(*l, h)).collect()
    }
}

/// `w · x`
fn product(on: Compute<'_>, w: &Weight, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; w.rows()];
    w.matmul(on, x, &mut Prepared::default(), &mut y);
    y
}

/// The neurons that `x` `[.., hidden]` in F32, F16 or BF16 needs, strictly increasing, by their [`LowRankPredictor::scores`];
/// it may be empty. Of several rows: those that any of them needs.
///
/// A list and no tensor: its length depends on the numbers, and [`super::sparse_ffn()`] takes it as it is.
/// `Tensor::new(list, x.device())` gives indices for `index_select`.
///
/// Cost: as [`LowRankPredictor::scores`], and a few operations per neuron.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Activation, Format, GluActivation, ops::{LowRankPredictor, Wanted, low_rank_predict}};
///
/// // Rank 1: all three gates are multiples of the sum of the inputs.
/// let p = Tensor::new(&[[1.0_f32, 1.0]], &Device::Cpu)?;
/// let q_gate = Tensor::new(&[[2.0_f32], [-1.0], [0.5]], &Device::Cpu)?;
/// let act = GluActivation { act: Activation::Relu, shift: 0.0 };
/// let predictor = LowRankPredictor::new(Format::F32, act, &p, &q_gate, None)?;
/// // Of several rows: what any of them needs.
/// let x = Tensor::new(&[[3.0_f32, 1.0], [-1.0, -1.0]], &Device::Cpu)?;
/// assert_eq!(low_rank_predict(&x, &predictor, Wanted::TopK(1))?, [0, 1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`LowRankPredictor::scores`]; also a threshold that is NaN, a top-k of 0 or a share outside 0 to 1.
pub fn low_rank_predict(x: &Tensor, predictor: &LowRankPredictor, wanted: Wanted) -> Result<Vec<u32>> {
    let n = predictor.intermediate_size();
    let k = match wanted {
        Wanted::Threshold(t) if t.is_nan() => bail!("{OP}: threshold is NaN, give a number"),
        Wanted::TopK(0) => bail!("{OP}: top-k of 0 neurons, give at least 1"),
        Wanted::Threshold(_) => 0,
        Wanted::TopK(k) => k,
        Wanted::Share(s) if s > 0.0 && s <= 1.0 => ((s * n as f32).round() as usize).max(1),
        Wanted::Share(s) => bail!("{OP}: share {s} is not within 0 and 1"),
    };
    let squares = predictor.squares(x)?;
    let (mut room, mut list, mut needed) = (vec![0.0; n], vec![0; n], vec![false; n]);
    for squares in squares.chunks_exact(n) {
        if let Wanted::Threshold(t) = wanted {
            // A threshold below 0 lets everything pass, so its square has to stay below 0.
            needed.iter_mut().zip(squares).for_each(|(needed, s)| *needed |= select::passes(*s, t * t.abs()));
        } else {
            let active = select::largest(squares, k, &mut room, &mut list);
            list[..active].iter().for_each(|&i| needed[i as usize] = true);
        }
    }
    Ok((0..n as u32).filter(|i| needed[*i as usize]).collect())
}

#[cfg(test)]
mod tests;
