//! One text or answer: tokens are chosen, fed and shown until something ends it.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::{cli::output, interrupt::Interrupt, sampling::SamplingArgs};
use anyhow::{Error, Result, bail};
use candle_core::{Device, Tensor};
use candle_sparse::DeadlineExceeded;
use candle_sparse_models::{
    causal_lm::CausalLm,
    sampling::Sampler,
    tokenizer::{StopTexts, TextStream},
};
use std::time::Instant;
use tokenizers::Tokenizer;

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The model said so.
    Token,
    /// A text of `--stop` was written.
    Stop,
    /// `--sample-len` tokens were written.
    Length,
    Context,
    /// The seconds of `--time-limit` were over.
    Time,
    Interrupted,
    Failed,
}

impl End {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Time => "time",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }

    /// What a reader of the text should know.
    pub(crate) fn remark(self, context: usize) -> String {
        match self {
            Self::Token | Self::Stop => String::new(),
            Self::Length => ", cut off by --sample-len".to_string(),
            Self::Context => format!(", cut off: the context of {context} tokens is full"),
            Self::Time => ", cut off by --time-limit".to_string(),
            Self::Interrupted => ", cut off by Ctrl-C".to_string(),
            Self::Failed => ", cut off by an error".to_string(),
        }
    }
}

/// A model and the tokens of one text or conversation.
pub(crate) struct Past<M> {
    pub(crate) model: M,
    /// What was read and written.
    pub(crate) ids: Vec<u32>,
    /// How many of them the model has seen: the last one that is written waits until it is needed.
    fed: usize,
    /// Tokens that the model holds from another run, until the first text says what of them it shares.
    before: Vec<u32>,
}

impl<M: CausalLm> Past<M> {
    pub(crate) fn new(model: M) -> Self {
        Self { model, ids: Vec::new(), fed: 0, before: Vec::new() }
    }

    /// Takes back what came after the first `len` tokens.
    pub(crate) fn cut(&mut self, len: usize) -> Result<()> {
        self.before.clear();
        self.ids.truncate(len);
        self.fed = self.fed.min(len);
        // What a sliding window has dropped does not come back: then all is read again.
        if self.model.cached_len() > self.fed && self.model.truncate(self.fed).is_err() {
            self.model.clear()?;
            self.fed = 0;
        }
        Ok(())
    }

    /// The model holds these tokens already, from another run.
    pub(crate) fn resume(&mut self, ids: Vec<u32>) {
        self.before = ids;
    }

    /// Continues with other tokens from where they differ; how many are held already. The last one is always read: its logits
    /// are wanted.
    pub(crate) fn replace(&mut self, ids: Vec<u32>) -> Result<usize> {
        if !self.before.is_empty() {
            (self.fed, self.ids) = (self.before.len(), std::mem::take(&mut self.before));
        }
        let same = self.ids.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        self.cut(same.min(ids.len().saturating_sub(1)))?;
        self.ids = ids;
        Ok(self.fed)
    }

    /// The tokens that the model holds.
    pub(crate) fn held(&self) -> &[u32] {
        if self.before.is_empty() { &self.ids[..self.fed] } else { &self.before }
    }

    /// Feeds what the model has not seen yet, if it can until then; the logits of the last position.
    fn feed(&mut self, until: Option<Instant>) -> Result<Vec<f32>> {
        let left = until.map(|end| end.saturating_duration_since(Instant::now()));
        if !self.model.set_time_limit(left) {
            bail!("--time-limit: this model keeps none");
        }
        let x = Tensor::new(&self.ids[self.fed..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.forward(&x, self.fed)?.squeeze(0)?;
        self.fed = self.ids.len();
        Ok(logits.to_vec1()?)
    }
}

/// What was written, also where it did not end well.
pub(crate) struct Written {
    pub(crate) text: String,
    pub(crate) tokens: usize,
    pub(crate) end: End,
    /// Of the last position that was read, before anything was written; empty if that failed.
    pub(crate) first_logits: Vec<f32>,
    pub(crate) prefill_s: f64,
    pub(crate) decode_s: f64,
    pub(crate) error: Option<Error>,
}

impl Written {
    /// Whether all went well, once it was reported.
    pub(crate) fn result(self) -> Result<()> {
        match self.error {
            Some(error) => Err(error),
            None if self.end == End::Interrupted => Err(output::Ended(output::INTERRUPTED).into()),
            None => Ok(()),
        }
    }

    /// The first token comes out of the prefill.
    pub(crate) fn tokens_per_s(&self) -> f64 {
        self.tokens.saturating_sub(1) as f64 / self.decode_s
    }
}

/// What writing needs.
pub(crate) struct Writer<'a> {
    pub(crate) args: &'a SamplingArgs,
    pub(crate) sampler: Sampler,
    pub(crate) tokenizer: &'a Tokenizer,
    /// Tokens that end a text.
    pub(crate) is_end: &'a dyn Fn(u32) -> bool,
    /// Positions that the model has.
    pub(crate) context: usize,
    /// The text goes to standard error, since standard output is for JSON.
    pub(crate) aside: bool,
    pub(crate) interrupt: Interrupt,
}

impl Writer<'_> {
    /// Shows a piece of text.
    pub(crate) fn show(&self, text: &str) -> Result<()> {
        if self.aside {
            output::aside(text);
            return Ok(());
        }
        output::print(text)
    }

