//! Making a profile from a checkpoint and texts.
//!
//! ```text
//! fit text   → second moments of every FFN's inputs
//! tune text  → a sample of inputs → per block: prediction, thresholds, errors
//!            → what an error in each block costs (divergence with only that block sparse) → budgets
//!            → the share at which each rule loses what it may (`search`)
//! both       → what attention reads and does, for some blocks at a time → their gates (`attention`)
//!            → what the output of each head loses at so many recalled pages → their budgets (`recall`)
//! held-out   → whether each rule keeps the target there; where not, at a larger share (`held_out`)
//! ```
//!
//! What a text says about a model that does not know it is worth little: [`own_text`] is text that it knows.

mod attention;
mod block;
mod budgets;
mod course;
mod gate;
mod held_out;
mod layer;
mod order;
mod own_text;
mod predictor;
mod recall;
mod regression;
mod run;
mod sample;
mod scores;
mod search;
mod seen;
mod stages;
mod thresholds;

use crate::{decoder::Decoder, profile::Profile, quality::Loss};
pub use block::Settings;
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::with_methods;
use course::Course;
pub use gate::{GateFit, GateSettings};
pub use held_out::RuleReport;
pub use own_text::{OwnText, own_text};
pub use recall::{RecallFit, RecallSettings};
use run::Run;
use std::path::Path;

/// What a profile is to aim at.
///
/// ```
/// use candle_sparse::{calibrate::{Calibrator, Target}, quality::Loss};
///
/// // At most half a percent of perplexity and a divergence of 0.01 nats per token.
/// let target = Target::Loss(Loss { ppl: 0.005, kld: 0.01 });
/// assert_eq!(Calibrator::default().with_target(target).target, target);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Target {
    /// The smallest share that loses no more than this on held-out text, with a certainty of 95 %; the divergence may be
    /// larger by the [noise floor](Fitted::noise_floor) of the dense path.
    Loss(Loss),
    /// This mean active share, whatever it costs.
    ActiveShare(f32),
}

/// How to calibrate: the settings, and [`Self::calibrate`] with them.
///
/// ```
/// use candle_sparse::calibrate::{Calibrator, Settings, Target, own_text};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::{self, Pretrained}};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let mut files = ModelFiles::from_folder(folder)?;
/// # files.sparse_profile = None;
/// # let loaded = Pretrained::load(&files, LoadOptions::default())?;
/// # let vb = pretrained::var_builder(&files, None)?;
/// let decoder = loaded.model.decoder(); // of a Llama without a profile, loaded from the tensors in `vb`
/// // So little text serves an example only: real ones have a million tokens.
/// let text = own_text(decoder, 1800, &[0], 1)?.windows;
/// let (fit, tune, held_out) = (&text[..4], &text[4..6], &text[6..8]);
/// let calibrator = Calibrator::default()
///     .with_settings(Settings::default().with_rank(16))
///     .with_target(Target::ActiveShare(0.4))
///     .with_compare_tokens(128);
/// let mut stages = Vec::new();
/// let fitted = calibrator.calibrate(decoder, &vb, [fit, tune, held_out], |p| stages.push(p.stage))?;
/// assert!(stages.contains(&"fitting blocks"));
/// fitted.profile.check_model(decoder.config())?;
/// assert_eq!(fitted.profile.layers[0].rank, 16);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Calibrator {
    /// Rank and factors of the fit.
    pub settings: Settings,
    /// What the fitted points aim at.
    pub target: Target,
    /// Inputs of each FFN that are kept for thresholds; they take `sample_rows · hidden_size · layers · 4` bytes.
    pub sample_rows: usize,
    /// Tokens on which settings are compared, some 15 times over and once more for each four blocks; models with more than
    /// 40 million FFN parameters take fewer, in proportion, but no less than 1024.
    pub compare_tokens: usize,
    /// How the gates of sparse attention are fitted; `None` fits none.
    pub gate: Option<GateSettings>,
    /// How the budget of recall is shared out among heads; `None` gives every head as much.
    pub recall: Option<RecallSettings>,
}

with_methods!(Calibrator {
    with_settings: settings: Settings,
    with_target: target: Target,
    with_sample_rows: sample_rows: usize,
    with_compare_tokens: compare_tokens: usize,
    with_gate: gate: Option<GateSettings>,
    with_recall: recall: Option<RecallSettings>,
});

impl Default for Calibrator {
    /// 1 % of perplexity and a divergence of 0.02, at most 4096 inputs per FFN, 4096 tokens to compare on, nothing of attention.
    fn default() -> Self {
        let (settings, target) = (Settings::default(), Target::Loss(Loss { ppl: 0.01, kld: 0.02 }));
        Self { settings, target, sample_rows: 4096, compare_tokens: 4096, gate: None, recall: None }
    }
}

/// Where a calibration is: `done` of the `steps` of a `stage`, for a progress bar.
///
/// ```
/// use candle_sparse::calibrate::Progress;
///
/// let show = |p: Progress| format!("{} {} %", p.stage, 100 * p.done / p.steps.max(1));
/// assert_eq!(show(Progress { stage: "fitting blocks", done: 3, steps: 12 }), "fitting blocks 25 %");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: &'static str,
    /// Steps done of this stage.
    pub done: usize,
    /// Steps of this stage.
    pub steps: usize,
}

