//! The gated feed-forward product and the cross-entropy, each with a fused backward pass.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::config::HiddenAct;
use super::ops::{done, exp, f32s};

/// `act(gate) * up`, the inner part of the Llama feed-forward.
pub(crate) struct GatedProduct(pub(crate) HiddenAct);

/// The activation and its slope at `x`.
fn act_and_slope(act: HiddenAct, x: f32) -> (f32, f32) {
    match act {
        HiddenAct::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        HiddenAct::Relu2 => (x.max(0.0) * x.max(0.0), 2.0 * x.max(0.0)),
        HiddenAct::Silu => {
            let s = 1.0 / (1.0 + exp(-x));
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
    }
}

impl CustomOp2 for GatedProduct {
    fn name(&self) -> &'static str {
        "gated-product"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (f32s(s1, l1)?, f32s(s2, l2)?);
        let mut out = vec![0f32; gate.len()];
        for ((o, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *o = act_and_slope(self.0, *gate).0 * up;
        }
        done(out, l1.shape())
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dgate = gate.apply_op3_no_bwd(up, &grad, &GatedProductGrad(self.0))?;
        // The slope with respect to `up` is the activation itself: the same product again.
        let dup = gate.apply_op2_no_bwd(&grad, &GatedProduct(self.0))?;
        Ok((Some(dgate), Some(dup)))
    }
}

struct GatedProductGrad(HiddenAct);

impl CustomOp3 for GatedProductGrad {
    fn name(&self) -> &'static str {
        "gated-product-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up, grad) = (f32s(s1, l1)?, f32s(s2, l2)?, f32s(s3, l3)?);
        let mut out = vec![0f32; gate.len()];
        for (((o, gate), up), grad) in out.iter_mut().zip(gate).zip(up).zip(grad) {
            *o = act_and_slope(self.0, *gate).1 * up * grad;
        }
        done(out, l1.shape())
    }
}

/// Negative log-likelihood of each row's target, in nats: logits `(n, vocab)`, targets `(n)` u32.
pub(crate) struct CrossEntropy;

fn u32s<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [u32]> {
    let (from, to) = layout.contiguous_offsets().unwrap_or((0, 0));
    Ok(&storage.as_slice::<u32>()?[from..to])
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (logits, targets) = (f32s(s1, l1)?, u32s(s2, l2)?);
        let (n, vocab) = l1.shape().dims2()?;
        let mut out = vec![0f32; n];
        let rows = out.par_iter_mut().zip(logits.par_chunks(vocab)).zip(targets);
        rows.for_each(|((o, row), target)| {
            let (max, sum) = max_and_exp_sum(row);
            *o = sum.ln() + max - row[*target as usize];
        });
        done(out, n)
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dlogits = logits.apply_op3_no_bwd(targets, &grad, &CrossEntropyGrad)?;
        Ok((Some(dlogits), None))
    }
}

/// The largest of a row, and the sum of `e^(x - largest)`.
pub(crate) fn max_and_exp_sum(row: &[f32]) -> (f32, f32) {
    let max = row.iter().fold(f32::MIN, |m, x| m.max(*x));
    (max, row.iter().map(|x| exp(x - max)).sum())
}

struct CrossEntropyGrad;

impl CustomOp3 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross-entropy-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (logits, targets, grad) = (f32s(s1, l1)?, u32s(s2, l2)?, f32s(s3, l3)?);
        let (_, vocab) = l1.shape().dims2()?;
        let mut out = vec![0f32; logits.len()];
        let rows = out.par_chunks_mut(vocab).zip(logits.par_chunks(vocab));
        rows.zip(targets).zip(grad).for_each(|(((out, row), target), grad)| {
            let (max, sum) = max_and_exp_sum(row);
            let scale = grad / sum;
            for (o, x) in out.iter_mut().zip(row) {
                *o = exp(x - max) * scale;
            }
            out[*target as usize] -= grad;
        });
        done(out, l1.shape())
    }
}
