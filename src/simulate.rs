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
use candle_sparse_core::{GluActivation, KernelSet, kernel::select};
use candle_sparse_kernels::Kernels;
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

/// What a [`Simulation`] counted; counts of several texts can be added, so that choices may take turns on each text.
///
/// ```
/// use candle_sparse::simulate::Counts;
///
/// /// The share of all neurons that were active in all texts.
/// fn share(texts: &[Counts]) -> f64 {
///     let mut all = Counts::default();
///     texts.iter().for_each(|counts| all.add(counts));
///     let shares = all.active_share();
///     shares.iter().sum::<f64>() / shares.len() as f64
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts(
    /// Per block: neurons, active ones, importance of these, and of all; one for each token.
    Vec<[f64; 4]>,
);

impl Counts {
    /// Adds those of another text, of the same model.
    pub fn add(&mut self, other: &Self) {
        self.0.resize(other.0.len().max(self.0.len()), [0.0; 4]);
        for (to, from) in self.0.iter_mut().zip(&other.0) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }

    /// As [`Simulation::active_share`].
    #[must_use]
    pub fn active_share(&self) -> Vec<f64> {
        self.0.iter().map(|s| s[1] / s[0]).collect()
    }

    /// As [`Simulation::recall`].
    #[must_use]
    pub fn recall(&self) -> Vec<f64> {
        self.0.iter().map(|s| s[2] / s[3]).collect()
    }
}

