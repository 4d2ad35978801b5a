//! Quality against active share, for every way of choosing neurons: a table and a plot.

use crate::{
    cli::{output, process_bytes},
    text,
};
use anyhow::{Context, Result};
use candle_sparse::{
    KvCache, KvConfig, KvDType,
    decoder::{Decoder, Input, Logits, Scratch, Step},
    profile::{Profile, Rule},
    save::save,
    simulate::Counts,
};
use candle_sparse_core::GluActivation;
use candle_sparse_models::{
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
    choice: Choice,
    quality: Quality,
    counts: Counts,
}

impl Point {
    fn new(series: &'static str, choice: Choice) -> Self {
        Self { series, choice, quality: Quality::default(), counts: Counts::default() }
    }

    /// The mean active share of all blocks.
    fn active(&self) -> f64 {
        mean(&self.counts.active_share())
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let q = &self.quality;
        serde_json::json!({
            "choice": self.series, "active_fraction": self.active(), "tokens": q.tokens(), "ppl": q.ppl(),
            "ppl_change": q.ppl_change(), "kld": q.kld(), "top1_agreement": q.top1_agreement(), "recall": self.counts.recall(),
        })
    }
}

fn mean(v: &[f64]) -> f64 {
    v.iter().sum::<f64>() / v.len() as f64
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

/// Runs everything on the texts; `loaded` is dense. Window by window, so that the logits of one are held at a time, by the dense
/// model and by one choice.
pub(crate) fn sweep(loaded: &Pretrained, profile: &Profile, windows: &[Vec<u32>]) -> Result<Vec<Point>> {
    let decoder = loaded.model.decoder();
    let c = &loaded.config;
    let act = GluActivation { act: c.hidden_act, shift: c.gate_shift };
    let mut simulation = Simulation::new(&profile.layers, act, Choice::All)?;
    let mut reader = Reader::new(decoder);
    let mut points: Vec<_> = series(&profile.shares)
        .into_iter()
        .flat_map(|(name, choices)| choices.into_iter().map(move |choice| Point::new(name, choice)))
        .collect();
    let bar = ProgressBar::new((windows.len() * (points.len() + 2)) as u64);
    let (mut dense, mut logits) = (Vec::new(), Vec::new());
    // Which neurons matter most on average is known once all was read.
    for window in windows {
        reader.read(window, Some(&mut simulation), Logits::Last, &mut logits)?;
        bar.inc(1);
    }
    for window in windows {
        reader.read(window, None, Logits::All, &mut dense)?;
        bar.inc(1);
        for point in &mut points {
            simulation.choose(point.choice);
            reader.read(window, Some(&mut simulation), Logits::All, &mut logits)?;
            // A row predicts the token that follows.
            let rows = ..(window.len() - 1) * decoder.config().vocab_size;
            point.quality.add_rows(&window[1..], &logits[rows], &dense[rows])?;
            point.counts.add(&simulation.counts());
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(points)
}

/// Reads whole windows.
struct Reader<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    scratch: Scratch,
}

impl<'a> Reader<'a> {
    fn new(decoder: &'a Decoder) -> Self {
        let cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F32));
        Self { decoder, cache, scratch: Scratch::default() }
    }

    /// Sets `logits` to those of a window.
    fn read(
        &mut self,
        window: &[u32],
        simulation: Option<&mut Simulation<'_>>,
        wanted: Logits,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let Self { decoder, cache, scratch } = self;
        let rows = if wanted == Logits::All { window.len() } else { 1 };
        logits.resize(rows * decoder.config().vocab_size, 0.0);
        cache.clear();
        let (ids, step) = (Input::Ids(window), Step { batch: 1, seq_len: window.len(), index_pos: 0 });
        match simulation {
            None => decoder.forward(ids, step, cache, scratch, wanted, logits)?,
            Some(simulation) => {
                decoder.forward_tapped(ids, step, cache, scratch, simulation, wanted, logits)?;
                simulation.check()?;
            }
        }
        Ok(())
    }
}

/// The share at which a series has lost [`ALLOWED`], between the points around it.
fn share_at_loss(points: &[Point], name: &str) -> Option<f64> {
    let mut curve: Vec<_> =
        points.iter().filter(|p| p.series == name).map(|p| (p.active(), p.quality.ppl_change())).collect();
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
        let peak = process_bytes("VmHWM").ok();
        let json = serde_json::json!({ "points": points, "share_at_1_percent": at_loss, "peak_bytes": peak });
        writeln!(out, "{json}")?;
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
            p.active(),
            q.ppl(),
            q.ppl_change() * 100.0,
            q.kld(),
            q.top1_agreement(),
            mean(&p.counts.recall()),
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
            .map(|p| (p.active(), p.quality.ppl_change().clamp(0.0003, 3.0)))
            .collect();
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(root.present()?)
}
