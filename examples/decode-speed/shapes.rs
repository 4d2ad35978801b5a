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
    /// No gate, relu2
    #[value(name = "afm-4.5b")]
    Afm45b,
    /// relu
    #[value(name = "minicpm-s-1b")]
    MinicpmS1b,
}

impl Shape {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Smollm2135m => "smollm2-135m",
            Self::Tinyllama11b => "tinyllama-1.1b",
            Self::Llama7b => "llama-7b",
            Self::Mistral7b => "mistral-7b",
            Self::Afm45b => "afm-4.5b",
            Self::MinicpmS1b => "minicpm-s-1b",
        }
    }

    /// Hidden size, neurons, blocks, query and key/value heads, vocabulary, and whether the head is the embedding.
    fn sizes(self) -> (usize, usize, usize, usize, usize, usize, bool) {
        match self {
            Self::Smollm2135m => (576, 1536, 30, 9, 3, 49152, true),
            Self::Tinyllama11b => (2048, 5632, 22, 32, 4, 32000, false),
            Self::Llama7b => (4096, 11008, 32, 32, 32, 32000, false),
            Self::Mistral7b => (4096, 14336, 32, 32, 8, 32000, false),
            Self::Afm45b => (2560, 18432, 36, 20, 4, 128_005, false),
            Self::MinicpmS1b => (1536, 3840, 52, 24, 8, 73440, false),
        }
    }

    pub(crate) fn hidden_size(self) -> usize {
        self.sizes().0
    }

    /// Its `model_type` and `hidden_act`.
    fn family(self) -> (&'static str, &'static str) {
        match self {
            Self::Smollm2135m | Self::Tinyllama11b | Self::Llama7b | Self::Mistral7b => ("llama", "silu"),
            Self::Afm45b => ("arcee", "relu2"),
            Self::MinicpmS1b => ("llama", "relu"),
        }
    }

    /// Whether its activation shuts neurons to an exact 0.
    pub(crate) fn has_exact_zeros(self) -> bool {
        self.family().1 != "silu"
    }

    /// `config.json` with a context of 32k, so that any depth can be measured; `gate_shift` is taken off what is activated.
    pub(crate) fn config(self, gate_shift: f32) -> String {
        let (hidden, inner, layers, heads, kv_heads, vocab, tied) = self.sizes();
        let (model_type, hidden_act) = self.family();
        serde_json::json!({
            "model_type": model_type, "hidden_act": hidden_act, "gate_shift": gate_shift, "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768
        })
        .to_string()
    }
}
