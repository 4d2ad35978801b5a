//! What a tensor of an image is for.

/// What a tensor of an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Role {
    /// The configuration.
    Config = 1,
    /// The tables of the vocabulary.
    Tokenizer = 2,
    /// `[vocab_size, hidden_size]`
    EmbedTokens = 16,
    /// `[hidden_size]`
    Norm = 17,
    /// `[vocab_size, hidden_size]`; where there is none the embedding is the head.
    LmHead = 18,
    /// `[hidden_size]`
    InputLayernorm = 32,
    /// `[q_dim, hidden_size]`
    QProj = 33,
    /// `[kv_dim, hidden_size]`
    KProj = 34,
    /// `[kv_dim, hidden_size]`
    VProj = 35,
    /// `[hidden_size, q_dim]`
    OProj = 36,
    /// `[hidden_size]`
    PostAttentionLayernorm = 37,
    /// `[intermediate_size, hidden_size]`
    GateProj = 38,
    /// `[intermediate_size, hidden_size]`
    UpProj = 39,
    /// `[hidden_size, intermediate_size]`
    DownProj = 40,
}

impl Role {
    /// Its name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Tokenizer => "tokenizer",
            Self::EmbedTokens => "embed_tokens",
            Self::Norm => "norm",
            Self::LmHead => "lm_head",
            Self::InputLayernorm => "input_layernorm",
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::PostAttentionLayernorm => "post_attention_layernorm",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }
}
