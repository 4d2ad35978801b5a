//! The files of a model, wherever they are: built into the program, in a folder, or on the Hub.

mod embedded;
mod source;
mod weights;

use crate::gguf::GgufFile;
#[cfg(feature = "hub")]
use crate::hub::{HubRepo, HubSettings};
use candle_core::{Error, Result};
use candle_sparse::input::{self, Expected};
use core::fmt;
pub use embedded::EmbeddedModel;
use source::{Folder, Source, weight_files};
use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};
use tokenizers::Tokenizer;
pub use weights::{SparseProfile, Weights};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
const SPARSE_PROFILE: &str = "sparse.safetensors";

/// What is needed to load a model: configuration and tokenizer in memory, weights by path.
///
/// ```
/// use candle_sparse_models::files::ModelFiles;
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let files = ModelFiles::from_folder(folder)?;
/// assert_eq!(files.name, "tales-silu");
/// assert!(files.config.is_some() && files.chat_template.is_none());
/// let tokens = files.load_tokenizer()?.encode("Once upon a time", false).expect("a text");
/// assert!(!tokens.is_empty());
/// // What is no path may be an id on the Hub.
/// assert!(ModelFiles::local("org/model")?.is_none());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct ModelFiles {
    /// For messages: built-in name, name of the folder or file, or Hub id.
    pub name: String,
    /// The folder that holds the files; `None` for a built-in model.
    pub folder: Option<PathBuf>,
    /// Content of `config.json`; `None`: a GGUF file's own.
    pub config: Option<Cow<'static, [u8]>>,
    /// Content of `tokenizer.json`; `None`: a GGUF file's own.
    pub tokenizer: Option<Cow<'static, [u8]>>,
    /// The weights.
    pub weights: Weights,
    /// Content of `generation_config.json`, if there is one.
    pub generation_config: Option<Vec<u8>>,
    /// Content of `tokenizer_config.json`, if there is one.
    pub tokenizer_config: Option<Vec<u8>>,
    /// Content of `chat_template.jinja`, if there is one.
    pub chat_template: Option<Vec<u8>>,
    /// The sparse profile `sparse.safetensors`, if there is one.
    pub sparse_profile: Option<SparseProfile>,
}

impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelFiles")
            .field("name", &self.name)
            .field("folder", &self.folder)
            .field("weights", &self.weights)
            .field("sparse_profile", &self.sparse_profile)
            .finish_non_exhaustive()
    }
}

impl ModelFiles {
    /// Finds a model by what a user writes for it. The first that fits is taken: a folder, a `.safetensors` file (with
    /// `config.json` and `tokenizer.json` beside it), a `.gguf` file, a Hub id, a `.gguf` file in a Hub repository
    /// (`org/name/file.gguf`). `revision` is for the Hub only.
    ///
    /// ```
    /// use candle_sparse_models::{files::ModelFiles, hub::HubSettings};
    ///
    /// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu");
    /// let settings = HubSettings::default().with_offline(true);
    /// assert_eq!(ModelFiles::resolve(folder, None, &settings)?.name, "tales-silu");
    /// // Plainly a path, so the Hub is not asked for it.
    /// let error = ModelFiles::resolve("./no-such-folder", None, &settings).unwrap_err();
    /// assert!(error.to_string().contains("there is no file or folder"), "{error}");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// If nothing fits, a file is missing or damaged, or the Hub does not deliver; see
    /// [`HubRepo::get`].
    #[cfg(feature = "hub")]
    pub fn resolve(spec: &str, revision: Option<&str>, settings: &HubSettings) -> Result<Self> {
        if let Some(files) = Self::local(spec)? {
            return match revision {
                None => Ok(files),
                Some(revision) => {
                    fail(format!("`{spec}` is not on the Hub: revision `{revision}` does not apply to it"))
                }
            };
        }
        // Without a slash it is a misspelt name: those of the Hub's models have one.
        if !spec.contains('/') {
            let problem = format!(
                "there is no folder or file `{spec}` here, and the Hub's models have a slash in their names"
            );
            let problem = format!("{problem}, such as `org/name`");
            return Err(candle_sparse::Error::Setting { name: "model", problem }.into());
        }
        match gguf_on_hub(spec) {
            Some((id, file)) => {
                HubRepo::new(settings, id, revision).and_then(|repo| gguf_from_hub(&repo, file))
            }
            None => HubRepo::new(settings, spec, revision).and_then(|repo| Self::from_hub(&repo)),
        }
    }

