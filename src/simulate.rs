//! What a rule costs in quality: whole windows at once, skipped neurons set to zero, nothing saved.
//!
//! The model is a dense one, its neurons in the order of the checkpoint; those of a profile stand in its own
//! [order](LayerProfile::order).
//!
//! Values agree with sparse decode within rounding; a test holds that. Rules that need to know the exact values, such as
//! the oracle, exist only here.

use crate::{
    decoder::LayerTap,
    profile::{LayerProfile, Rule},
};
use candle_core::{Device, Error, Result, Tensor};
use candle_sparse_core::{
    GluActivation,
    kernel::{activation, select},
};
use rayon::prelude::*;

/// How the active neurons of a simulation are chosen; shares are above 0 and at most 1.
///
/// ```
/// use candle_sparse::{profile::Rule, simulate::Choice};
///
/// // What a profile would choose at its fourth point, beside the best and the worst way to choose.
/// let choices = [Choice::Rule(Rule::Cascade, 3), Choice::Oracle(0.4), Choice::Random(0.4)];
/// assert!(choices.iter().all(|choice| *choice != Choice::All));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Choice {
    /// All neurons.
    All,
    /// By a profile's rule, at a point of its shares; exact zeros have none.
    Rule(Rule, usize),
    /// A share of each block's neurons with the largest true `|act(g)·u|·‖w_down‖`, per token.
    Oracle(f32),
    /// The same share drawn anew for each token.
    Random(f32),
    /// The same share, always those that matter most on average.
    Static(f32),
}

/// A tap that sets skipped neurons to zero, as a [`Choice`] says for each block, and counts what was active.
///
/// ```
/// use candle_sparse::decoder::{Input, Scratch, Step};
/// use candle_sparse::simulate::{Choice, Simulation};
/// use candle_sparse::{FfnMode, GluActivation, KvCache, KvConfig, KvDType, Profile, SparseConfig};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let mut files = ModelFiles::from_folder(folder)?;
/// # files.sparse_profile = None;
/// # let loaded = Pretrained::load(&files, LoadOptions::default())?;
/// # let path = folder.join("sparse.safetensors");
/// let decoder = loaded.model.decoder(); // of a Llama without a profile
/// let profile = Profile::load(path)?;
/// let config = decoder.config();
/// let act = GluActivation { act: config.hidden_act, shift: config.gate_shift };
/// let mut simulation = Simulation::new(&profile.layers, act, Choice::Oracle(0.25))?;
/// let mut cache = KvCache::new(config, KvConfig::exact(KvDType::F16));
/// let mut logits = vec![0.0; 2 * config.vocab_size];
/// let (ids, step) = (Input::Ids(&[5, 6]), Step { batch: 1, seq_len: 2, index_pos: 0 });
/// decoder.forward_tapped(ids, step, &mut cache, &mut Scratch::default(), &mut simulation, &mut logits)?;
/// simulation.check()?;
/// assert_eq!(simulation.active_share(), [0.25; 4]);
/// // A quarter of the neurons holds far more than a quarter of what all add.
/// assert!(simulation.recall().iter().all(|recall| *recall > 0.4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Simulation<'a> {
    layers: &'a [LayerProfile],
    /// Per block: where in the profile each neuron of the checkpoint stands.
    places: Vec<Vec<u32>>,
    predictors: Vec<[Tensor; 3]>,
    act: GluActivation,
    choices: Vec<Choice>,
    /// Per block: tokens, active neurons, importance of those that were active, and of all.
    sums: Vec<[f64; 4]>,
    /// `[layer][intermediate_size]`: mean importance, for [`Choice::Static`].
    static_importance: Vec<Vec<f64>>,
    seed: u64,
    failed: Option<Error>,
}

