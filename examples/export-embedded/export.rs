//! A model's files as an image.

use crate::{
    choice, cli,
    settings::{Attention, SettingsArgs},
    vocabulary::Vocabulary,
    weights::{BlockFfn, Held, Source},
};
use anyhow::{Context, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse::{FfnMode, Format, Profile, SparseConfig, sparse::BREAK_EVEN};
use candle_sparse_core::{
    Config,
    image::{self, Image, Role},
};
use candle_sparse_models::{
    files::{ModelFiles, Weights},
    gguf::GgufFile,
    pretrained,
};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ffn {
    /// What the profile found best; without one what the activation does not shut to 0, or all neurons
    Auto,
    /// All neurons
    Dense,
    /// All gates, then up and down where the gate says so
    Gate,
    /// What the prediction says
    LowRank,
    /// Gates of what the prediction says, then up and down where the gate says so
    Cascade,
    /// All gates, then up and down of those that the activation does not shut: loses nothing, needs no profile
    ExactZero,
}

/// What goes into an image.
#[derive(Args, Clone, Debug)]
pub(crate) struct ExportArgs {
    /// Format of the matrices: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k
    #[arg(long, value_parser = cli::format, default_value = "q8_0")]
    pub(crate) dtype: Format,
    /// Sparse profile, instead of the model's own
    #[arg(long)]
    pub(crate) profile: Option<PathBuf>,
    /// Which neurons a token computes
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) ffn: Ffn,
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
    /// Projection: share of the neurons that a token computes where blocks choose them
    #[arg(long, default_value_t = 0.5)]
    pub(crate) active: f32,
}

/// The image of a model, in words of 16 bytes, which is how images lie in memory; it was opened once.
pub(crate) fn image(files: &ModelFiles, args: &ExportArgs) -> Result<Vec<u128>> {
    let Opened { core, tied, vb } = Opened::new(files)?;
    let (tokenizer, notices) = files.load_tokenizer_and_notices()?;
    notices.iter().for_each(cli::output::note);
    let ends = pretrained::end_tokens(files, &tokenizer)?;
    let vocabulary = Vocabulary::new(&tokenizer, &ends).with_context(|| files.name.clone())?;
    let profile = profile(files, args)?;
    if let Some(profile) = &profile {
        profile.check_model(&core)?;
    }
    let settings = args.settings.settings(core.max_position_embeddings);
    let source = Source { vb: &vb, config: core, format: args.dtype };
    let mut all = source.frame(tied)?;
    let of_ffn = profile.as_ref().filter(|p| !p.is_of_attention_alone());
    for (i, ffn) in ffns(&core, of_ffn, args.ffn)?.iter().enumerate() {
        all.extend(source.block(i as u32, ffn)?);
    }
    all.extend(gates(profile.as_ref(), args, &core)?);
    all.extend(recall_shares(profile.as_ref(), args));
    all.push(Held::Bytes(Role::Config, 0, image::config_bytes(&core)?.to_vec()));
    all.push(Held::Bytes(Role::Settings, 0, image::settings_bytes(&settings)?.to_vec()));
    all.push(Held::Bytes(Role::Tokenizer, 0, vocabulary.to_bytes()));
    let image = written(&all)?;
    Image::open(bytemuck::cast_slice(&image))?;
    Ok(image)
}

/// A checkpoint with Hugging Face names.
struct Opened {
    core: Config,
    /// The head is the embedding.
    tied: bool,
    vb: VarBuilder<'static>,
}

impl Opened {
    fn new(files: &ModelFiles) -> Result<Self> {
        let config = pretrained::config(files)?;
        let mut core = config.to_core()?;
        let vb = pretrained::var_builder(files, None)?;
        let file = match &files.weights {
            Weights::Gguf(path) => Some(&GgufFile::open(path)?),
            Weights::Opened(file) => Some(file),
            _ => None,
        };
        let mut tied = config.tie_word_embeddings;
        if let Some(file) = file {
            if file.content().tensor_infos.contains_key("rope_freqs.weight") {
                bail!(
                    "{}: the file has factors of rotary frequencies, which an image has no place for",
                    files.name
                );
            }
            // Rows of q and k stand in GGUF's order.
            core.rope.interleaved = true;
            tied = !vb.contains_tensor("lm_head.weight");
        }
        Ok(Self { core, tied, vb })
    }
}

