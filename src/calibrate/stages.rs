//! A calibration from stage to stage.

use super::{
    Calibrator, Fitted, FittedAttention, RuleReport, Target, attention,
    block::FfnWeights,
    budgets::budgets,
    course::Course,
    held_out,
    layer::{LayerFit, fit_layer},
    own_text,
    run::{Inputs, Run},
    sample::{Moments, Sample},
    search::Search,
};
use crate::{
    FfnMode,
    decoder::Decoder,
    profile::{LayerProfile, Profile},
    quality::Loss,
};
use candle_core::{DType, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::{Config, GluActivation};

/// Tokens that the model writes to see how well it knows a text.
const OWN_TOKENS: usize = 512;
/// Shares that every profile has a point at.
const POINTS: [f32; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
/// FFN parameters of a model for which all of [`Calibrator::compare_tokens`] are affordable, and how many always are.
const FAST_PARAMETERS: f64 = 40e6;
const LEAST_COMPARED: usize = 1024;

/// [`Calibrator::calibrate`].
pub(super) fn calibrate(
    c: &Calibrator,
    model: &Decoder,
    vb: &VarBuilder<'_>,
    [fit, tune, held_out]: [&[Vec<u32>]; 3],
    course: &mut Course<'_>,
) -> Result<Fitted> {
    check(model, held_out)?;
    let config = model.config();
    let mut run = Run::new(model)?;
    let attention = attention::fit(c, &mut run, vb, [fit, tune], course)?;
    let act = GluActivation { act: config.hidden_act, shift: config.gate_shift };
    let fits = fits(c, &mut run, vb, [fit, tune], act, course)?;
    let own_ppl = once("own_ppl", course, |_| Ok(own_text(model, OWN_TOKENS, &start(fit), 0)?.perplexity()))?;
    let noise_floor = once("noise_floor", course, |course| held_out::noise_floor(model, held_out, course))?;
    let target = match c.target {
        Target::Loss(limit) => Target::Loss(Loss { kld: limit.kld + noise_floor, ..limit }),
        share @ Target::ActiveShare(_) => share,
    };
    let mut search = Search::new(run, &fits, act, some(tune, compared(c, config)))?;
    let sensitivities = search.sensitivities(course)?;
    let shares = search.shares(target, &sensitivities, course)?;
    let held_out = search.on_held_out(held_out, target, &sensitivities, shares, course)?;
    let (shares, fitted) = points(&held_out);
    let (layers, runs) = blocks(&fits, &sensitivities, &shares);
    let FittedAttention { mut profile, gates, recall } = attention;
    profile.about["rank"] = c.settings.rank.into();
    let held_out_verdict = held_out::verdict(&held_out, target, config, c.settings.rank);
    let profile = Profile { layers, shares, fitted, held_out: held_out_verdict, ..profile };
    let ppl = [held_out[0].quality.dense_nll().exp(), own_ppl];
    Ok(Fitted { profile, runs, sensitivities, held_out, noise_floor, ppl, gates, recall })
}

fn check(model: &Decoder, held_out: &[Vec<u32>]) -> Result<()> {
    if held_out.iter().all(|w| w.len() < 2) {
        bail!("calibrate: there is no held-out text to check the profile on: give more text");
    }
    if model.has_ffn_bias() {
        bail!("calibrate: models with biases in the FFN (mlp_bias) run dense only");
    }
    check_dense(model)
}

/// What is learned is of a model that leaves nothing out.
pub(super) fn check_dense(model: &Decoder) -> Result<()> {
    match model.sparse_config().map(|c| c.mode) {
        None => Ok(()),
        Some(FfnMode::ExactZero) => {
            bail!("calibrate: the model leaves exact zeros out: load it with FfnMode::Dense")
        }
        Some(_) => {
            bail!("calibrate: the checkpoint holds a profile already: leave it out, or set CANDLE_SPARSE=off")
        }
    }
}

/// A number that is found once.
fn once(
    name: &str,
    course: &mut Course<'_>,
    find: impl FnOnce(&mut Course<'_>) -> Result<f64>,
) -> Result<f64> {
    if let [found] = course.numbers(name)?[..] {
        return Ok(found);
    }
    let found = find(course)?;
    course.keep(name, &[found])?;
    course.stage_ends()?;
    Ok(found)
}

/// Fits all blocks, but for those that are known already.
fn fits(
    c: &Calibrator,
    run: &mut Run,
    vb: &VarBuilder<'_>,
    [fit, tune]: [&[Vec<u32>]; 2],
    act: GluActivation,
    course: &mut Course<'_>,
) -> Result<Vec<LayerFit>> {
    let config = *run.model.config();
    let (layers, hidden) = (config.num_hidden_layers, config.hidden_size);
    let name = |l: usize| format!("fits.{l}");
    let shape = [config.intermediate_size, hidden, c.settings.rank];
    let mut fits = Vec::with_capacity(layers);
    while fits.len() < layers
        && let Some(found) = LayerFit::found(&name(fits.len()), course, shape)?
    {
        fits.push(found);
    }
    if fits.len() == layers {
        return Ok(fits);
    }
    let mut moments = Inputs::new(vec![Moments::new(hidden); layers], Moments::add);
    run.over(fit, &mut moments, "reading the fit text", course)?;
    let mut samples = Inputs::new(vec![Sample::new(hidden, c.sample_rows); layers], Sample::add);
    run.over(tune, &mut samples, "reading the tune text", course)?;
    for l in fits.len()..layers {
        course.step("fitting blocks", l, layers)?;
        let weights = ffn_weights(vb, &config, act, l)?;
        let fit = fit_layer(&weights, &moments.each[l], &samples.each[l], &c.settings)?;
        fit.keep(&name(l), course)?;
        fits.push(fit);
    }
    course.stage_ends()?;
    Ok(fits)
}

/// The shares that a profile has points at, and the fitted one of each rule among them.
fn points(reports: &[RuleReport; 3]) -> (Vec<f32>, [usize; 3]) {
    let mut points: Vec<f32> = POINTS.into_iter().chain(reports.iter().map(|r| r.share)).collect();
    points.sort_by(f32::total_cmp);
    points.dedup();
    let fitted = reports.each_ref().map(|r| points.iter().position(|p| *p == r.share).unwrap_or(0));
    (points, fitted)
}

/// The blocks of a profile with such points, and the runs of active neurons, see [`Fitted::runs`].
fn blocks(fits: &[LayerFit], sensitivities: &[f32], points: &[f32]) -> (Vec<LayerProfile>, Vec<[f32; 2]>) {
    let shares: Vec<Vec<f32>> = points.iter().map(|&p| divide(fits, sensitivities, p)).collect();
    let of_layer = |l: usize| -> Vec<f32> { shares.iter().map(|s| s[l]).collect() };
    fits.iter().enumerate().map(|(l, f)| f.ordered(&of_layer(l))).unzip()
}

/// So many tokens that comparing takes minutes and not hours.
fn compared(calibrator: &Calibrator, c: &Config) -> usize {
    let matrices = if c.gated_mlp { 3 } else { 2 };
    let parameters = matrices * c.num_hidden_layers * c.intermediate_size * c.hidden_size;
    let affordable = (4096.0 * FAST_PARAMETERS / parameters as f64) as usize;
    calibrator.compare_tokens.min(affordable.max(LEAST_COMPARED))
}

/// What every window begins with, or the first token of one.
fn start(windows: &[Vec<u32>]) -> Vec<u32> {
    windows.iter().find(|w| !w.is_empty()).map_or(vec![0], |w| vec![w[0]])
}

/// The FFN of a block as the fit wants it.
fn ffn_weights(vb: &VarBuilder<'_>, c: &Config, act: GluActivation, layer: usize) -> Result<FfnWeights> {
    let vb = vb.pp(format!("model.layers.{layer}.mlp"));
    let get =
        |name: &str, dims: (usize, usize)| vb.get(dims, &format!("{name}.weight"))?.to_dtype(DType::F32);
    let (inner, hidden) = (c.intermediate_size, c.hidden_size);
    let up = get("up_proj", (inner, hidden))?;
    let (gate, up) = if c.gated_mlp { (get("gate_proj", (inner, hidden))?, Some(up)) } else { (up, None) };
    Ok(FfnWeights { gate, up, down: get("down_proj", (hidden, inner))?, act })
}

/// Whole windows of at least `tokens` tokens, spread over all.
pub(super) fn some(windows: &[Vec<u32>], tokens: usize) -> Vec<&Vec<u32>> {
    let len = windows.first().map_or(1, Vec::len);
    let step = (windows.len() * len / tokens.max(1)).max(1);
    windows.iter().step_by(step).collect()
}

/// The share of each block at a mean share.
pub(super) fn divide(fits: &[LayerFit], sensitivities: &[f32], mean: f32) -> Vec<f32> {
    let errors: Vec<&[f32]> = fits.iter().map(|f| f.error.as_slice()).collect();
    budgets(&errors, sensitivities, mean)
}
