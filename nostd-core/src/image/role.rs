//! What a tensor of an image is for.

/// The list of roles, each with its number and its name.
macro_rules! roles {
    ($($(#[$doc:meta])* $role:ident = $number:literal, $name:literal;)*) => {
        /// What a tensor of an image is for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Role {
            $($(#[$doc])* $role = $number,)*
        }

        impl Role {
            /// Its name, for people.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$role => $name,)*
                }
            }

            /// The role of that number, if there is one.
            #[must_use]
            pub const fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$role),)*
                    _ => None,
                }
            }
        }
    };
}

roles! {
    /// The configuration.
    Config = 1, "config";
    /// What a token reads of its past, and how that is kept.
    Settings = 2, "settings";
    /// The tables of the vocabulary.
    Tokenizer = 3, "tokenizer";
    /// `[vocab_size, hidden_size]`
    EmbedTokens = 16, "embed_tokens";
    /// `[hidden_size]`
    Norm = 17, "norm";
    /// `[vocab_size, hidden_size]`; where there is none the embedding is the head.
    LmHead = 18, "lm_head";
    /// `[hidden_size]`
    InputLayernorm = 32, "input_layernorm";
    /// `[q_dim, hidden_size]`
    QProj = 33, "q_proj";
    /// `[kv_dim, hidden_size]`
    KProj = 34, "k_proj";
    /// `[kv_dim, hidden_size]`
    VProj = 35, "v_proj";
    /// `[hidden_size, q_dim]`
    OProj = 36, "o_proj";
    /// `[q_dim]`
    QBias = 37, "q_proj.bias";
    /// `[kv_dim]`
    KBias = 38, "k_proj.bias";
    /// `[kv_dim]`
    VBias = 39, "v_proj.bias";
    /// `[hidden_size]`
    OBias = 40, "o_proj.bias";
    /// `[hidden_size]`
    PostAttentionLayernorm = 48, "post_attention_layernorm";
    /// `[intermediate_size, hidden_size]`; of a neuron-major FFN in its order. None where an FFN has no gate.
    GateProj = 49, "gate_proj";
    /// `[intermediate_size, hidden_size]`
    UpProj = 50, "up_proj";
    /// `[hidden_size, intermediate_size]`
    DownProj = 51, "down_proj";
    /// `[2 · intermediate_size, hidden_size]`: up row and down column, neuron by neuron, in place of the two.
    UpDown = 52, "up_down";
    /// `[intermediate_size, hidden_size]`: down columns of an FFN without a gate, neuron by neuron, in place of `down_proj`.
    DownRows = 53, "down_rows";
    /// `[rank, hidden_size]`
    PredictorP = 64, "predictor.p";
    /// `[panels · rank, 128]`
    PredictorGate = 65, "predictor.q_gate";
    /// `[panels · rank, 128]`
    PredictorUp = 66, "predictor.q_up";
    /// `[intermediate_size]`
    GateDeviation = 67, "predictor.gate_deviation";
    /// `[intermediate_size]`
    UpVariance = 68, "predictor.up_variance";
    /// `[intermediate_size]`
    UpSquare = 69, "predictor.up_square";
    /// `[intermediate_size]`
    Importance = 70, "predictor.importance_squared";
    /// Rule, top-k + 1 (0: none) and number of hot neurons, as words.
    Plan = 71, "plan";
    /// `[intermediate_size]`
    Candidate = 72, "plan.candidate";
    /// `[intermediate_size]`
    Keep = 73, "plan.keep";
    /// `[hidden_size]`: what is skipped, in the mean.
    Skipped = 74, "plan.bias";
    /// `[kv_heads, hidden_size]`
    Ridge = 80, "gate.ridge";
    /// `[kv_heads]`
    RidgeBias = 81, "gate.bias";
    /// `[kv_heads]`
    Threshold = 82, "gate.threshold";
    /// `[kv_heads, hidden]`
    Readout = 83, "gate.readout";
    /// `[hidden, rank_w]`
    CellW1 = 84, "gate.w1";
    /// `[rank_w, hidden_size]`
    CellW2 = 85, "gate.w2";
    /// `[hidden, rank_u]`
    CellU1 = 86, "gate.u1";
    /// `[rank_u, hidden]`
    CellU2 = 87, "gate.u2";
    /// `[hidden]`
    CellBz = 88, "gate.b_z";
    /// `[hidden]`
    CellBh = 89, "gate.b_h";
    /// `[2]`
    CellZetaNu = 90, "gate.zeta_nu";
    /// `[kv_heads]`
    RecallShares = 91, "recall_shares";
}