/// A tap that sets skipped neurons to zero, as a [`Choice`] says for each block, and counts what was active.
///
/// ```
/// use candle_sparse::decoder::{Input, Logits, Scratch, Step};
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
/// let (mut scratch, mut logits) = (Scratch::default(), vec![0.0; 2 * config.vocab_size]);
/// let (ids, step) = (Input::Ids(&[5, 6]), Step { batch: 1, seq_len: 2, index_pos: 0 });
/// decoder.forward_tapped(ids, step, &mut cache, &mut scratch, &mut simulation, Logits::All, &mut logits)?;
/// simulation.check()?;
/// assert_eq!(simulation.active_share(), [0.25; 4]);
/// // A quarter of the neurons holds far more than a quarter of what all add.
/// assert!(simulation.recall().iter().all(|recall| *recall > 0.4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Simulation<'a> {
    layers: &'a [LayerProfile],
    blocks: Vec<Block>,
    kernels: &'static Kernels,
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
        Ok(Self {
            layers,
            blocks: layers.iter().map(Block::new).collect::<Result<_>>()?,
            kernels: Kernels::get().map_err(Error::wrap)?,
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

    /// What was counted since the last choice.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let of_block = |(s, l): (&[f64; 4], &LayerProfile)| [s[0] * l.order.len() as f64, s[1], s[2], s[3]];
        Counts(self.sums.iter().zip(self.layers).map(of_block).collect())
    }

    /// The mean active share of each block.
    #[must_use]
    pub fn active_share(&self) -> Vec<f64> {
        self.counts().active_share()
    }

    /// The share of the importance `Σ |act(g)·u|·‖w_down‖` that active neurons held, of each block.
    #[must_use]
    pub fn recall(&self) -> Vec<f64> {
        self.counts().recall()
    }

    /// The error that has occurred since the last call, if one has: a tap itself returns nothing.
    ///
    /// # Errors
    /// The shapes of profile and model differ.
    pub fn check(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Sets what is skipped in `a` to zero; per token what it adds to the last three sums.
    fn skip(&self, layer: usize, x: &[f32], gate: &[f32], a: &mut [f32]) -> Result<Vec<[f64; 3]>> {
        let (block, choice) = (&self.blocks[layer], self.choices[layer]);
        let inner = block.place.len();
        let predicted = match choice {
            Choice::Rule(Rule::LowRank | Rule::Cascade, _) => block.predict(x, a.len() / inner)?,
            _ => Vec::new(),
        };
        let row = |(t, (a, gate)): (usize, (&mut [f32], &[f32]))| {
            let importance = |n: usize, a: f32| a.abs() * block.importance[n];
            let passes = match choice {
                Choice::All => vec![true; inner],
                Choice::Rule(rule, point) => {
                    let predicted = predicted.get(2 * inner * t..2 * inner * (t + 1)).unwrap_or_default();
                    self.by_rule(layer, rule, point, gate, predicted)
                }
                Choice::Oracle(s) => largest(inner, s, |n| importance(n, a[n])),
                Choice::Random(s) => largest(inner, s, |n| noise(self.seed, layer, t * inner + n)),
                Choice::Static(s) => largest(inner, s, |n| self.static_importance[layer][n] as f32),
            };
            let mut sums = [0.0; 3];
            for (n, pass) in passes.into_iter().enumerate() {
                let importance = f64::from(importance(n, a[n]));
                sums[2] += importance;
                if pass {
                    sums[0] += 1.0;
                    sums[1] += importance;
                } else {
                    a[n] = 0.0;
                }
            }
            sums
        };
        Ok(a.par_chunks_mut(inner).zip(gate.par_chunks(inner)).enumerate().map(row).collect())
    }

    /// What passes for one token, by its exact gates and what is predicted of gates and ups, one after the other.
    fn by_rule(&self, layer: usize, rule: Rule, point: usize, gate: &[f32], predicted: &[f32]) -> Vec<bool> {
        let (block, l) = (&self.blocks[layer], &self.layers[layer]);
        let exact = activated(self.kernels, self.act, gate);
        // Exact zeros have no rule in a profile.
        let Some(r) = l.rules.get(rule as usize) else { return exact.iter().map(|a| *a != 0.0).collect() };
        let hot = |n: usize| block.place[n] < r.hot[point];
        let keep = r.keep[point].powi(2);
        if rule == Rule::Gate {
            let passes = |(n, a): (usize, &f32)| hot(n) || a.powi(2) * block.up_square[n] >= keep;
            return exact.iter().enumerate().map(passes).collect();
        }
        let candidate = r.candidate[point].powi(2);
        let (gate, up) = predicted.split_at(gate.len());
        let square = expected_squares(self.kernels, self.act, gate, &block.deviation);
        let passes = |n: usize| {
            let up = (up[n].powi(2) + block.up_variance[n]) * block.scale[n];
            hot(n) || square[n] * up >= candidate && (rule == Rule::LowRank || exact[n].powi(2) * up >= keep)
        };
        (0..exact.len()).map(passes).collect()
    }
}

/// `act(gate − shift)`
pub(crate) fn activated(kernels: &Kernels, act: GluActivation, gate: &[f32]) -> Vec<f32> {
    let mut y = vec![1.0; gate.len()];
    kernels.gated(act.act, act.shift, gate, &mut y);
    y
}

/// `E[act(g)²]` of gates around `gate_hat`: the mean at one deviation below and above.
pub(crate) fn expected_squares(
    kernels: &Kernels,
    act: GluActivation,
    gate_hat: &[f32],
    deviation: &[f32],
) -> Vec<f32> {
    let at = |sign: f32| {
        let gates: Vec<f32> = gate_hat.iter().zip(deviation).map(|(g, d)| g + sign * d).collect();
        activated(kernels, act, &gates)
    };
    at(-1.0).into_iter().zip(at(1.0)).map(|(low, high)| select::expected_square(low, high)).collect()
}

/// What a profile knows of the neurons of a block, in the order of the checkpoint.
#[derive(Debug)]
struct Block {
    /// Where in the profile each neuron stands.
    place: Vec<u32>,
    importance: Vec<f32>,
    /// Its square.
    scale: Vec<f32>,
    /// What the prediction of a gate misses.
    deviation: Vec<f32>,
    up_variance: Vec<f32>,
    /// Mean square of up, times scale.
    up_square: Vec<f32>,
    /// `[hidden_size, rank]` and `[rank, 2 · intermediate_size]`: gates, then ups. `None` for a rank of 0: nothing is known, all
    /// is predicted to be 0.
    predictor: Option<[Tensor; 2]>,
}

impl Block {
    fn new(l: &LayerProfile) -> Result<Self> {
        let place = places(l)?;
        let (r, n, h) = (l.rank, place.len(), l.p.len() / l.rank.max(1));
        let numbers = [&l.importance, &l.gate_variance, &l.up_variance, &l.up_square];
        if numbers.iter().any(|v| v.len() != n) || [&l.q_gate, &l.q_up].iter().any(|q| q.len() != n * r) {
            candle_core::bail!("profile: a block of {n} neurons and rank {r} has numbers of more or fewer");
        }
        let ordered = |v: &[f32]| -> Vec<f32> { place.iter().map(|&p| v[p as usize]).collect() };
        let rows = |q: &[f32]| -> Vec<f32> {
            place.iter().flat_map(|&p| &q[p as usize * r..(p as usize + 1) * r]).copied().collect()
        };
        let predictor = || -> Result<[Tensor; 2]> {
            let p = Tensor::from_slice(&l.p, (r, h), &Device::Cpu)?.t()?;
            let q = [rows(&l.q_gate), rows(&l.q_up)].concat();
            Ok([p, Tensor::from_vec(q, (2 * n, r), &Device::Cpu)?.t()?])
        };
        let importance = ordered(&l.importance);
        let scale: Vec<f32> = importance.iter().map(|n| n.powi(2)).collect();
        Ok(Self {
            deviation: ordered(&l.gate_variance).into_iter().map(f32::sqrt).collect(),
            up_variance: ordered(&l.up_variance),
            up_square: ordered(&l.up_square).iter().zip(&scale).map(|(u, n)| u * n).collect(),
            predictor: (r > 0).then(predictor).transpose()?,
            place,
            importance,
            scale,
        })
    }

    /// Gates and ups that are predicted for inputs `x`, `[rows, 2 · intermediate_size]`.
    fn predict(&self, x: &[f32], rows: usize) -> Result<Vec<f32>> {
        match &self.predictor {
            None => Ok(vec![0.0; rows * 2 * self.place.len()]),
            Some([p, q]) => {
                let x = Tensor::from_slice(x, (rows, x.len() / rows), &Device::Cpu)?;
                x.matmul(p)?.matmul(q)?.flatten_all()?.to_vec1()
            }
        }
    }
}

/// The share `s` of `inner` neurons for which `score` is largest.
fn largest(inner: usize, s: f32, score: impl Fn(usize) -> f32) -> Vec<bool> {
    let k = ((s * inner as f32).round() as usize).min(inner);
    let mut order: Vec<usize> = (0..inner).collect();
    if k > 0 && k < inner {
        order.select_nth_unstable_by(k - 1, |&a, &b| score(b).total_cmp(&score(a)));
    }
    let mut passes = vec![false; inner];
    order[..k].iter().for_each(|&n| passes[n] = true);
    passes
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
        let (l, block) = (&self.layers[layer], &self.blocks[layer]);
        let (inner, rows) = (block.place.len(), a.len() / block.place.len());
        if self.choices[layer] == Choice::All {
            for a in a.chunks_exact(inner) {
                let sums = self.static_importance[layer].iter_mut().zip(a).zip(&block.importance);
                sums.for_each(|((sum, a), importance)| *sum += f64::from(a.abs() * importance));
            }
        }
        let found = match self.skip(layer, x, gate, a) {
            Ok(found) => found,
            Err(e) => {
                self.failed.get_or_insert(e);
                return;
            }
        };
        let sums = &mut self.sums[layer];
        sums[0] += rows as f64;
        found.iter().for_each(|token| (0..3).for_each(|i| sums[i + 1] += token[i]));
        self.seed += 1;
        if let Choice::Rule(rule, point) = self.choices[layer] {
            // Exact zeros have no rule in a profile, and miss nothing.
            let Some(rule) = l.rules.get(rule as usize) else { return };
            let hidden = x.len() / rows;
            let bias = &rule.bias[point * hidden..(point + 1) * hidden];
            y.chunks_exact_mut(hidden).for_each(|y| y.copy_from_slice(bias));
        }
    }
}
