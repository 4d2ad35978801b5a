//! The gates of sparse attention: their settings and what is printed of them.

use crate::cli::output;
use anyhow::{Result, bail};
use candle_sparse::calibrate::{GateFit, GateSettings};
use clap::Args;
use std::io::Write;

#[derive(Args, Debug)]
pub(crate) struct GateArgs {
    /// Fit no gates for sparse attention
    #[arg(long, conflicts_with_all = ["gate_window", "gate_share"])]
    no_gate: bool,
    /// Tokens that attention always sees, beyond which a gate says what to keep; a quarter of --context, at most 256,
    /// where not given
    #[arg(long)]
    gate_window: Option<usize>,
    /// Share of the tokens that is to pass a gate
    #[arg(long, default_value_t = 0.25)]
    gate_share: f32,
}

impl GateArgs {
    /// What to fit gates with; `None` where they are not wanted or the windows say too little.
    pub(crate) fn settings(&self, fit: &[Vec<u32>], tune: &[Vec<u32>]) -> Result<Option<GateSettings>> {
        let (window, share) = (self.gate_window, self.gate_share);
        if !(share > 0.0 && share < 1.0) {
            bail!("--gate-share {share} must be between 0 and 1");
        }
        let settings = GateSettings::default().with_window(window).with_share(share);
        let context = fit.first().map_or(0, Vec::len);
        if self.no_gate || settings.is_enough(context, fit.len(), tune.len()) {
            return Ok((!self.no_gate).then_some(settings));
        }
        if let Some(window) = window {
            bail!(
                "--gate-window {window} leaves too little of the text: give more --text or a longer --context"
            );
        }
        output::note(
            "too little text, or too short a --context, for gates of sparse attention: none are fitted",
        );
        Ok(None)
    }
}

fn kept(fit: &GateFit) -> &'static str {
    if fit.gate.cell.is_some() { "cell" } else { "ridge" }
}

fn mean(v: &[f32]) -> f32 {
    v.iter().sum::<f32>() / v.len() as f32
}

pub(crate) fn json(fits: &[GateFit]) -> serde_json::Value {
    let layer = |f: &GateFit| {
        let [ridge, cell] = f.r2();
        serde_json::json!({ "r2_ridge": ridge, "r2_cell": cell, "kept": kept(f), "share": mean(&f.share) })
    };
    fits.iter().map(layer).collect()
}

pub(crate) fn print(out: &mut impl Write, fits: &[GateFit]) -> Result<()> {
    if fits.is_empty() {
        return Ok(());
    }
    writeln!(out, "gates of attention, on windows that nothing was fitted to:")?;
    writeln!(out, "{:>10} {:>9} {:>13} {:>6} {:>7}", "", "R² ridge", "with FastGRNN", "kept", "passes")?;
    for (l, f) in fits.iter().enumerate() {
        let ([ridge, cell], block) = (f.r2(), format!("block {l}"));
        writeln!(out, "{block:>10} {ridge:>9.3} {cell:>13.3} {:>6} {:>7.3}", kept(f), mean(&f.share))?;
    }
    Ok(())
}
