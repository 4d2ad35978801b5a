//! The FFN of a Llama-shaped model that computes what a token needs, as a module.

use super::rows::{like, on, rows};
use crate::{
    Profile, SparseConfig,
    sparse::{FfnMode, ModelSelection, Points, SparseFfn, TokenFfn, TokenScratch, TokenSelection},
    team::{Member, Outcome, Outputs},
    threads::ranges,
    weight::{Compute, Prepared, ROW_STEP, split_columns},
};
use candle_core::{Module, Result, Tensor, bail};
use candle_sparse_core::{Columns, Format, GluActivation, KernelSet, Matrix};
use std::{
    iter::once,
    sync::{Arc, Mutex, PoisonError},
};

const OP: &str = "sparse-mlp";

/// `y = W_down · (act(W_gate·x − shift) · W_up·x)` for the neurons that `x` needs, plus the mean of those that are left out:
/// in place of a Llama's MLP in any candle model; cheap to clone.
///
/// One row of `x` (decode) is sparse as its [`SparseConfig`] says. More rows (a prompt, a batch) are computed with all
/// neurons: their sets unite to nearly everything.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_sparse::{Activation, FfnMode, Format, GluActivation, Profile, Selection, SparseConfig, loading, ops::SparseMlp};
///
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu");
/// let vb = loading::var_builder(&[format!("{folder}/model.safetensors")], Some(DType::F32), &Device::Cpu)?;
/// let mlp = vb.pp("model.layers.1.mlp");
/// let [gate, up] = ["gate_proj.weight", "up_proj.weight"].map(|name| mlp.get((512, 256), name));
/// let (gate, up, down) = (gate?, up?, mlp.get((256, 512), "down_proj.weight")?);
/// let profile = Profile::load(format!("{folder}/sparse.safetensors"))?;
///
/// let act = GluActivation { act: Activation::Silu, shift: 0.0 };
/// let config = SparseConfig::default().with_mode(FfnMode::Cascade).with_selection(Selection::Share(0.3));
/// let mlp = SparseMlp::new(Format::Q8_0, act, [&gate, &up, &down], (&profile, 1), config)?;
/// let x = Tensor::randn(0_f32, 1.0, (1, 256), &Device::Cpu)?;
/// assert_eq!(mlp.forward(&x)?.dims(), [1, 256]);
/// assert!(mlp.active(&x)?.len() < 512);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SparseMlp {
    ffn: SparseFfn,
    points: Points,
    plans: Arc<ModelSelection>,
    act: GluActivation,
}

impl SparseMlp {
    /// The MLP of block `layer` of a calibrated model: `gate`, `up` `[intermediate_size, hidden_size]` and `down`
    /// `[hidden_size, intermediate_size]` as in the checkpoint, held in `format` in the profile's order.
    ///
    /// Rows that are no whole number of the format's blocks take another one: [`Part::fitting`](crate::weight::Part::fitting).
    ///
    /// # Errors
    /// Tensors of shapes or dtypes that do not fit, a profile that belongs to another model, a setting that it does not
    /// serve, or a guard: only whole models have one.
    pub fn new(
        format: Format,
        act: GluActivation,
        [gate, up, down]: [&Tensor; 3],
        (profile, layer): (&Profile, usize),
        config: SparseConfig,
    ) -> Result<Self> {
        let (inner, hidden) = gate.dims2()?;
        if up.dims() != [inner, hidden] || down.dims() != [hidden, inner] || inner * hidden == 0 {
            let (gate, up, down) = (gate.dims(), up.dims(), down.dims());
            bail!("sparse-mlp: gate {gate:?}, up {up:?}, down {down:?}: give [n, h], [n, h] and [h, n]");
        }
        profile.check_block(layer, hidden, inner)?;
        let tensor = |name: &str| {
            Ok(match name {
                "gate_proj" => gate.clone(),
                "up_proj" => up.clone(),
                _ => down.clone(),
            })
        };
        let ffn = SparseFfn::load(format, [inner, hidden], true, Some(&profile.layers[layer]), tensor)?;
        let points = Points::of(Some(profile), act.act.has_exact_zeros());
        let plans = Arc::new(plans(config, &points, &ffn)?);
        Ok(Self { ffn, points, plans, act })
    }

    /// The same weights with another setting.
    ///
    /// # Errors
    /// The profile does not serve it, or it has a guard.
    pub fn with_config(&self, config: SparseConfig) -> Result<Self> {
        let plans = Arc::new(plans(config, &self.points, &self.ffn)?);
        Ok(Self { plans, ..self.clone() })
    }

    /// The neurons that one row `x` `[.., hidden]` in F32, F16 or BF16 needs, increasing, in the profile's order.
    ///
    /// # Errors
    /// `x` is more than one row, of another dtype, not on the CPU or not finite.
    pub fn active(&self, x: &Tensor) -> Result<Vec<u32>> {
        let hidden = self.ffn.gate.cols();
        let values = rows(OP, x, hidden)?;
        if values.len() != hidden {
            bail!("{OP}: x is {:?}: a list of neurons belongs to one row [1, {hidden}]", x.dims());
        }
        let mut s = self.on_team(on()?, &values, |token, member, s| {
            let active = token.choose(member, s)?.active;
            s.list.truncate(active);
            Ok(())
        });
        Ok(std::mem::take(&mut s.list))
    }

