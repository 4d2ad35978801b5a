//! Which blocks leave neurons out: where the profile keeps its target or the activation shuts neurons, bytes allow a gain, and
//! this machine shows one.

use super::tensors::{Hold, Loader};
use crate::decoder::{Decoder, Extras, Ffn, Layer, payoff::Trial};
use crate::tuning::{LEAST_SAVED, TIMED_BYTES};
use crate::{
    FfnMode, Profile, SparseConfig,
    profile::Fingerprint,
    sparse::{self, BREAK_EVEN, Points},
    weight::Conversions,
};
use candle_core::Result;
use candle_nn::VarBuilder;

/// Where blocks come from.
pub(super) struct Source<'a, 'b> {
    pub(super) loader: &'a Loader<'b>,
    pub(super) vb: &'a VarBuilder<'a>,
    pub(super) extras: Extras,
}

impl Source<'_, '_> {
    fn at(&self, block: usize) -> VarBuilder<'_> {
        self.vb.pp(format!("model.layers.{block}"))
    }
}

/// Which blocks are sparse.
pub(super) struct SparseBlocks {
    pub(super) sparse: Vec<bool>,
    /// Why the others are not, in one line.
    pub(super) why_not: Option<String>,
}

impl SparseBlocks {
    /// `decoder` has everything but blocks; `exact_zeros`: its activation gives them, and nothing is in their way.
    pub(super) fn choose(
        source: &Source<'_, '_>,
        decoder: &Decoder,
        profile: Option<&Profile>,
        exact_zeros: bool,
        wanted: &SparseConfig,
    ) -> Result<Self> {
        match profile {
            Some(profile) if wanted.mode != FfnMode::ExactZero => {
                Self::by_profile(source, decoder, profile, exact_zeros, wanted)
            }
            _ if exact_zeros => Self::by_zeros(source, decoder, profile, wanted),
            _ => Ok(Self { sparse: vec![false; decoder.config.num_hidden_layers], why_not: None }),
        }
    }

    fn by_profile(
        source: &Source<'_, '_>,
        decoder: &Decoder,
        profile: &Profile,
        exact_zeros: bool,
        wanted: &SparseConfig,
    ) -> Result<Self> {
        let blocks = 0..decoder.config.num_hidden_layers;
        let fixed = fixed(source, decoder);
        let forced = wanted.force && wanted.mode != FfnMode::Dense;
        if fixed.contains(&true) || forced {
            let sparse: Vec<bool> = blocks.map(|i| fixed[i] || sparse::pays(wanted, profile, i)).collect();
            return Ok(Self::some(sparse, BREAK_EVEN));
        }
        let config = Points::of(Some(profile), exact_zeros).resolve(*wanted)?;
        match config.mode {
            FfnMode::ExactZero => return Self::by_zeros(source, decoder, Some(profile), wanted),
            FfnMode::Dense => {
                let why = match wanted.mode {
                    FfnMode::Dense => "all neurons were asked for, the profile is not used",
                    _ => {
                        "no rule of this profile keeps its target on held-out text, all neurons are computed"
                    }
                };
                return Ok(Self { sparse: fixed, why_not: Some(why.into()) });
            }
            _ => {}
        }
        let shares = blocks.map(|i| profile.expected_share(&config, i)).collect::<Result<Vec<_>>>()?;
        Self::that_gain(source, decoder, profile, config.mode, &shares)
    }

    /// All of them where leaving out exact zeros gains time here, or none.
    fn by_zeros(
        source: &Source<'_, '_>,
        decoder: &Decoder,
        profile: Option<&Profile>,
        wanted: &SparseConfig,
    ) -> Result<Self> {
        let blocks: Vec<usize> = (0..decoder.config.num_hidden_layers).collect();
        let fixed = fixed(source, decoder);
        if wanted.mode == FfnMode::Dense {
            return Ok(Self { sparse: fixed, why_not: None });
        }
        if wanted.force || fixed.contains(&true) {
            return Ok(Self { sparse: vec![true; blocks.len()], why_not: None });
        }
        let none = |why: String| Ok(Self { sparse: vec![false; blocks.len()], why_not: Some(why) });
        // Who did not ask for it gets nothing but the same numbers.
        if wanted.mode == FfnMode::Auto && source.loader.rounds_anew(&source.at(0).pp("mlp")) {
            return none(
                "the activation gives exact zeros, but down_proj is stored in blocks of its rows, which would be rounded anew: \
                 all neurons are computed; `convert --neuron-major` from floats keeps every number, FfnMode::ExactZero \
                 (--ffn exact-zero) rounds them while loading"
                    .into(),
            );
        }
        let (held, bytes) = both_ways(source, decoder, profile, &blocks)?;
        let measured = held[0].len();
        let zeros = decoder.measure_zeros(held)?;
        let (n, head) = (blocks.len() as f64, decoder.lm_head.bytes() as f64);
        // What the measured blocks save of their token, as part of a token of all.
        let saved = zeros.saved() * n * (bytes as f64 + head) / (bytes as f64 * n + head * measured as f64);
        if saved < LEAST_SAVED {
            return none(format!(
                "exact zeros do not pay here: {:.2} of the neurons of the first {measured} blocks are active, to leave the others \
                 out would save less than {:.0} % of a token's time; all neurons are computed",
                zeros.active,
                100.0 * LEAST_SAVED
            ));
        }
        Ok(Self { sparse: vec![true; blocks.len()], why_not: None })
    }

