//! `config.json` of Llama-shaped models: a superset of candle's, refusing what cannot be run.

mod family;
mod rope;

use candle_core::{Error, Result};
use candle_sparse::error::plain;
use candle_sparse_core::{Activation, Rope, RopeScaling};
use family::Family;
use rope::RawRope;
pub use rope::{Llama3RopeConfig, Llama3RopeType, YarnRope};
use serde::Deserialize;

/// Context length of the preset configurations, as in candle.
///
/// ```
/// use candle_sparse_models::llama::{Config, DEFAULT_MAX_SEQ_LEN};
///
/// assert_eq!(Config::config_7b_v2(false).max_position_embeddings, DEFAULT_MAX_SEQ_LEN);
/// ```
pub const DEFAULT_MAX_SEQ_LEN: usize = 4096;

/// The tokens that end a text: `eos_token_id` of `config.json`.
///
/// ```
/// use candle_sparse_models::llama::LlamaEosToks;
///
/// assert_eq!(serde_json::from_str::<LlamaEosToks>("2")?, LlamaEosToks::Single(2));
/// assert_eq!(serde_json::from_str::<LlamaEosToks>("[2, 32]")?, LlamaEosToks::Multiple(vec![2, 32]));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum LlamaEosToks {
    /// One token.
    Single(u32),
    /// Any of several.
    Multiple(Vec<u32>),
}

/// `config.json`, checked while it is parsed.
///
/// Beyond candle's fields: `hidden_act`, `head_dim`, biases, both spellings of RoPE (`rope_theta` with `rope_scaling`, or
/// `rope_parameters`), linear and `YaRN` RoPE scaling, FFNs without a gate (`model_type` `arcee`), and the shifts of shifted-ReLU models. `sliding_window` counts where `model_type`
/// is `mistral` or `bamboo`: transformers' Llama has no such field and attends to everything.
///
/// ```
/// use candle_sparse_models::llama::LlamaConfig;
///
/// let json = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/config.json"));
/// let config: LlamaConfig = serde_json::from_str(json)?;
/// assert_eq!((config.hidden_size, config.num_key_value_heads()), (256, 2));
/// let error = serde_json::from_str::<LlamaConfig>(&json.replace("silu", "tanh")).unwrap_err();
/// assert!(error.to_string().contains("tanh"), "{error}");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Raw")]
#[allow(missing_docs, reason = "fields are those of the Hugging Face file")]
pub struct LlamaConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f64,
    pub rope_theta: f32,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<LlamaEosToks>,
    pub rope_scaling: Option<Llama3RopeConfig>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: Option<bool>,
    pub hidden_act: Activation,
    /// Whether there is a `gate_proj`: not with `model_type` `arcee`.
    pub gated_mlp: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub gate_shift: f32,
    pub norm_shift: Option<f32>,
    pub sliding_window: Option<usize>,
}

impl LlamaConfig {
    /// Key/value heads: as many as query heads where the file does not say.
    #[must_use]
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// The configuration a model is built from; `use_flash_attn` is accepted for candle's signature and means nothing.
    #[must_use]
    pub fn into_config(self, use_flash_attn: bool) -> Config {
        Config {
            num_key_value_heads: self.num_key_value_heads(),
            head_dim: self.head_dim,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            use_flash_attn,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            bos_token_id: self.bos_token_id,
            eos_token_id: self.eos_token_id,
            rope_scaling: self.rope_scaling,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            hidden_act: self.hidden_act,
            gated_mlp: self.gated_mlp,
            attention_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            gate_shift: self.gate_shift,
            norm_shift: self.norm_shift,
            sliding_window: self.sliding_window,
        }
    }
}

/// The configuration that a Llama is built from, with the fields of `config.json`.
///
/// ```
/// use candle_sparse_models::llama::Config;
///
/// let config = Config { num_key_value_heads: 8, ..Config::config_7b_v2(false) };
/// assert_eq!(config.to_core()?.group_size(), 4);
/// // 32 heads cannot share 5.
/// let wrong = Config { num_key_value_heads: 5, ..config };
/// assert!(wrong.to_core().unwrap_err().to_string().contains("num_key_value_heads"));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "fields are those of the Hugging Face file")]
pub struct Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: Option<usize>,
    pub use_flash_attn: bool,
    pub rms_norm_eps: f64,
    pub rope_theta: f32,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<LlamaEosToks>,
    pub rope_scaling: Option<Llama3RopeConfig>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub hidden_act: Activation,
    /// Whether the FFN has a gate, see [`candle_sparse_core::Config::gated_mlp`].
    pub gated_mlp: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub gate_shift: f32,
    pub norm_shift: Option<f32>,
    /// Positions that a token sees, see [`candle_sparse_core::Config::sliding_window`].
    pub sliding_window: Option<usize>,
}

impl Config {
    /// Llama 1 with 7 B parameters.
    #[must_use]
    pub fn config_7b_v1(use_flash_attn: bool) -> Self {
        Self { rms_norm_eps: 1e-6, ..Self::config_7b_v2(use_flash_attn) }
    }

    /// Llama 2 with 7 B parameters.
    #[must_use]
    pub fn config_7b_v2(use_flash_attn: bool) -> Self {
        Self {
            hidden_size: 4096,
            intermediate_size: 11008,
            vocab_size: 32000,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: None,
            use_flash_attn,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: DEFAULT_MAX_SEQ_LEN,
            tie_word_embeddings: false,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            attention_bias: false,
            mlp_bias: false,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        }
    }

