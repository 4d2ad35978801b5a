//! How the budget of recall is shared out among heads: some need many pages of their past and some none.
//!
//! ```text
//! attention of the dense model → what each head's output loses where so many pages are recalled (losses)
//! pages go where they save most, until the mean is the budget
//! ```

mod losses;

use super::{attention::at_most, course::Course, run::Run, seen::Grams};
use crate::decoder::LayerTap;
use candle_core::{DType, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::{Config, with_methods};
use losses::Losses;
use std::ops::Range;

/// Bytes of queries, keys and values that are held at once: where all blocks need more, the texts are run several times.
const MEMORY: usize = 1 << 30;

/// How the budget of [`AttentionMode::Recall`](crate::AttentionMode::Recall) is shared out among the key/value heads.
///
/// Memory beside the model: the queries, keys and values of a window in F32, of as many blocks at a time as take a GB, and the work of
/// one block.
///
/// ```
/// use candle_sparse::calibrate::RecallSettings;
///
/// // Of 2048 positions a quarter is read: the first page, the last 128, and 11 pages of 32 that are recalled.
/// let settings = RecallSettings::default();
/// assert_eq!((settings.window_of(2048), settings.pages_of(2048)), (128, 11));
/// assert!(settings.is_enough(2048) && !settings.is_enough(256));
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RecallSettings {
    /// Positions before a token that it always sees; `None` takes a sixteenth of the text's windows, at most 256.
    pub window: Option<usize>,
    /// Share of a window of text that its last token reads: what is learned serves other shares too, but this one best.
    pub share: f32,
    /// Tokens of each text that are looked at, at most.
    pub tokens: usize,
}

with_methods!(RecallSettings {
    with_window: window: Option<usize>,
    with_share: share: f32,
    with_tokens: tokens: usize,
});

impl Default for RecallSettings {
    /// A quarter of the positions; 16 k tokens of each text.
    fn default() -> Self {
        Self { window: None, share: 0.25, tokens: 16 * 1024 }
    }
}

impl RecallSettings {
    /// The window, in positions, for texts in windows of `context` tokens.
    #[must_use]
    pub fn window_of(&self, context: usize) -> usize {
        self.window.unwrap_or_else(|| (context / 16).min(256))
    }

    /// Pages that a head recalls in the mean at the end of `context` tokens.
    #[must_use]
    pub fn pages_of(&self, context: usize) -> usize {
        let read = (context as f32 * self.share) as usize;
        read.saturating_sub(self.window_of(context)).saturating_sub(losses::PAGE) / losses::PAGE
    }

    /// Whether windows of `context` tokens are long enough to tell.
    #[must_use]
    pub fn is_enough(&self, context: usize) -> bool {
        self.pages_of(context) >= 2 && self.pages_of(context) * losses::PAGE * 2 <= context
    }
}

/// Budgets of heads and what they save.
///
/// ```
/// use candle_sparse::calibrate::RecallFit;
///
/// let fit = RecallFit { shares: vec![vec![0.0, 2.0], vec![0.5, 1.5]], losses: [0.02, 0.01] };
/// assert!(fit.helps());
/// ```
#[derive(Clone, Debug)]
pub struct RecallFit {
    /// `[blocks][kv_heads]`: how many times the mean each head recalls.
    pub shares: Vec<Vec<f32>>,
    /// What attention's outputs lose of their squares on text that nothing was fitted to, mean of the blocks: with as much for every
    /// head, and shared out; [`Self::shares`] are all 1 where that does not help.
    pub losses: [f64; 2],
}

impl RecallFit {
    /// Whether sharing out loses less than giving every head as much.
    #[must_use]
    pub fn helps(&self) -> bool {
        self.losses[1] < self.losses[0]
    }
}

/// Shares the budget out: `fit` decides, `tune` says what it saves.
pub(super) fn recall(
    run: &mut Run,
    vb: &VarBuilder<'_>,
    [fit, tune]: [&[Vec<u32>]; 2],
    s: &RecallSettings,
    course: &mut Course<'_>,
) -> Result<RecallFit> {
    let config = &run.model.config().clone();
    let windows = [fit, tune].map(|text| long_enough(text, s));
    let context = windows[0].iter().map(Vec::len).max().unwrap_or(0);
    if windows.iter().any(Vec::is_empty) {
        let longest = fit.iter().chain(tune).map(Vec::len).max().unwrap_or(0);
        bail!(
            "calibrate: to share out the budget of recall both texts need longer windows, the longest has {longest} tokens: give \
             longer documents and --context 2048, or leave it out"
        );
    }
    let (layers, heads) = (config.num_hidden_layers, config.num_key_value_heads);
    if let Some(found) = found(course, layers * heads, heads)? {
        return Ok(found);
    }
    let windows = windows.each_ref().map(|text| at_most(text, s.tokens));
    let row = (config.q_dim() + 2 * config.kv_dim()) * size_of::<f32>();
    let together = (MEMORY / (context * row)).clamp(1, layers);
    let (passes, n) = (layers.div_ceil(together), windows.iter().map(Vec::len).sum::<usize>());
    let mut watch = Watch::new(vb, config, *s, context)?;
    for pass in 0..passes {
        watch.blocks = pass * together..((pass + 1) * together).min(layers);
        let all = windows.iter().enumerate().flat_map(|(text, w)| w.iter().map(move |w| (text, w)));
        for (done, (text, window)) in all.enumerate() {
            course.step("watching recall", pass * n + done, passes * n)?;
            (watch.text, watch.tokens) = (text, window.len());
            run.show(window, &mut watch)?;
            if let Some(e) = watch.failed.take() {
                return Err(e);
            }
        }
    }
    let ([fit, tune], mean) = (watch.losses, s.pages_of(context) as f32);
    let pages = fit.share_out(mean);
    let losses = [tune.at(&vec![mean; pages.len()]), tune.at(&pages)];
    let helps = losses[1] < losses[0];
    let shares: Vec<f32> = pages.iter().map(|p| if helps { p / mean } else { 1.0 }).collect();
    course.keep("recall.shares", &shares)?;
    course.keep("recall.losses", &losses)?;
    course.stage_ends()?;
    Ok(RecallFit { shares: shares.chunks(heads).map(<[f32]>::to_vec).collect(), losses })
}

/// Those that tell something.
fn long_enough(windows: &[Vec<u32>], s: &RecallSettings) -> Vec<Vec<u32>> {
    windows.iter().filter(|w| s.is_enough(w.len())).cloned().collect()
}

/// What an earlier run has kept.
fn found(course: &Course<'_>, all: usize, heads: usize) -> Result<Option<RecallFit>> {
    let [uniform, shared] = course.numbers("recall.losses")?[..] else { return Ok(None) };
    let shares = course.all("recall.shares", all)?;
    let shares = shares.chunks(heads).map(<[f32]>::to_vec).collect();
    Ok(Some(RecallFit { shares, losses: [uniform, shared] }))
}

/// What recall loses in the blocks of a model.
struct Watch<'a> {
    config: &'a Config,
    settings: RecallSettings,
    context: usize,
    blocks: Range<usize>,
    grams: Vec<Grams>,
    /// Of the text to fit and of the one to report on.
    losses: [Losses; 2],
    /// Of the window that is being run: which text's, and how long it is.
    text: usize,
    tokens: usize,
    /// Of each block so far: a window of more than 512 tokens comes in pieces, each through all blocks.
    qkv: Vec<Vec<f32>>,
    failed: Option<Error>,
}

