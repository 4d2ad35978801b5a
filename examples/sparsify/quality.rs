//! What the student is worth on text that it was not trained on.

use anyhow::Result;
use serde_json::{Value, json};

use super::data::window;
use super::model::{Llama, Pass, token_losses};
use super::sparse_loss::divergence;

/// Teacher and student over the same tokens.
#[derive(Clone, Debug)]
pub(crate) struct Quality {
    tokens: usize,
    teacher_loss: f64,
    student_loss: f64,
    kld: f64,
    active: Vec<f64>,
}

impl Quality {
    /// Predicts every token of the texts once, in windows of `context` tokens.
    pub(crate) fn measure(
        teacher: &Llama,
        student: &Llama,
        texts: &[Vec<u32>],
        context: usize,
    ) -> Result<Self> {
        let layers = student.config.num_hidden_layers;
        let mut all =
            Self { tokens: 0, teacher_loss: 0.0, student_loss: 0.0, kld: 0.0, active: vec![0.0; layers] };
        for chunk in texts.iter().flat_map(|text| text.chunks(context)) {
            let batch = window(chunk, student.config.bos_token_id);
            let mut active = vec![0.0; layers];
            let mut pass = Pass { active: Some(&mut active), ..Pass::default() };
            let got = student.forward(&batch.inputs, 1, &mut pass)?.detach();
            let want = teacher.forward(&batch.inputs, 1, &mut Pass::default())?;
            let sum = |values: candle_core::Tensor| -> Result<f64> {
                Ok(values.to_vec1::<f32>()?.iter().map(|x| *x as f64).sum())
            };
            all.tokens += chunk.len();
            all.teacher_loss += sum(token_losses(&want, &batch.targets)?)?;
            all.student_loss += sum(token_losses(&got, &batch.targets)?)?;
            all.kld += sum(divergence(&got, &want)?)?;
            all.active.iter_mut().zip(active).for_each(|(all, share)| *all += share * chunk.len() as f64);
        }
        let tokens = all.tokens.max(1) as f64;
        let sums = [&mut all.teacher_loss, &mut all.student_loss, &mut all.kld];
        sums.into_iter().chain(&mut all.active).for_each(|sum| *sum /= tokens);
        Ok(all)
    }

    fn active_fraction(&self) -> f64 {
        self.active.iter().sum::<f64>() / self.active.len() as f64
    }

    /// The numbers for programs.
    pub(crate) fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "teacher_ppl": self.teacher_loss.exp(),
            "ppl": self.student_loss.exp(),
            "kld": self.kld,
            "active_fraction": self.active_fraction(),
            "active_fraction_by_block": self.active,
        })
    }
}

impl core::fmt::Display for Quality {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (before, after) = (self.teacher_loss.exp(), self.student_loss.exp());
        write!(
            f,
            "held-out perplexity {after:.3} (teacher {before:.3}, {:+.2} %), kld {:.4}, {:.1} % of neurons fire; by block:",
            100.0 * (after / before - 1.0),
            self.kld,
            100.0 * self.active_fraction()
        )?;
        self.active.iter().try_for_each(|share| write!(f, " {:.1}", 100.0 * share))
    }
}
