//! What is printed of a calibration, and the exit code that says whether its target is kept.

use crate::{
    Cli,
    cli::output::{self, Ended},
    gates,
};
use anyhow::Result;
use candle_sparse::{profile::Rule, sparse::BREAK_EVEN};
use candle_sparse_models::calibrate::{Fitted, FittedAttention, RecallFit, RuleReport};
use std::io::Write;

/// A profile was written, but no rule of it keeps the target.
const NOT_KEPT: u8 = 3;

pub(crate) fn json(r: &RuleReport) -> serde_json::Value {
    let q = &r.quality;
    serde_json::json!({
        "rule": format!("{:?}", r.rule), "tokens": q.tokens(), "share": r.share, "active_fraction": r.active,
        "ppl": q.ppl(), "dense_ppl": q.dense_nll().exp(), "ppl_change": q.ppl_change(),
        "ppl_change_error": q.ppl_change_error(), "kld": q.kld(), "kld_error": q.kld_error(),
        "top1_agreement": q.top1_agreement(), "recall": r.recall, "kept": r.kept,
    })
}

/// Prints what was found, and says where it falls short of what was asked.
pub(crate) fn print(cli: &Cli, fitted: &Fitted, seconds: f64) -> Result<()> {
    let mut out = output::stdout();
    let (held_out, doubts) = (fitted.profile.held_out, fitted.doubts());
    if cli.json {
        let json = serde_json::json!({
            "out": cli.out.display().to_string(), "seconds": seconds, "shares": fitted.profile.shares, "runs": fitted.runs,
            "held_out": fitted.held_out.iter().map(json).collect::<Vec<_>>(), "best": held_out.best.map(|r| format!("{r:?}")),
            "noise_floor": fitted.noise_floor, "own_ppl": fitted.ppl[1], "doubts": doubts,
            "gates": gates::json(&fitted.gates), "recall": fitted.recall.as_ref().map(recall_json),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{} written after {seconds:.1} s", cli.out.display())?;
        table(&mut out, fitted)?;
        blocks(&mut out, fitted)?;
        gates::print(&mut out, &fitted.gates)?;
        recall(&mut out, fitted.recall.as_ref())?;
    }
    doubts.iter().for_each(output::note);
    verdict(fitted)
}

/// Prints what was found of attention.
pub(crate) fn print_attention(cli: &Cli, fitted: &FittedAttention, seconds: f64) -> Result<()> {
    let mut out = output::stdout();
    if cli.json {
        let json = serde_json::json!({
            "out": cli.out.display().to_string(), "seconds": seconds, "gates": gates::json(&fitted.gates),
            "recall": fitted.recall.as_ref().map(recall_json),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(out, "{} written after {seconds:.1} s", cli.out.display())?;
    gates::print(&mut out, &fitted.gates)?;
    recall(&mut out, fitted.recall.as_ref())
}

fn recall_json(fit: &RecallFit) -> serde_json::Value {
    serde_json::json!({ "shares": fit.shares, "losses": fit.losses })
}

fn recall(out: &mut impl Write, fit: Option<&RecallFit>) -> Result<()> {
    let Some(fit) = fit else { return Ok(()) };
    if !fit.helps() {
        output::note(
            "sharing out the budget of recall gains nothing on the held-out text: every head gets as much",
        );
        return Ok(());
    }
    let [uniform, shared] = fit.losses;
    writeln!(
        out,
        "recall: the heads' outputs lose {:.2} of what they lose with as much for every head",
        shared / uniform
    )?;
    for (l, shares) in fit.shares.iter().enumerate() {
        let shares: Vec<String> = shares.iter().map(|s| format!("{s:.2}")).collect();
        writeln!(out, "block {l}: budgets of heads, of the mean: {}", shares.join(" "))?;
    }
    Ok(())
}

fn table(out: &mut impl Write, fitted: &Fitted) -> Result<()> {
    writeln!(
        out,
        "{:>10} {:>8} {:>10} {:>17} {:>17} {:>8}  target",
        "", "active", "ppl", "change", "kld", "top-1"
    )?;
    for r in &fitted.held_out {
        let (q, rule) = (&r.quality, format!("{:?}", r.rule));
        let best = fitted.profile.held_out.best == Some(r.rule);
        writeln!(
            out,
            "{rule:>10} {:>8.3} {:>10.4} {:>+8.2} ± {:>4.2} % {:>8.4} ± {:.4} {:>8.4}  {}",
            r.active,
            q.ppl(),
            q.ppl_change() * 100.0,
            q.ppl_change_error() * 100.0,
            q.kld(),
            q.kld_error(),
            q.top1_agreement(),
            if best {
                "kept, the default"
            } else if r.kept {
                "kept"
            } else {
                "missed: not used unless forced"
            }
        )?;
    }
    let tokens = fitted.held_out[0].quality.tokens();
    writeln!(
        out,
        "{tokens} held-out tokens; ± is one standard error, kept means with a certainty of 95 %; noise of the dense path: \
         kld {:.4}; perplexity of text by the model itself {:.2}",
        fitted.noise_floor, fitted.ppl[1]
    )?;
    Ok(())
}

fn blocks(out: &mut impl Write, fitted: &Fitted) -> Result<()> {
    for (l, runs) in fitted.runs.iter().enumerate() {
        let recall: Vec<String> = fitted.held_out.iter().map(|r| format!("{:.3}", r.recall[l])).collect();
        let shares: Vec<String> = (0..3)
            .map(|r| format!("{:.2}", fitted.profile.layers[l].rules[r].share[fitted.profile.fitted[r]]))
            .collect();
        writeln!(
            out,
            "block {l}: shares {}, recall {}, runs of {:.2} neurons before, {:.2} after ordering",
            shares.join(" "),
            recall.join(" "),
            runs[0],
            runs[1]
        )?;
    }
    Ok(())
}

/// One line where a target is missed, or where the default would save nothing.
fn verdict(fitted: &Fitted) -> Result<()> {
    let held_out = fitted.profile.held_out;
    let Some(best) = held_out.best else {
        output::error(
            "no rule keeps the target on held-out text: the profile was written, but models compute all neurons with \
             it; allow a larger loss, or give more text (the target must be kept with a certainty of 95 %)",
        );
        return Err(Ended(NOT_KEPT).into());
    };
    let missed = Rule::ALL.into_iter().filter(|&r| !held_out.kept[r as usize]);
    let missed: Vec<String> = missed.map(|r| format!("{r:?}")).collect();
    if !missed.is_empty() {
        let missed = missed.join(" and ");
        output::note(format_args!("the target is missed by {missed}: not used unless it is forced"));
    }
    let share = fitted.held_out[best as usize].active;
    if share > f64::from(BREAK_EVEN) {
        output::note(format_args!(
            "this profile saves nothing: {best:?} needs {share:.2} of the neurons, {BREAK_EVEN} or less would; models compute \
             all neurons with it"
        ));
    }
    Ok(())
}
