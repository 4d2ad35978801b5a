//! Draws the pictures of a record: a JSON file of points becomes an SVG file.
//!
//! ```json
//! { "title": "…", "x": "bits per weight", "x_from": 4, "y": "KL, nats per token", "log_y": true,
//!   "series": [ { "name": "weights", "line": false, "points": [ { "x": 4.5, "y": 0.05, "label": "Q4_0" } ] } ] }
//! ```
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;

use anyhow::{Context, Result, bail};
use candle_sparse::save::save;
use clap::Parser;
use cli::input;
use plotters::{coord::ranged1d::ValueFormatter, prelude::*};
use serde_json::Value;
use std::{io::Write, path::PathBuf, process::ExitCode};

const COLOURS: [RGBColor; 6] =
    [BLUE, RED, RGBColor(0, 140, 140), RGBColor(190, 140, 60), BLACK, RGBColor(150, 150, 150)];
const SIZE: (u32, u32) = (720, 420);

/// Draw the picture of a record.
#[derive(Parser, Debug)]
#[command(name = "plot", version)]
struct Cli {
    /// The points
    data: PathBuf,
    /// The SVG file
    #[arg(long)]
    out: PathBuf,
}

struct Picture {
    title: String,
    x: String,
    /// Where the axis begins.
    x_from: f64,
    y: String,
    log_y: bool,
    series: Vec<Series>,
}

struct Series {
    name: String,
    line: bool,
    points: Vec<(f64, f64, String)>,
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let json = serde_json::from_str(&input::text(&cli.data)?)
        .with_context(|| format!("{} is no JSON", cli.data.display()))?;
    let picture = Picture::new(&json).with_context(|| cli.data.display().to_string())?;
    let mut svg = String::new();
    picture.draw(&mut svg).context("cannot draw the picture")?;
    Ok(save(&cli.out, |file| Ok(file.write_all(svg.as_bytes())?))?)
}

fn text(json: &Value, key: &str) -> Result<String> {
    let text = json[key].as_str().with_context(|| format!("\"{key}\" must be a text"))?;
    Ok(text.to_string())
}

fn list<'a>(json: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    json[key].as_array().filter(|l| !l.is_empty()).with_context(|| format!("\"{key}\" must be a list"))
}

impl Picture {
    fn new(json: &Value) -> Result<Self> {
        let picture = Self {
            title: text(json, "title")?,
            x: text(json, "x")?,
            x_from: json["x_from"].as_f64().unwrap_or_default(),
            y: text(json, "y")?,
            log_y: json["log_y"].as_bool().unwrap_or_default(),
            series: list(json, "series")?.iter().map(Series::new).collect::<Result<_>>()?,
        };
        if picture.log_y && picture.points().any(|(_, y, _)| *y <= 0.0) {
            bail!("a logarithmic axis has no place for numbers that are not above 0");
        }
        Ok(picture)
    }

    fn points(&self) -> impl Iterator<Item = &(f64, f64, String)> {
        self.series.iter().flat_map(|s| &s.points)
    }

    fn draw(&self, svg: &mut String) -> Result<()> {
        let most_x = self.points().map(|p| p.0).fold(self.x_from, f64::max);
        let most_y = self.points().map(|p| p.1).fold(0.0, f64::max);
        let least_y = self.points().map(|p| p.1).fold(f64::INFINITY, f64::min);
        let x = self.x_from..most_x + 0.1 * (most_x - self.x_from);
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root);
        chart
            .caption(&self.title, ("sans-serif", 17))
            .margin(10)
            .margin_right(30)
            .x_label_area_size(42)
            .y_label_area_size(64);
        // With room for the names of the series.
        if self.log_y {
            let y = (least_y / 1.5..most_y * 8.0).log_scale();
            self.fill(chart.build_cartesian_2d(x, y)?)?;
        } else {
            self.fill(chart.build_cartesian_2d(x, 0.0..most_y * 1.12)?)?;
        }
        Ok(root.present()?)
    }

    fn fill<'a, 'b: 'a, X, Y>(
        &self,
        mut chart: ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>,
    ) -> Result<()>
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_label_formatter(&|x| format!("{x}"))
            .y_label_formatter(&|y| format!("{y}"))
            .x_desc(&self.x)
            .y_desc(&self.y)
            .label_style(("sans-serif", 13))
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.into_iter().cycle()) {
            let points = || series.points.iter();
            let dots = points().map(|(x, y, _)| Circle::new((*x, *y), 4, colour.filled()));
            chart
                .draw_series(dots)?
                .label(&series.name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
            if series.line {
                let line = points().map(|(x, y, _)| (*x, *y));
                chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
            }
            chart.draw_series(points().map(|(x, y, label)| {
                let style = ("sans-serif", 12).into_font().color(&colour);
                EmptyElement::at((*x, *y)) + Text::new(label.clone(), (7, -12), style)
            }))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 13))
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
        Ok(())
    }
}

impl Series {
    fn new(json: &Value) -> Result<Self> {
        let number =
            |p: &Value, key: &str| p[key].as_f64().with_context(|| format!("\"{key}\" must be a number"));
        let point = |p: &Value| -> Result<_> {
            Ok((number(p, "x")?, number(p, "y")?, p["label"].as_str().unwrap_or_default().to_string()))
        };
        let points = list(json, "points")?.iter().map(point).collect::<Result<_>>()?;
        Ok(Self { name: text(json, "name")?, line: json["line"].as_bool().unwrap_or_default(), points })
    }
}
