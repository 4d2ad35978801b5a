//! AdamW with global gradient clipping and a warm-up + cosine schedule.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::model::Llama;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.95;
const EPS: f32 = 1e-8;

struct Slot {
    var: Var,
    mean: Vec<f32>,
    square: Vec<f32>,
    decay: f32,
}

/// AdamW over plain vectors: one pass over the data instead of candle's fifteen.
pub(crate) struct AdamW {
    slots: Vec<Slot>,
    clip: f64,
    steps: i32,
}

impl AdamW {
    /// Weight decay applies to matrices only; gradients are scaled down to the norm `clip`.
    pub(crate) fn new(model: &Llama, weight_decay: f64, clip: f64) -> Self {
        let slot = |var: &Var| Slot {
            var: var.clone(),
            mean: vec![0.0; var.elem_count()],
            square: vec![0.0; var.elem_count()],
            decay: if var.rank() > 1 { weight_decay as f32 } else { 0.0 },
        };
        let trained = model.vars.iter().filter(|(name, _)| (model.is_trained)(name));
        Self { slots: trained.map(|(_, var)| slot(var)).collect(), clip, steps: 0 }
    }

    /// Moves all trained weights by one step of size `lr`.
    pub(crate) fn step(&mut self, grads: &GradStore, lr: f64) -> Result<()> {
        let mut flat = Vec::with_capacity(self.slots.len());
        let mut sum = 0f64;
        for slot in &self.slots {
            let grad = grads.get(slot.var.as_tensor()).context("a weight has no gradient")?;
            let grad = grad.flatten_all()?.to_vec1::<f32>()?;
            sum += grad.iter().map(|g| g * g).sum::<f32>() as f64;
            flat.push(grad);
        }
        let scale = (self.clip / (sum.sqrt() + 1e-6)).min(1.0) as f32;
        self.steps += 1;
        let fix1 = 1.0 - BETA1.powi(self.steps);
        let fix2 = 1.0 - BETA2.powi(self.steps);
        for (slot, grad) in self.slots.iter_mut().zip(flat) {
            slot.update(&grad, scale, lr as f32, fix1, fix2)?;
        }
        Ok(())
    }
}

impl Slot {
    fn update(&mut self, grad: &[f32], scale: f32, lr: f32, fix1: f32, fix2: f32) -> Result<()> {
        let mut weights = self.var.flatten_all()?.to_vec1::<f32>()?;
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((w, g), (mean, square)) in weights.iter_mut().zip(grad).zip(moments) {
            let g = g * scale;
            *mean = BETA1 * *mean + (1.0 - BETA1) * g;
            *square = BETA2 * *square + (1.0 - BETA2) * g * g;
            let step = (*mean / fix1) / ((*square / fix2).sqrt() + EPS);
            *w -= lr * (step + self.decay * *w);
        }
        self.var.set(&Tensor::from_vec(weights, self.var.shape(), &Device::Cpu)?)?;
        Ok(())
    }
}

/// The share of the peak learning rate at `progress` of `0.0..=1.0`.
pub(crate) fn schedule(progress: f64) -> f64 {
    const WARMUP: f64 = 0.04;
    const FLOOR: f64 = 0.02;
    if progress < WARMUP {
        return (progress / WARMUP).max(0.01);
    }
    let rest = ((progress - WARMUP) / (1.0 - WARMUP)).min(1.0);
    FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (core::f64::consts::PI * rest).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_rises_and_falls() {
        assert!(schedule(0.0) < 0.05);
        assert!(schedule(0.04) > 0.99);
        assert!(schedule(0.5) < schedule(0.3));
        assert!((schedule(1.0) - 0.02).abs() < 1e-9);
    }
}
