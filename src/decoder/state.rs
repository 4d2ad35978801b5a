//! What a sequence's sparse steps have seen: statistics, the guard's verdicts, blocks that run dense for a while.

use crate::{
    Guard,
    sparse::{BlockSelection, FfnMode, GuardSample, ModelSelection, TokenSelection},
};
use candle_sparse_core::ffn::dense_left;

/// What an error past the limit multiplies a block's thresholds with.
const SINK: f32 = 0.8;
/// What an error below half of it does, until they are as they were.
const RISE: f32 = 1.02;
/// Thresholds this small let nearly everything pass.
const LEAST_SCALE: f32 = 0.01;
/// Looks from which on a new one counts as much as a fourth of the mean.
const MEMORY: u32 = 4;

/// What the sparse FFNs of one sequence did, block by block; counted by decode steps alone, since prompts are dense.
///
/// ```
/// use candle_sparse::decoder::SparseStats;
///
/// let stats = SparseStats::default();
/// assert_eq!((stats.layers.len(), stats.active_share()), (0, 1.0));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseStats {
    /// One per decoder block; empty before the first decoded token of a model with a profile.
    pub layers: Vec<LayerStats>,
}

impl SparseStats {
    /// The mean active share of all blocks; 1 where nothing was counted, as in a dense model.
    #[must_use]
    pub fn active_share(&self) -> f64 {
        if self.layers.is_empty() {
            return 1.0;
        }
        self.layers.iter().map(|l| l.active_share).sum::<f64>() / self.layers.len() as f64
    }
}

/// Means over the decoded tokens of one block.
///
/// ```
/// use candle_sparse::decoder::{Input, LoadOptions, Logits, Scratch, Step};
/// use candle_sparse::{FfnMode, KvCache, KvConfig, KvDType, Selection, SparseConfig};
///
/// let config = SparseConfig::default().with_mode(FfnMode::Cascade).with_selection(Selection::Share(0.3));
/// // Also where this machine gains nothing by it.
/// let options = LoadOptions::default().with_sparse(config.with_force(true));
/// # use candle_sparse_models::{files::ModelFiles, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, options)?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let mut cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
/// let (mut scratch, mut logits) = (Scratch::default(), vec![0.0; decoder.config().vocab_size]);
/// for index_pos in 0..4 {
///     let step = Step { batch: 1, seq_len: 1, index_pos };
///     decoder.forward(Input::Ids(&[5]), step, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
/// }
/// let stats = scratch.sparse_stats();
/// assert_eq!((stats.layers.len(), stats.layers[0].tokens), (4, 4));
/// assert!(stats.active_share() < 0.9, "{stats:?}");
/// assert!(decoder.read_bytes_per_token(&stats) < decoder.weight_bytes_per_token());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerStats {
    /// Decoded tokens.
    pub tokens: u64,
    /// Those for which all neurons were computed because so many were needed, or expected.
    pub dense_tokens: u64,
    /// Neurons whose up and down rows were read, of all.
    pub active_share: f64,
    /// Neurons that the prediction named, of all; without a prediction those that are active.
    pub candidate_share: f64,
    /// Weight bytes of the FFN read per token, counted from what was computed.
    pub bytes_per_token: f64,
    /// How often the [guard](crate::Guard) compared the block with its dense FFN.
    pub looks: u64,
    /// Mean `‖y_dense − y_sparse‖ / ‖y_dense‖` of these comparisons.
    pub error: f64,
    /// Mean share of `Σ |a|·n` that the active neurons held in these comparisons.
    pub recall: f64,
    /// The guard multiplies the block's thresholds by this; 1 as long as the error stays within its limit.
    pub scale: f32,
}

/// One block of one token.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LayerRun {
    pub(super) active: usize,
    pub(super) candidates: usize,
    pub(super) bytes: usize,
    pub(super) dense: bool,
    pub(super) sample: Option<GuardSample>,
}

impl LayerRun {
    /// Of a block that leaves nothing out.
    pub(super) fn all(neurons: usize, bytes: usize) -> Self {
        Self { active: neurons, candidates: neurons, bytes, dense: true, sample: None }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// [`ModelSelection::id`] of what is counted.
    id: u64,
    neurons: usize,
    layers: Vec<LayerState>,
}

#[derive(Clone, Copy, Debug)]
struct LayerState {
    tokens: u64,
    dense: u64,
    active: u64,
    candidates: u64,
    bytes: u64,
    looks: u64,
    errors: f64,
    recalls: f64,
    /// Running mean of the error since the scale last sank, and over how many looks.
    mean: f32,
    since: u32,
    scale: f32,
    dense_left: u32,
}

impl LayerState {
    const NEW: Self = Self {
        tokens: 0,
        dense: 0,
        active: 0,
        candidates: 0,
        bytes: 0,
        looks: 0,
        errors: 0.0,
        recalls: 0.0,
        mean: 0.0,
        since: 0,
        scale: 1.0,
        dense_left: 0,
    };

