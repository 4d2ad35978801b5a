//! Whether the parts of a profile fit together: asked when one is written, read, and used.

use super::{HeldOut, LayerProfile, LayerRule, Profile, Rule};
use crate::Error;

/// Of the only format there is.
pub(super) const FORMAT: u64 = 1;
/// P and Q are stored in F16.
const LARGEST: f32 = 65_504.0;

type Checked = Result<(), String>;

impl Profile {
    /// Checks that all sizes fit together and every number is usable; [`Self::check_model`] compares them with a model.
    ///
    /// # Errors
    /// [`Error::Setting`]: a part does not fit; block and vector are named.
    pub fn check(&self) -> candle_core::Result<()> {
        self.checked().map_err(|problem| Error::Setting { name: "profile", problem }.into())
    }

    pub(super) fn checked(&self) -> Checked {
        match &self.about["format"] {
            serde_json::Value::Null => {}
            format if format.as_u64() == Some(FORMAT) => {}
            other => {
                return Err(format!("format {other} is not known here, only {FORMAT}: update candle-sparse"));
            }
        }
        if self.is_of_attention_alone() {
            if self.fitted != [0; 3] || self.held_out != HeldOut::NONE {
                return Err(
                    "it is of attention alone and names fitted rules of the FFN: calibrate again".into()
                );
            }
        } else {
            self.check_points()?;
            if self.layers.is_empty() {
                return Err("it has no blocks: calibrate again".into());
            }
        }
        (0..self.layers.len()).try_for_each(|i| self.check_layer(i))?;
        let blocks = self.blocks();
        for (what, n) in [("attention gates", self.gates.len()), ("recall shares", self.recall_shares.len())]
        {
            if n != 0 && n != blocks {
                return Err(format!("{what} of {n} blocks, the profile has {blocks}: calibrate again"));
            }
        }
        for (i, shares) in self.recall_shares.iter().enumerate() {
            check_vector("recall_shares", shares, self.recall_shares[0].len().max(1), true)
                .map_err(|e| format!("layer {i}: {e}"))?;
        }
        let gate =
            |(i, gate): (usize, &crate::FastGrnnGate)| gate.check().map_err(|e| format!("layer {i}: {e}"));
        self.gates.iter().enumerate().try_for_each(gate)
    }

    /// Blocks of the model that it was made for.
    pub(crate) fn blocks(&self) -> usize {
        if self.layers.is_empty() { self.recall_shares.len() } else { self.layers.len() }
    }

    /// Whether nothing was learned about the FFN: a model computes its neurons as without a profile.
    ///
    /// ```
    /// use candle_sparse::Profile;
    ///
    /// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/sparse.safetensors");
    /// assert!(!Profile::load(path)?.is_of_attention_alone());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn is_of_attention_alone(&self) -> bool {
        self.layers.is_empty() && self.shares.is_empty() && !self.recall_shares.is_empty()
    }

    fn check_points(&self) -> Checked {
        let points = self.shares.len();
        if points == 0 || !self.shares.is_sorted_by(|a, b| a < b) || !all_finite(&self.shares) {
            return Err(format!("shares {:?} are not increasing numbers: calibrate again", self.shares));
        }
        match self.fitted.iter().find(|&&p| p >= points) {
            Some(point) => Err(format!("fitted point {point} of {points}: calibrate again")),
            None => Ok(()),
        }
    }

    /// Inputs and neurons of a block, as far as its vectors say.
    pub(crate) fn shape(&self, layer: usize) -> [usize; 2] {
        let layer = &self.layers[layer];
        let hidden = layer.rules[0].bias.len().checked_div(self.shares.len());
        [hidden.unwrap_or(0), layer.order.len()]
    }

    fn check_layer(&self, i: usize) -> Checked {
        let (layer, [hidden, inner]) = (&self.layers[i], self.shape(i));
        let checked = || {
            if hidden == 0 || inner == 0 {
                return Err(format!("{inner} neurons of {hidden} inputs: there must be some"));
            }
            layer.check(hidden, inner)?;
            let mut rules = layer.rules.iter().zip(Rule::ALL);
            rules.try_for_each(|(r, rule)| r.check(rule.name(), self.shares.len(), hidden, inner))
        };
        checked().map_err(|e| format!("layer {i}: {e}"))
    }
}

impl LayerProfile {
    fn check(&self, hidden: usize, inner: usize) -> Checked {
        let mut seen = vec![false; inner];
        let mut twice = |n: &u32| seen.get_mut(*n as usize).is_none_or(|s| std::mem::replace(s, true));
        if let Some(n) = self.order.iter().find(|n| twice(n)) {
            return Err(format!("order names neuron {n} of {inner} twice or past the last"));
        }
        for (name, v, rows) in
            [("p", &self.p, hidden), ("q_gate", &self.q_gate, inner), ("q_up", &self.q_up, inner)]
        {
            check_vector(name, v, self.rank.saturating_mul(rows), false)?;
            if v.iter().any(|v| v.abs() > LARGEST) {
                return Err(format!(
                    "{name} has values beyond {LARGEST}, too large for F16: calibrate again"
                ));
            }
        }
        self.vectors().into_iter().try_for_each(|(name, v)| check_vector(name, v, inner, true))
    }
}

impl LayerRule {
    fn check(&self, rule: &str, points: usize, hidden: usize, inner: usize) -> Checked {
        check_vector(&format!("{rule} candidate"), &self.candidate, points, true)?;
        check_vector(&format!("{rule} keep"), &self.keep, points, true)?;
        check_vector(&format!("{rule} share"), &self.share, points, true)?;
        check_vector(&format!("{rule} bias"), &self.bias, points * hidden, false)?;
        if self.hot.len() != points || self.hot.iter().any(|&h| h as usize > inner) {
            return Err(format!("{rule} hot {:?} is not one number of neurons per point", self.hot));
        }
        Ok(())
    }
}

fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|v| v.is_finite())
}

/// A vector's length and that its values are finite, and with `positive` not below 0.
fn check_vector(name: &str, v: &[f32], expected: usize, positive: bool) -> Checked {
    let got = v.len();
    if got != expected {
        return Err(format!(
            "{name} has {got} elements, {expected} are needed: is it damaged, or of another model?"
        ));
    }
    if !all_finite(v) || positive && v.iter().any(|&v| v < 0.0) {
        return Err(format!("{name} has values that are negative or not finite: calibrate again"));
    }
    Ok(())
}
