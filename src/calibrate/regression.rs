//! Ridge regression of several targets in closed form.

use candle_core::{DType, Device, Error, Result, Tensor};
use faer::{Mat, MatRef, Side, linalg::solvers::Solve};

/// Rows added at once: bounds the copies.
const ROWS: usize = 4096;

/// Moments of inputs `x` and targets `y`, from which every ridge follows.
pub(super) struct Regression {
    inputs: usize,
    targets: usize,
    rows: f64,
    /// A first row, taken from all: an input that hardly varies would lose its variance in the squares of its mean.
    origin: Vec<f32>,
    /// Of `[x, y, 1]` less the origin, row-major.
    products: Vec<f64>,
}

/// `ŷ = weights · x + bias`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// `[targets, inputs]`
    pub(super) weights: Vec<f32>,
    /// `[targets]`
    pub(super) bias: Vec<f32>,
}

impl Regression {
    pub(super) fn new(inputs: usize, targets: usize) -> Self {
        let width = inputs + targets + 1;
        Self { inputs, targets, rows: 0.0, origin: Vec::new(), products: vec![0.0; width * width] }
    }

    /// Adds `x` `[n, inputs]` and `y` `[n, targets]`. Cost: `n · (inputs + targets)²` multiply-adds.
    pub(super) fn add(&mut self, x: &[f32], y: &[f32]) -> Result<()> {
        let width = self.inputs + self.targets + 1;
        for (x, y) in x.chunks(ROWS * self.inputs).zip(y.chunks(ROWS * self.targets)) {
            let rows = x.chunks_exact(self.inputs).zip(y.chunks_exact(self.targets));
            if self.origin.is_empty() {
                self.origin = x[..self.inputs].iter().chain(&y[..self.targets]).copied().collect();
            }
            let less = |(v, o): (&f32, &f32)| v - o;
            let row = |(x, y): (&[f32], &[f32])| -> Vec<f32> {
                x.iter().chain(y).zip(&self.origin).map(less).chain([1.0]).collect()
            };
            let all: Vec<f32> = rows.flat_map(row).collect();
            let n = all.len() / width;
            let all = Tensor::from_vec(all, (n, width), &Device::Cpu)?;
            let products = all.t()?.contiguous()?.matmul(&all)?.flatten_all()?.to_dtype(DType::F64)?;
            self.products.iter_mut().zip(products.to_vec1::<f64>()?).for_each(|(s, p)| *s += p);
            self.rows += n as f64;
        }
        Ok(())
    }

    /// The centred mean of the product of two columns of `[x, y, 1]`.
    fn covariance(&self, a: usize, b: usize) -> f64 {
        let width = self.inputs + self.targets + 1;
        let mean = |i: usize| self.products[i * width + width - 1] / self.rows;
        self.products[a * width + b] / self.rows - mean(a) * mean(b)
    }

    /// The ridge whose penalty is `lambda` of the inputs' mean variance. Cost: `inputs³ / 3`.
    ///
    /// # Errors
    /// The inputs do not vary, or are not finite.
    pub(super) fn solve(&self, lambda: f64) -> Result<Linear> {
        let (d, k) = (self.inputs, self.targets);
        let penalty = lambda * (0..d).map(|i| self.covariance(i, i)).sum::<f64>() / d as f64;
        let ridge = |a: usize, b: usize| {
            self.covariance(a, b) + if a == b { penalty + f64::MIN_POSITIVE } else { 0.0 }
        };
        let square = Mat::from_fn(d, d, ridge);
        let right = Mat::from_fn(d, k, |a, t| self.covariance(a, d + t));
        let llt = square
            .llt(Side::Lower)
            .map_err(|e| Error::msg(format!("calibrate: no regression on what attention reads: {e:?}")))?;
        let solved = llt.solve(right);
        Ok(self.linear(solved.as_ref()))
    }

    fn linear(&self, w: MatRef<'_, f64>) -> Linear {
        let (d, width) = (self.inputs, self.inputs + self.targets + 1);
        let mean = |i: usize| self.products[i * width + width - 1] / self.rows + f64::from(self.origin[i]);
        let weights = (0..self.targets).flat_map(|t| (0..d).map(move |i| w[(i, t)] as f32)).collect();
        let bias = |t: usize| mean(d + t) - (0..d).map(|i| w[(i, t)] * mean(i)).sum::<f64>();
        Linear { weights, bias: (0..self.targets).map(|t| bias(t) as f32).collect() }
    }
}

/// The share of the variance of each target `[n, targets]` that a prediction explains; 0 for a target that does not vary.
pub(super) fn r2(predicted: &[f32], y: &[f32], targets: usize) -> Vec<f32> {
    let n = (y.len() / targets) as f64;
    let of = |t: usize| {
        let column = || y.iter().skip(t).step_by(targets).map(|&v| f64::from(v));
        let mean = column().sum::<f64>() / n;
        let total: f64 = column().map(|v| (v - mean).powi(2)).sum();
        let predicted = predicted.iter().skip(t).step_by(targets).map(|&v| f64::from(v));
        let missed: f64 = column().zip(predicted).map(|(v, p)| (v - p).powi(2)).sum();
        if total > 0.0 { (1.0 - missed / total) as f32 } else { 0.0 }
    };
    (0..targets).map(of).collect()
}
