//! Making a profile from a checkpoint and texts.
//!
//! ```text
//! fit text   → second moments of every FFN's inputs
//! tune text  → a sample of inputs → per block: prediction, thresholds, errors
//!            → what an error in each block costs (divergence with only that block sparse) → budgets
//!            → the share at which each rule loses what it may
//! both       → what attention reads and does, for some blocks at a time → their gates (`attention`)
//! ```

mod attention;

use crate::{
    decoder::LayerTap,
    llama::{Cache, Config, Llama},
    quality::Quality,
    simulate::{Choice, Simulation},
};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_sparse::{
    KvConfig, KvDType,
    calibrate::{
        FfnWeights, GRID, GateFit, GateSettings, LayerFit, Moments, Sample, Settings, budgets, fit_layer,
    },
    core::Gate,
    profile::{LayerProfile, Profile, Rule},
};

/// What a profile is to aim at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The smallest share whose perplexity on the tune text is at most this much higher (0.01 is 1 %).
    PplLoss(f64),
    /// This mean active share.
    ActiveShare(f32),
}

/// How to calibrate.
#[derive(Clone, Copy, Debug)]
pub struct Calibrator {
    /// Rank and factors of the fit.
    pub settings: Settings,
    /// What the fitted points aim at.
    pub target: Target,
    /// Inputs of each FFN that are kept for thresholds; bounds the memory, `rows · hidden_size · layers · 4` bytes.
    pub sample_rows: usize,
    /// Tokens on which settings are compared, some 27 times over and once more for each four blocks; models with more than
    /// 40 million FFN parameters take fewer, in proportion, but no less than 1024.
    pub compare_tokens: usize,
    /// How the gates of sparse attention are fitted; `None` fits none.
    pub gate: Option<GateSettings>,
}

impl Default for Calibrator {
    /// 1 % of perplexity, at most 4096 inputs per FFN, 4096 tokens to compare on, no gates.
    fn default() -> Self {
        let (settings, target) = (Settings::default(), Target::PplLoss(0.01));
        Self { settings, target, sample_rows: 4096, compare_tokens: 4096, gate: None }
    }
}

/// Where a calibration is, for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: &'static str,
    /// Steps done of this stage.
    pub done: usize,
    /// Steps of this stage.
    pub steps: usize,
}

/// What was learned beside the profile.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// The profile.
    pub profile: Profile,
    /// Per block: mean length of runs of active neurons before and after they were put in order.
    pub runs: Vec<[f32; 2]>,
    /// Divergence with only this block sparse, per unit of its mean square error.
    pub sensitivities: Vec<f32>,
    /// In the order of [`Rule`]: mean active share and change of perplexity on the tune text at the fitted point.
    pub tuned: [(f32, f64); 3],
    /// Per block, where gates were asked for: how well they predict, see [`GateSettings`].
    pub gates: Vec<GateFit>,
}

