//! Flags that say which model is used and how it is held.
#![allow(dead_code, reason = "not every program uses all of it")]

#[path = "embedded.rs"]
pub(crate) mod embedded;

use super::{
    cli::{self, format, output},
    memory::{Attention, MemoryArgs},
};
use anyhow::{Context, Result, bail};
use candle_core::{
    DType,
    quantized::gguf_file::{Content, TensorInfo},
};
use candle_sparse::{
    AttentionConfig, Format, Guard, Threads,
    input::Expected,
    profile::Profile,
    sparse::{FfnMode, Selection, SparseConfig},
    weight::format_of,
};
use candle_sparse_models::{
    decoder::LoadOptions,
    files::{ModelFiles, Weights},
    gguf::ggml_type,
    llama::Cache,
    pretrained::{Pretrained, var_builder},
    tokenizer,
};
use clap::{Args, ValueEnum};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Which model.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct SourceArgs {
    /// Hub id (org/name), folder, .safetensors or .gguf file (also org/name/file.gguf), or name of an embedded model
    /// (tales-silu, tales-relu)
    #[arg(long, default_value = "tales-silu")]
    model: OsString,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    revision: Option<String>,
    /// A tokenizer.json, instead of the model's own
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Threads, at most those of candle's pool (CANDLE_NUM_THREADS)
    #[arg(long)]
    threads: Option<usize>,
}

impl SourceArgs {
    /// Finds the files, fetching them where the model is on the Hub.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        self.threads()?;
        let mut files = resolve(&self.model, self.revision.as_deref())?;
        if let Some(path) = &self.tokenizer {
            let bytes = candle_sparse::input::read(path, Expected::Json)?;
            // Here it is known which file it is.
            tokenizer::from_json(&bytes, None).with_context(|| path.display().to_string())?;
            files.tokenizer = Some(bytes.into());
        }
        Ok(files)
    }

    /// How many threads are asked for.
    pub(crate) fn threads(&self) -> Result<Option<Threads>> {
        cli::threads(self.threads)
    }
}

/// Which model, and how to hold it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// Format of the weights in memory: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k; as stored where not given
    #[arg(long, value_parser = format)]
    pub(crate) dtype: Option<Format>,
    /// Copy the weights of a GGUF file into huge pages instead of mapping it: slower to load, decode may be faster. A mapped
    /// file must not be written to, or shortened, while the program runs
    #[arg(long)]
    pub(crate) no_mmap: bool,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// Sparse profile, instead of the model's own sparse.safetensors; CANDLE_SPARSE=off runs without any
    #[arg(long, help_heading = "Sparse")]
    pub(crate) profile: Option<PathBuf>,
    /// Which neurons are computed; what the profile found best where not given, and without one what the activation does not shut
    #[arg(long, help_heading = "Sparse")]
    pub(crate) ffn: Option<Ffn>,
    /// Leave neurons out even where that is no faster here, or by a rule that misses its profile's target
    #[arg(long, help_heading = "Sparse")]
    pub(crate) force_sparse: bool,
    /// Share of the neurons that are left out, instead of what calibration found
    #[arg(long, help_heading = "Sparse")]
    pub(crate) sparsity: Option<f32>,
    /// Compute all neurons of one block at every 64th position, and more neurons of it from then on where its output is off
    /// by more than this share (such as 0.3) in the mean
    #[arg(long, value_name = "ERROR", help_heading = "Sparse")]
    pub(crate) guard: Option<f32>,
}

/// Positions from one comparison of `--guard` to the next.
const GUARD_EVERY: usize = 64;

/// Names of [`FfnMode`].
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ffn {
    /// All neurons
    Dense,
    /// All gates; up and down where the gate says so
    Gate,
    /// What the prediction says
    LowRank,
    /// Gates of what the prediction says; up and down where the gate says so
    Cascade,
    /// All gates; up and down of those that the activation does not shut: loses nothing, needs no profile
    ExactZero,
}

impl From<Ffn> for FfnMode {
    fn from(ffn: Ffn) -> Self {
        match ffn {
            Ffn::Dense => Self::Dense,
            Ffn::Gate => Self::Gate,
            Ffn::LowRank => Self::LowRank,
            Ffn::Cascade => Self::Cascade,
            Ffn::ExactZero => Self::ExactZero,
        }
    }
}

