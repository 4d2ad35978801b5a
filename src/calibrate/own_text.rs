//! Text that a model writes itself: the kind it knows best, wherever its training text is.

use crate::{
    KvCache, KvConfig, KvDType,
    decoder::{Decoder, Input, Logits, Scratch, Step},
};
use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::log_softmax;

/// Sequences that are written side by side: each step reads the weights once for all.
const SEQUENCES: usize = 8;
/// Tokens of a sequence, where the model's context is longer.
const LONGEST: usize = 256;

/// What a model has written, with the perplexity that it gave itself: see [`own_text`].
///
/// ```
/// use candle_sparse::calibrate::own_text;
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let text = own_text(decoder, 64, &[0], 1)?;
/// assert!(text.windows.iter().all(|window| window[0] == 0));
/// assert!(text.perplexity() > 1.0 && text.perplexity() < decoder.config().vocab_size as f64);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OwnText {
    /// Sequences of tokens, each with its beginning.
    pub windows: Vec<Vec<u32>>,
    /// Sum of the negative log likelihoods of the tokens written, and how many.
    nll: (f64, usize),
}

impl OwnText {
    /// Perplexity of what was written.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        (self.nll.0 / self.nll.1.max(1) as f64).exp()
    }
}

/// Lets a dense `model` write about `tokens` tokens, each drawn with the probability that the model gives it (temperature
/// 1), in sequences that begin with `start`; the same `seed` writes the same text.
///
/// Cost: that of decoding, for eight sequences at a time.
///
/// ```
/// use candle_sparse::calibrate::own_text;
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let text = own_text(decoder, 64, &[0], 1)?;
/// // Eight sequences, and the same again from the same seed.
/// assert_eq!((text.windows.len(), text.windows[0].len()), (8, 9));
/// assert_eq!(own_text(decoder, 64, &[0], 1)?.windows, text.windows);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// An empty `start`, or a model whose logits are not numbers.
pub fn own_text(model: &Decoder, tokens: usize, start: &[u32], seed: u64) -> Result<OwnText> {
    if start.is_empty() {
        candle_core::bail!("own text: give at least one token to begin with");
    }
    let limit = model.config().max_position_embeddings;
    let length = LONGEST.min(limit).min(start.len() + tokens.div_ceil(SEQUENCES)).max(start.len());
    let mut text = OwnText { windows: Vec::new(), nll: (0.0, 0) };
    let mut random = Random(seed);
    while text.nll.1 < tokens && length > start.len() {
        write(model, length, start, &mut random, &mut text)?;
    }
    Ok(text)
}

/// One batch of sequences.
fn write(
    model: &Decoder,
    length: usize,
    start: &[u32],
    random: &mut Random,
    text: &mut OwnText,
) -> Result<()> {
    let mut sequences = vec![start.to_vec(); SEQUENCES];
    let vocab = model.config().vocab_size;
    let mut cache = KvCache::new(model.config(), KvConfig::exact(KvDType::F16));
    let (mut scratch, mut logits) = (Scratch::default(), vec![0.0; SEQUENCES * vocab]);
    let mut x = start.repeat(SEQUENCES);
    while sequences[0].len() < length {
        let seq_len = x.len() / SEQUENCES;
        let step = Step { batch: SEQUENCES, seq_len, index_pos: sequences[0].len() - seq_len };
        model.forward(Input::Ids(&x), step, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
        let log_p = Tensor::from_slice(&logits, (SEQUENCES, vocab), &Device::Cpu)?;
        let log_p: Vec<Vec<f32>> = log_softmax(&log_p, D::Minus1)?.to_vec2()?;
        for (sequence, log_p) in sequences.iter_mut().zip(&log_p) {
            let next = random.draw(log_p)?;
            text.nll.0 -= f64::from(log_p[next]);
            text.nll.1 += 1;
            sequence.push(next as u32);
        }
        x = sequences.iter().map(|s| s[s.len() - 1]).collect();
    }
    text.windows.append(&mut sequences);
    Ok(())
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    /// Within 0 and 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// An index, each with its probability.
    fn draw(&mut self, log_p: &[f32]) -> Result<usize> {
        let mut left = self.next();
        if log_p.iter().any(|p| p.is_nan()) {
            candle_core::bail!("own text: the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        for (i, p) in log_p.iter().enumerate() {
            left -= f64::from(p.exp());
            if left < 0.0 {
                return Ok(i);
            }
        }
        // Rounding has left a trace of probability over: it belongs to the most likely.
        Ok((0..log_p.len()).max_by(|&a, &b| log_p[a].total_cmp(&log_p[b])).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let p = [0.5_f32, 0.3, 0.15, 0.05];
        let log_p = p.map(f32::ln);
        let mut random = Random(7);
        let mut counts = [0_u32; 4];
        for _ in 0..20_000 {
            counts[random.draw(&log_p).unwrap()] += 1;
        }
        for (count, p) in counts.iter().zip(p) {
            assert!((*count as f32 / 20_000.0 - p).abs() < 0.01, "{counts:?}");
        }
        assert!(random.draw(&[f32::NAN, 0.0]).is_err());
    }
}