/// Shares that every profile has a point at.
const POINTS: [f32; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
/// The share at which blocks are compared.
const PROBE_SHARE: f32 = 0.4;
/// FFN parameters of a model for which all of [`Calibrator::compare_tokens`] are affordable, and how many always are.
const FAST_PARAMETERS: f64 = 40e6;
const LEAST_COMPARED: usize = 1024;
/// Halvings of the interval in which a fitted share lies: 0.9 / 2^7 is below the noise of the text.
const HALVINGS: usize = 7;

impl Calibrator {
    /// Fits a profile for `model`, loaded without one from the checkpoint in `vb`; `fit` and `tune` are windows of tokens of
    /// different texts.
    ///
    /// Memory beyond the model: `hidden_size²` f32 per block, the samples, and the work of one block
    /// ([`fit_layer`]), however long the texts; where gates are fitted, before that, [`GateSettings::memory`] or the inputs
    /// of one block, and a copy of the latter.
    ///
    /// # Errors
    /// A checkpoint that cannot be run, too little text, a model with biases in its FFN, or one that is not finite.
    pub fn calibrate(
        &self,
        model: &Llama,
        vb: &VarBuilder<'_>,
        config: &Config,
        fit: &[Vec<u32>],
        tune: &[Vec<u32>],
        mut progress: impl FnMut(Progress),
    ) -> Result<Fitted> {
        if config.mlp_bias {
            bail!("calibrate: models with biases in the FFN (mlp_bias) run dense only");
        }
        if model.decoder().sparse_config().is_some() {
            bail!(
                "calibrate: the checkpoint holds a profile already: leave it out, or set CANDLE_SPARSE=off"
            );
        }
        let mut run = Run::new(model);
        let (layers, hidden) = (config.num_hidden_layers, config.hidden_size);
        let gates = match &self.gate {
            Some(s) => attention::gates(&mut run, vb, config, [fit, tune], s, &mut progress)?,
            None => Vec::new(),
        };
        let mut moments = Inputs::new(vec![Moments::new(hidden); layers], Moments::add);
        run.over(fit, &mut moments, "reading the fit text", &mut progress)?;
        let mut samples = Inputs::new(vec![Sample::new(hidden, self.sample_rows); layers], Sample::add);
        run.over(tune, &mut samples, "reading the tune text", &mut progress)?;
        let act = Gate { act: config.hidden_act, shift: config.gate_shift };
        let mut fits = Vec::with_capacity(layers);
        for l in 0..layers {
            progress(Progress { stage: "fitting blocks", done: l, steps: layers });
            let weights = ffn_weights(vb, config, act, l)?;
            fits.push(fit_layer(&weights, &moments.each[l], &samples.each[l], &self.settings)?);
        }
        drop((moments, samples));
        let mut search =
            Search { run, fits: &fits, act, windows: some(tune, self.compared(config)), dense: Vec::new() };
        search.dense = search.windows.iter().map(|w| search.run.logits(w, None)).collect::<Result<_>>()?;
        let sensitivities = search.sensitivities(&mut progress)?;
        let mut tuned = [(0.0, 0.0); 3];
        for (i, rule) in Rule::ALL.into_iter().enumerate() {
            progress(Progress { stage: "searching shares", done: i, steps: 3 });
            tuned[i] = search.fitted(rule, self.target, &sensitivities)?;
        }
        let points = points(tuned.map(|t| t.0));
        let fitted = tuned.map(|t| points.iter().position(|p| *p == t.0).unwrap_or(0));
        let shares: Vec<Vec<f32>> = points.iter().map(|&p| divide(&fits, &sensitivities, p)).collect();
        let of_layer = |l: usize| -> Vec<f32> { shares.iter().map(|s| s[l]).collect() };
        let (layers, runs) = fits.iter().enumerate().map(|(l, f)| f.ordered(&of_layer(l))).unzip();
        let fingerprint = model.decoder().origin().fingerprint.to_vec();
        let mut about = serde_json::json!({ "format": 1, "rank": self.settings.rank });
        if let Some(s) = &self.gate {
            about["attention"] = attention::about(&gates, s, fit.first().map_or(0, Vec::len));
        }
        let profile_gates = gates.iter().map(|g| g.gate.clone()).collect();
        let profile = Profile { layers, gates: profile_gates, shares: points, fitted, fingerprint, about };
        Ok(Fitted { profile, runs, sensitivities, tuned, gates })
    }
}

impl Calibrator {
    /// So many tokens that comparing takes minutes and not hours.
    fn compared(&self, c: &Config) -> usize {
        let parameters = 3 * c.num_hidden_layers * c.intermediate_size * c.hidden_size;
        let affordable = (4096.0 * FAST_PARAMETERS / parameters as f64) as usize;
        self.compare_tokens.min(affordable.max(LEAST_COMPARED))
    }
}

/// Fits the gates of sparse attention alone; `fit` and `tune` are windows of tokens of different texts.
///
/// Gates go into a [`Profile`], or to [`Llama::with_gates`].
///
/// # Errors
/// A checkpoint that cannot be run, or too little text.
pub fn fit_gates(
    model: &Llama,
    vb: &VarBuilder<'_>,
    config: &Config,
    [fit, tune]: [&[Vec<u32>]; 2],
    settings: &GateSettings,
    mut progress: impl FnMut(Progress),
) -> Result<Vec<GateFit>> {
    let mut run = Run::new(model);
    attention::gates(&mut run, vb, config, [fit, tune], settings, &mut progress)
}

/// The FFN of a block as the fit wants it.
fn ffn_weights(vb: &VarBuilder<'_>, c: &Config, act: Gate, layer: usize) -> Result<FfnWeights> {
    let vb = vb.pp(format!("model.layers.{layer}.mlp"));
    let get =
        |name: &str, dims: (usize, usize)| vb.get(dims, &format!("{name}.weight"))?.to_dtype(DType::F32);
    let (inner, hidden) = (c.intermediate_size, c.hidden_size);
    Ok(FfnWeights {
        gate: get("gate_proj", (inner, hidden))?,
        up: get("up_proj", (inner, hidden))?,
        down: get("down_proj", (hidden, inner))?,
        act,
    })
}

/// Whole windows of at least `tokens` tokens, spread over all.
fn some(windows: &[Vec<u32>], tokens: usize) -> Vec<&Vec<u32>> {
    let len = windows.first().map_or(1, Vec::len);
    let step = (windows.len() * len / tokens.max(1)).max(1);
    windows.iter().step_by(step).collect()
}

fn points(fitted: [f32; 3]) -> Vec<f32> {
    let mut points: Vec<f32> = POINTS.into_iter().chain(fitted).collect();
    points.sort_by(f32::total_cmp);
    points.dedup();
    points
}

fn divide(fits: &[LayerFit], sensitivities: &[f32], mean: f32) -> Vec<f32> {
    let errors: Vec<&[f32]> = fits.iter().map(|f| f.error.as_slice()).collect();
    budgets(&errors, sensitivities, mean)
}

/// The dense model at work.
struct Run {
    model: Llama,
    cache: Cache,
}

impl Run {
    fn new(model: &Llama) -> Self {
        Self { model: model.clone(), cache: Cache::of(model, KvConfig::exact(KvDType::F32)) }
    }

    /// Logits `[window, vocab_size]`.
    fn logits(&mut self, window: &[u32], tap: Option<&mut dyn LayerTap>) -> Result<Tensor> {
        let x = Tensor::new(window, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match tap {
            Some(tap) => self.model.forward_tapped(&x, 0, &mut self.cache, tap)?,
            None => self.model.forward_all(&x, 0, &mut self.cache)?,
        };
        logits.squeeze(0)
    }

    fn over<T>(
        &mut self,
        windows: &[Vec<u32>],
        inputs: &mut Inputs<T>,
        stage: &'static str,
        progress: &mut impl FnMut(Progress),
    ) -> Result<()> {
        for (done, window) in windows.iter().enumerate() {
            progress(Progress { stage, done, steps: windows.len() });
            self.logits(window, Some(inputs))?;
            if let Some(e) = inputs.failed.take() {
                return Err(e);
            }
        }
        Ok(())
    }
}

/// Shows the inputs of each FFN to something.
struct Inputs<T> {
    each: Vec<T>,
    add: fn(&mut T, &[f32]) -> Result<()>,
    failed: Option<Error>,
}

impl<T> Inputs<T> {
    fn new(each: Vec<T>, add: fn(&mut T, &[f32]) -> Result<()>) -> Self {
        Self { each, add, failed: None }
    }
}

impl<T> LayerTap for Inputs<T> {
    fn ffn(&mut self, layer: usize, x: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {
        if let Err(e) = (self.add)(&mut self.each[layer], x) {
            self.failed.get_or_insert(e);
        }
    }
}

/// Comparing settings with the dense model on the tune text.
struct Search<'a> {
    run: Run,
    fits: &'a [LayerFit],
    act: Gate,
    windows: Vec<&'a Vec<u32>>,
    dense: Vec<Tensor>,
}

impl Search<'_> {
    fn quality(&mut self, simulation: &mut Simulation<'_>, windows: usize) -> Result<Quality> {
        let mut quality = Quality::default();
        for (window, dense) in self.windows.iter().zip(&self.dense).take(windows) {
            let logits = self.run.logits(window, Some(simulation))?;
            simulation.check()?;
            quality.add(window, 1, &logits, dense)?;
        }
        Ok(quality)
    }

    /// What a unit of error in each block costs in divergence.
    fn sensitivities(&mut self, progress: &mut impl FnMut(Progress)) -> Result<Vec<f32>> {
        let layers: Vec<LayerProfile> = self.fits.iter().map(|f| f.at(&[PROBE_SHARE])).collect();
        let mut simulation = Simulation::new(&layers, self.act, Choice::All)?;
        let probe = GRID.iter().position(|&s| s >= PROBE_SHARE).unwrap_or(0);
        let windows = self.windows.len().div_ceil(4);
        let mut all = Vec::new();
        for l in 0..layers.len() {
            progress(Progress { stage: "weighing blocks", done: l, steps: layers.len() });
            simulation.choose_only(l, Choice::Rule(Rule::Cascade, 0));
            let kld = self.quality(&mut simulation, windows)?.kld().max(0.0) as f32;
            all.push(kld / self.fits[l].error[probe].max(f32::MIN_POSITIVE));
        }
        Ok(all)
    }

    /// The share that a rule is fitted at, and the change of perplexity there.
    fn fitted(&mut self, rule: Rule, target: Target, sensitivities: &[f32]) -> Result<(f32, f64)> {
        let mut change = |share: f32| -> Result<f64> {
            let shares = divide(self.fits, sensitivities, share);
            let layers: Vec<_> = self.fits.iter().zip(&shares).map(|(f, &s)| f.at(&[s])).collect();
            let mut simulation = Simulation::new(&layers, self.act, Choice::Rule(rule, 0))?;
            Ok(self.quality(&mut simulation, usize::MAX)?.ppl_change())
        };
        let allowed = match target {
            Target::ActiveShare(share) => return Ok((share, change(share)?)),
            Target::PplLoss(allowed) => allowed,
        };
        let (mut low, mut high) = (GRID[0], (1.0, 0.0));
        for _ in 0..HALVINGS {
            let middle = (low + high.0) / 2.0;
            let loss = change(middle)?;
            if loss <= allowed { high = (middle, loss) } else { low = middle }
        }
        Ok(high)
    }
}
