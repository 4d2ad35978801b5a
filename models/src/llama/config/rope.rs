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
/// assert!(serde_json::from_str::<Llama3RopeConfig>(r#"{"rope_type": "yarn", "factor": 2.0}"#).is_err());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Llama3RopeType {
    /// As Llama 3.1 does it.
    Llama3,
    /// Positions divided by `factor`.
    Linear,
    /// Not at all.
    #[default]
    Default,
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
}

impl RawRope {
    pub(super) fn scaling(&self) -> Result<Llama3RopeConfig, String> {
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
            other => Err(format!("unknown rope type '{other}', supported: default, linear, llama3")),
        }
    }
}

impl TryFrom<RawRope> for Llama3RopeConfig {
    type Error = String;

    fn try_from(raw: RawRope) -> Result<Self, String> {
        raw.scaling()
    }
}
