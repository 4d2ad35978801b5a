//! The training loop: the student learns the teacher's distributions while a growing penalty shuts its gates.

use anyhow::{Result, bail};
use core::time::Duration;
use std::time::Instant;

use super::data::random_windows;
use super::model::{Llama, Pass};
use super::optim::{AdamW, schedule};
use super::rng::Rng;
use super::sparse_loss::{divergence, open_share};
use super::train::bar;

/// Largest norm of the gradient of all weights.
const CLIP: f64 = 1.0;

/// How to train.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Optimizer steps, those of earlier runs included.
    pub(crate) steps: usize,
    /// Windows per step.
    pub(crate) batch: usize,
    /// Tokens per window.
    pub(crate) context: usize,
    /// Peak learning rate.
    pub(crate) learning_rate: f64,
    /// What an open gate costs from the middle of the steps on, in nats.
    pub(crate) penalty: f64,
    /// Seed of the windows.
    pub(crate) seed: u64,
    /// Ends the schedule early if it would take longer than this.
    pub(crate) limit: Option<Duration>,
    /// Time from one checkpoint to the next.
    pub(crate) save_every: Duration,
}

impl Recipe {
    /// How far the schedule is, by steps or by time, whichever is further.
    fn progress(&self, step: usize, start: Instant) -> f64 {
        let by_step = step as f64 / self.steps as f64;
        let by_time = self.limit.map_or(0.0, |limit| start.elapsed().as_secs_f64() / limit.as_secs_f64());
        by_step.max(by_time)
    }
}

/// What the last step had.
#[derive(Clone, Copy, Debug)]
struct Losses {
    /// From the teacher, in nats per token.
    kld: f32,
    /// Share of gates that are open, as the penalty counts them.
    open: f32,
}

/// Trains from `step` on and calls `save` every so often; returns the number of the last step.
pub(crate) fn distill(
    teacher: &Llama,
    student: &Llama,
    tokens: &[u32],
    recipe: &Recipe,
    mut step: usize,
    save: impl Fn(usize) -> Result<()>,
) -> Result<usize> {
    let bar = bar(recipe.steps)?;
    bar.set_position(step as u64);
    let mut optim = AdamW::new(student, 0.0, CLIP);
    let (start, mut saved) = (Instant::now(), Instant::now());
    while recipe.progress(step, start) < 1.0 {
        let losses =
            train_step(teacher, student, &mut optim, tokens, recipe, step, recipe.progress(step, start))?;
        step += 1;
        if !(losses.kld + losses.open).is_finite() {
            bail!("the loss of step {step} is no number: try a lower --learning-rate");
        }
        bar.set_message(format!("kld {:.4}, {:.1} % open", losses.kld, 100.0 * losses.open));
        bar.inc(1);
        if step.is_multiple_of(50) {
            let seconds = start.elapsed().as_secs_f64();
            bar.suspend(|| report(step, losses, seconds));
        }
        if saved.elapsed() >= recipe.save_every {
            save(step)?;
            saved = Instant::now();
        }
    }
    bar.finish_and_clear();
    save(step)?;
    Ok(step)
}

fn train_step(
    teacher: &Llama,
    student: &Llama,
    optim: &mut AdamW,
    tokens: &[u32],
    recipe: &Recipe,
    step: usize,
    progress: f64,
) -> Result<Losses> {
    // A generator per step: a resumed run draws the windows it would have drawn.
    let mut rng = Rng::new(Rng::new(recipe.seed).bits() ^ step as u64);
    let bos = student.config.bos_token_id;
    let ids = random_windows(tokens, bos, recipe.batch, recipe.context, &mut rng).inputs;
    let want = teacher.forward(&ids, recipe.batch, &mut Pass::default())?;
    let mut gates = vec![];
    let mut pass = Pass { gates: Some(&mut gates), ..Pass::default() };
    let kld = divergence(&student.forward(&ids, recipe.batch, &mut pass)?, &want)?.mean_all()?;
    let open = open_share(&gates)?;
    let penalty = recipe.penalty * (2.0 * progress).min(1.0);
    let loss = (&kld + (&open * penalty)?)?;
    optim.step(&loss.backward()?, recipe.learning_rate * schedule(progress))?;
    Ok(Losses { kld: kld.to_scalar()?, open: open.to_scalar()? })
}

fn report(step: usize, losses: Losses, seconds: f64) {
    let Losses { kld, open } = losses;
    super::cli::output::status(format_args!(
        "step {step:5}  kld {kld:.4}  open {:.1} %  {seconds:.0} s",
        100.0 * open
    ));
}
