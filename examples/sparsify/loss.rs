//! The loss: how far the student's next token is from the teacher's, and how many gates are open.

use anyhow::{Context, Result};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use candle_nn::ops::sigmoid;
use rayon::prelude::*;

use super::loss::max_and_exp_sum;
use super::ops::{done, exp, f32s};

/// How steep the stand-in for "is above zero" is: steeper is closer to counting, but teaches only gates beside zero.
const STEEPNESS: f64 = 8.0;

/// `mean over blocks of mean sigmoid(8 · gate)`: about the share of gates above zero, but with a slope.
pub(crate) fn open_share(gates: &[Tensor]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for gate in gates {
        let share = sigmoid(&(gate * STEEPNESS)?)?.mean_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + share)?,
            None => share,
        });
    }
    Ok((sum.context("the model has no blocks")? / gates.len() as f64)?)
}

/// `Σ p · ln(p / q)` of each row in nats, `p` the teacher's and `q` the student's softmax: both `(n, vocab)`, result `(n)`.
///
/// The gradient goes to the student alone.
pub(crate) fn divergence(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    Ok(student.apply_op2(teacher, Divergence)?)
}

struct Divergence;

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (student, teacher) = (f32s(s1, l1)?, f32s(s2, l2)?);
        let (n, vocab) = l1.shape().dims2()?;
        let mut out = vec![0f32; n];
        let rows = student.par_chunks(vocab).zip(teacher.par_chunks(vocab));
        out.par_iter_mut().zip(rows).for_each(|(out, (student, teacher))| {
            let ((q_max, q_sum), (p_max, p_sum)) = (max_and_exp_sum(student), max_and_exp_sum(teacher));
            let shift = q_max + q_sum.ln() - p_max - p_sum.ln();
            let terms = student.iter().zip(teacher).map(|(q, p)| exp(p - p_max) * (p - q + shift));
            *out = terms.sum::<f32>() / p_sum;
        });
        done(out, n)
    }

    fn bwd(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        Ok((Some(student.apply_op3_no_bwd(teacher, &grad, &DivergenceGrad)?), None))
    }
}

/// `(q - p) · grad`.
struct DivergenceGrad;

impl CustomOp3 for DivergenceGrad {
    fn name(&self) -> &'static str {
        "divergence-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (student, teacher, grad) = (f32s(s1, l1)?, f32s(s2, l2)?, f32s(s3, l3)?);
        let (_, vocab) = l1.shape().dims2()?;
        let mut out = vec![0f32; student.len()];
        let rows = student.par_chunks(vocab).zip(teacher.par_chunks(vocab)).zip(grad);
        out.par_chunks_mut(vocab).zip(rows).for_each(|(out, ((student, teacher), grad))| {
            let ((q_max, q_sum), (p_max, p_sum)) = (max_and_exp_sum(student), max_and_exp_sum(teacher));
            for ((out, q), p) in out.iter_mut().zip(student).zip(teacher) {
                *out = (exp(q - q_max) / q_sum - exp(p - p_max) / p_sum) * grad;
            }
        });
        done(out, l1.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::super::rng::Rng;
    use super::*;
    use candle_core::{D, Device, Var};
    use candle_nn::ops::log_softmax;

    fn logits(seed: u64) -> Var {
        let data = Rng::new(seed).normals(3 * 40, 2.0);
        Var::from_vec(data, (3, 40), &Device::Cpu).unwrap()
    }

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn divergence_and_its_gradient_are_those_of_plain_ops() {
        let (student, teacher) = (logits(1), logits(2));
        let got = divergence(&student, &teacher).unwrap();
        let log_p = log_softmax(teacher.as_tensor(), D::Minus1).unwrap();
        let log_q = log_softmax(student.as_tensor(), D::Minus1).unwrap();
        let terms = (log_p.exp().unwrap() * (&log_p - log_q).unwrap()).unwrap();
        let want = terms.sum(D::Minus1).unwrap();
        assert!(gap(&got, &want) < 1e-5, "{got} {want}");
        assert!(want.min_all().unwrap().to_scalar::<f32>().unwrap() > 0.1, "{want}");
        let (got, want) = (got.backward().unwrap(), want.backward().unwrap());
        assert!(gap(got.get(&student).unwrap(), want.get(&student).unwrap()) < 1e-5);
        assert!(got.get(&teacher).is_none());
        assert!(
            gap(
                &divergence(&student, &student).unwrap(),
                &Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap()
            ) < 1e-6
        );
    }

    #[test]
    fn open_share_counts_what_is_far_from_zero() {
        let gates = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let share = open_share(&[gates(&[9.0, -9.0, -9.0, -9.0]), gates(&[9.0, 9.0, 9.0, -9.0])]).unwrap();
        assert!((share.to_scalar::<f32>().unwrap() - 0.5).abs() < 1e-6, "{share}");
    }
}
