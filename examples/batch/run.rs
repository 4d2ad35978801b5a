//! Lines through the engine: as many at a time as it takes, results as they are done.

use crate::{
    ask::Asker,
    cli::output,
    fields::{Fields, Wrong},
    interrupt::Interrupt,
    lines::{Line, Lines},
    results::{Ids, Results},
};
use anyhow::Result;
use candle_sparse_models::{
    engine::{Engine, Event, EventKind, FinishReason, Finished, Request, SequenceId},
    pretrained::first_line,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant},
};

/// How often the bar is drawn anew.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Where nobody sees a bar, a line now and then says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// Tokens to write after a prompt where neither its line nor a flag says.
const TEXT_TOKENS: usize = 200;

/// A text on its way.
struct Job {
    id: Value,
    text: String,
}

/// What a run is about.
pub(crate) struct Run<'a> {
    engine: Engine,
    asker: &'a Asker,
    results: Results,
    done: Ids,
    /// Ids of this run's lines.
    seen: Ids,
    jobs: HashMap<SequenceId, Job>,
    /// How many may be with the engine.
    room: usize,
    bar: ProgressBar,
    said: Instant,
    report: Report,
}

/// What a run did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    written: usize,
    skipped: usize,
    pub(crate) failed: usize,
    pub(crate) interrupted: bool,
    tokens: [usize; 3],
    seconds: f64,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        engine: Engine,
        asker: &'a Asker,
        results: Results,
        done: Ids,
        lines: Option<usize>,
        room: usize,
    ) -> Self {
        let bar = lines.map_or_else(ProgressBar::no_length, |lines| ProgressBar::new(lines as u64));
        let style = "{elapsed_precise} [{wide_bar}] {pos}/{len} {msg} {eta}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (seen, jobs, report) = (Ids::new(), HashMap::new(), Report::default());
        Self { engine, asker, results, done, seen, jobs, room, bar, said: Instant::now(), report }
    }

    /// Does all lines, or as many as come before an interrupt.
    pub(crate) fn all(&mut self, mut lines: Lines, interrupt: &Interrupt) -> Result<()> {
        let mut more = true;
        while more || !self.jobs.is_empty() {
            if interrupt.came() {
                self.report.interrupted = true;
                return Ok(());
            }
            while more && self.jobs.len() < self.room {
                match lines.next_line()? {
                    Some(line) => self.begin(&line)?,
                    None => more = false,
                }
            }
            for event in self.engine.step() {
                self.take(event)?;
            }
            self.engine.take_notices().iter().for_each(output::note);
            self.say();
        }
        Ok(())
    }

    fn begin(&mut self, line: &Line) -> Result<()> {
        let (id, request) = self.read(line);
        let key = id.to_string();
        if !self.seen.insert(key.clone()) {
            // A result of its own could not be told from that of the other line.
            self.report.failed += 1;
            output::note(format_args!(
                "line {}: an earlier line has the id {key} too: left out",
                line.number
            ));
        } else if self.done.contains(&key) {
            self.report.skipped += 1;
        } else {
            return match request {
                Ok(request) => self.add(id, request),
                Err(wrong) => self.fail(&id, &wrong),
            };
        }
        self.bar.inc(1);
        Ok(())
    }

    fn add(&mut self, id: Value, request: Request) -> Result<()> {
        match self.engine.add(request) {
            Ok(sequence) => {
                self.jobs.insert(sequence, Job { id, text: String::new() });
                Ok(())
            }
            Err(error) => self.fail(&id, &Wrong::new(first_line(&error))),
        }
    }

    /// The id of a line, which is its number where it has none, and what is asked.
    fn read(&self, line: &Line) -> (Value, Result<Request, Wrong>) {
        let named =
            |wrong: Wrong| Wrong { message: format!("line {}: {}", line.number, wrong.message), ..wrong };
        let value: Result<Value, _> = serde_json::from_slice(&line.bytes);
        let fields = value.map_err(|e| Wrong::new(format!("no JSON: {e}"))).and_then(|v| Fields::new(v, ""));
        let mut fields = match fields {
            Ok(fields) => fields,
            Err(wrong) => return (json!({ "line": line.number }), Err(named(wrong))),
        };
        let id = fields.take("id").unwrap_or_else(|| json!({ "line": line.number }));
        (id, self.request(fields).map_err(named))
    }

    fn request(&self, mut fields: Fields) -> Result<Request, Wrong> {
        let mut wish = self.asker.wish(&mut fields)?;
        let prompt = match (fields.take("prompt"), fields.take("messages")) {
            (Some(prompt), None) => {
                wish.max_tokens.get_or_insert(TEXT_TOKENS);
                let mut prompts = self.asker.texts(prompt)?;
                match prompts.pop() {
                    Some(prompt) if prompts.is_empty() => prompt,
                    _ => return Err(Wrong::value("prompt", "one text to a line")),
                }
            }
            (None, Some(messages)) => self.asker.chat(messages)?,
            _ => return Err(Wrong::new("either prompt or messages is needed")),
        };
        fields.finish()?;
        Ok(self.asker.request(&prompt, &wish, 0))
    }

    fn take(&mut self, event: Event) -> Result<()> {
        match event.kind {
            EventKind::Token { text, .. } => {
                if let Some(job) = self.jobs.get_mut(&event.id) {
                    job.text.push_str(&text);
                }
                Ok(())
            }
            EventKind::Finished(finished) => match self.jobs.remove(&event.id) {
                Some(job) => self.end(job, finished),
                None => Ok(()),
            },
        }
    }

    fn end(&mut self, mut job: Job, finished: Finished) -> Result<()> {
        if finished.reason == FinishReason::Failed {
            let message = finished.error.unwrap_or_else(|| "the text failed".to_string());
            return self.fail(&job.id, &Wrong::new(message));
        }
        job.text.push_str(&finished.text);
        let Finished { prompt_tokens: read, completion_tokens: written, cached_tokens: cached, .. } =
            finished;
        for (all, tokens) in self.report.tokens.iter_mut().zip([read, cached, written]) {
            *all += tokens;
        }
        self.report.written += 1;
        let stops = matches!(finished.reason, FinishReason::EndToken | FinishReason::StopText);
        self.result(&json!({
            "id": job.id, "text": job.text, "finish_reason": if stops { "stop" } else { "length" },
            "usage": {
                "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
                "prompt_tokens_details": { "cached_tokens": cached },
            },
        }))
    }

    fn fail(&mut self, id: &Value, wrong: &Wrong) -> Result<()> {
        self.report.failed += 1;
        let Wrong { message, param, code } = wrong;
        self.result(&json!({ "id": id, "error": { "message": message, "param": param, "code": code } }))
    }

    fn result(&mut self, result: &Value) -> Result<()> {
        self.results.add(result)?;
        self.bar.inc(1);
        Ok(())
    }

    fn say(&mut self) {
        let every = if self.bar.is_hidden() { SAY_EVERY } else { DRAW_EVERY };
        if self.said.elapsed() < every {
            return;
        }
        self.said = Instant::now();
        let stats = self.engine.stats();
        self.bar.set_message(format!("{} at a time, {} tokens", stats.running, stats.tokens_written));
        if self.bar.is_hidden() {
            let all = self.bar.length().map_or_else(String::new, |all| format!(" of {all}"));
            output::status(format_args!(
                "{}{all} lines, {} tokens",
                self.bar.position(),
                stats.tokens_written
            ));
        }
    }

    pub(crate) fn report(&self, seconds: f64) -> Report {
        self.bar.finish_and_clear();
        Report { seconds, ..self.report.clone() }
    }
}

impl Report {
    pub(crate) fn json(&self) -> Value {
        let [read, cached, written] = self.tokens;
        json!({
            "written": self.written, "skipped": self.skipped, "failed": self.failed, "interrupted": self.interrupted,
            "prompt_tokens": read, "cached_tokens": cached, "completion_tokens": written, "seconds": self.seconds,
        })
    }

    pub(crate) fn line(&self, out: &Path) -> String {
        let Self { written, skipped, failed, seconds, .. } = self;
        let tokens = self.tokens[2];
        let skipped = if *skipped > 0 { format!(", {skipped} were there") } else { String::new() };
        let rest = if self.interrupted { "; the same command does the rest" } else { "" };
        format!(
            "{written} results and {failed} errors added to {}{skipped}: {tokens} tokens in {seconds:.1} s, {:.1} tokens/s{rest}",
            out.display(),
            tokens as f64 / seconds,
        )
    }
}