    /// One row.
    fn token(&self, on: Compute<'_>, x: &[f32]) -> Vec<f32> {
        let mut s = self.on_team(on, x, |token, member, s| token.run(member, s).map(|_| ()));
        std::mem::take(&mut s.y)
    }

    /// Runs `program` on all threads; what the calling one holds afterwards.
    fn on_team(
        &self,
        on: Compute<'_>,
        x: &[f32],
        program: impl Fn(&TokenFfn<'_>, &mut Member<'_>, &mut TokenScratch) -> Outcome + Sync,
    ) -> TokenScratch {
        let (ffn, plan) = (&self.ffn, &self.plans.layers[0]);
        let mut prepared = Prepared::default();
        let rounded = match ffn.rounds_input() {
            true => on.column(Format::Q8_0, x, &mut prepared),
            false => Columns::F32(x),
        };
        let (dense, top) = (plan.mode == FfnMode::Dense, plan.top);
        let selection = TokenSelection { plan, dense, factor: 1.0, top, sample: false };
        let token = TokenFfn { kernels: on.kernels, ffn, act: self.act, selection, x, rounded };
        let mut outputs = Outputs::of(on.threads.count());
        TokenFfn::declare(ffn, &mut outputs);
        let rank = ffn.predictor.as_ref().map_or(0, |p| p.p.rows());
        let local = || {
            let mut s = TokenScratch::default();
            s.resize([ffn.intermediate_size(), x.len(), rank]);
            Mutex::new(s)
        };
        let mut locals: Vec<_> = (0..on.threads.count()).map(|_| local()).collect();
        let run = |member: &mut Member<'_>, s: &mut TokenScratch| program(&token, member, s);
        let outcome = on.threads.lone_team(&outputs, &locals, run);
        debug_assert_eq!(outcome, Ok(()), "nobody gives up");
        locals.swap_remove(0).into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// All neurons for many rows: the activations by neurons, the output by rows.
    fn rows(&self, on: Compute<'_>, x: &[f32]) -> Vec<f32> {
        let SparseFfn { gate: gate_w, up_down, .. } = &self.ffn;
        let (inner, hidden) = (gate_w.rows(), gate_w.cols());
        let n = x.len() / hidden;
        let mut prepared = Prepared::default();
        let x = on.input(once(gate_w.format()), hidden, x, &mut prepared);
        let tasks = on.threads.tasks(inner.div_ceil(ROW_STEP), 2 * n * gate_w.bytes());
        let ranges: Vec<_> = ranges(inner, tasks, ROW_STEP).collect();
        let (mut gate, mut a) = (vec![0.0; n * inner], vec![0.0; n * inner]);
        let widths = ranges.iter().map(ExactSizeIterator::len);
        let (gates, ups) =
            (split_columns(&mut gate, inner, widths.clone()), split_columns(&mut a, inner, widths));
        let up_w = up_down.matrix().every(0, 2);
        on.threads.for_each(ranges.iter().zip(gates.into_iter().zip(ups)), |(r, (mut gate, mut up))| {
            x.multiply(on.kernels, gate_w.matrix().slice_rows(r.clone()), &mut gate);
            x.multiply(on.kernels, up_w.slice_rows(r.clone()), &mut up);
            for (gate, up) in gate.iter().zip(up) {
                on.kernels.gated(self.act.act, self.act.shift, gate, up);
            }
        });
        let mut y = vec![0.0; n * hidden];
        let run = n.div_ceil(on.threads.tasks(n, n * up_down.bytes()));
        let tasks = a.chunks(run * inner).zip(y.chunks_mut(run * hidden));
        on.threads.for_each(tasks, |(a, y)| sum_rows(on, up_down.matrix().every(1, 2), a, y));
        y
    }
}

impl Module for SparseMlp {
    /// `x` `[.., hidden]` in F32, F16 or BF16, and so is the result.
    ///
    /// Cost for one row: 3 rows of `hidden` multiply-adds and bytes per active neuron and what the choice reads (all gates,
    /// or `rank · (hidden + 2 · intermediate_size)` and the gates of candidates); else `3 · hidden · intermediate_size` per
    /// row.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (hidden, on) = (self.ffn.gate.cols(), on()?);
        let values = rows(OP, x, hidden)?;
        let y = if values.len() == hidden { self.token(on, &values) } else { self.rows(on, &values) };
        like(x, y, hidden)
    }
}

fn plans(config: SparseConfig, points: &Points, ffn: &SparseFfn) -> Result<ModelSelection> {
    if config.guard.is_some() {
        bail!("sparse-mlp: one MLP has no guard, set it to None: whole models have one");
    }
    ModelSelection::new(config, points, once(Some(ffn)))
}

/// `y = a · w` for rows of `a` and `y`.
fn sum_rows(on: Compute<'_>, w: Matrix<'_>, a: &[f32], y: &mut [f32]) {
    let a: Vec<_> = a.chunks_exact(w.rows()).collect();
    let mut y: Vec<_> = y.chunks_exact_mut(w.cols()).collect();
    on.kernels.matmul_t(w, &a, &mut y);
}

#[cfg(test)]
mod tests;