impl ModelArgs {
    /// What the user calls the model.
    pub(crate) fn name(&self) -> std::borrow::Cow<'_, str> {
        self.source.model.to_string_lossy()
    }

    /// Finds the files, fetching them where the model is on the Hub.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        // Nothing is fetched for flags that make no sense.
        self.sparse()?;
        self.memory.attention()?;
        self.memory.kv(DType::F32)?;
        self.source.files()
    }

    /// The profile of the flag, else the one beside the model.
    pub(crate) fn profile(&self, files: &ModelFiles) -> Result<Option<Arc<Profile>>> {
        Ok(match (&self.profile, &files.sparse_profile) {
            (Some(path), _) => Some(Arc::new(Profile::load(path)?)),
            (None, Some(profile)) => Some(Arc::new(profile.load()?)),
            (None, None) => None,
        })
    }

    /// What the flags say about the FFN.
    pub(crate) fn sparse(&self) -> Result<SparseConfig> {
        let selection = match self.sparsity {
            None => Selection::Fitted,
            Some(s) if (0.0..1.0).contains(&s) => Selection::Share(1.0 - s),
            Some(s) => bail!("--sparsity {s} must be 0 or more and below 1"),
        };
        match self.ffn.filter(|_| self.sparsity.is_some()) {
            Some(Ffn::Dense) => {
                bail!("--sparsity leaves nothing out with --ffn dense: give one of the two")
            }
            Some(Ffn::ExactZero) => bail!(
                "--sparsity says how many neurons are left out, --ffn exact-zero leaves that to the model: give one of the two"
            ),
            _ => {}
        }
        if let Some(limit) = self.guard.filter(|l| !(*l > 0.0 && l.is_finite())) {
            bail!("--guard {limit} must be above 0");
        }
        if self.guard.is_some() && self.ffn == Some(Ffn::Dense) {
            bail!("--guard watches over neurons that are left out: with --ffn dense none are");
        }
        Ok(SparseConfig::default()
            .with_mode(self.ffn.map_or_else(FfnMode::default, FfnMode::from))
            .with_selection(selection)
            .with_guard(self.guard.map(|limit| Guard::new(GUARD_EVERY, limit)))
            .with_force(self.force_sparse))
    }

    /// Loads the model; says on standard error what was done otherwise than asked.
    pub(crate) fn load(&self) -> Result<Pretrained> {
        self.load_files(&self.files()?)
    }

    /// As [`Self::load`] for files that were found already.
    pub(crate) fn load_files(&self, files: &ModelFiles) -> Result<Pretrained> {
        let (sparse, attention) = (self.sparse()?, self.memory.attention()?);
        let loaded = self.load_as(files, self.dtype, sparse, attention).map_err(|error| {
            // The library knows no flags.
            let unused = output::one_line(&error).contains("settings without a profile");
            self.check_sparse(!unused).err().unwrap_or(error)
        })?;
        let has_profile = files.sparse_profile.is_some() || loaded.model.decoder().sparse_config().is_some();
        self.check_sparse(has_profile)?;
        self.note_profile(files, !loaded.model.decoder().recall_shares().is_empty())?;
        self.note_dtype(files)?;
        Ok(loaded)
    }

    /// Flags about a profile that is not there, or not used.
    pub(crate) fn check_sparse(&self, has_profile: bool) -> Result<()> {
        let by_profile = |ffn: &Ffn| !matches!(ffn, Ffn::Dense | Ffn::ExactZero);
        let ffn = self.ffn.filter(by_profile).map(|_| "--ffn");
        let sparsity = self.sparsity.map(|_| "--sparsity");
        let flag = ffn.or(sparsity).or(self.guard.map(|_| "--guard"));
        if std::env::var_os("CANDLE_SPARSE").is_some_and(|value| value == "off") {
            if let Some(flag) = flag.or(self.profile.as_ref().map(|_| "--profile")) {
                output::note(format_args!("{flag} without effect: CANDLE_SPARSE=off runs without a profile"));
            }
            return Ok(());
        }
        if self.profile.is_some() && self.ffn == Some(Ffn::Dense) && !self.memory.attention.reads_profile() {
            output::note("--profile without effect: --ffn dense computes all neurons");
        }
        if let (Some(flag), false) = (flag, has_profile || self.profile.is_some()) {
            let name = self.name();
            bail!(
                "{flag} needs a profile and {name} has none: make one with `calibrate`, give it with --profile"
            );
        }
        Ok(())
    }

    /// A profile that attention could use and does not: of attention alone, or without what `--attention` takes.
    fn note_profile(&self, files: &ModelFiles, has_shares: bool) -> Result<()> {
        let attention = self.memory.attention;
        let used = attention.reads_profile() && (attention != Attention::Recall || has_shares);
        if self.profile.is_none() || used {
            return Ok(());
        }
        if has_shares && self.profile(files)?.is_some_and(|p| p.is_of_attention_alone()) {
            output::note("--profile without effect: it is of attention alone, --attention recall uses it");
        } else if self.ffn == Some(Ffn::Dense) && attention == Attention::Recall {
            output::note(
                "--profile without effect: --ffn dense computes all neurons, and it says nothing of --attention recall",
            );
        }
        Ok(())
    }

    /// A format that changes nothing; of one that makes the weights larger the library tells.
    pub(crate) fn note_dtype(&self, files: &ModelFiles) -> Result<()> {
        let Some(format) = self.dtype else { return Ok(()) };
        if stored_formats(files)?.iter().all(|&stored| stored == Some(format)) {
            output::note(format_args!("--dtype {} without effect: the model is stored so", format.name()));
        }
        Ok(())
    }

    /// The dense model in a format, or as it is stored.
    pub(crate) fn dense(&self, format: Option<Format>) -> Result<Pretrained> {
        self.load_as(
            &self.files()?,
            format,
            SparseConfig::default().with_mode(FfnMode::Dense),
            AttentionConfig::default(),
        )
    }

    /// How to hold and run the model.
    pub(crate) fn options(
        &self,
        files: &ModelFiles,
        format: Option<Format>,
        sparse: SparseConfig,
        attention: AttentionConfig,
    ) -> Result<LoadOptions> {
        let threads = self.source.threads()?;
        if self.no_mmap && !matches!(files.weights, Weights::Gguf(_) | Weights::Opened(_)) {
            output::note("--no-mmap without effect: GGUF files alone are mapped");
        }
        Ok(LoadOptions::default()
            .with_format(format)
            .with_threads(threads)
            .with_profile(self.profile(files)?)
            .with_sparse(sparse)
            .with_attention(attention))
    }

    fn load_as(
        &self,
        files: &ModelFiles,
        format: Option<Format>,
        sparse: SparseConfig,
        attention: AttentionConfig,
    ) -> Result<Pretrained> {
        let options = self.options(files, format, sparse, attention)?;
        let mut files = files.clone();
        if !self.no_mmap {
            // SAFETY: these programs write to no model file in place, and --help asks the user not to do so meanwhile.
            unsafe { files.map() }?;
        }
        let loaded = Pretrained::load(&files, options)?;
        for notice in &loaded.notices {
            output::note(notice);
        }
        Ok(loaded)
    }

    /// An empty cache for the model.
    pub(crate) fn cache(&self, loaded: &Pretrained) -> Result<Cache> {
        let kv = self.memory.kv(loaded.default_kv_dtype())?;
        Ok(Cache::of(&loaded.model, kv))
    }
}