impl<'a> Simulation<'a> {
    /// A simulation on a dense model, for which the blocks of a profile were made; all of them as `choice` says.
    ///
    /// # Errors
    /// A block of the profile is malformed.
    pub fn new(layers: &'a [LayerProfile], act: GluActivation, choice: Choice) -> Result<Self> {
        let predictor = |l: &LayerProfile| -> Result<[Tensor; 3]> {
            let (r, n, h) = (l.rank, l.order.len(), l.p.len() / l.rank.max(1));
            let matrix = |v: &[f32], dims: (usize, usize)| Tensor::from_slice(v, dims, &Device::Cpu)?.t();
            Ok([matrix(&l.p, (r, h))?, matrix(&l.q_gate, (n, r))?, matrix(&l.q_up, (n, r))?])
        };
        Ok(Self {
            layers,
            places: layers.iter().map(places).collect::<Result<_>>()?,
            predictors: layers.iter().map(predictor).collect::<Result<_>>()?,
            act,
            choices: vec![choice; layers.len()],
            sums: vec![[0.0; 4]; layers.len()],
            static_importance: layers.iter().map(|l| vec![0.0; l.order.len()]).collect(),
            seed: 1,
            failed: None,
        })
    }

    /// Chooses in all blocks as `choice` says, and forgets the counts.
    pub fn choose(&mut self, choice: Choice) {
        self.choices.fill(choice);
        self.sums.fill([0.0; 4]);
    }

    /// Chooses in block `layer` as `choice` says and computes all neurons of the others; forgets the counts.
    pub fn choose_only(&mut self, layer: usize, choice: Choice) {
        self.choose(Choice::All);
        self.choices[layer] = choice;
    }

    /// The mean active share of each block.
    #[must_use]
    pub fn active_share(&self) -> Vec<f64> {
        let share = |(s, l): (&[f64; 4], &LayerProfile)| s[1] / (s[0] * l.order.len() as f64);
        self.sums.iter().zip(self.layers).map(share).collect()
    }

    /// The share of the importance `Σ |act(g)·u|·‖w_down‖` that active neurons held, of each block.
    #[must_use]
    pub fn recall(&self) -> Vec<f64> {
        self.sums.iter().map(|s| s[2] / s[3]).collect()
    }

    /// The error that has occurred since the last call, if one has: a tap itself returns nothing.
    ///
    /// # Errors
    /// The shapes of profile and model differ.
    pub fn check(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn passes(&self, layer: usize, rows: &Rows<'_>) -> Result<Vec<bool>> {
        let (l, inner) = (&self.layers[layer], rows.inner);
        let share = |s: f32| ((s * inner as f32).round() as usize).min(inner);
        Ok(match self.choices[layer] {
            Choice::All => vec![true; rows.a.len()],
            Choice::Rule(rule, point) => {
                let (gate_hat, up_hat) = match rule {
                    Rule::Gate | Rule::ExactZero => (Vec::new(), Vec::new()),
                    Rule::LowRank | Rule::Cascade => {
                        let [p, q_gate, q_up] = &self.predictors[layer];
                        let z =
                            Tensor::from_slice(rows.x, (rows.a.len() / inner, rows.hidden), &Device::Cpu)?;
                        let z = z.matmul(p)?;
                        let flat = |q: &Tensor| z.matmul(q)?.flatten_all()?.to_vec1();
                        (flat(q_gate)?, flat(q_up)?)
                    }
                };
                let place = &self.places[layer];
                let decide = |i: usize| {
                    let (token, n) = (i / inner, place[i % inner] as usize);
                    let at = token * inner + n;
                    let predicted = (gate_hat.get(at).copied(), up_hat.get(at).copied());
                    self.decide(l, rule, point, n, rows.gate[i], predicted)
                };
                (0..rows.a.len()).into_par_iter().map(decide).collect()
            }
            Choice::Oracle(s) => {
                rows.largest(share(s), |i| rows.a[i].abs() * self.importance(layer, i % inner))
            }
            Choice::Random(s) => rows.largest(share(s), |i| noise(self.seed, layer, i)),
            Choice::Static(s) => rows.largest(share(s), |i| self.static_importance[layer][i % inner] as f32),
        })
    }

    /// The importance of a neuron of the checkpoint.
    fn importance(&self, layer: usize, n: usize) -> f32 {
        self.layers[layer].importance[self.places[layer][n] as usize]
    }

    /// Whether neuron `n` of the profile is active, by its exact gate and what is predicted.
    fn decide(
        &self,
        l: &LayerProfile,
        rule: Rule,
        point: usize,
        n: usize,
        gate: f32,
        (gate_hat, up_hat): (Option<f32>, Option<f32>),
    ) -> bool {
        let alpha = |g: f32| activation::apply(self.act.act, g - self.act.shift, 1.0);
        let Some(r) = l.rules.get(rule as usize) else { return alpha(gate) != 0.0 };
        if n < r.hot[point] as usize {
            return true;
        }
        let scale = l.importance[n].powi(2);
        if rule == Rule::Gate {
            return alpha(gate).powi(2) * l.up_square[n] * scale >= r.keep[point].powi(2);
        }
        // Without a prediction, which is a rank of 0, nothing is known: all is expected to be 0.
        let (gate_hat, up_hat) = (gate_hat.unwrap_or(0.0), up_hat.unwrap_or(0.0));
        let deviation = l.gate_variance[n].sqrt();
        let square = select::expected_square(alpha(gate_hat - deviation), alpha(gate_hat + deviation));
        let up = (up_hat.powi(2) + l.up_variance[n]) * scale;
        square * up >= r.candidate[point].powi(2)
            && (rule == Rule::LowRank || alpha(gate).powi(2) * up >= r.keep[point].powi(2))
    }
}

/// What the FFN of one block computes for some tokens.
struct Rows<'a> {
    x: &'a [f32],
    gate: &'a [f32],
    a: &'a [f32],
    hidden: usize,
    inner: usize,
}

