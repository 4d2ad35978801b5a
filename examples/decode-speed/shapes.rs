//! Shapes of well-known models.

use clap::ValueEnum;

/// A model whose shape is filled with random weights.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub(crate) enum Shape {
    #[value(name = "smollm2-135m")]
    Smollm2135m,
    #[value(name = "tinyllama-1.1b")]
    Tinyllama11b,
    #[value(name = "llama-7b")]
    Llama7b,
    #[value(name = "mistral-7b")]
    Mistral7b,
}

impl Shape {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Smollm2135m => "smollm2-135m",
            Self::Tinyllama11b => "tinyllama-1.1b",
            Self::Llama7b => "llama-7b",
            Self::Mistral7b => "mistral-7b",
        }
    }

    /// `config.json` with a context of 32k, so that any depth can be measured.
    pub(crate) fn config(self) -> String {
        let (hidden, inner, layers, heads, kv_heads, vocab, tied) = match self {
            Self::Smollm2135m => (576, 1536, 30, 9, 3, 49152, true),
            Self::Tinyllama11b => (2048, 5632, 22, 32, 4, 32000, false),
            Self::Llama7b => (4096, 11008, 32, 32, 32, 32000, false),
            Self::Mistral7b => (4096, 14336, 32, 32, 8, 32000, false),
        };
        serde_json::json!({
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768
        })
        .to_string()
    }
}
