//! Quality against active share, for every way of choosing neurons: a table and a plot.

use crate::{cli::output, text};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sparse::{
    profile::{Profile, Rule},
    save::save,
};
use candle_sparse_core::GluActivation;
use candle_sparse_models::{
    llama::Cache,
    pretrained::Pretrained,
    quality::Quality,
    simulate::{Choice, Simulation},
};
use indicatif::ProgressBar;
use plotters::prelude::*;
use std::{io::Write, path::Path};

/// The change of perplexity at which shares are compared.
const ALLOWED: f64 = 0.01;
/// Seeds of one plot's colours, in the order of [`series`].
const COLOURS: [RGBColor; 6] =
    [RGBColor(150, 150, 150), RGBColor(190, 140, 60), BLUE, RGBColor(0, 140, 140), RED, BLACK];

/// One way of choosing at one share.
pub(crate) struct Point {
    series: &'static str,
    active: f64,
    quality: Quality,
    recall: Vec<f64>,
}

impl Point {
    pub(crate) fn json(&self) -> serde_json::Value {
        let q = &self.quality;
        serde_json::json!({
            "choice": self.series, "active_fraction": self.active, "tokens": q.tokens(), "ppl": q.ppl(),
            "ppl_change": q.ppl_change(), "kld": q.kld(), "top1_agreement": q.top1_agreement(), "recall": self.recall,
        })
    }
}

fn series(shares: &[f32]) -> Vec<(&'static str, Vec<Choice>)> {
    let rule = |rule: Rule| (0..shares.len()).map(|p| Choice::Rule(rule, p)).collect();
    let each = |f: fn(f32) -> Choice| shares.iter().map(|&s| f(s)).collect();
    vec![
        ("random", each(Choice::Random)),
        ("static hot", each(Choice::Static)),
        ("low-rank", rule(Rule::LowRank)),
        ("gate", rule(Rule::Gate)),
        ("cascade", rule(Rule::Cascade)),
        ("oracle", each(Choice::Oracle)),
    ]
}

/// Runs everything on the texts; `loaded` is dense.
pub(crate) fn sweep(loaded: &Pretrained, profile: &Profile, windows: &[Vec<u32>]) -> Result<Vec<Point>> {
    let c = &loaded.config;
    let act = GluActivation { act: c.hidden_act, shift: c.gate_shift };
    let mut simulation = Simulation::new(&profile.layers, act, Choice::All)?;
    let mut cache = Cache::new(true, DType::F32, c, &Device::Cpu)?;
    let mut logits = |window: &Vec<u32>, simulation: &mut Simulation<'_>| -> Result<Tensor> {
        let x = Tensor::new(window.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = loaded.model.forward_tapped(&x, 0, &mut cache, simulation)?.squeeze(0)?;
        simulation.check()?;
        Ok(logits)
    };
    // Also learns which neurons matter most on average, for the static choice.
    let dense = windows.iter().map(|w| logits(w, &mut simulation)).collect::<Result<Vec<_>>>()?;
    let all = series(&profile.shares);
    let bar = ProgressBar::new(all.iter().map(|(_, c)| c.len() as u64).sum());
    let mut points = Vec::new();
    for (name, choices) in all {
        for choice in choices {
            simulation.choose(choice);
            let mut quality = Quality::default();
            for (window, dense) in windows.iter().zip(&dense) {
                quality.add(window, 1, &logits(window, &mut simulation)?, dense)?;
            }
            let active = simulation.active_share();
            let active = active.iter().sum::<f64>() / active.len() as f64;
            points.push(Point { series: name, active, quality, recall: simulation.recall() });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(points)
}

/// The share at which a series has lost [`ALLOWED`], between the points around it.
fn share_at_loss(points: &[Point], name: &str) -> Option<f64> {
    let mut curve: Vec<_> =
        points.iter().filter(|p| p.series == name).map(|p| (p.active, p.quality.ppl_change())).collect();
    curve.push((1.0, 0.0));
    curve.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (dense, sparse) = curve.windows(2).map(|w| (w[0], w[1])).find(|(_, s)| s.1 > ALLOWED)?;
    let part = (ALLOWED - dense.1) / (sparse.1 - dense.1);
    Some(dense.0 + (sparse.0 - dense.0) * part)
}

/// Text files and how much of them.
pub(crate) fn windows(
    loaded: &Pretrained,
    paths: &[std::path::PathBuf],
    context: usize,
    tokens: usize,
) -> Result<Vec<Vec<u32>>> {
    Ok(text::some(&text::windows(&loaded.tokenizer, paths, context)?, tokens))
}

/// Prints the table and, per series, the share at which 1 % of perplexity is lost.
pub(crate) fn print(points: &[Point], json: bool) -> Result<()> {
    let mut out = output::stdout();
    let names: Vec<_> = series(&[]).iter().map(|s| s.0).collect();
    let at_loss: serde_json::Map<_, _> =
        names.iter().map(|n| (n.to_string(), serde_json::json!(share_at_loss(points, n)))).collect();
    if json {
        let points: Vec<_> = points.iter().map(Point::json).collect();
        writeln!(out, "{}", serde_json::json!({ "points": points, "share_at_1_percent": at_loss }))?;
        return Ok(());
    }
    writeln!(out, "| choice | active | ppl | change | kld | top-1 | importance held |")?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for p in points {
        let q = &p.quality;
        writeln!(
            out,
            "| {} | {:.3} | {:.4} | {:+.2} % | {:.4} | {:.4} | {:.3} |",
            p.series,
            p.active,
            q.ppl(),
            q.ppl_change() * 100.0,
            q.kld(),
            q.top1_agreement(),
            p.recall.iter().sum::<f64>() / p.recall.len() as f64,
        )?;
    }
    for name in names {
        match share_at_loss(points, name) {
            Some(share) => writeln!(out, "{name}: 1 % of perplexity is lost at {share:.3} active")?,
            None => writeln!(out, "{name}: loses less than 1 % at every share")?,
        }
    }
    Ok(())
}

/// Draws the change of perplexity against the active share.
pub(crate) fn plot(points: &[Point], title: &str, path: &Path) -> Result<()> {
    let mut svg = String::new();
    draw(points, title, &mut svg).context("cannot draw the plot")?;
    Ok(save(path, |file| Ok(file.write_all(svg.as_bytes())?))?)
}

fn draw(points: &[Point], title: &str, svg: &mut String) -> Result<()> {
    let root = SVGBackend::with_string(svg, (720, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..1.0, (0.0003..3.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("active share of the neurons")
        .y_desc("increase of perplexity")
        .y_label_formatter(&|v| format!("{} %", v * 100.0))
        .draw()?;
    for (name, colour) in series(&[]).iter().map(|s| s.0).zip(COLOURS) {
        let line: Vec<_> = points
            .iter()
            .filter(|p| p.series == name)
            .map(|p| (p.active, p.quality.ppl_change().clamp(0.0003, 3.0)))
            .collect();
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(root.present()?)
}
