//! The shape of a model, in Hugging Face words.

mod rope;

use crate::error::Error;
pub use rope::{Rope, RopeScaling};

/// The activation of the FFN, `y = act(gate − gate_shift) · up`; of one without a gate `y = act(up − gate_shift)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^−x)`
    Silu,
    /// `x · Φ(x)` with the exact normal distribution function
    Gelu,
    /// `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`
    GeluPytorchTanh,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)²`
    Relu2,
    /// `x` where `x > threshold`, else 0 (FATReLU of ProSparse, <https://arxiv.org/abs/2402.13516>)
    FatRelu {
        /// Largest value that does not pass.
        threshold: f32,
    },
    /// `max(gate, 0) · max(up, 0)` (dReLU of TurboSparse, <https://arxiv.org/abs/2406.05955>)
    DRelu,
}

impl Activation {
    /// Whether it shuts neurons: one whose activation is exactly 0 adds nothing, and to leave it out changes nothing.
    #[must_use]
    pub fn has_exact_zeros(self) -> bool {
        match self {
            Self::Silu | Self::Gelu | Self::GeluPytorchTanh => false,
            Self::Relu | Self::Relu2 | Self::FatRelu { .. } | Self::DRelu => true,
        }
    }
}

/// Far beyond every model there is: a number above it is a damaged or hostile file.
const MOST_LAYERS: usize = 1 << 16;
/// The same of the channels of a head.
const MOST_CHANNELS: usize = 1 << 20;

/// Everything a forward pass must know about a Llama-shaped model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Neurons per FFN.
    pub intermediate_size: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Decoder blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even. Need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// FFN activation.
    pub hidden_act: Activation,
    /// Whether the FFN has a gate, `down(act(gate(x)) · up(x))`; without one it is `down(act(up(x)))`.
    pub gated_mlp: bool,
    /// Subtracted from the gate before the activation (shifted ReLU); 0 in stock models.
    pub gate_shift: f32,
    /// With `Some(s)` attention and FFN read `max(norm(x) − s, 0)` instead of `norm(x)`.
    pub norm_shift: Option<f32>,
    /// With `Some(w)` the token at position p sees positions j with `p − w < j ≤ p`: `w` keys, its own among them.
    ///
    /// As transformers' [`sliding_window_overlay`][1]; candle's Mistral masks one position less (`j < p − w`), and
    /// nothing of what came before the prompt it is given.
    ///
    /// [1]: https://github.com/huggingface/transformers/blob/2ccc6cae21faaf11631efa5fb9054687ae5dc931/src/transformers/masking_utils.py#L80-L89
    pub sliding_window: Option<usize>,
}

impl Config {
    /// The first position that the token at `position` sees: `position + 1 − sliding_window`, or 0.
    #[must_use]
    pub fn first_visible(&self, position: usize) -> usize {
        self.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Width of all query heads, `num_attention_heads · head_dim`.
    #[must_use]
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads, `num_key_value_heads · head_dim`.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Query heads that share one key/value head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Checks what the forward pass relies on; afterwards it can fail on a token or position only.
    ///
    /// # Errors
    /// The first field that is zero, out of range, or does not divide.
    pub fn validate(&self) -> Result<(), Error> {
        for (size, name) in [
            (self.hidden_size, "hidden_size"),
            (self.intermediate_size, "intermediate_size"),
            (self.vocab_size, "vocab_size"),
            (self.num_hidden_layers, "num_hidden_layers"),
            (self.num_attention_heads, "num_attention_heads"),
            (self.num_key_value_heads, "num_key_value_heads"),
            (self.head_dim, "head_dim"),
            (self.max_position_embeddings, "max_position_embeddings"),
        ] {
            if size == 0 {
                return Err(Error::Zero(name));
            }
        }
        if self.sliding_window == Some(0) {
            return Err(Error::Zero("sliding_window"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::HeadGroups {
                heads: self.num_attention_heads,
                kv_heads: self.num_key_value_heads,
            });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::OddHeadDim(self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(Error::OutOfRange("rms_norm_eps"));
        }
        if !self.gate_shift.is_finite() {
            return Err(Error::OutOfRange("gate_shift"));
        }
        if self.norm_shift.is_some_and(|s| !s.is_finite()) {
            return Err(Error::OutOfRange("norm_shift"));
        }
        if let Activation::FatRelu { threshold } = self.hidden_act
            && !threshold.is_finite()
        {
            return Err(Error::OutOfRange("fatrelu threshold"));
        }
        if self.hidden_act == Activation::DRelu && !self.gated_mlp {
            return Err(Error::OutOfRange("hidden_act (drelu is of gate and up, the FFN has no gate)"));
        }
        self.rope.validate()?;
        self.check_sizes()
    }

    /// That no product of sizes overflows, and that what is held per layer or pair of channels can be.
    fn check_sizes(&self) -> Result<(), Error> {
        // A matrix of f32 must stay addressable, so its element count gets two bits of head room.
        let limit = usize::MAX / 8;
        let fits = |a: usize, b: usize| a.checked_mul(b).is_some_and(|n| n <= limit);
        let q_dim = self.num_attention_heads.checked_mul(self.head_dim);
        for (a, b, name) in [
            (self.vocab_size, self.hidden_size, "vocab_size x hidden_size"),
            (self.intermediate_size, self.hidden_size, "intermediate_size x hidden_size"),
            (q_dim.unwrap_or(usize::MAX), self.hidden_size, "heads x head_dim x hidden_size"),
        ] {
            if !fits(a, b) {
                return Err(Error::TooLarge(name));
            }
        }
        for (size, most, name) in [
            (self.num_hidden_layers, MOST_LAYERS, "num_hidden_layers"),
            (self.head_dim, MOST_CHANNELS, "head_dim"),
        ] {
            if size > most {
                return Err(Error::TooLarge(name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny() -> Config {
        Config {
            hidden_size: 64,
            intermediate_size: 96,
            vocab_size: 50,
            num_hidden_layers: 2,
            num_attention_heads: 6,
            num_key_value_heads: 2,
            head_dim: 16,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: 64,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        }
    }

    #[test]
    fn validate_names_the_first_bad_field() {
        assert_eq!(tiny().validate(), Ok(()));
        assert_eq!(Config { vocab_size: 0, ..tiny() }.validate(), Err(Error::Zero("vocab_size")));
        assert_eq!(
            Config { num_key_value_heads: 4, ..tiny() }.validate(),
            Err(Error::HeadGroups { heads: 6, kv_heads: 4 })
        );
        assert_eq!(Config { head_dim: 15, ..tiny() }.validate(), Err(Error::OddHeadDim(15)));
        assert_eq!(
            Config { rms_norm_eps: f32::NAN, ..tiny() }.validate(),
            Err(Error::OutOfRange("rms_norm_eps"))
        );
        assert_eq!(
            Config { vocab_size: usize::MAX / 2, ..tiny() }.validate(),
            Err(Error::TooLarge("vocab_size x hidden_size"))
        );
        for (bad, name) in [
            (Config { num_hidden_layers: 1 << 50, ..tiny() }, "num_hidden_layers"),
            (
                Config {
                    head_dim: 1 << 50,
                    hidden_size: 1,
                    num_attention_heads: 1,
                    num_key_value_heads: 1,
                    ..tiny()
                },
                "head_dim",
            ),
        ] {
            assert_eq!(bad.validate(), Err(Error::TooLarge(name)));
        }
        let long = [usize::MAX, 1_000_000_000_000_000, 4_294_967_295];
        assert!(long.iter().all(|&n| Config { max_position_embeddings: n, ..tiny() }.validate().is_ok()));
        assert_eq!(
            Config { sliding_window: Some(0), ..tiny() }.validate(),
            Err(Error::Zero("sliding_window"))
        );
        let rope = Rope { theta: -1.0, ..tiny().rope };
        assert_eq!(Config { rope, ..tiny() }.validate(), Err(Error::OutOfRange("rope_theta")));
    }

    #[test]
    fn a_window_counts_the_token_itself() {
        let first = |w, p| Config { sliding_window: w, ..tiny() }.first_visible(p);
        assert_eq!([0, 2, 3, 7].map(|p| first(Some(3), p)), [0, 0, 1, 5]);
        assert_eq!((first(Some(1), 5), first(None, 5), first(Some(usize::MAX), 5)), (5, 0, 0));
    }

    #[test]
    fn llama3_scaling_keeps_high_and_stretches_low_frequencies() {
        let plain = Rope { theta: 5e5, scaling: RopeScaling::None, interleaved: false };
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let scaled = Rope { scaling, ..plain };
        assert_eq!(scaled.inv_freq(0, 128), plain.inv_freq(0, 128));
        assert_eq!(scaled.inv_freq(63, 128), plain.inv_freq(63, 128) / 8.0);
        let mid = (20..50).filter(|&i| {
            let (s, p) = (scaled.inv_freq(i, 128), plain.inv_freq(i, 128));
            s < p && s > p / 8.0
        });
        assert!(mid.count() > 0, "some frequency lies between the two regimes");
    }
}
