//! How tokenizers of pieces treat blanks: what stands around the merges, as JSON has it and as we make it.

use super::wrong;
use candle_core::Result;
use serde::{Deserialize, Serialize};
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
    decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as DecoderSequence, strip::Strip,
    },
    normalizers::{Prepend, Replace, Sequence},
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
};

const BLANK: char = '\u{2581}';

/// Where a blank is put before the pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Prefix {
    /// Before each part of a text, also behind a special token: `tokenizer.ggml.add_space_prefix`.
    Parts,
    /// Nowhere.
    None,
    /// As `Parts`, unless a blank is there.
    Always,
    /// As `Always`, but only at the beginning of a text.
    First,
}

impl Prefix {
    const ALL: [Self; 4] = [Self::Parts, Self::None, Self::Always, Self::First];

    /// Makes a tokenizer treat blanks so.
    pub(super) fn apply(self, tokenizer: &mut Tokenizer) -> Result<()> {
        tokenizer.with_normalizer(self.normalizer()?).map_err(wrong)?;
        tokenizer.with_pre_tokenizer(self.pre_tokenizer());
        tokenizer.with_decoder(Some(self.decoder()?));
        Ok(())
    }

    fn normalizer(self) -> Result<Option<NormalizerWrapper>> {
        let replace = || -> Result<NormalizerWrapper> {
            Ok(Replace::new(" ", BLANK.to_string()).map_err(wrong)?.into())
        };
        Ok(match self {
            Self::Parts => {
                Some(Sequence::new(vec![Prepend::new(BLANK.to_string()).into(), replace()?]).into())
            }
            Self::None => Some(replace()?),
            Self::Always | Self::First => None,
        })
    }

    fn pre_tokenizer(self) -> Option<PreTokenizerWrapper> {
        let scheme = match self {
            Self::Parts | Self::None => return None,
            Self::Always => PrependScheme::Always,
            Self::First => PrependScheme::First,
        };
        Some(Metaspace::new(BLANK, scheme, false).into())
    }

    fn decoder(self) -> Result<DecoderWrapper> {
        let replace = Replace::new(BLANK.to_string(), " ").map_err(wrong)?.into();
        let mut steps: Vec<DecoderWrapper> = vec![replace, ByteFallback::new().into(), Fuse::new().into()];
        if self != Self::None {
            steps.push(Strip::new(' ', 1, 0).into());
        }
        Ok(DecoderSequence::new(steps).into())
    }

    /// How a tokenizer treats blanks; `None`: in some other way.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let json = |value: serde_json::Result<serde_json::Value>| value.map(flat).map_err(wrong);
        let found = [
            json(serde_json::to_value(tokenizer.get_normalizer()))?,
            json(serde_json::to_value(tokenizer.get_pre_tokenizer()))?,
            json(serde_json::to_value(tokenizer.get_decoder()))?,
        ];
        for prefix in Self::ALL {
            let known = [
                json(serde_json::to_value(prefix.normalizer()?))?,
                json(serde_json::to_value(prefix.pre_tokenizer()))?,
                json(serde_json::to_value(Some(prefix.decoder()?)))?,
            ];
            if found == known {
                return Ok(Some(prefix));
            }
        }
        Ok(None)
    }
}

/// The steps of a part of a `tokenizer.json`, whether they stand alone or in sequences.
pub(super) fn flat(part: serde_json::Value) -> Vec<serde_json::Value> {
    for list in ["normalizers", "pretokenizers", "decoders"] {
        if let Some(steps) = part[list].as_array() {
            return steps.iter().cloned().flat_map(flat).collect();
        }
    }
    if part.is_null() { Vec::new() } else { vec![part] }
}
