//! Whether a profile fits a model.

use crate::{Error, core::Config, profile::Profile};
use candle_core::{Result, bail};

/// Whether `profile` is [one](Profile::check), and of the model's shape.
///
/// # Errors
/// [`Error::WrongModel`] where the shape is another; those of [`Profile::check`].
pub fn check(profile: &Profile, c: &Config) -> Result<()> {
    let (layers, got) = (c.num_hidden_layers, profile.layers.len());
    if got != layers {
        return wrong_model(format!("made for {got} blocks, the model has {layers}"));
    }
    (0..layers).try_for_each(|i| check_shape(profile, i, c.hidden_size, c.intermediate_size))?;
    if !profile.gates.is_empty() && profile.gates.len() != layers {
        return wrong_model(format!(
            "attention gates of {} blocks, the model has {layers}",
            profile.gates.len()
        ));
    }
    for (i, gate) in profile.gates.iter().enumerate() {
        let (got, expected) = ([gate.kv_heads, gate.hidden_size], [c.num_key_value_heads, c.hidden_size]);
        if got != expected {
            return wrong_model(format!(
                "layer {i}: gate.ridge has shape {got:?}, the model needs {expected:?}"
            ));
        }
    }
    profile.check()
}

/// Whether block `i` of a [checked](Profile::check) `profile` fits an FFN of `hidden` inputs and `inner` neurons.
///
/// # Errors
/// As [`check`]; also where there is no such block.
pub(crate) fn check_block(profile: &Profile, i: usize, hidden: usize, inner: usize) -> Result<()> {
    if i >= profile.layers.len() {
        bail!("profile: layer {i} asked for, it was made for {}", profile.layers.len());
    }
    check_shape(profile, i, hidden, inner)?;
    profile.check()
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