impl<'a> Watch<'a> {
    fn new(
        vb: &VarBuilder<'_>,
        config: &'a Config,
        settings: RecallSettings,
        context: usize,
    ) -> Result<Self> {
        let (layers, shape) = (config.num_hidden_layers, (config.hidden_size, config.q_dim()));
        let grams = |l: usize| {
            let o_proj = vb.get(shape, &format!("model.layers.{l}.self_attn.o_proj.weight"))?;
            Grams::new(&o_proj.to_dtype(DType::F32)?, config)
        };
        Ok(Self {
            grams: (0..layers).map(grams).collect::<Result<_>>()?,
            losses: [(); 2].map(|()| Losses::new([layers, config.num_key_value_heads], context)),
            blocks: 0..0,
            config,
            settings,
            context,
            text: 0,
            tokens: 0,
            qkv: vec![Vec::new(); layers],
            failed: None,
        })
    }
}

impl LayerTap for Watch<'_> {
    fn attention(&mut self, layer: usize, _: &[f32], qkv: &[f32]) {
        if !self.blocks.contains(&layer) {
            return;
        }
        self.qkv[layer].extend_from_slice(qkv);
        let width = self.config.q_dim() + 2 * self.config.kv_dim();
        if self.qkv[layer].len() < self.tokens * width {
            return;
        }
        let qkv = std::mem::take(&mut self.qkv[layer]);
        let window = self.settings.window_of(self.context);
        let losses = &mut self.losses[self.text];
        if let Err(e) = losses.add(self.config, &self.grams[layer], layer, &qkv, window) {
            self.failed.get_or_insert(e);
        }
    }

    fn ffn(&mut self, _: usize, _: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {}
}

#[cfg(test)]
mod tests;