/// The files of a model by what the user calls it, which may be a path that is no UTF-8.
pub(crate) fn resolve(model: &OsStr, revision: Option<&str>) -> Result<ModelFiles> {
    let path = Path::new(model);
    Ok(match model.to_str() {
        Some(name) => embedded::resolve(name, revision)?,
        None if revision.is_some() => bail!("--revision does not apply to the path {}", path.display()),
        None if path.is_dir() => ModelFiles::from_folder(path)?,
        None if path.is_file() => ModelFiles::from_file(path)?,
        None => bail!("there is no file or folder {}", path.display()),
    })
}

/// The formats of the matrices, `None` for one that we have no name for: of files that were loaded, so that their headers are
/// known to be whole.
fn stored_formats(files: &ModelFiles) -> Result<Vec<Option<Format>>> {
    let path = match &files.weights {
        Weights::Gguf(path) => path,
        Weights::Opened(file) => file.path(),
        Weights::Files(_) | Weights::Embedded(_) => {
            return Ok(vec![format_of(var_builder(files, None)?.dtype())]);
        }
    };
    let file = Content::read(&mut BufReader::new(File::open(path)?))?;
    let matrices = file.tensor_infos.values().filter(|t| t.shape.rank() == 2);
    let format = |t: &TensorInfo| Format::ALL.into_iter().find(|f| ggml_type(*f) == t.ggml_dtype);
    Ok(matrices.map(format).collect())
}