    /// As `resolve`, without the Hub: `None` if `spec` could only be a Hub id.
    ///
    /// # Errors
    /// If `spec` is a path at which there is no model, or a file is missing or damaged.
    pub fn local(spec: &str) -> Result<Option<Self>> {
        let path = Path::new(spec);
        if path.is_dir() {
            return Self::from_folder(path).map(Some);
        }
        if path.is_file() {
            return Self::from_file(path).map(Some);
        }
        refuse_path(spec).map(|()| None)
    }

    /// The files of a model that is part of the program.
    #[must_use]
    pub fn from_embedded(model: &EmbeddedModel) -> Self {
        Self {
            name: model.name.to_string(),
            folder: None,
            config: Some(Cow::Borrowed(model.config)),
            tokenizer: Some(Cow::Borrowed(model.tokenizer)),
            weights: Weights::Embedded(model.weights),
            generation_config: None,
            tokenizer_config: None,
            chat_template: None,
            sparse_profile: Some(SparseProfile::Embedded(model.sparse_profile)),
        }
    }

    /// The files of the model in a folder, laid out as on the Hub, or the only GGUF model in it.
    ///
    /// # Errors
    /// If a needed file is missing or cannot be read, or the index of the shards is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        if !folder.join(CONFIG).exists()
            && let Some(model) = source::only_gguf(folder)?
        {
            return Self::from_gguf(&model);
        }
        Self::collect(last_name(folder), &Folder(folder), weight_files)
    }

    /// Has the weights of a GGUF file used where they lie, see [`GgufFile::map`]; others are as before.
    ///
    /// # Errors
    /// As [`GgufFile::map`].
    ///
    /// # Safety
    /// As [`GgufFile::map`].
    pub unsafe fn map(&mut self) -> Result<()> {
        if let Weights::Gguf(path) = &self.weights {
            // SAFETY: the caller promises what it asks for.
            self.weights = Weights::Opened(unsafe { GgufFile::map(path) }?);
        }
        Ok(())
    }

    /// The model in a GGUF file; a profile beside it is named `FILE.sparse.safetensors`.
    ///
    /// # Errors
    /// None yet: the file is read when it is loaded.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let profile = path.with_file_name(format!("{stem}.{SPARSE_PROFILE}"));
        Ok(Self {
            name: last_name(path),
            folder: path.parent().map(Path::to_path_buf),
            config: None,
            tokenizer: None,
            weights: Weights::Gguf(path.to_path_buf()),
            generation_config: None,
            tokenizer_config: None,
            chat_template: None,
            sparse_profile: profile.symlink_metadata().is_ok().then_some(SparseProfile::File(profile)),
        })
    }

    /// The files of a model whose weights are the one file `weights`; its content decides which kind it is.
    ///
    /// # Errors
    /// If it is neither a GGUF nor a safetensors file, or the files beside the latter are missing or cannot be read.
    pub fn from_file(weights: &Path) -> Result<Self> {
        let by_name = || {
            let named = |extension| has_extension(weights, extension);
            if named("gguf") {
                Some(Expected::Gguf)
            } else {
                named("safetensors").then_some(Expected::Safetensors)
            }
        };
        // What is wrong with a file that has the name of a model shows when it is loaded.
        let kind = match (input::kind(weights), by_name()) {
            (Ok(Some(kind)), _) | (_, Some(kind)) => kind,
            (Err(e), None) => return Err(e),
            (Ok(None), None) => {
                let weights = weights.display();
                return fail(format!("{weights}: not a model: a .safetensors or .gguf file is expected"));
            }
        };
        if kind == Expected::Gguf {
            return Self::from_gguf(weights);
        }
        let folder = match weights.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        Self::collect(last_name(weights), &Folder(folder), |_| Ok(vec![weights.to_path_buf()]))
    }

    /// The files of a model on the Hub, downloaded where the cache lacks them.
    ///
    /// # Errors
    /// If a needed file is missing or damaged, or does not come; see [`HubRepo::get`].
    #[cfg(feature = "hub")]
    pub fn from_hub(repo: &HubRepo) -> Result<Self> {
        let collect = || Self::collect(repo.id().to_string(), repo, weight_files);
        let files = collect()?;
        let folder = files.folder.as_deref();
        match &files.weights {
            // The revision moved on the Hub after some of the files were cached. The cache knows
            // the new commit now, so a second pass takes all of them from there.
            Weights::Files(paths) if paths.iter().any(|path| path.parent() != folder) => collect(),
            _ => Ok(files),
        }
    }

    /// Weights come last: what is wrong with the small files shows before the long download.
    fn collect<S: Source>(
        name: String,
        source: &S,
        weights: impl FnOnce(&S) -> Result<Vec<PathBuf>>,
    ) -> Result<Self> {
        let json = |path: &Path| input::read(path, Expected::Json);
        let optional = |file| source.get_optional(file)?.as_deref().map(json).transpose();
        // First: only when a file has come does the Hub's cache remember what the model does not have.
        let config = source.get(CONFIG)?;
        let template = source.get_optional("chat_template.jinja")?;
        Ok(Self {
            name,
            folder: config.parent().map(Path::to_path_buf),
            config: Some(Cow::Owned(json(&config)?)),
            tokenizer: Some(Cow::Owned(json(&source.get(TOKENIZER)?)?)),
            generation_config: optional("generation_config.json")?,
            tokenizer_config: optional("tokenizer_config.json")?,
            chat_template: template.map(|path| input::read(path, Expected::Text)).transpose()?,
            sparse_profile: source.get_optional(SPARSE_PROFILE)?.map(SparseProfile::File),
            weights: Weights::Files(weights(source)?),
        })
    }

    /// The tokenizer of the model; see [`crate::tokenizer`] for what its files say and which of them decides.
    ///
    /// # Errors
    /// If `tokenizer.json` is damaged or of an unknown kind, or a GGUF file holds none that can be read.
    pub fn load_tokenizer(&self) -> Result<Tokenizer> {
        self.load_tokenizer_and_notices().map(|(tokenizer, _)| tokenizer)
    }

    /// As [`Self::load_tokenizer`], with notices of what was taken for granted or decided between two files.
    ///
    /// # Errors
    /// As [`Self::load_tokenizer`].
    pub fn load_tokenizer_and_notices(&self) -> Result<(Tokenizer, Vec<String>)> {
        let opened = match (&self.tokenizer, &self.weights) {
            (None, Weights::Gguf(path)) => Some(GgufFile::open(path)?),
            (None, Weights::Opened(file)) => Some(file.clone()),
            _ => None,
        };
        if let Some(file) = opened {
            return crate::gguf::tokenizer::tokenizer_and_notices(file.content()).map_err(|error| {
                let problem = crate::message::first_line(&error);
                candle_sparse::Error::File { path: file.path().to_path_buf(), problem }.into()
            });
        }
        let bytes = self.tokenizer.as_deref().unwrap_or_default();
        crate::tokenizer::from_json(bytes, self.tokenizer_config.as_deref()).map_err(|error| {
            let problem = format!("not a tokenizer file: {}", crate::message::first_line(&error));
            match &self.folder {
                Some(folder) => candle_sparse::Error::File { path: folder.join(TOKENIZER), problem }.into(),
                None => Error::Msg(format!("{TOKENIZER} of `{}`: {problem}", self.name)),
            }
        })
    }
}

