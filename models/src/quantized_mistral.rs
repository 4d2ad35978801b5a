//! Mistral from GGUF files with Hugging Face tensor names, drop-in for `candle_transformers::models::quantized_mistral`.
//!
//! Such files are made for candle (`lmz/candle-mistral`). Those of llama.cpp, Mistral's too, have names of their own and are
//! read by [`quantized_llama`](crate::quantized_llama). The sliding window is applied as in [`mistral`](crate::mistral).

pub use crate::mistral::Config;
use crate::{
    decoder::{Checkpoint, Extras, LoadOptions, Stored},
    llama::{Cache, Llama},
    quantized_llama::held,
    speculation::Decoding,
};
use candle_core::{DType, Result, Tensor, bail};
use candle_sparse::{AttentionConfig, FastGrnnGate, KvConfig, KvDType, SparseConfig};
pub use candle_transformers::quantized_var_builder::VarBuilder;
use std::sync::Arc;

/// Matrices of a layer that are quantised.
const MATRICES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A quantised Mistral and the tokens it has seen. `Clone` shares the weights and copies what was seen.
///
/// ```
/// use candle_core::{Device, Tensor, quantized::{GgmlDType, QTensor, gguf_file}};
/// use candle_sparse_models::quantized_mistral::{Config, Model, VarBuilder};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
/// # tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
/// # let json = std::fs::read_to_string(folder.join("config.json"))?.replace("\"llama\"", "\"mistral\"");
/// # let quantize = |(name, t): (&String, &Tensor)| {
/// #     let dtype = if t.rank() == 2 { GgmlDType::Q8_0 } else { GgmlDType::F32 };
/// #     QTensor::quantize(t, dtype).map(|t| (name.clone(), t))
/// # };
/// # let tensors = tensors.iter().map(quantize).collect::<candle_core::Result<Vec<_>>>()?;
/// # let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
/// # let mut file = std::io::Cursor::new(Vec::new());
/// # gguf_file::write(&mut file, &[], &tensors)?;
/// let config: Config = serde_json::from_str(&json).expect("a Mistral's config.json");
/// let vb = VarBuilder::from_gguf_buffer(file.get_ref(), &Device::Cpu)?;
/// let mut model = Model::new(&config, vb)?;
/// let logits = model.forward(&Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?, 0)?;
/// assert_eq!((logits.dims(), model.cache().len()), (&[1, 1, 2048][..], 3));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    llama: Llama,
    cache: Cache,
}

impl Model {
    /// Loads the tensors of `vb`, which stay where candle has put them.
    ///
    /// # Errors
    /// See [`Self::load_with`].
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::load_with(cfg, &vb, LoadOptions::default())
    }

    /// Loads the tensors of `vb`, sparse or limited in threads as `options` say.
    ///
    /// # Errors
    /// A configuration that cannot be run, a missing tensor, a device other than the CPU, and those of
    /// [`Decoder::load`](crate::decoder::Decoder::load).
    pub fn load_with(cfg: &Config, vb: &VarBuilder, options: LoadOptions) -> Result<Self> {
        if !vb.device().is_cpu() {
            bail!(
                "quantized_mistral::Model runs on the CPU, not on {:?}: candle_transformers' own serves there",
                vb.device()
            );
        }
        let config = cfg.to_llama()?;
        let mut stored = Stored::new("GGUF");
        let mut add = |name: String| -> Result<()> {
            let (weight, dims) = held(vb.get_no_shape(&name)?)?;
            stored.insert(name, weight, &dims);
            Ok(())
        };
        for name in ["model.embed_tokens", "model.norm", "lm_head"] {
            add(format!("{name}.weight"))?;
        }
        for i in 0..config.num_hidden_layers {
            for name in MATRICES.iter().chain(&["input_layernorm", "post_attention_layernorm"]) {
                add(format!("model.layers.{i}.{name}.weight"))?;
            }
        }
        let stored = Arc::new(stored);
        let checkpoint = Checkpoint { vb: stored.var_builder(), stored: Some(stored), rope_freqs: None };
        let llama = Llama::from_checkpoint(&checkpoint, config.to_core()?, Extras::default(), options)?;
        let cache = Cache::of(&llama, KvConfig::exact(KvDType::F32));
        Ok(Self { llama, cache })
    }

    /// This model with keys and values kept as `kv` says, such as [`KvConfig::tiered`]; with an empty cache and no time limit.
    ///
    /// # Errors
    /// None today; the `Result` leaves room for caches that cannot be made.
    pub fn with_kv(self, kv: KvConfig) -> Result<Self> {
        Ok(Self { cache: Cache::of(&self.llama, kv), ..self })
    }

    /// This model with other settings of the sparse FFN; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_sparse`].
    pub fn with_sparse(self, config: SparseConfig) -> Result<Self> {
        Ok(Self { llama: self.llama.with_sparse(config)?, ..self })
    }

    /// This model with other settings of attention; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_attention`].
    pub fn with_attention(self, config: AttentionConfig) -> Result<Self> {
        Ok(Self { llama: self.llama.with_attention(config)?, ..self })
    }

    /// This model with other gates of sparse attention; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_gates`].
    pub fn with_gates(self, gates: Vec<FastGrnnGate>) -> Result<Self> {
        Ok(Self { llama: self.llama.with_gates(gates)?, ..self })
    }

    /// Logits `[batch, 1, vocab_size]` F32 after the tokens `input_ids` `[batch, seq_len]` at `seqlen_offset`.
    ///
    /// # Errors
    /// See [`mistral::Model::forward`](crate::mistral::Model::forward).
    pub fn forward(&mut self, input_ids: &Tensor, seqlen_offset: usize) -> Result<Tensor> {
        self.llama.forward(input_ids, seqlen_offset, &mut self.cache)?.unsqueeze(1)
    }

    /// Forgets every token.
    pub fn clear_kv_cache(&mut self) {
        self.cache.clear();
    }

    /// The model underneath, which takes a cache with each call.
    #[must_use]
    pub fn llama(&self) -> &Llama {
        &self.llama
    }

    /// The cache: keys and values of the tokens that were seen, and what the sparse FFNs did.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The cache, to save, load, cut back or replace.
    pub fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    pub(crate) fn decoding(&mut self) -> Option<Decoding<'_>> {
        self.cache.decoding(&self.llama, DType::F32)
    }
}
