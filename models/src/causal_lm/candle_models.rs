//! candle's models behind [`CausalLm`]. They do not say how much they have seen, so it is counted here.

use super::CausalLm;
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_transformers::models::{llama, mistral, quantized_llama};

/// Counts what a model has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Seen(usize);

impl Seen {
    /// candle appends wherever it is told to be: a gap, or a step back, would go unnoticed.
    fn check(self, index_pos: usize) -> Result<()> {
        if index_pos != self.0 && index_pos != 0 {
            bail!(
                "candle's model has seen {} tokens and cannot go to {index_pos}: continue there, or at 0",
                self.0
            );
        }
        Ok(())
    }

    fn grow(&mut self, ids: &Tensor, index_pos: usize) -> Result<()> {
        self.0 = index_pos + ids.dim(1)?;
        Ok(())
    }

    /// Whether everything is to be forgotten.
    fn cut(&mut self, len: usize) -> Result<bool> {
        match len {
            0 => {
                self.0 = 0;
                Ok(true)
            }
            _ if len >= self.0 => Ok(false),
            _ => bail!("candle's cache goes back to 0 only, not to {len}"),
        }
    }
}

/// candle's Llama with its cache.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sparse_models::causal_lm::{CandleLlama, CausalLm};
/// use candle_transformers::models::llama::{Llama, LlamaConfig};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let json = std::fs::read(folder.join("config.json"))?;
/// # let vb = candle_sparse::loading::var_builder(&[folder.join("model.safetensors")], Some(DType::F32), &Device::Cpu)?;
/// let config: LlamaConfig = serde_json::from_slice(&json).expect("a config.json");
/// let config = config.into_config(false);
/// let mut model = CandleLlama::new(Llama::load(vb, &config)?, config, DType::F32)?;
/// let logits = model.forward(&Tensor::new(&[[0_u32, 5]], &Device::Cpu)?, 0)?;
/// assert_eq!((logits.dims(), model.cached_len()), (&[1, 2048][..], 2));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CandleLlama {
    model: llama::Llama,
    cache: llama::Cache,
    config: llama::Config,
    dtype: DType,
    seen: Seen,
}

impl CandleLlama {
    /// A model that was loaded with `config` in `dtype`.
    ///
    /// # Errors
    /// The cache cannot be made.
    pub fn new(model: llama::Llama, config: llama::Config, dtype: DType) -> Result<Self> {
        let cache = llama::Cache::new(true, dtype, &config, &Device::Cpu)?;
        Ok(Self { model, cache, config, dtype, seen: Seen::default() })
    }
}

impl CausalLm for CandleLlama {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        self.seen.check(index_pos)?;
        if index_pos == 0 && self.seen.0 > 0 {
            self.clear()?;
        }
        let logits = self.model.forward(ids, index_pos, &mut self.cache)?;
        self.seen.grow(ids, index_pos)?;
        Ok(logits)
    }

    fn cached_len(&self) -> usize {
        self.seen.0
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if self.seen.cut(len)? {
            self.cache = llama::Cache::new(true, self.dtype, &self.config, &Device::Cpu)?;
        }
        Ok(())
    }
}

/// candle's quantised Llama.
///
/// ```
/// use candle_core::{Device, Tensor, quantized::gguf_file::Content};
/// use candle_sparse_models::causal_lm::{CandleQuantizedLlama, CausalLm};
/// use candle_transformers::models::quantized_llama::ModelWeights;
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// let mut file = std::fs::File::open(&path)?;
/// let content = Content::read(&mut file)?;
/// let mut model = CandleQuantizedLlama::new(ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?);
/// let logits = model.forward(&Tensor::new(&[[0_u32, 5]], &Device::Cpu)?, 0)?;
/// assert_eq!((logits.dims(), model.cached_len()), (&[1, 2048][..], 2));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CandleQuantizedLlama {
    model: quantized_llama::ModelWeights,
    seen: Seen,
}

impl CandleQuantizedLlama {
    /// A loaded model that has seen nothing.
    #[must_use]
    pub fn new(model: quantized_llama::ModelWeights) -> Self {
        Self { model, seen: Seen::default() }
    }
}

impl CausalLm for CandleQuantizedLlama {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        self.seen.check(index_pos)?;
        let logits = self.model.forward(ids, index_pos)?;
        self.seen.grow(ids, index_pos)?;
        Ok(logits)
    }

    fn cached_len(&self) -> usize {
        self.seen.0
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if self.seen.cut(len)? {
            self.model.clear_kv_cache();
        }
        Ok(())
    }
}

/// candle's Mistral.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_sparse_models::causal_lm::{CandleMistral, CausalLm};
/// use candle_transformers::models::mistral::{Config, Model};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
/// # tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
/// # let json = std::fs::read_to_string(folder.join("config.json"))?.replace("\"llama\"", "\"mistral\"");
/// # let mut json: serde_json::Value = serde_json::from_str(&json).expect("a config.json");
/// # json["use_flash_attn"] = false.into();
/// let config: Config = serde_json::from_value(json).expect("a Mistral's config.json");
/// let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
/// let mut model = CandleMistral::new(Model::new(&config, vb)?);
/// let logits = model.forward(&Tensor::new(&[[0_u32, 5]], &Device::Cpu)?, 0)?;
/// assert_eq!((logits.dims(), model.cached_len()), (&[1, 2048][..], 2));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CandleMistral {
    model: mistral::Model,
    seen: Seen,
}

impl CandleMistral {
    /// A loaded model that has seen nothing.
    #[must_use]
    pub fn new(model: mistral::Model) -> Self {
        Self { model, seen: Seen::default() }
    }
}

impl CausalLm for CandleMistral {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        self.seen.check(index_pos)?;
        if index_pos == 0 {
            self.clear()?;
        }
        let logits = self.model.forward(ids, index_pos)?.squeeze(1)?.to_dtype(DType::F32)?;
        self.seen.grow(ids, index_pos)?;
        Ok(logits)
    }

    fn cached_len(&self) -> usize {
        self.seen.0
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if self.seen.cut(len)? {
            self.model.clear_kv_cache();
        }
        Ok(())
    }
}
