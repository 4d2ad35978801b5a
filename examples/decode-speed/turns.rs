//! Steps of several sequences, and of several tokens of one, in turn with steps of one token.

use super::{
    Cli,
    cli::output,
    engines::{Ours, decode_one},
    report::median,
};
use anyhow::{Result, bail};
use candle_sparse::{
    Format, KvCache,
    decoder::{BatchScratch, Decoder, Scratch, Turn},
};
use serde_json::{Value, json};
use std::{io::Write, time::Instant};

/// A step of so many sequences with so many tokens each.
#[derive(Clone, Copy)]
struct Shape {
    sequences: usize,
    tokens: usize,
}

/// What a step took.
struct Timed {
    shape: Shape,
    step_s: f64,
    /// The same in steps of one token, each pair measured one after the other.
    steps: f64,
    /// Tokens that a draft and its step bring, and how many times as fast that is as steps of one: simulated.
    drafted: Option<[f64; 2]>,
}

impl Timed {
    fn tokens(&self) -> usize {
        self.shape.sequences * self.shape.tokens
    }

    fn json(&self) -> Value {
        json!({
            "sequences": self.shape.sequences,
            "tokens_each": self.shape.tokens,
            "step_s": self.step_s,
            "steps_of_one": self.steps,
            "tokens_per_s": self.tokens() as f64 / self.step_s,
            "simulated_tokens_per_draft": self.drafted.map(|d| d[0]),
            "simulated_speedup": self.drafted.map(|d| d[1]),
        })
    }
}

/// Times the steps that `--batch` and `--turn` ask for.
pub(crate) fn measure(cli: &Cli, ours: &Ours) -> Result<()> {
    let of_sequences = cli.batch.iter().map(|&sequences| Shape { sequences, tokens: 1 });
    let of_tokens = cli.turn.iter().map(|&tokens| Shape { sequences: 1, tokens });
    let shapes: Vec<_> = of_sequences.chain(of_tokens).collect();
    if let Some(bad) = shapes.iter().find(|s| s.sequences == 0 || !(1..=32).contains(&s.tokens)) {
        bail!("--batch {} --turn {}: at least one sequence, 1 to 32 tokens", bad.sequences, bad.tokens);
    }
    let copy = cli.accept.map(|_| ours.decoder().in_format(Format::Q4_0)).transpose()?;
    let timed = |shape| time(cli, ours, shape, copy.as_ref());
    let timed = shapes.into_iter().map(timed).collect::<Result<Vec<_>>>()?;
    if cli.output.json {
        return output::line(json!({
            "shape": cli.model.as_ref().map_or(cli.shape.name().into(), |m| m.to_string_lossy()),
            "depth": cli.depth,
            "turns": timed.iter().map(Timed::json).collect::<Vec<_>>(),
        }));
    }
    let mut out = output::stdout();
    for t in &timed {
        writeln!(
            out,
            "{:>3} sequences of {:>2} tokens: {:7.2} ms, {:8.2} tokens/s together, {:.2} steps of one{}",
            t.shape.sequences,
            t.shape.tokens,
            1e3 * t.step_s,
            t.tokens() as f64 / t.step_s,
            t.steps,
            t.drafted.map_or(String::new(), |[tokens, ratio]| {
                format!("; drafted: {tokens:.2} tokens, {ratio:.2} x (acceptance simulated)")
            })
        )?;
    }
    Ok(())
}

fn time(cli: &Cli, ours: &Ours, shape: Shape, copy: Option<&Decoder>) -> Result<Timed> {
    let vocab = ours.vocab_size();
    let all = (0..=shape.sequences).map(|_| Ok((ours.filled(cli.depth)?, Scratch::default())));
    let mut all = all.collect::<Result<Vec<_>>>()?;
    let (mut scratch, mut times, mut ratios) = (BatchScratch::default(), Vec::new(), Vec::new());
    let mut logits = vec![0.0; shape.sequences * shape.tokens * vocab];
    let drafts = if shape.sequences == 1 { shape.tokens - 1 } else { 0 };
    let (mut copy_scratch, mut rounds) = (Scratch::default(), Vec::new());
    for step in 0..=cli.steps {
        let (lone, together) = all.split_at_mut(1);
        let start = Instant::now();
        run(ours, lone, Shape { sequences: 1, tokens: 1 }, step, &mut scratch, &mut logits[..vocab])?;
        let one = start.elapsed().as_secs_f64();
        let start = Instant::now();
        run(ours, together, shape, step, &mut scratch, &mut logits)?;
        let many = start.elapsed().as_secs_f64();
        // The copy reads the keys and values of the model, as `Speculation::copy` does.
        together[0].0.truncate(cli.depth);
        let (start, mut cache) = (Instant::now(), together[0].0.clone());
        for i in 0..copy.map_or(0, |_| drafts) {
            let decoder = copy.unwrap_or(ours.decoder());
            decode_one(decoder, step + i, &mut cache, &mut copy_scratch, &mut logits[..vocab])?;
        }
        let draft = start.elapsed().as_secs_f64();
        // The first step makes room.
        if step > 0 {
            times.push(many);
            ratios.push(many / one);
            rounds.push((many + draft) / one);
        }
        all.iter_mut().for_each(|(cache, _)| cache.truncate(cli.depth));
    }
    let drafted = cli.accept.filter(|_| drafts > 0).map(|accept| {
        let tokens = 1.0 + (1..=drafts as i32).map(|i| accept.powi(i)).sum::<f64>();
        [tokens, tokens / median(&mut rounds)]
    });
    Ok(Timed { shape, step_s: median(&mut times), steps: median(&mut ratios), drafted })
}

fn run(
    ours: &Ours,
    all: &mut [(KvCache, Scratch)],
    shape: Shape,
    step: usize,
    scratch: &mut BatchScratch,
    logits: &mut [f32],
) -> Result<()> {
    if shape.sequences * shape.tokens == 1 {
        // As `forward` decodes a lone token.
        let (cache, scratch) = &mut all[0];
        return decode_one(ours.decoder(), step, cache, scratch, logits);
    }
    let id = |i: usize| ((i * 7919 + step * 31) % ours.vocab_size()) as u32;
    let ids: Vec<_> = (0..shape.sequences * shape.tokens).map(id).collect();
    let mut turns: Vec<_> = all
        .iter_mut()
        .zip(ids.chunks(shape.tokens))
        .map(|((cache, scratch), ids)| Turn { ids, cache, scratch })
        .collect();
    Ok(ours.decoder().decode_turns(&mut turns, scratch, logits)?)
}
