//! Whether a profile fits a model.

use super::Profile;
use crate::Error;
use candle_core::{Result, bail};
use candle_sparse_core::Config;

impl Profile {
    /// Checks as [`Self::check`], and that the shape is the model's.
    ///
    /// # Errors
    /// [`Error::WrongModel`] where the shape is another; those of [`Self::check`].
    pub fn check_model(&self, c: &Config) -> Result<()> {
        let (layers, got) = (c.num_hidden_layers, self.blocks());
        if got != layers {
            return wrong_model(format!("made for {got} blocks, the model has {layers}"));
        }
        (0..self.layers.len()).try_for_each(|i| check_shape(self, i, c.hidden_size, c.intermediate_size))?;
        if let Some(shares) = self.recall_shares.first()
            && shares.len() != c.num_key_value_heads
        {
            let (got, heads) = (shares.len(), c.num_key_value_heads);
            return wrong_model(format!("recall_shares of {got} key/value heads, the model has {heads}"));
        }
        if !self.gates.is_empty() && self.gates.len() != layers {
            return wrong_model(format!(
                "attention gates of {} blocks, the model has {layers}",
                self.gates.len()
            ));
        }
        for (i, gate) in self.gates.iter().enumerate() {
            let (got, expected) = ([gate.kv_heads, gate.hidden_size], [c.num_key_value_heads, c.hidden_size]);
            if got != expected {
                return wrong_model(format!(
                    "layer {i}: gate.ridge has shape {got:?}, the model needs {expected:?}"
                ));
            }
        }
        self.check()
    }

    /// [`Self::check`], and that block `i` fits an FFN of `hidden` inputs and `inner` neurons.
    ///
    /// # Errors
    /// As [`Self::check_model`]; also where there is no such block.
    pub(crate) fn check_block(&self, i: usize, hidden: usize, inner: usize) -> Result<()> {
        if i >= self.layers.len() {
            bail!("profile: layer {i} asked for, it was made for {}", self.layers.len());
        }
        check_shape(self, i, hidden, inner)?;
        self.check()
    }
}

fn check_shape(profile: &Profile, i: usize, hidden: usize, inner: usize) -> Result<()> {
    let [inputs, neurons] = profile.shape(i);
    if neurons != inner {
        return wrong_model(format!("layer {i}: order has {neurons} neurons, the model {inner}"));
    }
    // Without points there is no telling: that is no profile.
    if inputs != hidden && !profile.shares.is_empty() {
        return wrong_model(format!("layer {i}: made for {inputs} inputs, the model has {hidden}"));
    }
    Ok(())
}

fn wrong_model(problem: String) -> Result<()> {
    Err(Error::WrongModel { what: "the profile", problem }.into())
}