    /// Continues `past` by at most `limit` tokens; with `echo` its text is shown first.
    pub(crate) fn write<M: CausalLm>(&mut self, past: &mut Past<M>, limit: usize, echo: bool) -> Written {
        let (mut written, from) = (Written::new(), past.ids.len());
        let until = self.args.until();
        self.interrupt.listen();
        let result = self.steps(past, limit, until, echo, &mut written);
        self.interrupt.let_end();
        // What was guessed is not part of it.
        let result = result.and_then(|end| Ok((past.model.truncate(past.model.cached_len())?, end).1));
        written.tokens = past.ids.len() - from;
        match result {
            Ok(end) => written.end = end,
            Err(error) => written.error = Some(error),
        }
        written
    }

    fn steps<M: CausalLm>(
        &mut self,
        past: &mut Past<M>,
        limit: usize,
        until: Option<Instant>,
        echo: bool,
        written: &mut Written,
    ) -> Result<End> {
        let from = past.ids.len();
        let mut stream = TextStream::new(self.tokenizer);
        for &id in past.ids.iter().filter(|_| echo) {
            written.text.push_str(&stream.push(id));
        }
        self.show(&written.text)?;
        let (echoed, start) = (written.text.len(), Instant::now());
        let mut logits = past.feed(until).map_err(unread)?;
        written.prefill_s = start.elapsed().as_secs_f64();
        written.first_logits.clone_from(&logits);
        let start = Instant::now();
        let mut held = StopTexts::new(self.args.stop.iter().cloned());
        // The length of the text after each token.
        let mut lengths = Vec::new();
        let end = loop {
            written.decode_s = start.elapsed().as_secs_f64();
            if let Some(end) = self.end_before(past.ids.len(), limit - lengths.len(), until) {
                break end;
            }
            if past.fed < past.ids.len() {
                past.model.expect(&self.sampler, &past.ids[from..], limit - lengths.len() - 1);
                logits = match past.feed(until) {
                    Err(error) if is_late(&error) => break End::Time,
                    fed => fed?,
                };
            }
            let next = self.sampler.sample(&logits, &past.ids[from..])?;
            if (self.is_end)(next) {
                break End::Token;
            }
            past.ids.push(next);
            let shown = held.push(&stream.push(next));
            written.text.push_str(&shown);
            self.show(&shown)?;
            if held.stopped() {
                self.forget_stop(past, from, &lengths, &written.text[echoed..])?;
                break End::Stop;
            }
            lengths.push(held.len());
        };
        let mut rest = held.push(&stream.finish());
        rest.push_str(&held.rest());
        written.text.push_str(&rest);
        self.show(&rest)?;
        Ok(end)
    }

    /// What ends a text of so many tokens before another one is chosen, `room` being what may still be written.
    fn end_before(&self, tokens: usize, room: usize, until: Option<Instant>) -> Option<End> {
        let ends = [
            (until.is_some_and(|end| Instant::now() >= end), End::Time),
            (self.interrupt.came(), End::Interrupted),
            (room == 0, End::Length),
            (tokens >= self.context, End::Context),
        ];
        ends.into_iter().find(|(ends, _)| *ends).map(|(_, end)| end)
    }

    /// Takes the tokens of a stop text back: what the model is to remember is `text`, which ends before it. `lengths` are those
    /// of the text after each token that was written.
    fn forget_stop<M: CausalLm>(
        &self,
        past: &mut Past<M>,
        from: usize,
        lengths: &[usize],
        text: &str,
    ) -> Result<()> {
        let kept = lengths.iter().take_while(|length| **length <= text.len()).count();
        let at = lengths[..kept].last().copied().unwrap_or(0);
        past.cut(from + kept)?;
        // A token may have held the end of the text and the beginning of the stop.
        let rest = self.tokenizer.encode(&text[at..], false).map_err(Error::msg)?;
        past.ids.extend(rest.get_ids());
        Ok(())
    }

    /// Ends the line that was written, if anybody reads it. Where the prompt could not even be read there is nothing to report:
    /// that is the error.
    pub(crate) fn end_line(&self, written: &mut Written) -> Result<()> {
        let ended = written.error.as_ref().and_then(output::ended);
        if ended.is_none() && !(written.error.is_some() && written.text.is_empty()) {
            self.show("\n")?;
        }
        let nothing = written.first_logits.is_empty();
        written.error.take_if(|_| nothing || ended.is_some()).map_or(Ok(()), Err)
    }

    /// Refuses what has no room.
    pub(crate) fn check_room(&self, tokens: usize) -> Result<()> {
        if tokens > self.context {
            bail!("{tokens} tokens are past the model's context of {} positions", self.context);
        }
        Ok(())
    }
}

/// Whether a step ended because its time was over.
fn is_late(error: &Error) -> bool {
    error.downcast_ref::<candle_core::Error>().and_then(DeadlineExceeded::of).is_some()
}

/// What became of a prompt that could not be read.
fn unread(error: Error) -> Error {
    match is_late(&error) {
        true => Error::msg(
            "--time-limit: the time was over before the prompt was read: give more, or a shorter prompt",
        ),
        false => error,
    }
}

impl Written {
    fn new() -> Self {
        Self {
            text: String::new(),
            tokens: 0,
            end: End::Failed,
            first_logits: Vec::new(),
            prefill_s: 0.0,
            decode_s: 0.0,
            error: None,
        }
    }
}
