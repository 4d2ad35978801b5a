//! Whether a profile fits a model.

use crate::{
    core::Config,
    profile::{LayerProfile, LayerRule, Profile},
};
use candle_core::{Error, Result, bail};

/// Whether every vector of `profile` has the length that the model's shape asks for, and usable values.
///
/// # Errors
/// One has not; block and vector are named.
pub fn check(profile: &Profile, c: &Config) -> Result<()> {
    let (layers, got) = (c.num_hidden_layers, profile.layers.len());
    if got != layers {
        bail!("profile: made for {got} blocks, the model has {layers}: does it belong to this model?");
    }
    check_points(profile)?;
    check_gates(profile, c)?;
    (0..layers).try_for_each(|i| check_layer(profile, i, c.hidden_size, c.intermediate_size))
}

fn check_gates(profile: &Profile, c: &Config) -> Result<()> {
    let (layers, got) = (c.num_hidden_layers, profile.gates.len());
    if got != 0 && got != layers {
        bail!("profile: attention gates of {got} blocks, the model has {layers}: calibrate again");
    }
    for (i, gate) in profile.gates.iter().enumerate() {
        gate.check().map_err(|e| Error::msg(format!("profile: layer {i}: {e}")))?;
        let (got, expected) = ([gate.kv_heads, gate.hidden_size], [c.num_key_value_heads, c.hidden_size]);
        if got != expected {
            bail!(
                "profile: layer {i}: gate.ridge has shape {got:?}, the model needs {expected:?}: does it belong to this model?"
            );
        }
    }
    Ok(())
}

fn check_points(profile: &Profile) -> Result<()> {
    let points = profile.shares.len();
    if points == 0 || !profile.shares.is_sorted_by(|a, b| a < b) || !all_finite(&profile.shares) {
        bail!("profile: shares {:?} are not increasing numbers: calibrate again", profile.shares);
    }
    if let Some(point) = profile.fitted.iter().find(|&&p| p >= points) {
        bail!("profile: fitted point {point} of {points}: calibrate again");
    }
    Ok(())
}

/// Whether block `i` of `profile` fits an FFN of `hidden` inputs and `inner` neurons, as [`check`] does for all.
///
/// # Errors
/// As [`check`]; also where there is no such block.
pub(crate) fn check_block(profile: &Profile, i: usize, hidden: usize, inner: usize) -> Result<()> {
    if i >= profile.layers.len() {
        bail!("profile: layer {i} asked for, it was made for {}", profile.layers.len());
    }
    check_points(profile)?;
    check_layer(profile, i, hidden, inner)
}

fn check_layer(profile: &Profile, i: usize, hidden: usize, inner: usize) -> Result<()> {
    let layer = &profile.layers[i];
    check_vectors(i, layer, hidden, inner)?;
    for (rule, name) in layer.rules.iter().zip(["gate", "low-rank", "cascade"]) {
        check_rule(i, name, rule, profile.shares.len(), (hidden, inner))?;
    }
    Ok(())
}

fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|v| v.is_finite())
}

/// A vector's length and that its values are finite, and with `positive` not below 0.
fn check_vector(i: usize, name: &str, v: &[f32], expected: usize, positive: bool) -> Result<()> {
    let got = v.len();
    if got != expected {
        bail!(
            "profile: layer {i}: {name} has {got} elements, the model needs {expected}: does it belong to this model?"
        );
    }
    if !all_finite(v) || positive && v.iter().any(|&v| v < 0.0) {
        bail!("profile: layer {i}: {name} has values that are negative or not finite: calibrate again");
    }
    Ok(())
}

fn check_vectors(i: usize, l: &LayerProfile, hidden: usize, inner: usize) -> Result<()> {
    if l.order.len() != inner {
        let got = l.order.len();
        bail!(
            "profile: layer {i}: order has {got} neurons, the model {inner}: does it belong to this model?"
        );
    }
    let mut seen = vec![false; inner];
    for &n in &l.order {
        match seen.get_mut(n as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => bail!("profile: layer {i}: order names neuron {n} of {inner} twice or past the last"),
        }
    }
    check_vector(i, "p", &l.p, l.rank.saturating_mul(hidden), false)?;
    check_vector(i, "q_gate", &l.q_gate, l.rank.saturating_mul(inner), false)?;
    check_vector(i, "q_up", &l.q_up, l.rank.saturating_mul(inner), false)?;
    check_vector(i, "gate_variance", &l.gate_variance, inner, true)?;
    check_vector(i, "up_variance", &l.up_variance, inner, true)?;
    check_vector(i, "up_square", &l.up_square, inner, true)?;
    check_vector(i, "importance", &l.importance, inner, true)
}

fn check_rule(
    i: usize,
    rule: &str,
    r: &LayerRule,
    points: usize,
    (hidden, inner): (usize, usize),
) -> Result<()> {
    check_vector(i, &format!("{rule} candidate"), &r.candidate, points, true)?;
    check_vector(i, &format!("{rule} keep"), &r.keep, points, true)?;
    check_vector(i, &format!("{rule} share"), &r.share, points, true)?;
    check_vector(i, &format!("{rule} bias"), &r.bias, points * hidden, false)?;
    if r.hot.len() != points || r.hot.iter().any(|&h| h as usize > inner) {
        bail!("profile: layer {i}: {rule} hot {:?} is not one number of neurons per point", r.hot);
    }
    Ok(())
}
