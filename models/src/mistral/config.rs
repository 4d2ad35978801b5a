//! `config.json` of Mistral: candle's fields, refusing what cannot be run.

use crate::llama;
use candle_core::{Result, bail};
use candle_nn::Activation;
use candle_sparse::error::plain;

use serde::Deserialize;

/// The configuration that a Mistral is built from: the fields of candle's, so that an app that writes one compiles.
///
/// ```
/// use candle_sparse_models::mistral::Config;
///
/// let config = Config::config_7b_v0_1(false);
/// assert_eq!((config.sliding_window, config.num_key_value_heads), (Some(4096), 8));
/// assert_eq!(config.to_llama()?.to_core()?.sliding_window, Some(4096));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Raw")]
#[allow(missing_docs, reason = "fields are those of the Hugging Face file")]
#[allow(missing_copy_implementations, reason = "candle's is not Copy, so apps clone it")]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub head_dim: Option<usize>,
    pub num_key_value_heads: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Positions that a token sees, its own among them, see [`candle_sparse_core::Config::sliding_window`].
    pub sliding_window: Option<usize>,
    /// Accepted and without meaning: there is one attention.
    pub use_flash_attn: bool,
}

impl Config {
    /// Mistral-7B-v0.1.
    #[must_use]
    pub fn config_7b_v0_1(use_flash_attn: bool) -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            head_dim: None,
            num_key_value_heads: 8,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            sliding_window: Some(4096),
            use_flash_attn,
        }
    }

    /// Mistral-7B fine-tuned with the tokens of `ChatML` (`OpenOrca`, `OpenHermes` 2.5).
    #[must_use]
    pub fn config_chat_ml(use_flash_attn: bool) -> Self {
        Self { vocab_size: 32_002, ..Self::config_7b_v0_1(use_flash_attn) }
    }

    /// Amazon's `MistralLite`.
    #[must_use]
    pub fn config_amazon_mistral_lite(use_flash_attn: bool) -> Self {
        Self { vocab_size: 32_003, ..Self::config_7b_v0_1(use_flash_attn) }
    }

    /// The same model as a Llama with a sliding window, which is what runs it.
    ///
    /// # Errors
    /// A `hidden_act` that there is no kernel for.
    pub fn to_llama(&self) -> Result<llama::Config> {
        Ok(llama::Config {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            use_flash_attn: self.use_flash_attn,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: false,
            hidden_act: activation(self.hidden_act)?,
            gated_mlp: true,
            attention_bias: false,
            mlp_bias: false,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: self.sliding_window,
        })
    }
}

fn activation(act: Activation) -> Result<candle_sparse_core::Activation> {
    Ok(match act {
        Activation::Silu | Activation::Swish => candle_sparse_core::Activation::Silu,
        Activation::Gelu => candle_sparse_core::Activation::Gelu,
        Activation::NewGelu | Activation::GeluPytorchTanh => candle_sparse_core::Activation::GeluPytorchTanh,
        Activation::Relu => candle_sparse_core::Activation::Relu,
        Activation::Relu2 => candle_sparse_core::Activation::Relu2,
        other => bail!(
            "config: hidden_act {other:?} is not supported, only silu, gelu, gelu_pytorch_tanh, relu and relu2"
        ),
    })
}

/// The file as it stands.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: Option<usize>,
    head_dim: Option<usize>,
    num_key_value_heads: usize,
    hidden_act: Option<Activation>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<RawRope>,
    sliding_window: Option<usize>,
    use_flash_attn: Option<bool>,
    quantization_config: Option<serde_json::Value>,
}

/// `rope_parameters`, or the older `rope_scaling`.
#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The older spelling; re-saved files carry both.
    #[serde(rename = "type")]
    old_type: Option<String>,
}

impl TryFrom<Raw> for Config {
    type Error = String;

    fn try_from(raw: Raw) -> std::result::Result<Self, String> {
        Self::of(raw).map_err(|problem| plain(&problem))
    }
}

impl Config {
    fn of(raw: Raw) -> std::result::Result<Self, String> {
        if let Some(other) = raw.model_type.as_deref().filter(|t| *t != "mistral") {
            return Err(format!("model_type '{other}' is not supported here, only mistral"));
        }
        llama::refuse_quantized(raw.quantization_config.as_ref())?;
        let ropes = [&raw.rope_parameters, &raw.rope_scaling];
        let types =
            ropes.into_iter().flatten().filter_map(|r| r.rope_type.as_deref().or(r.old_type.as_deref()));
        if let Some(other) = types.into_iter().find(|t| *t != "default") {
            return Err(format!(
                "rope type '{other}' is not supported by the mistral model: load it as a llama"
            ));
        }
        let nested = raw.rope_parameters.as_ref().and_then(|r| r.rope_theta);
        let config = Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads.unwrap_or(32),
            head_dim: raw.head_dim,
            num_key_value_heads: raw.num_key_value_heads,
            hidden_act: raw.hidden_act.unwrap_or(Activation::Silu),
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: nested.or(raw.rope_theta).ok_or("missing field `rope_theta`")?,
            sliding_window: raw.sliding_window,
            use_flash_attn: raw.use_flash_attn.unwrap_or(false),
        };
        activation(config.hidden_act).map_err(|e| crate::message::first_line(&e))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &str) -> std::result::Result<Config, String> {
        let json = format!(
            r#"{{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_key_value_heads": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5 {extra}}}"#
        );
        serde_json::from_str(&json).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_candles() {
        let c = parse(r#", "rope_theta": 1e6, "sliding_window": null"#).unwrap();
        assert_eq!((c.num_attention_heads, c.hidden_act, c.rope_theta), (32, Activation::Silu, 1e6));
        assert_eq!((c.sliding_window, c.use_flash_attn, c.head_dim), (None, false, None));
        let new = r#", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}"#;
        assert_eq!(parse(new).unwrap(), c);
    }

    #[test]
    fn presets_are_those_of_the_checkpoints() {
        for (c, vocab_size) in [
            (Config::config_7b_v0_1(false), 32_000),
            (Config::config_chat_ml(false), 32_002),
            (Config::config_amazon_mistral_lite(false), 32_003),
        ] {
            let core = c.to_llama().unwrap().to_core().unwrap();
            assert_eq!((core.vocab_size, core.kv_dim(), core.intermediate_size), (vocab_size, 1024, 14_336));
            assert_eq!(core.sliding_window, Some(4096));
        }
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        let theta = r#", "rope_theta": 1e4"#;
        for (extra, needle) in [
            (r#", "hidden_act": "mish""#, "Mish"),
            (r#", "hidden_act": "swiglu9""#, "swiglu9"),
            (r#", "model_type": "mixtral""#, "'mixtral'"),
            (r#", "rope_scaling": {"type": "yarn", "factor": 4.0}"#, "'yarn'"),
            (r#", "quantization_config": {"quant_method": "awq"}"#, "awq"),
        ] {
            let err = parse(&format!("{theta}{extra}")).unwrap_err();
            assert!(err.contains(needle) && !err.contains('\n'), "{extra}: {err}");
        }
        assert!(parse("").unwrap_err().contains("rope_theta"));
        let none = parse(&format!(r#"{theta}, "sliding_window": 0"#)).unwrap();
        let err = none.to_llama().unwrap().to_core().unwrap_err().to_string();
        assert!(err.contains("sliding_window"), "{err}");
    }
}
