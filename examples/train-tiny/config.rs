//! Model sizes, as Hugging Face writes them in `config.json`.

use anyhow::Result;
use serde_json::{Value, json};

/// A mistake in the user's input: reported as one line with exit code 2.
#[derive(Debug)]
pub(crate) struct WrongInput(pub String);

impl core::fmt::Display for WrongInput {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for WrongInput {}

/// An error that is the user's to mend.
pub(crate) fn wrong<T>(message: impl Into<String>) -> Result<T> {
    Err(WrongInput(message.into()).into())
}

/// The activation of the feed-forward gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HiddenAct {
    /// `x * sigmoid(x)`: no neuron is ever exactly zero.
    Silu,
    /// `max(x, 0)`: the neurons it zeroes need not be computed.
    Relu,
    /// `max(x, 0)²`: the same.
    Relu2,
}

impl HiddenAct {
    /// The name used by `hidden_act` in `config.json`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Relu => "relu",
            Self::Relu2 => "relu2",
        }
    }

    /// Reads the name used by `hidden_act` in `config.json`.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        match name {
            "silu" => Ok(Self::Silu),
            "relu" => Ok(Self::Relu),
            "relu2" => Ok(Self::Relu2),
            other => wrong(format!("unknown activation `{other}`: use silu, relu or relu2")),
        }
    }
}

/// The fields of a Hugging Face Llama `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) architectures: Vec<String>,
    pub(crate) model_type: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) rope_theta: f64,
    pub(crate) hidden_act: HiddenAct,
    /// Whether there is a `gate_proj`; the file says it by its `model_type`.
    pub(crate) gated_mlp: bool,
    pub(crate) bos_token_id: u32,
    pub(crate) eos_token_id: u32,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) attention_bias: bool,
    pub(crate) mlp_bias: bool,
    pub(crate) torch_dtype: String,
}

impl Config {
    /// The content of `config.json`.
    pub(crate) fn json(&self) -> Value {
        json!({
            "architectures": self.architectures,
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": self.hidden_act.name(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "torch_dtype": self.torch_dtype,
        })
    }

    /// Checks that the sizes fit together.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("--hidden-size", self.hidden_size),
            ("--intermediate-size", self.intermediate_size),
            ("--num-hidden-layers", self.num_hidden_layers),
            ("--num-attention-heads", self.num_attention_heads),
            ("--num-key-value-heads", self.num_key_value_heads),
            ("--max-position-embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 {
                return wrong(format!("{name} must be at least 1"));
            }
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if !hidden.is_multiple_of(2 * heads) {
            return wrong(format!(
                "--hidden-size {hidden} must be an even multiple of --num-attention-heads {heads}"
            ));
        }
        let kv = self.num_key_value_heads;
        if !heads.is_multiple_of(kv) {
            return wrong(format!(
                "--num-attention-heads {heads} must be a multiple of --num-key-value-heads {kv}"
            ));
        }
        // 256 bytes and two special tokens are always there.
        if self.vocab_size < 258 {
            return wrong(format!("--vocab-size {} must be at least 258", self.vocab_size));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) fn tiny(hidden_act: HiddenAct) -> Config {
    Config {
        architectures: vec!["LlamaForCausalLM".into()],
        model_type: "llama".into(),
        vocab_size: 300,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        hidden_act,
        gated_mlp: true,
        bos_token_id: 0,
        eos_token_id: 1,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        torch_dtype: "float16".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_divide_are_refused() {
        let good = tiny(HiddenAct::Relu);
        assert!(good.check().is_ok());
        let heads = Config { num_attention_heads: 3, ..good.clone() };
        let kv = Config { num_key_value_heads: 3, ..good.clone() };
        let vocab = Config { vocab_size: 100, ..good };
        for bad in [heads, kv, vocab] {
            let err = bad.check().unwrap_err();
            assert!(err.downcast_ref::<WrongInput>().is_some());
            assert!(!err.to_string().contains('\n'));
        }
    }

    #[test]
    fn activation_names() {
        assert_eq!(HiddenAct::parse("relu").unwrap(), HiddenAct::Relu);
        assert!(HiddenAct::parse("gelu").unwrap_err().to_string().contains("gelu"));
    }
}