    /// The shape as the core crate names it, checked.
    ///
    /// # Errors
    /// A size is 0, does not divide, or a number is out of range; the message names the field.
    pub fn to_core(&self) -> Result<candle_sparse_core::Config> {
        let scaling = match &self.rope_scaling {
            None => RopeScaling::None,
            Some(s) => match s.rope_type {
                Llama3RopeType::Default => RopeScaling::None,
                Llama3RopeType::Linear => RopeScaling::Linear { factor: s.factor },
                Llama3RopeType::Llama3 => RopeScaling::Llama3 {
                    factor: s.factor,
                    low_freq_factor: s.low_freq_factor,
                    high_freq_factor: s.high_freq_factor,
                    original_max_position_embeddings: s.original_max_position_embeddings,
                },
                Llama3RopeType::Yarn(yarn) => RopeScaling::Yarn {
                    factor: s.factor,
                    beta_fast: yarn.beta_fast,
                    beta_slow: yarn.beta_slow,
                    original_max_position_embeddings: s.original_max_position_embeddings,
                    attention_factor: yarn.attention_factor,
                    truncate: yarn.truncate,
                },
            },
        };
        let head_dim = match self.head_dim {
            Some(n) => n,
            None => self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0),
        };
        let config = candle_sparse_core::Config {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim,
            rms_norm_eps: self.rms_norm_eps as f32,
            rope: Rope { theta: self.rope_theta, scaling, interleaved: false },
            max_position_embeddings: self.max_position_embeddings,
            hidden_act: self.hidden_act,
            gated_mlp: self.gated_mlp,
            gate_shift: self.gate_shift,
            norm_shift: self.norm_shift,
            sliding_window: self.sliding_window.filter(|w| *w < self.max_position_embeddings),
        };
        config.validate().map_err(|e| Error::msg(format!("config: {e}")))?;
        Ok(config)
    }
}

/// The file as it stands, with every spelling.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f32>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<LlamaEosToks>,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    hidden_act_param: Option<f32>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<serde_json::Value>,
    sliding_window: Option<usize>,
    gate_shift: Option<f32>,
    norm_shift: Option<f32>,
}

/// Refuses a checkpoint whose `quantization_config` says that it is quantised.
pub(crate) fn refuse_quantized(config: Option<&serde_json::Value>) -> std::result::Result<(), String> {
    let Some(q) = config.filter(|q| !q.is_null()) else { return Ok(()) };
    let method = q["quant_method"].as_str().unwrap_or("unknown");
    Err(format!(
        "the checkpoint is quantised already (quant_method {method}): give the unquantised one, it can be quantised \
         while it is loaded"
    ))
}

/// The `hidden_act` of an activation, and its parameter.
pub(crate) fn activation_name(activation: Activation) -> (&'static str, Option<f32>) {
    match activation {
        Activation::Silu => ("silu", None),
        Activation::Gelu => ("gelu", None),
        Activation::GeluPytorchTanh => ("gelu_pytorch_tanh", None),
        Activation::Relu => ("relu", None),
        Activation::Relu2 => ("relu2", None),
        Activation::FatRelu { threshold } => ("fatrelu", Some(threshold)),
        Activation::DRelu => ("drelu", None),
    }
}

/// The activation a `hidden_act` names.
pub(crate) fn activation(name: &str, param: Option<f32>) -> std::result::Result<Activation, String> {
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluPytorchTanh),
        "relu" => Ok(Activation::Relu),
        "relu2" => Ok(Activation::Relu2),
        "drelu" => Ok(Activation::DRelu),
        "fatrelu" => {
            let threshold = param.ok_or("hidden_act 'fatrelu' needs hidden_act_param, its threshold")?;
            Ok(Activation::FatRelu { threshold })
        }
        other => Err(format!(
            "unknown hidden_act '{other}', supported: silu, gelu, gelu_pytorch_tanh, relu, relu2, fatrelu, drelu"
        )),
    }
}

impl TryFrom<Raw> for LlamaConfig {
    type Error = String;

    fn try_from(raw: Raw) -> std::result::Result<Self, String> {
        Self::of(raw).map_err(|problem| plain(&problem))
    }
}

impl LlamaConfig {
    fn of(raw: Raw) -> std::result::Result<Self, String> {
        let family = Family::of(raw.model_type.as_deref(), raw.architectures.as_deref())?;
        if let Some(part) = raw.partial_rotary_factor.filter(|f| *f != 1.0) {
            return Err(format!("partial_rotary_factor {part} is not supported, only 1"));
        }
        refuse_quantized(raw.quantization_config.as_ref())?;
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let scaling = rope.map(|r| r.scaling(Some(raw.max_position_embeddings))).transpose()?;
        let theta = raw.rope_parameters.as_ref().and_then(|r| r.rope_theta).or(raw.rope_theta);
        Ok(Self {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            vocab_size: raw.vocab_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads,
            head_dim: raw.head_dim,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: theta.unwrap_or(10_000.0),
            bos_token_id: raw.bos_token_id,
            eos_token_id: raw.eos_token_id,
            rope_scaling: scaling.filter(|s| s.rope_type != Llama3RopeType::Default),
            max_position_embeddings: raw.max_position_embeddings,
            tie_word_embeddings: raw.tie_word_embeddings,
            hidden_act: family.activation(raw.hidden_act.as_deref(), raw.hidden_act_param)?,
            gated_mlp: family != Family::Arcee,
            attention_bias: raw.attention_bias.unwrap_or(false),
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            gate_shift: raw.gate_shift.unwrap_or(0.0),
            norm_shift: raw.norm_shift,
            // In transformers a Llama has none, whatever its file says. A window that no context reaches changes nothing.
            sliding_window: raw
                .sliding_window
                .filter(|w| family.has_window() && *w < raw.max_position_embeddings),
        })
    }
}

#[cfg(test)]
mod tests;
