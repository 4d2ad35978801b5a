//! The model card and the JSON summary, from measured values.

use serde_json::json;
use std::path::{Path, PathBuf};

use super::config::Config;
use super::eval::{RangeLoss, Score};
use super::train::Outcome;

/// All that the card tells.
pub(crate) struct Card {
    /// The command line, with file names instead of paths.
    pub(crate) command: String,
    /// Where the data comes from and its licence.
    pub(crate) data_note: String,
    /// Names of the text files.
    pub(crate) files: String,
    /// Share of each file that was held out.
    pub(crate) heldout_percent: f64,
    /// Tokens in the training split.
    pub(crate) train_tokens: usize,
    /// Trained numbers.
    pub(crate) parameters: usize,
    /// Held-out loss in bits per byte of text.
    pub(crate) bits_per_byte: f64,
    /// Held-out loss by position.
    pub(crate) positions: Vec<RangeLoss>,
    /// Text the model wrote.
    pub(crate) sample: String,
    /// Sizes and activation.
    pub(crate) config: Config,
    /// Whether feed-forward gates can be zero.
    pub(crate) sparse: bool,
    /// Held-out loss and active share.
    pub(crate) score: Score,
    /// Steps that were asked for.
    pub(crate) planned_steps: usize,
    /// Steps, tokens and time.
    pub(crate) outcome: Outcome,
}

/// The files' names without their folders.
pub(crate) fn file_names(files: &[PathBuf]) -> String {
    let names: Vec<String> = files.iter().map(|file| base_name(file)).collect();
    names.join(", ")
}

fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The command that was given, without the machine's folders and quoted for a shell.
pub(crate) fn command(args: impl Iterator<Item = String>) -> String {
    let mut out = "cargo run --release --example train-tiny --".to_string();
    for arg in args {
        let sentence = arg.contains(' ');
        let arg = if sentence || arg.starts_with('-') { arg } else { base_name(Path::new(&arg)) };
        let plain = arg.chars().all(|c| c.is_ascii_alphanumeric() || "-_.,=+".contains(c));
        out.push_str(if arg.starts_with("--") { " \\\n  " } else { " " });
        if plain && !arg.is_empty() {
            out.push_str(&arg);
        } else {
            out.push_str(&format!("'{}'", arg.replace('\'', "'\\''")));
        }
    }
    out
}

impl Card {
    /// The text of `README.md`.
    pub(crate) fn markdown(&self) -> String {
        let (score, outcome) = (&self.score, &self.outcome);
        let parts = [
            format!(
                "# A tiny Llama with {} feed-forward{}\n",
                self.config.hidden_act.name(),
                if self.config.gated_mlp { "" } else { " and no gate" }
            ),
            self.model_part(),
            format!("## Data\n\n{}\n\nFiles: {}. {}\n", self.data_note, self.files, self.split()),
            self.recipe_part(),
            format!(
                "## Measured\n\nOn the saved f16 file, over {} held-out tokens:\n\n\
                 | loss, nats/token | perplexity | bits per byte | last training loss |\n\
                 | --- | --- | --- | --- |\n| {:.4} | {:.2} | {:.4} | {:.4} |\n",
                score.tokens,
                score.loss,
                score.loss.exp(),
                self.bits_per_byte,
                outcome.train_loss
            ),
            self.positions_part(),
            self.active_part(),
            format!("## Sample\n\nTemperature 0.7, 60 tokens:\n\n```text\n{}\n```\n", self.sample),
            "## Licence\n\nThe weights are licensed under MIT OR Apache-2.0.\n".to_string(),
        ];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
    }

    fn recipe_part(&self) -> String {
        let outcome = &self.outcome;
        let early = match self.planned_steps - outcome.steps.min(self.planned_steps) {
            0 => "",
            _ => " The time limit shortened the schedule, so another machine makes other weights.",
        };
        format!(
            "## Recipe\n\n```sh\n{}\n```\n\n{} steps, {} tokens ({:.1} passes over the training split), \
             {:.0} s on a CPU with candle.{early} The weights are those of step {}, which had the best \
             held-out loss; the text that picked it is the text it is scored on below.\n",
            self.command,
            outcome.steps,
            outcome.tokens,
            outcome.tokens as f64 / self.train_tokens as f64,
            outcome.seconds,
            outcome.best_step
        )
    }

    fn split(&self) -> String {
        format!(
            "Neither the tokenizer nor the model was trained on the last {} % of each cleaned file (from the \
             next paragraph break on); `--write-heldout FILE` writes that text.",
            self.heldout_percent
        )
    }

    fn model_part(&self) -> String {
        let c = &self.config;
        format!(
            "{} parameters: {} layers, hidden size {}, feed-forward size {}, {} query heads, {} \
             key heads, {} tokens of byte-level BPE, context {}, tied head. A test model: it \
             knows the style of its few books and nothing of the world.\n",
            self.parameters,
            c.num_hidden_layers,
            c.hidden_size,
            c.intermediate_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.vocab_size,
            c.max_position_embeddings
        )
    }

    fn positions_part(&self) -> String {
        if self.positions.is_empty() {
            return String::new();
        }
        let mut out = "Loss by position in the window, the same tokens in each row:\n\n\
                       | positions | nats/token |\n| --- | --- |\n"
            .to_string();
        for range in &self.positions {
            out += &format!("| {}..{} | {:.4} |\n", range.from, range.to - 1, range.loss);
        }
        out
    }

    fn active_part(&self) -> String {
        if !self.sparse {
            return String::new();
        }
        let mut out = "Share of feed-forward neurons with a non-zero gate, on held-out text:\n\n\
                       | layer | active |\n| --- | --- |\n"
            .to_string();
        for (layer, share) in self.score.active.iter().enumerate() {
            out += &format!("| {layer} | {:.1} % |\n", 100.0 * share);
        }
        out
    }

    /// The summary that `--json` prints.
    pub(crate) fn json(&self) -> serde_json::Value {
        let ranges = self.positions.iter();
        let ranges: Vec<_> = ranges.map(|r| json!({"from": r.from, "to": r.to, "loss": r.loss})).collect();
        json!({
            "steps": self.outcome.steps,
            "best_step": self.outcome.best_step,
            "tokens": self.outcome.tokens,
            "train_loss": self.outcome.train_loss,
            "heldout_loss": self.score.loss,
            "heldout_ppl": self.score.loss.exp(),
            "heldout_bits_per_byte": self.bits_per_byte,
            "heldout_by_position": ranges,
            "active_share": self.sparse.then_some(&self.score.active),
            "seconds": self.outcome.seconds,
            "parameters": self.parameters,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_names_no_folders() {
        let args = ["--text", "/home/me/a.txt", "--lr", "2e-3", "--data-note", "It's a/b free"];
        let command = command(args.iter().map(|arg| arg.to_string()));
        assert!(command.contains("--text a.txt"), "{command}");
        assert!(command.contains("--data-note 'It'\\''s a/b free'"), "{command}");
    }
}