    /// Those whose expected `shares` gain time here.
    fn that_gain(
        source: &Source<'_, '_>,
        decoder: &Decoder,
        profile: &Profile,
        mode: FfnMode,
        shares: &[f32],
    ) -> Result<Self> {
        let up_to = |limit: f32| (0..shares.len()).filter(|&i| shares[i] <= limit).collect::<Vec<_>>();
        let hopeful = up_to(BREAK_EVEN);
        if hopeful.is_empty() {
            return Ok(Self::none(shares, BREAK_EVEN));
        }
        let (blocks, bytes) = both_ways(source, decoder, Some(profile), &hopeful)?;
        let measured = blocks[0].len();
        let of_measured = hopeful[..measured].iter().map(|&i| shares[i]).collect();
        let trial = Trial { blocks, shares: of_measured, mode, points: Points::from(profile) };
        let payoff = decoder.measure(trial)?;
        let gaining = up_to(payoff.break_even());
        let head = decoder.lm_head.bytes();
        // What one block is of a token, by bytes, and a token of the measured one.
        let part = (bytes + head) as f64 / (bytes * shares.len() + head * measured) as f64;
        if payoff.saved(gaining.iter().map(|&i| shares[i]), part) < LEAST_SAVED {
            return Ok(Self::none(shares, payoff.break_even()));
        }
        Ok(Self::some((0..shares.len()).map(|i| gaining.contains(&i)).collect(), payoff.break_even()))
    }

    fn some(sparse: Vec<bool>, needed: f32) -> Self {
        let dense: Vec<usize> = (0..sparse.len()).filter(|&i| !sparse[i]).collect();
        let needed = 100.0 * needed;
        let why_not = (!dense.is_empty()).then(|| {
            format!("blocks {dense:?}: more than {needed:.0} % of the neurons are expected to be active, they are dense")
        });
        Self { sparse, why_not }
    }

    fn none(shares: &[f32], needed: f32) -> Self {
        let least = shares.iter().copied().fold(f32::INFINITY, f32::min);
        let mean = shares.iter().sum::<f32>() / shares.len() as f32;
        let found = if least <= needed {
            format!("it would save less than {:.0} % of a token's time", 100.0 * LEAST_SAVED)
        } else {
            format!(
                "{mean:.2} of the neurons expected active ({least:.2} in the best block), {needed:.2} or less needed"
            )
        };
        let why = format!("this profile does not pay here: {found}; all neurons are computed");
        Self { sparse: vec![false; shares.len()], why_not: Some(why) }
    }
}

/// The blocks of a neuron-major file, which cannot be held otherwise.
fn fixed(source: &Source<'_, '_>, decoder: &Decoder) -> Vec<bool> {
    let blocks = 0..decoder.config.num_hidden_layers;
    blocks.map(|i| source.loader.is_neuron_major(&source.at(i).pp("mlp"))).collect()
}

/// The first of `blocks` dense and sparse, as many as it takes to measure, and their bytes.
fn both_ways(
    source: &Source<'_, '_>,
    decoder: &Decoder,
    profile: Option<&Profile>,
    blocks: &[usize],
) -> Result<([Vec<Layer>; 2], usize)> {
    let Loader { format, stored, optional_biases, .. } = *source.loader;
    let (root, fingerprint, conversions) =
        (source.loader.root.clone(), Fingerprint::default(), Conversions::default());
    let mut loader = Loader { root, fingerprint, format, stored, optional_biases, conversions };
    let (mut held, mut bytes) = ([Vec::new(), Vec::new()], 0);
    for &i in blocks {
        let vb = source.at(i);
        let dense = loader.layer(&decoder.config, source.extras, Hold::Dense, &vb)?;
        let of_block = profile.map(|p| &p.layers[i]);
        let ffn = loader.sparse_ffn(&decoder.config, of_block, &vb.pp("mlp"))?;
        bytes += dense.bytes();
        held[1].push(Layer { ffn: Ffn::Sparse(ffn), ..dense.clone() });
        held[0].push(dense);
        if bytes >= TIMED_BYTES {
            break;
        }
    }
    Ok((held, bytes))
}