/// What a calibration gives: the profile, and what was measured on the way to it.
///
/// ```
/// use candle_sparse::calibrate::Fitted;
///
/// /// The profile with what speaks against using it.
/// fn summary(fitted: &Fitted) -> String {
///     let rules = fitted.held_out.iter().map(|report| {
///         let change = 100.0 * report.quality.ppl_change();
///         format!("{:?}: {:.0} % of the neurons, perplexity {change:+.2} %\n", report.rule, 100.0 * report.active)
///     });
///     rules.chain(fitted.doubts()).collect()
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Fitted {
    /// The profile.
    pub profile: Profile,
    /// Per block: mean length of runs of active neurons before and after they were put in order.
    pub runs: Vec<[f32; 2]>,
    /// Divergence with only this block sparse, per unit of its mean square error.
    pub sensitivities: Vec<f32>,
    /// In the order of [`Rule`](crate::profile::Rule): each at its fitted point, on the held-out text.
    pub held_out: [RuleReport; 3],
    /// Divergence of the dense model from the same weights with activations that are not rounded, nats per token; 0 where
    /// it rounds none, or where it is too large to hold in F32 as well.
    pub noise_floor: f64,
    /// Perplexity of the held-out text, and of text that the model has written itself.
    pub ppl: [f64; 2],
    /// Per block, where gates were asked for: how well they predict, see [`GateSettings`].
    pub gates: Vec<GateFit>,
    /// Where it was asked for: how the budget of recall is shared out.
    pub recall: Option<RecallFit>,
}

impl Fitted {
    /// What speaks against the profile, one sentence each: text that the model does not know (its perplexity is more than 8 times
    /// that of what the model writes itself), or a best rule that changes the most likely token at more than 15 % of the positions.
    /// Empty where nothing does.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        let [ppl, own] = self.ppl;
        if ppl > UNKNOWN_TEXT * own {
            doubts.push(format!(
                "the model does not know this kind of text: perplexity {ppl:.1}, {:.0} times that of text it writes itself \
                 ({own:.1}); what is learned and measured on it says little about what the model is used for",
                ppl / own
            ));
        }
        if let Some(rule) = self.profile.held_out.best {
            let agreement = self.held_out[rule as usize].quality.top1_agreement();
            if agreement < LEAST_AGREEMENT {
                doubts.push(format!(
                    "with {rule:?} the most likely token is another one at {:.0} % of the positions",
                    100.0 * (1.0 - agreement)
                ));
            }
        }
        doubts
    }
}

/// Text whose perplexity is so many times that of the model's own is of a kind that it does not know.
const UNKNOWN_TEXT: f64 = 8.0;
/// Share of the positions at which the most likely token should stay the same.
const LEAST_AGREEMENT: f64 = 0.85;
/// What a calibration of attention alone gives.
#[derive(Clone, Debug)]
pub struct FittedAttention {
    /// A profile of [attention alone](Profile::is_of_attention_alone).
    pub profile: Profile,
    /// Per block, where gates were asked for: how well they predict, see [`GateSettings`].
    pub gates: Vec<GateFit>,
    /// How the budget of recall is shared out; where that [does not help](RecallFit::helps) the profile gives every head as much.
    pub recall: Option<RecallFit>,
}

impl Calibrator {
    /// Fits what attention needs and nothing of the FFN: `fit` and `tune` are windows of tokens of different texts.
    ///
    /// ```
    /// use candle_sparse::{AttentionConfig, AttentionMode};
    /// use candle_sparse::calibrate::{Calibrator, RecallSettings, own_text};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::{self, Pretrained}};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
    /// # let mut files = ModelFiles::from_folder(folder)?;
    /// # files.sparse_profile = None;
    /// # let loaded = Pretrained::load(&files, LoadOptions::default())?;
    /// # let vb = pretrained::var_builder(&files, None)?;
    /// let decoder = loaded.model.decoder(); // of a Llama, loaded from the tensors in `vb`
    /// let text: Vec<Vec<u32>> = own_text(decoder, 2100, &[0], 1)?.windows.concat().chunks_exact(512).map(<[u32]>::to_vec).collect();
    /// let calibrator = Calibrator::default().with_recall(Some(RecallSettings::default()));
    /// let fitted = calibrator.calibrate_attention(decoder, &vb, [&text[..2], &text[2..]], |_| {})?;
    /// assert!(fitted.profile.is_of_attention_alone());
    /// // Two key/value heads in each of four blocks; the model recalls with these budgets from now on.
    /// let shares = fitted.profile.recall_shares.clone();
    /// assert_eq!((shares.len(), shares[0].len()), (4, 2));
    /// let recall = AttentionConfig::new(AttentionMode::Recall).with_window(64).with_budget(256);
    /// let decoder = decoder.with_recall_shares(shares)?.with_attention(recall)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// Cost: for recall [`RecallSettings::tokens`] of both texts are read once, and `n²/26` products of a query and a key per window of
    /// `n` tokens and query head, and as many weighted values, are made; [`RecallSettings`] says how much memory it takes. Gates come on
    /// top of that, see [`GateSettings`].
    ///
    /// # Errors
    /// No [`Self::recall`], a checkpoint that cannot be run, a model that leaves neurons out, or too little text.
    pub fn calibrate_attention(
        &self,
        model: &Decoder,
        vb: &VarBuilder<'_>,
        texts: [&[Vec<u32>]; 2],
        mut progress: impl FnMut(Progress),
    ) -> Result<FittedAttention> {
        if self.recall.is_none() {
            bail!(
                "calibrate: attention alone is calibrated with recall, give its settings; for gates alone call fit_gates"
            );
        }
        stages::check_dense(model)?;
        attention::fit(self, &mut Run::new(model)?, vb, texts, &mut Course::new(&mut progress))
    }

