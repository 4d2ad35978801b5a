//! How a model wants its tokens to be chosen: the sampling settings of `generation_config.json`, or of a GGUF file.

use crate::files::ModelFiles;
use candle_core::{Result, quantized::gguf_file::Value};
use serde::Deserialize;
use std::collections::HashMap;

const FILE: &str = "generation_config.json";

/// What a model's files say of how its tokens should be sampled; `None` where they say nothing.
///
/// ```
/// use candle_sparse_models::{files::ModelFiles, generation::GenerationConfig};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let mut files = ModelFiles::from_folder(folder)?;
/// assert_eq!(GenerationConfig::of(&files)?.temperature, None);
/// files.generation_config = Some(br#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9}"#.to_vec());
/// let generation = GenerationConfig::of(&files)?;
/// assert_eq!((generation.do_sample, generation.temperature, generation.top_k), (Some(true), Some(0.6), None));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub struct GenerationConfig {
    /// `false`: the most likely token is taken always.
    pub do_sample: Option<bool>,
    /// The logits are divided by it; 0 or more.
    pub temperature: Option<f64>,
    /// Tokens to choose from at most; 0 is all.
    pub top_k: Option<usize>,
    /// Tokens are chosen from the smallest set whose probabilities sum up to this, 0 to 1.
    pub top_p: Option<f64>,
    /// Tokens less likely than this share, 0 to 1, of the most likely one are left out.
    pub min_p: Option<f64>,
    /// Positive logits of tokens that were in the text before are divided by it, negative ones multiplied.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the settings of a model; all are `None` where its files have none.
    ///
    /// # Errors
    /// The file is no JSON object, or a setting has a value that makes no sense.
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let Some(json) = &files.generation_config else { return Ok(Self::default()) };
        let damaged = |problem: String| candle_sparse::Error::File {
            path: files.folder.clone().unwrap_or_default().join(FILE),
            problem,
        };
        let config: Self = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        Ok(config.check().map_err(damaged)?)
    }

    /// Reads the settings of a GGUF file from the keys `general.sampling.*` of its metadata.
    ///
    /// # Errors
    /// A setting has a value that makes no sense.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        let number = |key: &str| metadata.get(&format!("general.sampling.{key}")).and_then(number);
        let config = Self {
            do_sample: None,
            temperature: number("temp"),
            // -1 is no limit, as 0 is.
            top_k: number("top_k").map(|k| k.max(0.0) as usize),
            top_p: number("top_p"),
            min_p: number("min_p"),
            repetition_penalty: number("penalty_repeat").map(|p| p as f32),
        };
        let wrong =
            |problem| candle_sparse::Error::Setting { name: "general.sampling (GGUF metadata)", problem };
        Ok(config.check().map_err(wrong)?)
    }

    fn check(self) -> core::result::Result<Self, String> {
        let numbers = [
            ("temperature", self.temperature, 0.0, f64::MAX),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty.map(f64::from), f64::MIN_POSITIVE, f64::MAX),
        ];
        for (name, value, least, most) in numbers {
            if let Some(value) = value.filter(|v| !(least..=most).contains(v)) {
                return Err(format!("{name} {value} is out of range"));
            }
        }
        Ok(self)
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::F32(x) => Some(f64::from(*x)),
        Value::F64(x) => Some(*x),
        Value::U8(x) => Some(f64::from(*x)),
        Value::I8(x) => Some(f64::from(*x)),
        Value::U16(x) => Some(f64::from(*x)),
        Value::I16(x) => Some(f64::from(*x)),
        Value::U32(x) => Some(f64::from(*x)),
        Value::I32(x) => Some(f64::from(*x)),
        Value::U64(x) => Some(*x as f64),
        Value::I64(x) => Some(*x as f64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_file_says_it_by_keys() {
        let metadata = |temperature| {
            let values =
                [("temp", Value::F32(temperature)), ("top_k", Value::I32(-1)), ("min_p", Value::F64(0.25))];
            values.into_iter().map(|(key, value)| (format!("general.sampling.{key}"), value)).collect()
        };
        let config = GenerationConfig::from_gguf(&metadata(0.5)).unwrap();
        let expected = GenerationConfig {
            temperature: Some(0.5),
            top_k: Some(0),
            min_p: Some(0.25),
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
        assert_eq!(GenerationConfig::from_gguf(&HashMap::new()).unwrap(), GenerationConfig::default());
        let error = GenerationConfig::from_gguf(&metadata(-1.0)).unwrap_err();
        assert!(error.to_string().contains("temperature -1"), "{error}");
    }

    fn of(json: &str) -> Result<GenerationConfig> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu");
        let mut files = ModelFiles::from_folder(folder.as_ref())?;
        files.generation_config = Some(json.into());
        GenerationConfig::of(&files)
    }

    #[test]
    fn what_the_file_says_is_read_and_nothing_else() {
        let all = of(r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": null,
            "repetition_penalty": 1.05, "eos_token_id": [1, 2], "transformers_version": "4.51.0"}"#)
        .unwrap();
        let expected = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.9),
            min_p: None,
            repetition_penalty: Some(1.05),
        };
        assert_eq!(all, expected);
        assert_eq!(of("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn what_makes_no_sense_is_named_with_the_file() {
        for (json, needle) in [
            ("[", "generation_config.json"),
            (r#"{"temperature": -1}"#, "temperature -1"),
            (r#"{"top_p": 2}"#, "top_p 2"),
            (r#"{"min_p": -0.5}"#, "min_p -0.5"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty 0"),
            (r#"{"temperature": "hot"}"#, "hot"),
        ] {
            let error = of(json).unwrap_err();
            assert!(matches!(candle_sparse::Error::of(&error), Some(candle_sparse::Error::File { .. })));
            assert!(error.to_string().contains(needle), "{error}");
        }
    }
}