/// The profile of the flag, else the one in or beside the model.
fn profile(files: &ModelFiles, args: &ExportArgs) -> Result<Option<Profile>> {
    let of_attention = matches!(args.settings.attention, Attention::Gated | Attention::Recall);
    let needed = args.ffn != Ffn::Dense || of_attention;
    Ok(match (&args.profile, &files.sparse_profile, &files.weights) {
        _ if !needed => None,
        (Some(path), ..) => Some(Profile::load(path)?),
        (None, Some(profile), _) => Some(profile.load()?),
        (None, None, Weights::Gguf(path)) => GgufFile::open(path)?.profile()?,
        (None, None, _) => None,
    })
}

/// How each block computes its FFN: dense where leaving neurons out is not expected to read fewer bytes.
fn ffns<'a>(c: &Config, profile: Option<&'a Profile>, ffn: Ffn) -> Result<Vec<BlockFfn<'a>>> {
    let mode = match ffn {
        Ffn::Auto => FfnMode::Auto,
        Ffn::Dense => FfnMode::Dense,
        Ffn::Gate => FfnMode::Gate,
        Ffn::LowRank => FfnMode::LowRank,
        Ffn::Cascade => FfnMode::Cascade,
        Ffn::ExactZero => FfnMode::ExactZero,
    };
    let all = |of_block: fn() -> BlockFfn<'a>| Ok((0..c.num_hidden_layers).map(|_| of_block()).collect());
    let shuts = c.hidden_act.has_exact_zeros();
    if ffn == Ffn::ExactZero && !shuts {
        bail!("--ffn exact-zero needs an activation that gives exact zeros (relu, relu2, fatrelu, drelu)");
    }
    if ffn == Ffn::ExactZero || ffn == Ffn::Auto && profile.is_none() && shuts {
        return all(|| BlockFfn::ExactZero);
    }
    let Some(profile) = profile else {
        if !matches!(ffn, Ffn::Auto | Ffn::Dense) {
            bail!("--ffn {mode:?} needs a profile: make one with `calibrate` and give it with --profile");
        }
        return all(|| BlockFfn::Dense);
    };
    let config = SparseConfig::default().with_mode(mode).resolve(&profile.held_out)?;
    (0..c.num_hidden_layers)
        .map(|i| {
            let share = profile.expected_share(&config, i)?;
            Ok(match config.mode.rule().filter(|_| share <= BREAK_EVEN) {
                Some(rule) => {
                    BlockFfn::Chosen(config.mode, &profile.layers[i], profile.fitted[rule as usize])
                }
                None if ffn == Ffn::Auto && shuts => BlockFfn::ExactZero,
                None => BlockFfn::Dense,
            })
        })
        .collect()
}

fn gates(profile: Option<&Profile>, args: &ExportArgs, c: &Config) -> Result<Vec<Held>> {
    if args.settings.attention != Attention::Gated {
        return Ok(Vec::new());
    }
    let gates = profile.map(|p| p.gates.as_slice()).unwrap_or_default();
    if gates.len() != c.num_hidden_layers {
        bail!("--attention gated needs a profile with gates: calibrate attention too");
    }
    let all: Result<Vec<_>> = gates.iter().zip(0..).map(|(g, layer)| choice::gate(layer, g)).collect();
    Ok(all?.into_iter().flatten().collect())
}

fn recall_shares(profile: Option<&Profile>, args: &ExportArgs) -> Vec<Held> {
    let profile = profile.filter(|_| args.settings.attention == Attention::Recall);
    let shares = profile.map(|p| p.recall_shares.as_slice()).unwrap_or_default();
    shares.iter().zip(0..).map(|(s, layer)| Held::Vector(Role::RecallShares, layer, s.clone())).collect()
}

fn written(all: &[Held]) -> Result<Vec<u128>> {
    let mut tensors = all.iter().map(Held::tensor).collect::<Result<Vec<_>>>()?;
    let mut bytes = Vec::new();
    image::write(&mut tensors, |piece| bytes.extend_from_slice(piece))?;
    let mut words = vec![0_u128; bytes.len().div_ceil(size_of::<u128>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    Ok(words)
}