    fn note(&mut self, run: &LayerRun, neurons: usize, plan: &BlockSelection, guard: Option<Guard>) {
        self.tokens += 1;
        self.dense += u64::from(run.dense);
        self.active += run.active as u64;
        self.candidates += run.candidates as u64;
        self.bytes += run.bytes as u64;
        if plan.mode != FfnMode::Dense {
            self.dense_left = dense_left(self.dense_left, run.dense, run.active, neurons);
        }
        if let (Some(sample), Some(guard)) = (run.sample, guard) {
            self.looks += 1;
            self.errors += f64::from(sample.error);
            self.recalls += f64::from(sample.recall);
            self.judge(sample.error, guard.limit);
        }
    }

    fn judge(&mut self, error: f32, limit: f32) {
        self.since += 1;
        self.mean += (error - self.mean) / self.since.min(MEMORY) as f32;
        if self.mean > limit {
            self.scale = (self.scale * SINK).max(LEAST_SCALE);
            // The mean was that of other thresholds.
            (self.mean, self.since) = (0.0, 0);
        } else if self.mean < 0.5 * limit {
            self.scale = (self.scale * RISE).min(1.0);
        }
    }
}

impl State {
    /// Forgets what was counted under other plans. Allocates when the model has more blocks than before.
    pub(super) fn begin(&mut self, plans: &ModelSelection, neurons: usize) {
        if self.id != plans.id {
            (self.id, self.neurons) = (plans.id, neurons);
            self.layers.clear();
            self.layers.resize(plans.layers.len(), LayerState::NEW);
        }
    }

    pub(super) fn selection<'a>(
        &self,
        plans: &'a ModelSelection,
        i: usize,
        position: usize,
    ) -> TokenSelection<'a> {
        let (plan, layer) = (&plans.layers[i], &self.layers[i]);
        let dense = plan.mode == FfnMode::Dense || layer.dense_left > 0;
        let sample = plans.config.guard.is_some_and(|g| {
            position.is_multiple_of(g.every) && position / g.every % plans.layers.len() == i
        });
        let more = |k: usize| ((k as f32 / layer.scale).ceil() as usize).min(self.neurons);
        let (factor, top) = (layer.scale * layer.scale, plan.top.map(more));
        TokenSelection { plan, dense, factor, top, sample: sample && !dense }
    }

    pub(super) fn note(&mut self, plans: &ModelSelection, runs: &[LayerRun]) {
        for ((layer, run), plan) in self.layers.iter_mut().zip(runs).zip(&plans.layers) {
            layer.note(run, self.neurons, plan, plans.config.guard);
        }
    }

    /// Notes what a token did in layer `i`.
    pub(super) fn note_layer(&mut self, plans: &ModelSelection, i: usize, run: &LayerRun) {
        self.layers[i].note(run, self.neurons, &plans.layers[i], plans.config.guard);
    }

    pub(super) fn stats(&self) -> SparseStats {
        let per = |sum: f64, n: u64| sum / n.max(1) as f64;
        let layer = |l: &LayerState| LayerStats {
            tokens: l.tokens,
            dense_tokens: l.dense,
            active_share: per(l.active as f64 / self.neurons.max(1) as f64, l.tokens),
            candidate_share: per(l.candidates as f64 / self.neurons.max(1) as f64, l.tokens),
            bytes_per_token: per(l.bytes as f64, l.tokens),
            looks: l.looks,
            error: per(l.errors, l.looks),
            recall: per(l.recalls, l.looks),
            scale: l.scale,
        };
        SparseStats { layers: self.layers.iter().map(layer).collect() }
    }

    /// Begins to count anew; what the guard learned stays.
    pub(super) fn reset(&mut self) {
        for l in &mut self.layers {
            let LayerState { mean, since, scale, dense_left, .. } = *l;
            *l = LayerState { mean, since, scale, dense_left, ..LayerState::NEW };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_sink_with_errors_and_rise_again() {
        let mut layer = LayerState::NEW;
        layer.judge(0.2, 0.1);
        assert_eq!(layer.scale, SINK);
        layer.judge(0.08, 0.1);
        assert_eq!(layer.scale, SINK, "neither too large nor far below");
        for _ in 0..40 {
            layer.judge(0.01, 0.1);
        }
        assert_eq!(layer.scale, 1.0);
        for _ in 0..200 {
            layer.judge(1.0, 0.1);
        }
        assert_eq!(layer.scale, LEAST_SCALE);
    }
}
