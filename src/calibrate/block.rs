//! The FFN of one block: its weights, what it computes exactly, and how it is to be fitted.

use crate::sparse::candidate_factor;
use candle_core::{Error, Result, Tensor, bail};
use candle_sparse_core::{Activation, GluActivation, KernelSet, with_methods};
use candle_sparse_kernels::Kernels;
use rayon::prelude::*;

/// Elements that a thread activates at once.
const PIECE: usize = 1 << 14;

/// How the FFN of a block is fitted.
///
/// ```
/// use candle_sparse::calibrate::{Calibrator, Settings};
///
/// // Half the default rank: the prediction reads half as many bytes and misses more.
/// let settings = Settings::default().with_rank(32);
/// assert_eq!(Calibrator::default().with_settings(settings).settings.rank, 32);
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// Rank of the prediction.
    pub rank: usize,
    /// Candidates of a cascade per neuron that it wants active; `None` takes 1.4, and 2 where most gates are shut: there a
    /// candidate costs little and the exact gate tells all.
    pub candidate_factor: Option<f32>,
    /// The mean active share at which neurons are put in order.
    pub reference_share: f32,
}

with_methods!(Settings {
    with_rank: rank: usize,
    with_candidate_factor: candidate_factor: Option<f32>,
    with_reference_share: reference_share: f32,
});

impl Default for Settings {
    fn default() -> Self {
        Self { rank: 64, candidate_factor: None, reference_share: 0.35 }
    }
}

impl Settings {
    /// The same with the factor that suits an activation, unless one is set.
    pub(super) fn for_activation(self, act: Activation) -> Self {
        let factor = self.candidate_factor.unwrap_or_else(|| candidate_factor(act));
        Self { candidate_factor: Some(factor), ..self }
    }
}

/// The FFN of one block, F32.
#[derive(Clone, Debug)]
pub(crate) struct FfnWeights {
    /// `[intermediate_size, hidden_size]`; of an FFN without a gate its `up_proj`, which decides as a gate does.
    pub gate: Tensor,
    /// `[intermediate_size, hidden_size]`; `None` without a gate: what is activated is multiplied with 1.
    pub up: Option<Tensor>,
    /// `[hidden_size, intermediate_size]`
    pub down: Tensor,
    /// Its activation.
    pub act: GluActivation,
}

impl FfnWeights {
    /// `intermediate_size` and `hidden_size`.
    pub(super) fn dims(&self) -> Result<(usize, usize)> {
        let (inner, hidden) = self.gate.dims2()?;
        let up = self.up.as_ref().map_or_else(|| self.gate.dims(), Tensor::dims);
        if up != [inner, hidden] || self.down.dims() != [hidden, inner] {
            let (gate, down) = (self.gate.dims(), self.down.dims());
            bail!(
                "calibrate: gate {gate:?}, up {up:?} and down {down:?} are no FFN: give [n, h], [n, h] and [h, n]"
            );
        }
        Ok((inner, hidden))
    }

    /// ‖down column‖ of each neuron.
    pub(super) fn norms(&self) -> Result<Vec<f32>> {
        self.down.sqr()?.sum(0)?.sqrt()?.to_vec1()
    }
}

/// Gates and ups of every neuron at every sampled token, `[tokens, intermediate_size]`, as the weights say.
pub(super) struct Exact {
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
}

impl Exact {
    pub(super) fn new(w: &FfnWeights, x: &Tensor) -> Result<Self> {
        let gate = product(x, &w.gate)?;
        let up = w.up.as_ref().map_or_else(|| Ok(vec![1.0; gate.len()]), |up| product(x, up))?;
        Ok(Self { gate, up })
    }
}

/// `x · mᵀ`
pub(super) fn product(x: &Tensor, m: &Tensor) -> Result<Vec<f32>> {
    x.matmul(&m.t()?)?.flatten_all()?.to_vec1()
}

/// `act(g − shift) · u`, element by element.
pub(super) fn gated(act: GluActivation, gate: &[f32], mut up: Vec<f32>) -> Result<Vec<f32>> {
    let kernels = Kernels::get().map_err(Error::wrap)?;
    let pieces = up.par_chunks_mut(PIECE).zip(gate.par_chunks(PIECE));
    pieces.for_each(|(up, gate)| kernels.gated(act.act, act.shift, gate, up));
    Ok(up)
}
