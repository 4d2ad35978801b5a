//! How `config.json` says that rotary frequencies are stretched.

use serde::Deserialize;

/// How rotary frequencies are stretched.
///
/// ```
/// use candle_sparse_models::llama::{Llama3RopeConfig, Llama3RopeType};
///
/// let rope: Llama3RopeConfig = serde_json::from_str(r#"{"type": "linear", "factor": 2.0}"#)?;
/// assert_eq!((rope.rope_type, rope.factor), (Llama3RopeType::Linear, 2.0));
/// // What is not known is refused, for it would give wrong text.
/// assert!(serde_json::from_str::<Llama3RopeConfig>(r#"{"rope_type": "longrope", "factor": 2.0}"#).is_err());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Llama3RopeType {
    /// As Llama 3.1 does it.
    Llama3,
    /// Positions divided by `factor`.
    Linear,
    /// As `YaRN` does it, with what it needs beside the fields of [`Llama3RopeConfig`].
    Yarn(YarnRope),
    /// Not at all.
    #[default]
    Default,
}

/// What `YaRN` needs beside `factor` and `original_max_position_embeddings`; see
/// [`RopeScaling::Yarn`](candle_sparse_core::RopeScaling::Yarn).
///
/// ```
/// use candle_sparse_models::llama::{Llama3RopeConfig, Llama3RopeType};
///
/// let json = r#"{"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}"#;
/// let rope: Llama3RopeConfig = serde_json::from_str(json)?;
/// let Llama3RopeType::Yarn(yarn) = rope.rope_type else { panic!("another type") };
/// assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.truncate), (32.0, 1.0, true));
/// // 0.1 ln 20 + 1
/// assert!((yarn.attention_factor - 1.29957).abs() < 1e-5);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "fields are those of the Hugging Face file")]
pub struct YarnRope {
    pub beta_fast: f32,
    pub beta_slow: f32,
    pub attention_factor: f32,
    pub truncate: bool,
}

impl YarnRope {
    /// Of files that do not say: 32 and 1.
    pub(crate) const BETA: [f32; 2] = [32.0, 1.0];

    /// `0.1 · mscale · ln(factor) + 1`, and 1 where nothing is stretched.
    pub(crate) fn mscale(factor: f32, mscale: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0) as f32 }
    }
}

/// `rope_scaling` of `config.json`; the fields that a type does not use are 0.
///
/// ```
/// use candle_sparse_models::llama::{Llama3RopeConfig, Llama3RopeType};
///
/// let json = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
///     "original_max_position_embeddings": 8192}"#;
/// let rope: Llama3RopeConfig = serde_json::from_str(json)?;
/// assert_eq!((rope.rope_type, rope.original_max_position_embeddings), (Llama3RopeType::Llama3, 8192));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(try_from = "RawRope")]
pub struct Llama3RopeConfig {
    /// Divisor of the low frequencies (of all positions for [`Llama3RopeType::Linear`]).
    pub factor: f32,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
    pub low_freq_factor: f32,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
    pub high_freq_factor: f32,
    /// Context length of the original training.
    pub original_max_position_embeddings: usize,
    /// Which of them applies.
    pub rope_type: Llama3RopeType,
}

#[derive(Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    /// The older spelling; re-saved files carry both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    pub(super) rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
    beta_fast: Option<f32>,
    beta_slow: Option<f32>,
    attention_factor: Option<f32>,
    mscale: Option<f32>,
    mscale_all_dim: Option<f32>,
    truncate: Option<bool>,
}

impl RawRope {
    /// `context` is `max_position_embeddings`, where it is known.
    pub(super) fn scaling(&self, context: Option<usize>) -> Result<Llama3RopeConfig, String> {
        let need = |v: Option<f32>, name| v.ok_or(format!("rope scaling: {name} is missing"));
        match self.rope_type.as_deref().or(self.old_type.as_deref()).unwrap_or("default") {
            "default" => Ok(Llama3RopeConfig::default()),
            "linear" => Ok(Llama3RopeConfig {
                factor: need(self.factor, "factor")?,
                rope_type: Llama3RopeType::Linear,
                ..Default::default()
            }),
            "llama3" => Ok(Llama3RopeConfig {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position_embeddings: self
                    .original_max_position_embeddings
                    .ok_or("rope scaling: original_max_position_embeddings is missing")?,
                rope_type: Llama3RopeType::Llama3,
            }),
            "yarn" => self.yarn(context),
            other => Err(format!("unknown rope type '{other}', supported: default, linear, llama3, yarn")),
        }
    }

    /// As `_compute_yarn_parameters` of transformers reads it.
    fn yarn(&self, context: Option<usize>) -> Result<Llama3RopeConfig, String> {
        let original = self.original_max_position_embeddings.or(context);
        let original = original.ok_or("rope scaling: original_max_position_embeddings is missing")?;
        let ratio = context.map(|context| context as f32 / original as f32);
        let factor = self.factor.or(ratio).ok_or("rope scaling: factor is missing")?;
        let set = |v: Option<f32>| v.filter(|v| *v != 0.0);
        let inferred = match (set(self.mscale), set(self.mscale_all_dim)) {
            (Some(mscale), Some(all)) => YarnRope::mscale(factor, mscale) / YarnRope::mscale(factor, all),
            _ => YarnRope::mscale(factor, 1.0),
        };
        let [fast, slow] = YarnRope::BETA;
        let yarn = YarnRope {
            beta_fast: set(self.beta_fast).unwrap_or(fast),
            beta_slow: set(self.beta_slow).unwrap_or(slow),
            attention_factor: self.attention_factor.unwrap_or(inferred),
            truncate: self.truncate.unwrap_or(true),
        };
        Ok(Llama3RopeConfig {
            factor,
            original_max_position_embeddings: original,
            rope_type: Llama3RopeType::Yarn(yarn),
            ..Default::default()
        })
    }
}

impl TryFrom<RawRope> for Llama3RopeConfig {
    type Error = String;

    fn try_from(raw: RawRope) -> Result<Self, String> {
        raw.scaling(None)
    }
}
