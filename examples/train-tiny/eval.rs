//! Held-out loss, loss by position and samples.

use anyhow::Result;
use candle_core::{D, DType};

use super::data::{Batch, window};
use super::model::{Llama, Pass, token_losses};
use super::rng::Rng;

/// What the model scores on the held-out texts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Score {
    /// Mean loss in nats per token.
    pub(crate) loss: f64,
    /// How many tokens were predicted.
    pub(crate) tokens: usize,
    /// Share of feed-forward gates above zero, per layer.
    pub(crate) active: Vec<f64>,
}

fn losses(model: &Llama, batch: &Batch, pass: &mut Pass) -> Result<Vec<f32>> {
    let logits = model.forward(&batch.inputs, 1, pass)?.detach();
    Ok(token_losses(&logits, &batch.targets)?.to_vec1::<f32>()?)
}

/// Scores every token once, in windows of `context` tokens that start with `<s>`.
pub(crate) fn score(model: &Llama, texts: &[Vec<u32>], context: usize) -> Result<Score> {
    let mut active = vec![0f64; model.config.num_hidden_layers];
    let (mut sum, mut tokens, mut windows) = (0f64, 0, 0);
    for chunk in texts.iter().flat_map(|text| text.chunks(context)) {
        let mut pass = Pass { active: Some(&mut active), ..Pass::default() };
        let batch = window(chunk, model.config.bos_token_id);
        let losses = losses(model, &batch, &mut pass)?;
        sum += losses.iter().map(|x| *x as f64).sum::<f64>();
        tokens += losses.len();
        windows += 1;
    }
    active.iter_mut().for_each(|share| *share /= windows.max(1) as f64);
    Ok(Score { loss: sum / tokens.max(1) as f64, tokens, active })
}

/// Mean loss of tokens that stand at `from..to` of a window.
#[derive(Clone, Debug)]
pub(crate) struct RangeLoss {
    /// First position.
    pub(crate) from: usize,
    /// Position after the last.
    pub(crate) to: usize,
    /// Nats per token.
    pub(crate) loss: f64,
}

/// The loss by position, over the same tokens for each range; empty if the texts are too short.
pub(crate) fn by_position(model: &Llama, texts: &[Vec<u32>], context: usize) -> Result<Vec<RangeLoss>> {
    let stride = context / 8;
    let bounds = [0, stride, 2 * stride, 4 * stride, context];
    let mut sums = [(0f64, 0usize); 4];
    for text in texts.iter().filter(|text| stride > 0 && text.len() >= context + stride) {
        let last = (text.len() - context) / stride * stride;
        // Each range sees exactly the tokens of this stretch, so texts of unlike difficulty
        // cannot pass for an effect of the position.
        let common = context - stride..last + stride;
        for start in (0..=last).step_by(stride) {
            let batch = window(&text[start..start + context], model.config.bos_token_id);
            let losses = losses(model, &batch, &mut Pass::default())?;
            for (at, loss) in losses.iter().enumerate() {
                let range = bounds[1..].iter().take_while(|bound| at >= **bound).count();
                if common.contains(&(start + at)) {
                    sums[range].0 += *loss as f64;
                    sums[range].1 += 1;
                }
            }
        }
    }
    let ranges = bounds.windows(2).zip(sums).filter(|(_, (_, count))| *count > 0);
    Ok(ranges.map(|(b, (sum, count))| RangeLoss { from: b[0], to: b[1], loss: sum / count as f64 }).collect())
}

/// Continues `prompt` (without `<s>`) by up to `count` tokens.
pub(crate) fn sample(
    model: &Llama,
    prompt: &[u32],
    count: usize,
    temperature: f64,
    rng: &mut Rng,
) -> Result<Vec<u32>> {
    let mut ids = vec![model.config.bos_token_id];
    ids.extend_from_slice(prompt);
    for _ in 0..count {
        let from = ids.len().saturating_sub(model.config.max_position_embeddings);
        let logits = model.forward(&ids[from..], 1, &mut Pass::default())?.detach();
        let last = logits.get_on_dim(0, logits.dim(0)? - 1)?.to_dtype(DType::F64)?;
        let max = last.max(D::Minus1)?;
        let weights = (last.broadcast_sub(&max)? / temperature)?.exp()?.to_vec1::<f64>()?;
        let next = draw(&weights, rng);
        if next == model.config.eos_token_id {
            break;
        }
        ids.push(next);
    }
    Ok(ids[1..].to_vec())
}

fn draw(weights: &[f64], rng: &mut Rng) -> u32 {
    let mut left = rng.uniform() * weights.iter().sum::<f64>();
    for (id, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return id as u32;
        }
    }
    weights.len() as u32 - 1
}
