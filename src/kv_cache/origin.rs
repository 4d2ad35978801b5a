//! Which model keys and values are of.

use super::KvCache;
use crate::{Error, profile};
use candle_core::Result;
use std::sync::Arc;

/// How far frequencies of one model may be apart that were computed in two ways.
const SAME_FREQUENCY: f32 = 1e-4;

/// What makes keys and values those of one model, beyond their shape: a cache of another model is refused.
///
/// ```
/// use candle_sparse::kv_cache::Origin;
///
/// let hub = Origin { interleaved: false, inv_freq: [1.0, 0.01].into(), fingerprint: [].into() };
/// let gguf = Origin { interleaved: true, ..hub.clone() };
/// assert_eq!(hub.difference(&hub.clone()), None);
/// assert!(hub.difference(&gguf).expect("another order of channels").contains("GGUF"));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// RoPE turns neighbours (GGUF) instead of the two halves of a head (Hugging Face).
    pub interleaved: bool,
    /// Angle per position of each pair of a head, scaling included; behind them the factor of cosine and sine, where it is not 1.
    pub inv_freq: Arc<[f32]>,
    /// Of the weights, see [`profile::Fingerprint`].
    pub fingerprint: Arc<[f32]>,
}

impl Origin {
    /// How another model differs; `None`: by nothing that was compared.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.interleaved != other.interleaved {
            let order = |o: &Self| if o.interleaved { "a GGUF file" } else { "a Hugging Face checkpoint" };
            return Some(format!(
                "its keys are ordered as those of {}, the model's as those of {}",
                order(self),
                order(other)
            ));
        }
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= SAME_FREQUENCY * a.abs().max(b.abs());
        if self.inv_freq.len() != other.inv_freq.len()
            || !self.inv_freq.iter().zip(&*other.inv_freq).all(same)
        {
            return Some("RoPE has another base or scaling".into());
        }
        if self.fingerprint.len() != other.fingerprint.len() {
            return Some("the fingerprints have different lengths".into());
        }
        profile::difference(&self.fingerprint, &other.fingerprint)
    }
}

impl KvCache {
    /// The model whose keys and values these are, as far as it is known: one that a caller fills by itself has none.
    #[must_use]
    pub fn origin(&self) -> Option<&Arc<Origin>> {
        self.origin.as_ref()
    }

    /// What is written from now on is of this model.
    pub fn set_origin(&mut self, model: &Arc<Origin>) {
        if !self.origin.as_ref().is_some_and(|own| Arc::ptr_eq(own, model)) {
            self.origin = Some(Arc::clone(model));
        }
    }

    /// Whether this model can continue what the cache holds.
    ///
    /// # Errors
    /// [`Error::WrongModel`]: it is another model's.
    pub(crate) fn check_origin(&self, model: &Arc<Origin>) -> Result<()> {
        let Some(own) = self.origin.as_ref().filter(|own| !self.is_empty() && !Arc::ptr_eq(own, model))
        else {
            return Ok(());
        };
        let Some(problem) = own.difference(model) else { return Ok(()) };
        let problem = format!("{problem}: begin at position 0, or take the model that it was made with");
        Err(Error::WrongModel { what: "the kv cache", problem }.into())
    }
}
