//! The training loop: random windows, AdamW, and the checkpoint with the best held-out loss.

use anyhow::Result;
use core::time::Duration;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Instant;

use super::data::{Batch, random_windows};
use super::eval::score;
use super::model::{Llama, Pass, token_losses};
use super::optim::{AdamW, schedule};
use super::rng::Rng;

/// How to train.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Optimizer steps.
    pub(crate) steps: usize,
    /// Windows of `seq_len` tokens per step.
    pub(crate) batch_size: usize,
    /// Tokens of a usual window.
    pub(crate) seq_len: usize,
    /// Tokens of a long window.
    pub(crate) long_seq_len: usize,
    /// Every n-th step uses long windows.
    pub(crate) long_every: usize,
    /// Peak learning rate.
    pub(crate) lr: f64,
    /// Weight decay on matrices.
    pub(crate) weight_decay: f64,
    /// Largest global gradient norm.
    pub(crate) clip: f64,
    /// Dropout on the embeddings and on each branch.
    pub(crate) dropout: f64,
    /// Steps between two looks at the held-out loss.
    pub(crate) eval_every: usize,
    /// Ends the schedule early if it would take longer than this.
    pub(crate) limit: Option<Duration>,
}

/// How the training went.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Optimizer steps made.
    pub(crate) steps: usize,
    /// Tokens trained on.
    pub(crate) tokens: usize,
    /// Mean loss of the last steps, with dropout.
    pub(crate) train_loss: f64,
    /// Step of the best held-out loss.
    pub(crate) best_step: usize,
    /// Wall time.
    pub(crate) seconds: f64,
}

/// The token streams and the seeded generator.
pub(crate) struct Source {
    /// Training tokens.
    pub(crate) train: Vec<u32>,
    /// Held-out tokens of each text.
    pub(crate) heldout: Vec<Vec<u32>>,
    /// Draws windows and dropout masks.
    pub(crate) rng: Rng,
}

impl Recipe {
    /// The tokens of one step; long windows come in smaller batches of as many tokens.
    fn draw(&self, step: usize, bos: u32, source: &mut Source) -> (Batch, usize) {
        let long = self.long_every > 0 && step % self.long_every == self.long_every - 1;
        let (len, rows) = if long {
            let rows = (self.batch_size * self.seq_len / self.long_seq_len).max(1);
            (self.long_seq_len, rows)
        } else {
            (self.seq_len, self.batch_size)
        };
        (random_windows(&source.train, bos, rows, len, &mut source.rng), rows)
    }

    /// How far the schedule is, by steps or by time, whichever is further.
    fn progress(&self, step: usize, start: Instant) -> f64 {
        let by_step = step as f64 / self.steps as f64;
        let by_time =
            self.limit.map_or(0.0, |limit| start.elapsed().as_secs_f64() / limit.as_secs_f64().max(1e-9));
        by_step.max(by_time)
    }
}

/// One optimizer step; returns the mean loss of the batch.
pub(crate) fn train_step(
    model: &Llama,
    optim: &mut AdamW,
    batch: &Batch,
    rows: usize,
    lr: f64,
    pass: &mut Pass,
) -> Result<f64> {
    let logits = model.forward(&batch.inputs, rows, pass)?;
    let loss = token_losses(&logits, &batch.targets)?.mean_all()?;
    optim.step(&loss.backward()?, lr)?;
    Ok(loss.to_scalar::<f32>()? as f64)
}

/// Shows how many of the steps are made.
pub(crate) fn bar(steps: usize) -> Result<ProgressBar> {
    let bar = ProgressBar::new(steps as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} steps, {elapsed} gone, {eta} left, {msg}",
    )?);
    Ok(bar)
}

/// Trains and calls `save` each time the held-out loss is the best so far.
pub(crate) fn train(
    model: &Llama,
    recipe: &Recipe,
    source: &mut Source,
    mut save: impl FnMut() -> Result<()>,
) -> Result<Outcome> {
    let bar = bar(recipe.steps)?;
    let mut optim = AdamW::new(model, recipe.weight_decay, recipe.clip);
    let start = Instant::now();
    let (mut best, mut recent) = (f64::INFINITY, None::<f64>);
    let mut out = Outcome { steps: 0, tokens: 0, train_loss: 0.0, best_step: 0, seconds: 0.0 };
    loop {
        let progress = recipe.progress(out.steps, start);
        let (batch, rows) = recipe.draw(out.steps, model.config.bos_token_id, source);
        let dropout = Some((recipe.dropout, &mut source.rng));
        let mut pass = Pass { dropout, ..Pass::default() };
        let lr = recipe.lr * schedule(progress);
        let loss = train_step(model, &mut optim, &batch, rows, lr, &mut pass)?;
        out.train_loss = recent.map_or(loss, |mean| 0.98 * mean + 0.02 * loss);
        recent = Some(out.train_loss);
        out.steps += 1;
        out.tokens += batch.targets.len();
        bar.set_message(format!("loss {:.3}", out.train_loss));
        bar.inc(1);
        let done = recipe.progress(out.steps, start) >= 1.0;
        if done || out.steps.is_multiple_of(recipe.eval_every) {
            let heldout = score(model, &source.heldout, recipe.long_seq_len)?.loss;
            out.seconds = start.elapsed().as_secs_f64();
            bar.suspend(|| report(&out, heldout));
            if heldout < best {
                (best, out.best_step) = (heldout, out.steps);
                save()?;
            }
        }
        if done {
            bar.finish_and_clear();
            return Ok(out);
        }
    }
}

fn report(out: &Outcome, heldout: f64) {
    super::cli::output::status(format_args!(
        "step {:5}  train {:.4}  held-out {heldout:.4}  {:.0} s  {:.0} tokens/s",
        out.steps,
        out.train_loss,
        out.seconds,
        out.tokens as f64 / out.seconds
    ));
}