/// Repository and file of `org/name/file.gguf`.
#[cfg(feature = "hub")]
fn gguf_on_hub(spec: &str) -> Option<(&str, &str)> {
    let second = spec.match_indices('/').nth(1)?.0;
    let (id, file) = (&spec[..second], &spec[second + 1..]);
    has_extension(Path::new(file), "gguf").then_some((id, file))
}

/// A GGUF file of a repository with all parts of it, if it is one of several.
#[cfg(feature = "hub")]
fn gguf_from_hub(repo: &HubRepo, file: &str) -> Result<ModelFiles> {
    let (folder, name) = file.rsplit_once('/').map_or(("", file), |(folder, name)| (folder, name));
    for part in crate::gguf::part_names(name).unwrap_or_default() {
        repo.get(&if folder.is_empty() { part } else { format!("{folder}/{part}") })?;
    }
    ModelFiles::from_gguf(&repo.get(file)?)
}

/// Refuses what can only be meant as a path, so that a misspelt one is not asked of the Hub.
fn refuse_path(spec: &str) -> Result<()> {
    let path = Path::new(spec);
    let marked = ["./", "../", "~"].iter().any(|start| spec.starts_with(start))
        || spec.contains('\\')
        || spec.ends_with('/')
        || path.is_absolute()
        || has_extension(path, "safetensors")
        || has_extension(path, "gguf") && spec.split('/').count() < 3;
    if marked {
        let hint = if spec.starts_with('~') { " (`~` is not expanded)" } else { "" };
        return fail(format!("there is no file or folder `{spec}`{hint}"));
    }
    match spec.split_once('/') {
        Some((first, rest)) if Path::new(first).is_dir() => fail(format!(
            "the folder `{first}` holds no `{rest}`; if `{spec}` is meant as a Hub id, run this in \
             a folder without `{first}`"
        )),
        _ => Ok(()),
    }
}

fn last_name(path: &Path) -> String {
    // `.` and `..` have no last name of their own.
    let name = path.file_name().map_or(path.as_os_str(), |name| name);
    name.to_string_lossy().into_owned()
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn fail<T>(message: String) -> Result<T> {
    // No backtrace, as `bail!` would add one: these are mistakes in what was asked for.
    Err(Error::Msg(message))
}
