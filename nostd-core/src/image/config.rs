//! The configuration as words of an image.

use super::Error;
use crate::{
    config::{Activation, Config, Rope, RopeScaling},
    error::Error as Reason,
};

/// Words of a configuration.
pub(super) const WORDS: usize = 24;

/// What stands in an image before its configuration is read; no model has it.
pub(super) const PLACEHOLDER: Config = Config {
    hidden_size: 0,
    intermediate_size: 0,
    vocab_size: 0,
    num_hidden_layers: 0,
    num_attention_heads: 0,
    num_key_value_heads: 0,
    head_dim: 0,
    rms_norm_eps: 0.0,
    rope: Rope { theta: 0.0, scaling: RopeScaling::None, interleaved: false },
    max_position_embeddings: 0,
    hidden_act: Activation::Silu,
    gated_mlp: true,
    gate_shift: 0.0,
    norm_shift: None,
    sliding_window: None,
};

/// The words of a configuration.
///
/// # Errors
/// A size that does not fit 32 bits.
pub(super) fn words(c: &Config) -> Result<[u32; WORDS], Error> {
    let size = |n: usize, what| u32::try_from(n).map_err(|_| Error::Model(Reason::TooLarge(what)));
    let (act, threshold) = match c.hidden_act {
        Activation::Silu => (0, 0.0),
        Activation::Gelu => (1, 0.0),
        Activation::GeluPytorchTanh => (2, 0.0),
        Activation::Relu => (3, 0.0),
        Activation::Relu2 => (4, 0.0),
        Activation::FatRelu { threshold } => (5, threshold),
        Activation::DRelu => (6, 0.0),
    };
    let (scaling, factors, original) = match c.rope.scaling {
        RopeScaling::None => (0, [0.0; 3], 0),
        RopeScaling::Linear { factor } => (1, [factor, 0.0, 0.0], 0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => (2, [factor, low_freq_factor, high_freq_factor], original_max_position_embeddings),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            truncate,
            ..
        } => (if truncate { 3 } else { 4 }, [factor, beta_fast, beta_slow], original_max_position_embeddings),
    };
    // Longer contexts than 32 bits count are as good as no limit.
    let limit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Ok([
        size(c.hidden_size, "hidden_size")?,
        size(c.intermediate_size, "intermediate_size")?,
        size(c.vocab_size, "vocab_size")?,
        size(c.num_hidden_layers, "num_hidden_layers")?,
        size(c.num_attention_heads, "num_attention_heads")?,
        size(c.num_key_value_heads, "num_key_value_heads")?,
        size(c.head_dim, "head_dim")?,
        limit(c.max_position_embeddings),
        c.rms_norm_eps.to_bits(),
        c.rope.theta.to_bits(),
        u32::from(c.rope.interleaved),
        scaling,
        factors[0].to_bits(),
        factors[1].to_bits(),
        factors[2].to_bits(),
        size(original, "original_max_position_embeddings")?,
        act,
        f32::to_bits(threshold),
        c.gate_shift.to_bits(),
        u32::from(c.norm_shift.is_some()),
        c.norm_shift.unwrap_or(0.0).to_bits(),
        c.sliding_window.map_or(0, limit),
        u32::from(!c.gated_mlp),
        // 0 in images from before it, and where it is none.
        if scaling < 3 { 0 } else { c.rope.attention_factor().to_bits() },
    ])
}

/// Reads what [`words`] gave; [`Config::validate`] remains to be called.
pub(super) fn read(bytes: &[u8]) -> Result<Config, Error> {
    let bad = |what| Error::Model(Reason::OutOfRange(what));
    let words: &[u32] = bytemuck::try_cast_slice(bytes).map_err(|_| bad("configuration bytes"))?;
    let w: &[u32; WORDS] = words.try_into().map_err(|_| bad("configuration length"))?;
    let size = |i: usize| w[i] as usize;
    let number = |i: usize| f32::from_bits(w[i]);
    let scaling = match w[11] {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor: number(12) },
        2 => RopeScaling::Llama3 {
            factor: number(12),
            low_freq_factor: number(13),
            high_freq_factor: number(14),
            original_max_position_embeddings: size(15),
        },
        yarn @ (3 | 4) => RopeScaling::Yarn {
            factor: number(12),
            beta_fast: number(13),
            beta_slow: number(14),
            original_max_position_embeddings: size(15),
            attention_factor: number(23),
            truncate: yarn == 3,
        },
        _ => return Err(bad("rope_scaling")),
    };
    let hidden_act = match w[16] {
        0 => Activation::Silu,
        1 => Activation::Gelu,
        2 => Activation::GeluPytorchTanh,
        3 => Activation::Relu,
        4 => Activation::Relu2,
        5 => Activation::FatRelu { threshold: number(17) },
        6 => Activation::DRelu,
        _ => return Err(bad("hidden_act")),
    };
    Ok(Config {
        hidden_size: size(0),
        intermediate_size: size(1),
        vocab_size: size(2),
        num_hidden_layers: size(3),
        num_attention_heads: size(4),
        num_key_value_heads: size(5),
        head_dim: size(6),
        rms_norm_eps: number(8),
        rope: Rope { theta: number(9), scaling, interleaved: w[10] != 0 },
        max_position_embeddings: size(7),
        hidden_act,
        gated_mlp: w[22] == 0,
        gate_shift: number(18),
        norm_shift: (w[19] != 0).then(|| number(20)),
        sliding_window: Some(size(21)).filter(|&w| w != 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let llama = crate::config::tests::tiny();
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 20.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096,
            attention_factor: 1.3,
            truncate,
        };
        let scaled = |scaling| Config { rope: Rope { scaling, ..llama.rope }, ..llama };
        let arcee = Config { gated_mlp: false, hidden_act: Activation::Relu2, ..scaled(yarn(true)) };
        let fat = Config { hidden_act: Activation::FatRelu { threshold: 0.01 }, ..scaled(yarn(false)) };
        for config in [llama, arcee, fat, scaled(RopeScaling::Linear { factor: 2.0 })] {
            let words = words(&config).unwrap();
            assert_eq!(read(bytemuck::cast_slice(&words)), Ok(config));
        }
        // Images from before FFNs without a gate have zeros there.
        assert_eq!(words(&llama).unwrap()[22..], [0, 0]);
    }
}
