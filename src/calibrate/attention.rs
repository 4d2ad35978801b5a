//! What sparse attention learns from the dense model: the gates, one fit per block, and how heads share the budget of recall.

use super::{
    Calibrator, FittedAttention,
    course::Course,
    gate::{GateFit, GateSettings, ValueNorms, WatchedWindow, fit_gate},
    recall::recall,
    run::Run,
};
use crate::{Profile, decoder::LayerTap, profile::gates as stored};
use candle_core::{DType, Device, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::Config;
use std::ops::Range;

/// Fits what `c` asks for of attention.
pub(super) fn fit(
    c: &Calibrator,
    run: &mut Run,
    vb: &VarBuilder<'_>,
    texts: [&[Vec<u32>]; 2],
    course: &mut Course<'_>,
) -> Result<FittedAttention> {
    let gates = c.gate.as_ref().map(|s| gates(run, vb, texts, s, course)).transpose()?.unwrap_or_default();
    let recall = c.recall.as_ref().map(|s| recall(run, vb, texts, s, course)).transpose()?;
    let shares = recall.as_ref().map(|fit| fit.shares.clone()).unwrap_or_default();
    let mut profile = Profile::of_attention_alone(shares, run.model.origin().fingerprint.to_vec());
    profile.gates = gates.iter().map(|g| g.gate.clone()).collect();
    let context = texts[0].first().map_or(0, Vec::len);
    profile.about = serde_json::json!({ "format": 1 });
    if let Some(s) = &c.gate {
        profile.about["attention"] = about(&gates, s, context);
    }
    if let (Some(s), Some(fit)) = (&c.recall, &recall) {
        profile.about["recall"] = serde_json::json!({ "share": s.share, "losses": fit.losses });
    }
    Ok(FittedAttention { profile, gates, recall })
}

/// Fits a gate for every block; blocks whose inputs fit into the settings' memory together share a run of the texts.
pub(super) fn gates(
    run: &mut Run,
    vb: &VarBuilder<'_>,
    [fit, tune]: [&[Vec<u32>]; 2],
    s: &GateSettings,
    course: &mut Course<'_>,
) -> Result<Vec<GateFit>> {
    let config = &run.model.config().clone();
    let context = fit.first().map_or(0, Vec::len);
    let windows = [at_most(fit, s.tokens), at_most(tune, s.tokens)];
    let counts = windows.each_ref().map(Vec::len);
    if !s.is_enough(context, counts[0], counts[1]) {
        let window = s.window_of(context);
        bail!(
            "calibrate: {counts:?} windows of {context} tokens tell too little about attention beyond {window} tokens: \
             give more or longer ones, a shorter window for the gate, or fit none"
        );
    }
    let (layers, heads) = (config.num_hidden_layers, config.num_key_value_heads);
    let tokens: usize = windows.iter().flatten().map(|w| w.len()).sum();
    let together = s.memory / (tokens * config.hidden_size * size_of::<f32>());
    let together = together.clamp(1, layers);
    let each = windows.iter().map(Vec::len).sum::<usize>();
    let mut fits = found(course, heads)?;
    while fits.len() < layers {
        let blocks = fits.len()..(fits.len() + together).min(layers);
        let (pass, passes) = (blocks.start / together, layers.div_ceil(together));
        let mut seen = windows.each_ref().map(|_| vec![Vec::new(); blocks.len()]);
        let mut watch = Watch::new(vb, config, *s, s.window_of(context), blocks)?;
        let all = windows.iter().enumerate().flat_map(|(text, w)| w.iter().map(move |w| (text, w)));
        for (done, (text, window)) in all.enumerate() {
            course.step("watching attention", pass * each + done, passes * each)?;
            watch.tokens = window.len();
            run.show(window, &mut watch)?;
            let found = watch.finish()?;
            seen[text].iter_mut().zip(found).for_each(|(all, w): (&mut Vec<WatchedWindow>, _)| all.push(w));
        }
        drop(watch);
        let [fit, tune] = seen;
        for (fit, tune) in fit.into_iter().zip(tune) {
            course.step("fitting gates", fits.len(), layers)?;
            fits.push(fit_gate(&fit, &tune, heads, s)?);
            keep(&fits, course)?;
        }
        course.stage_ends()?;
    }
    Ok(fits)
}

/// Keeps the gates that were fitted, as a profile has them, and how well they predict.
fn keep(fits: &[GateFit], course: &mut Course<'_>) -> Result<()> {
    let gates: Vec<_> = fits.iter().map(|f| f.gate.clone()).collect();
    course.keep_all(|tensors| stored::write(&gates, tensors))?;
    course.keep("gates.r2_ridge", &fits.iter().flat_map(|f| &f.r2_ridge).copied().collect::<Vec<_>>())?;
    course.keep("gates.r2_cell", &fits.iter().flat_map(|f| &f.r2_cell).copied().collect::<Vec<_>>())?;
    course.keep("gates.share", &fits.iter().flat_map(|f| &f.share).copied().collect::<Vec<_>>())
}

/// What an earlier run has kept.
fn found(course: &Course<'_>, heads: usize) -> Result<Vec<GateFit>> {
    let r2_ridge: Vec<f32> = course.numbers("gates.r2_ridge")?;
    let (n, Some(tensors)) = (r2_ridge.len() / heads, course.found()) else { return Ok(Vec::new()) };
    let (r2_cell, share) = (course.all("gates.r2_cell", n * heads)?, course.all("gates.share", n * heads)?);
    let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
    let gates = stored::read(&vb, n)?.into_iter().enumerate();
    let fit = |(i, gate)| {
        let of = |v: &[f32]| v[i * heads..(i + 1) * heads].to_vec();
        GateFit { gate, r2_ridge: of(&r2_ridge), r2_cell: of(&r2_cell), share: of(&share) }
    };
    Ok(gates.map(fit).collect())
}

/// What a profile says of its gates: held-out R² of the ridge and with a cell, which is kept, per block.
fn about(fits: &[GateFit], s: &GateSettings, context: usize) -> serde_json::Value {
    let layer = |f: &GateFit| {
        let [ridge, cell] = f.r2();
        serde_json::json!({
            "r2_ridge": ridge, "r2_cell": cell, "kept": if f.gate.cell.is_some() { "cell" } else { "ridge" },
            "share": f.share,
        })
    };
    serde_json::json!({
        "window": s.window_of(context), "sinks": s.sinks, "share": s.share, "context": context,
        "layers": fits.iter().map(layer).collect::<Vec<_>>(),
    })
}

/// Whole windows of at most `tokens` tokens (one at least), spread over all.
pub(super) fn at_most(windows: &[Vec<u32>], tokens: usize) -> Vec<&Vec<u32>> {
    let all: usize = windows.iter().map(Vec::len).sum();
    windows.iter().step_by(all.div_ceil(tokens.max(1)).max(1)).collect()
}

/// What attention did in some blocks in one window.
struct Watch {
    blocks: Range<usize>,
    norms: Vec<ValueNorms>,
    settings: GateSettings,
    window: usize,
    hidden: usize,
    /// Of the window that is being run.
    tokens: usize,
    /// Inputs of each block so far.
    inputs: Vec<Vec<f32>>,
    labels: Vec<Vec<f32>>,
    /// Of the block that is being run; a window of more than 512 tokens comes in pieces, block by block.
    qkv: Vec<Vec<f32>>,
    failed: Option<Error>,
}

impl Watch {
    fn new(
        vb: &VarBuilder<'_>,
        config: &Config,
        settings: GateSettings,
        window: usize,
        blocks: Range<usize>,
    ) -> Result<Self> {
        let shape = (config.hidden_size, config.q_dim());
        let norms = |l: usize| {
            let o_proj = vb.get(shape, &format!("model.layers.{l}.self_attn.o_proj.weight"))?;
            ValueNorms::new(&o_proj.to_dtype(DType::F32)?, config)
        };
        let empty = vec![Vec::new(); blocks.len()];
        Ok(Self {
            norms: blocks.clone().map(norms).collect::<Result<_>>()?,
            blocks,
            settings,
            window,
            hidden: config.hidden_size,
            tokens: 0,
            inputs: empty.clone(),
            labels: empty.clone(),
            qkv: empty,
            failed: None,
        })
    }

    /// The window of each block, once all of it was run.
    fn finish(&mut self) -> Result<Vec<WatchedWindow>> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        let taken =
            self.inputs.iter_mut().map(std::mem::take).zip(self.labels.iter_mut().map(std::mem::take));
        Ok(taken.map(|(x, labels)| WatchedWindow { x, labels }).collect())
    }
}

impl LayerTap for Watch {
    fn attention(&mut self, layer: usize, x: &[f32], qkv: &[f32]) {
        if !self.blocks.contains(&layer) {
            return;
        }
        let i = layer - self.blocks.start;
        self.inputs[i].extend_from_slice(x);
        self.qkv[i].extend_from_slice(qkv);
        if self.inputs[i].len() == self.tokens * self.hidden {
            match self.norms[i].labels(&std::mem::take(&mut self.qkv[i]), self.window, &self.settings) {
                Ok(labels) => self.labels[i] = labels,
                Err(e) => self.failed = Some(e),
            }
        }
    }

    fn ffn(&mut self, _: usize, _: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {}
}
