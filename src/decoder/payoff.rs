//! Whether leaving neurons out is faster, on this machine and for these blocks: measured while a model is loaded.
//!
//! Bytes say when it could be. What it costs to judge the neurons, to gather rows and to hand over between threads depends
//! on the machine and on the size of the blocks. So some blocks are held both ways for a moment and a few tokens are
//! decoded through them, dense and with drawn neurons at two shares, in turn. Time grows linearly with the share, so the
//! two say at which share it equals the dense one. Exact zeros need no drawing: the blocks themselves say how many there are, as far
//! as tokens without a text before them do.

use super::{Decoder, Input, Layer, Logits, Scratch, Sparse, Step};
use crate::{
    KvCache, KvConfig, KvDType, SparseConfig,
    sparse::{BREAK_EVEN, FfnMode, ModelSelection, Points, candidate_factor},
};
use candle_core::Result;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Decoded tokens of each kind, at least and at most; in between so many as take [`LIMIT`].
const ROUNDS: [usize; 2] = [5, 24];
const LIMIT: Duration = Duration::from_millis(300);
/// Rounds that wake threads and caches, not counted.
const WARM_UP: usize = 2;

/// Blocks held both ways.
pub(super) struct Trial {
    /// With dense FFNs, and with sparse ones.
    pub(super) blocks: [Vec<Layer>; 2],
    /// The share of each that is expected to be active.
    pub(super) shares: Vec<f32>,
    pub(super) mode: FfnMode,
    pub(super) points: Points,
}

/// Seconds per token as a function of the active share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payoff {
    /// The token's with dense FFNs.
    dense: f64,
    /// At no neuron active, and what all of them add.
    fixed: f64,
    slope: f64,
}

impl Payoff {
    /// From the times of a dense token and of two shares.
    fn new(dense: f64, [(s0, t0), (s1, t1)]: [(f32, f64); 2]) -> Self {
        // A share that costs nothing, or less than nothing, is noise.
        let slope = ((t1 - t0) / f64::from(s1 - s0)).max(0.0);
        Self { dense, fixed: t1 - slope * f64::from(s1), slope }
    }

    /// The share up to which a block gains.
    pub(super) fn break_even(&self) -> f32 {
        let left = self.dense - self.fixed;
        if left <= 0.0 {
            return 0.0;
        }
        ((left / self.slope) as f32).min(BREAK_EVEN)
    }

    /// Of a dense token's time: what blocks of these shares save, each one `part` of a measured token.
    pub(super) fn saved(&self, shares: impl Iterator<Item = f32>, part: f64) -> f64 {
        let saved = |share: f32| self.dense - self.fixed - self.slope * f64::from(share);
        shares.map(saved).sum::<f64>() * part / self.dense
    }
}

/// What leaving out exact zeros does to a token of the measured blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zeros {
    /// Seconds per token with all neurons, and without those that are shut.
    seconds: [f64; 2],
    /// The share of neurons that are not.
    pub(super) active: f64,
}

impl Zeros {
    /// Of a dense token's time.
    pub(super) fn saved(&self) -> f64 {
        1.0 - self.seconds[1] / self.seconds[0]
    }
}

impl Decoder {
    /// Times the blocks of a trial in a decoder that has everything but blocks.
    ///
    /// # Errors
    /// A token cannot be decoded, as where a weight is not finite.
    pub(super) fn measure(&self, trial: Trial) -> Result<Payoff> {
        let Trial { blocks: [dense, sparse], shares, mode, points } = trial;
        let mean = shares.iter().sum::<f32>() / shares.len() as f32;
        let candidates = candidate_factor(self.config.hidden_act);
        let mut config = self.config;
        config.num_hidden_layers = shares.len();
        let dense = Self { config, layers: dense.into(), ..self.clone() };
        let layers: Arc<[Layer]> = sparse.into();
        let with = |part: f32| {
            let blocks = shares.iter().zip(&*layers).map(|(s, l)| (s * part, l.ffn.sparse()));
            let plans = Arc::new(ModelSelection::drawn(mode, candidates, blocks));
            let sparse = Some(Sparse { points: points.clone(), plans });
            Self { config, layers: Arc::clone(&layers), sparse, ..self.clone() }
        };
        let [half, whole] = [with(0.5), with(1.0)];
        let [dense, half, whole] = times([&dense, &half, &whole])?.0;
        Ok(Payoff::new(dense, [(0.5 * mean, half), (mean, whole)]))
    }