impl Rows<'_> {
    /// The `k` neurons of each token for which `score` is largest.
    fn largest(&self, k: usize, score: impl Fn(usize) -> f32 + Sync) -> Vec<bool> {
        let mut passes = vec![false; self.a.len()];
        passes.par_chunks_mut(self.inner).enumerate().for_each(|(t, passes)| {
            let mut order: Vec<usize> = (0..self.inner).collect();
            let at = |n: usize| score(t * self.inner + n);
            if k > 0 && k < self.inner {
                order.select_nth_unstable_by(k - 1, |&a, &b| at(b).total_cmp(&at(a)));
            }
            order[..k].iter().for_each(|&n| passes[n] = true);
        });
        passes
    }
}

/// The inverse of a block's order.
fn places(l: &LayerProfile) -> Result<Vec<u32>> {
    let mut places = vec![u32::MAX; l.order.len()];
    for (place, &n) in (0..).zip(&l.order) {
        match places.get_mut(n as usize) {
            Some(slot) => *slot = place,
            None => candle_core::bail!("profile: neuron {n} of {} is past the last", l.order.len()),
        }
    }
    if places.contains(&u32::MAX) {
        candle_core::bail!("profile: the order of its neurons is no permutation");
    }
    Ok(places)
}

fn noise(seed: u64, layer: usize, i: usize) -> f32 {
    let mut h =
        (seed << 40 | (layer as u64) << 32).wrapping_add(i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((h ^ (h >> 31)) >> 40) as f32
}

impl LayerTap for Simulation<'_> {
    fn ffn(&mut self, layer: usize, x: &[f32], gate: &[f32], a: &mut [f32], y: &mut [f32]) {
        let l = &self.layers[layer];
        let (inner, hidden) = (l.order.len(), x.len() / (a.len() / l.order.len()).max(1));
        let passes = match self.passes(layer, &Rows { x, gate, a, hidden, inner }) {
            Ok(passes) => passes,
            Err(e) => {
                self.failed.get_or_insert(e);
                return;
            }
        };
        let sums = &mut self.sums[layer];
        let all = self.choices[layer] == Choice::All;
        let place = &self.places[layer];
        for (i, (a, &pass)) in a.iter_mut().zip(&passes).enumerate() {
            let importance = f64::from(a.abs() * l.importance[place[i % inner] as usize]);
            sums[1] += f64::from(u8::from(pass));
            sums[3] += importance;
            if pass {
                sums[2] += importance;
            } else {
                *a = 0.0;
            }
            if all {
                self.static_importance[layer][i % inner] += importance;
            }
        }
        sums[0] += (a.len() / inner) as f64;
        self.seed += 1;
        if let Choice::Rule(rule, point) = self.choices[layer] {
            // Exact zeros have no rule in a profile, and miss nothing.
            let Some(rule) = l.rules.get(rule as usize) else { return };
            let bias = &rule.bias[point * hidden..(point + 1) * hidden];
            y.chunks_exact_mut(hidden).for_each(|y| y.copy_from_slice(bias));
        }
    }
}
