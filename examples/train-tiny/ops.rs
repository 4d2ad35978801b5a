//! Fused CPU operations with a backward pass.
//!
//! candle's own fused `rms_norm`, `softmax_last_dim` and `rotary_emb::rope` have no backward, and
//! their plain twins build many temporaries per step; these ops make one pass over the data.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::Arc;

/// The f32 values of a contiguous input.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<f32>()?[from..to]),
        None => bail!("this op needs a contiguous input"),
    }
}

/// The result pair of an op's forward pass.
pub(crate) fn done(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

/// e^x to about 1e-7 relative, in a form the compiler turns into vector code.
pub(crate) fn exp(x: f32) -> f32 {
    // Cody-Waite reduction: x = n ln 2 + r with |r| <= ln 2 / 2.
    let x = x.clamp(-87.0, 88.0);
    let n = (x * core::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = (p * r + 0.5) * r * r + r + 1.0;
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// `x / rms(x) * weight` over the last dimension.
pub(crate) struct RmsNorm {
    /// Added to the mean square, as in the Llama config.
    pub(crate) eps: f32,
}

fn inv_rms(row: &[f32], eps: f32) -> f32 {
    let square: f32 = row.iter().map(|x| x * x).sum();
    1.0 / (square / row.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (f32s(s1, l1)?, f32s(s2, l2)?);
        let mut out = vec![0f32; x.len()];
        let rows = out.par_chunks_mut(w.len()).zip(x.par_chunks(w.len()));
        rows.for_each(|(out, x)| {
            let scale = inv_rms(x, self.eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                *o = x * scale * w;
            }
        });
        done(out, l1.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dx = x.apply_op3_no_bwd(w, &grad, &RmsNormGradX(self.eps))?;
        let dw = x.apply_op3_no_bwd(w, &grad, &RmsNormGradW(self.eps))?;
        Ok((Some(dx), Some(dw)))
    }
}

struct RmsNormGradX(f32);

impl CustomOp3 for RmsNormGradX {
    fn name(&self) -> &'static str {
        "rms-norm-grad-x"
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
        let (x, w, g) = (f32s(s1, l1)?, f32s(s2, l2)?, f32s(s3, l3)?);
        let n = w.len();
        let mut out = vec![0f32; x.len()];
        let rows = out.par_chunks_mut(n).zip(x.par_chunks(n)).zip(g.par_chunks(n));
        rows.for_each(|((out, x), g)| {
            let scale = inv_rms(x, self.0);
            let dot: f32 = x.iter().zip(g).zip(w).map(|((x, g), w)| x * g * w).sum();
            let shift = dot * scale * scale / n as f32;
            for (((o, x), g), w) in out.iter_mut().zip(x).zip(g).zip(w) {
                *o = scale * (g * w - x * shift);
            }
        });
        done(out, l1.shape())
    }
}

struct RmsNormGradW(f32);

impl CustomOp3 for RmsNormGradW {
    fn name(&self) -> &'static str {
        "rms-norm-grad-w"
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
        let (x, w, g) = (f32s(s1, l1)?, f32s(s2, l2)?, f32s(s3, l3)?);
        let n = w.len();
        let mut out = vec![0f32; n];
        for (x, g) in x.chunks(n).zip(g.chunks(n)) {
            let scale = inv_rms(x, self.0);
            for ((o, x), g) in out.iter_mut().zip(x).zip(g) {
                *o += x * scale * g;
            }
        }
        done(out, l2.shape())
    }
}

/// Cosines and sines of the rotary embedding, one row of `head_dim / 2` per position.
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// Tabulates `positions` rows for `head_dim` and the base `theta`.
    pub(crate) fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let angle = |i: usize| {
            let exponent = (2 * (i % half)) as f64 / head_dim as f64;
            (i / half) as f64 / theta.powf(exponent)
        };
        Self {
            cos: (0..positions * half).map(|i| angle(i).cos() as f32).collect(),
            sin: (0..positions * half).map(|i| angle(i).sin() as f32).collect(),
            half,
        }
    }
}

/// Rotates `(batch, time, heads, head_dim)` and lays it out as `(batch, heads, time, head_dim)`.
#[derive(Clone)]
pub(crate) struct RopeHeads {
    /// The angles to rotate by.
    pub(crate) table: Arc<RopeTable>,
    /// The gradient goes the other way: from heads-first to time-first, by the opposite angle.
    pub(crate) inverse: bool,
}

impl CustomOp1 for RopeHeads {
    fn name(&self) -> &'static str {
        "rope-heads"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32s(storage, layout)?;
        let (b, d1, d2, dim) = layout.shape().dims4()?;
        let half = self.table.half;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(dim).enumerate().for_each(|(row, out)| {
            let (batch, r1, r2) = (row / (d1 * d2), row / d1 % d2, row % d1);
            let from = ((batch * d1 + r2) * d2 + r1) * dim;
            let (time, sign) = if self.inverse { (r1, -1.0) } else { (r2, 1.0) };
            let (x1, x2) = x[from..from + dim].split_at(half);
            let (o1, o2) = out.split_at_mut(half);
            let angles = time * half..(time + 1) * half;
            let (cos, sin) = (&self.table.cos[angles.clone()], &self.table.sin[angles]);
            for i in 0..half {
                let s = sin[i] * sign;
                o1[i] = x1[i] * cos[i] - x2[i] * s;
                o2[i] = x2[i] * cos[i] + x1[i] * s;
            }
        });
        done(out, (b, d2, d1, dim))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { table: self.table.clone(), inverse: !self.inverse };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

/// Scaled softmax over keys where query row `r` stands at time `r % keys` and sees no later key.
pub(crate) struct CausalSoftmax {
    /// Factor on the scores before the softmax.
    pub(crate) scale: f32,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32s(storage, layout)?;
        let keys = layout.dims()[layout.dims().len() - 1];
        let mut out = vec![0f32; x.len()];
        let rows = out.par_chunks_mut(keys).zip(x.par_chunks(keys)).enumerate();
        rows.for_each(|(row, (out, x))| {
            let seen = row % keys + 1;
            let max = x[..seen].iter().fold(f32::MIN, |m, x| m.max(*x));
            for (o, x) in out.iter_mut().zip(&x[..seen]) {
                *o = exp((x - max) * self.scale);
            }
            let norm = 1.0 / out[..seen].iter().sum::<f32>();
            out[..seen].iter_mut().for_each(|o| *o *= norm);
        });
        done(out, layout.shape())
    }

    fn bwd(&self, _arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = CausalSoftmaxGrad { scale: self.scale };
        Ok(Some(res.apply_op2_no_bwd(&grad.contiguous()?, &op)?))
    }
}

struct CausalSoftmaxGrad {
    scale: f32,
}

impl CustomOp2 for CausalSoftmaxGrad {
    fn name(&self) -> &'static str {
        "causal-softmax-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, g) = (f32s(s1, l1)?, f32s(s2, l2)?);
        let keys = l1.dims()[l1.dims().len() - 1];
        let mut out = vec![0f32; y.len()];
        let rows = out.par_chunks_mut(keys).zip(y.par_chunks(keys)).zip(g.par_chunks(keys));
        rows.enumerate().for_each(|(row, ((out, y), g))| {
            let seen = row % keys + 1;
            let dot: f32 = y[..seen].iter().zip(g).map(|(y, g)| y * g).sum();
            for ((o, y), g) in out.iter_mut().zip(&y[..seen]).zip(g) {
                *o = self.scale * y * (g - dot);
            }
        });
        done(out, l1.shape())
    }
}
