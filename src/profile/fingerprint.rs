//! Whether a profile belongs to a model.

use super::Profile;
use candle_core::{DType, Result, bail};
use candle_nn::VarBuilder;

/// Numbers taken of a tensor.
const LEN: usize = 8;

/// Numbers that tell a checkpoint with Hugging Face names: the first eight of each block's two norms, and of the first
/// row of the first block's gate.
///
/// # Errors
/// A tensor is missing.
pub fn fingerprint(
    vb: &VarBuilder<'_>,
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    let mut add = |dims: &[usize], name: &str| -> Result<()> {
        let t = vb.get(dims, name)?.to_dtype(DType::F32)?.flatten_all()?;
        let some = t.narrow(0, 0, LEN.min(t.elem_count()))?.to_vec1::<f32>()?;
        all.extend((0..LEN).map(|i| some.get(i).copied().unwrap_or(0.0)));
        Ok(())
    };
    add(&[intermediate_size, hidden_size], "model.layers.0.mlp.gate_proj.weight")?;
    for i in 0..num_hidden_layers {
        add(&[hidden_size], &format!("model.layers.{i}.input_layernorm.weight"))?;
        add(&[hidden_size], &format!("model.layers.{i}.post_attention_layernorm.weight"))?;
    }
    Ok(all)
}

impl Profile {
    /// Makes `row` the first row of the first block's gate: that of a checkpoint whose neurons were put in another order.
    pub fn set_first_gate(&mut self, row: &[f32]) {
        for (i, number) in self.fingerprint.iter_mut().take(LEN).enumerate() {
            *number = row.get(i).copied().unwrap_or(0.0);
        }
    }

    /// Refuses a model that the profile was not made for; rounding is forgiven: norms to BF16, the row of a gate to any of
    /// ggml's formats.
    ///
    /// # Errors
    /// The fingerprints differ.
    pub fn belongs_to(&self, model: &[f32]) -> Result<()> {
        let close = |(i, (a, b)): (usize, (&[f32], &[f32]))| {
            let largest = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let tolerance = if i == 0 { largest / 2.0 } else { largest / 128.0 };
            a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance)
        };
        let same = self.fingerprint.len() == model.len()
            && self.fingerprint.chunks(LEN).zip(model.chunks(LEN)).enumerate().all(close);
        if !same {
            bail!(
                "the profile was made for another model: take the one that belongs to this checkpoint, or make it with \
                 `calibrate`; CANDLE_SPARSE=off runs dense"
            );
        }
        Ok(())
    }
}