    /// Fits a profile for `model`, loaded without one from the checkpoint in `vb`; `fit`, `tune` and `held_out` are windows
    /// of tokens of different texts.
    ///
    /// A rule that misses the target on the held-out text is tried there at larger shares, up to 0.9; one that still misses
    /// it stands in the profile as [not kept](crate::profile::HeldOut).
    ///
    /// Cost: `fit` and `tune` are read once, without the head, [`Self::compare_tokens`] tokens of `tune` as often as said there,
    /// `held_out` four times, and again where a rule misses the target; per block some `20 · sample_rows · intermediate_size ·
    /// hidden_size` multiply-adds and two decompositions of matrices `[hidden_size, hidden_size]`. Memory beside the model,
    /// however long the texts: `hidden_size²` f32 per block, the samples, and the work of one block. Where gates are fitted,
    /// before that, [`GateSettings::memory`] or the inputs of one block, whichever is more, and a copy of the latter.
    ///
    /// # Errors
    /// A checkpoint that cannot be run, too little text, a model with biases in its FFN, or one that is not finite.
    pub fn calibrate(
        &self,
        model: &Decoder,
        vb: &VarBuilder<'_>,
        texts: [&[Vec<u32>]; 3],
        mut progress: impl FnMut(Progress),
    ) -> Result<Fitted> {
        stages::calibrate(self, model, vb, texts, &mut Course::new(&mut progress))
    }

    /// As [`Self::calibrate`], but what was found stands in the file `checkpoint`, from which the next run goes on where this
    /// one is interrupted; both give the same profile, bit for bit. The file stays: delete it when the profile is saved.
    ///
    /// It is written at the end of each stage, and every 20 s within the long ones; it takes about as many bytes as
    /// `4 · (rank + 90) · (hidden_size + 2 · intermediate_size)` per block.
    ///
    /// # Errors
    /// As [`Self::calibrate`], and [`Error::File`](crate::Error::File): the file belongs to another model, text, setting or version,
    /// is damaged, or cannot be written.
    pub fn calibrate_resumable(
        &self,
        model: &Decoder,
        vb: &VarBuilder<'_>,
        texts: [&[Vec<u32>]; 3],
        checkpoint: impl AsRef<Path>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Fitted> {
        let about = course::about(self, model, texts);
        let mut course = Course::kept(checkpoint.as_ref(), about, &mut progress)?;
        stages::calibrate(self, model, vb, texts, &mut course)
    }
}

/// Fits the gates of sparse attention alone; `fit` and `tune` are windows of tokens of different texts.
///
/// Gates go into a [`Profile`], or to [`Decoder::with_gates`].
///
/// ```
/// use candle_sparse::calibrate::{GateSettings, fit_gates, own_text};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::{self, Pretrained}};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let mut files = ModelFiles::from_folder(folder)?;
/// # files.sparse_profile = None;
/// # let loaded = Pretrained::load(&files, LoadOptions::default())?;
/// # let vb = pretrained::var_builder(&files, None)?;
/// let decoder = loaded.model.decoder(); // of a Llama, loaded from the tensors in `vb`
/// let text = own_text(decoder, 1900, &[0], 1)?.windows;
/// let settings = GateSettings::default().with_window(Some(32)).with_min_later(8);
/// let gates = fit_gates(decoder, &vb, [&text[..6], &text[6..]], &settings, |_| {})?;
/// // One gate per block; decode then reads the pages that they find salient.
/// let decoder = decoder.with_gates(gates.into_iter().map(|fit| fit.gate).collect())?;
/// assert_eq!(decoder.gates().len(), 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A checkpoint that cannot be run, or too little text.
pub fn fit_gates(
    model: &Decoder,
    vb: &VarBuilder<'_>,
    [fit, tune]: [&[Vec<u32>]; 2],
    settings: &GateSettings,
    mut progress: impl FnMut(Progress),
) -> Result<Vec<GateFit>> {
    let mut run = Run::new(model)?;
    attention::gates(&mut run, vb, [fit, tune], settings, &mut Course::new(&mut progress))
}

#[cfg(test)]
mod tests;