    /// Times blocks that are held dense and neuron by neuron, in a decoder that has everything but blocks.
    ///
    /// # Errors
    /// As [`Self::measure`].
    pub(super) fn measure_zeros(&self, [dense, sparse]: [Vec<Layer>; 2]) -> Result<Zeros> {
        let mut config = self.config;
        config.num_hidden_layers = dense.len();
        let points = Points::of(None, true);
        let by_zeros = SparseConfig::default().with_mode(FfnMode::ExactZero);
        let plans = ModelSelection::new(by_zeros, &points, sparse.iter().map(|l| l.ffn.sparse()))?;
        let dense = Self { config, layers: dense.into(), ..self.clone() };
        let plans = Some(Sparse { points, plans: Arc::new(plans) });
        let sparse = Self { config, layers: sparse.into(), sparse: plans, ..self.clone() };
        let (seconds, [_, active]) = times([&dense, &sparse])?;
        Ok(Zeros { seconds, active })
    }
}

/// Seconds per token of some decoders, in turn: the lower quartile, which a neighbour on the same cores moves least; and the
/// mean share of neurons that each computed.
fn times<const N: usize>(decoders: [&Decoder; N]) -> Result<([f64; N], [f64; N])> {
    let mut all: [Vec<f64>; N] = [const { Vec::new() }; N];
    let mut caches = decoders.map(|d| KvCache::new(d.config(), KvConfig::exact(KvDType::F16)));
    let mut scratches = decoders.map(|_| Scratch::default());
    let mut logits = vec![0.0; decoders[0].config.vocab_size];
    let step = Step { batch: 1, seq_len: 1, index_pos: 0 };
    let start = Instant::now();
    for round in 0..ROUNDS[1] {
        if round >= ROUNDS[0] && start.elapsed() > LIMIT {
            break;
        }
        // Tokens from all over the vocabulary.
        let token = (round * 7919 % logits.len()) as u32;
        for (i, decoder) in decoders.iter().enumerate() {
            let begin = Instant::now();
            decoder.forward(
                Input::Ids(&[token]),
                step,
                &mut caches[i],
                &mut scratches[i],
                Logits::Last,
                &mut logits,
            )?;
            if round >= WARM_UP {
                all[i].push(begin.elapsed().as_secs_f64());
            }
        }
    }
    let seconds = all.map(|mut t| {
        t.sort_by(f64::total_cmp);
        t[t.len() / 4]
    });
    Ok((seconds, scratches.map(|s| s.sparse_stats().active_share())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn break_even_is_where_the_line_meets_the_dense_time() {
        let p = Payoff::new(10.0, [(0.2, 6.0), (0.4, 8.0)]);
        assert!((p.break_even() - 0.6).abs() < 1e-6, "{p:?}");
        // Two halves of a measured token, at 0.2 and at 0.5: 2 and 0.5 seconds of 10 saved.
        let saved = p.saved([0.2, 0.5].into_iter(), 0.5);
        assert!((saved - 0.25).abs() < 1e-6, "{saved}");
    }

    #[test]
    fn what_costs_more_at_any_share_never_gains() {
        assert_eq!(Payoff::new(10.0, [(0.2, 11.0), (0.4, 12.0)]).break_even(), 0.0);
        let noise = Payoff::new(10.0, [(0.2, 9.0), (0.4, 8.9)]);
        assert_eq!(noise.break_even(), BREAK_EVEN, "bytes bound it where the share costs nothing");
    }
}
