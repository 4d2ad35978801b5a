//! The gate of sparse attention: which tokens are worth keeping in sight when they have left the window.
//!
//! `score[t][head] = ridge[head] · x_t + readout[head] · h_t + bias[head]`, where `x_t` is what attention reads of token t (the
//! norm's output) and `h_t` the state of a FastGRNN cell ([`Cell`], Kusupati et al. 2018) after it. Scores depend on the
//! token and those before it, never on later ones. The definition is [`Salience`](candle_sparse_core::kernel::fast_grnn::Salience); here its products run on the CPU's
//! kernels, for many tokens at once.

use arrayvec::ArrayVec;
use candle_core::{Error, Result, bail};
use candle_sparse_core::{
    Columns, KernelSet, Matrix, Rows,
    kernel::{
        fast_grnn::{Cell, CellMatrix},
        vector,
    },
};
use candle_sparse_kernels::Kernels;

/// Tokens whose products with the input are computed together: fewer rows than columns are packed for, which would allocate.
const RUN: usize = 32;
/// Products that read a run of tokens together.
const COLUMNS: usize = 32;

/// A matrix `[rows, cols]` of a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct CellWeight {
    /// Rows.
    pub rows: usize,
    /// Row after row.
    pub values: Vec<f32>,
}

impl CellWeight {
    fn cols(&self) -> usize {
        self.values.len() / self.rows.max(1)
    }
}

impl CellMatrix for CellWeight {
    /// A matrix that is no whole number of rows has `[0, 0]`.
    fn shape(&self) -> [usize; 2] {
        if self.rows * self.cols() == self.values.len() { [self.rows, self.cols()] } else { [0, 0] }
    }

    fn product(&self, x: &[f32], y: &mut [f32]) {
        y.iter_mut()
            .zip(self.values.chunks_exact(x.len().max(1)))
            .for_each(|(y, row)| *y = vector::dot(row, x));
    }

    fn bytes(&self) -> usize {
        size_of_val(self.values.as_slice())
    }
}

/// The salience of tokens for the key/value heads of one layer; matrices are row-major, `[rows, cols]`.
///
/// ```
/// use candle_sparse::{FastGrnnGate, candle_sparse_kernels::Kernels};
///
/// // One head: the score is the first element of the input and a half; salient from 1 on.
/// let gate = FastGrnnGate::new(2, vec![1.0, 0.0], vec![0.5], vec![1.0])?;
/// let (mut state, mut scratch) = (vec![0.0; gate.state_len()], vec![0.0; gate.scratch_len()]);
/// let (tokens, mut scores) = ([2.0, 9.0, 0.25, 9.0], [0.0; 2]);
/// let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
/// gate.scores(kernels, &tokens, &mut state, &mut scratch, &mut scores);
/// assert_eq!(scores, [2.5, 0.75]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct FastGrnnGate {
    /// Elements of the layer's input.
    pub hidden_size: usize,
    /// Heads that are scored.
    pub kv_heads: usize,
    /// `[kv_heads, hidden_size]`
    pub ridge: Vec<f32>,
    /// `[kv_heads]`
    pub bias: Vec<f32>,
    /// `[kv_heads]`: a token is salient for a head from this score on.
    pub threshold: Vec<f32>,
    /// What remembers the tokens before; `None` where that told nothing.
    pub cell: Option<Cell<CellWeight, Vec<f32>>>,
    /// `[kv_heads, cell's hidden]`; empty with a cell: its state's norm ‖h‖₂ is added to every head's score.
    pub readout: Vec<f32>,
}

impl FastGrnnGate {
    /// A gate of the token alone: `score[head] = ridge[head] · x + bias[head]`.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn new(hidden_size: usize, ridge: Vec<f32>, bias: Vec<f32>, threshold: Vec<f32>) -> Result<Self> {
        let kv_heads = bias.len();
        let gate = Self { hidden_size, kv_heads, ridge, bias, threshold, cell: None, readout: Vec::new() };
        gate.check()?;
        Ok(gate)
    }

    /// The same with a cell, and the `readout` `[kv_heads, cell's hidden]` by which its state adds to the scores.
    ///
    /// # Errors
    /// As [`Self::check`]; also an empty `readout`.
    pub fn with_cell(self, cell: Cell<CellWeight, Vec<f32>>, readout: Vec<f32>) -> Result<Self> {
        let gate = Self { cell: Some(cell), readout, ..self };
        if gate.readout.is_empty() {
            bail!("gate.readout is empty");
        }
        gate.check()?;
        Ok(gate)
    }

    /// A gate whose score is the norm of a cell's state, the same for each of `kv_heads` heads: weights of the crate
    /// `ruvllm_sparse_attention` are [`Cell::Separate`] and mean this.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn from_state_norm(
        kv_heads: usize,
        cell: Cell<CellWeight, Vec<f32>>,
        threshold: f32,
    ) -> Result<Self> {
        let hidden_size = cell.inputs().next().map_or(0, CellWeight::cols);
        let gate = Self {
            hidden_size,
            kv_heads,
            ridge: vec![0.0; kv_heads.saturating_mul(hidden_size)],
            bias: vec![0.0; kv_heads],
            threshold: vec![threshold; kv_heads],
            cell: Some(cell),
            readout: Vec::new(),
        };
        gate.check()?;
        Ok(gate)
    }

    /// Checks that all shapes fit together and every number is finite.
    ///
    /// # Errors
    /// A tensor does not fit; it is named.
    pub fn check(&self) -> Result<()> {
        let (heads, hidden) = (self.kv_heads, self.hidden_size);
        if heads == 0 || hidden == 0 {
            bail!("gate: {heads} heads of a layer with {hidden} inputs: both must be 1 or more");
        }
        if self.cell.is_none() && !self.readout.is_empty() {
            bail!("gate.readout is there without a cell (gate.w1 and others)");
        }
        let state = self.state_len();
        let readout = if self.readout.is_empty() { 0 } else { heads.saturating_mul(state) };
        for (name, v, expected) in [
            ("ridge", &self.ridge, heads.saturating_mul(hidden)),
            ("bias", &self.bias, heads),
            ("threshold", &self.threshold, heads),
            ("readout", &self.readout, readout),
        ] {
            check_vector(name, v, expected)?;
        }
        let Some(cell) = &self.cell else { return Ok(()) };
        cell.matrices()
            .into_iter()
            .try_for_each(|(name, w)| check_vector(name, &w.values, w.values.len()))?;
        cell.check(hidden).map_err(|e| Error::msg(format!("gate.{e}")))
    }

    /// Elements of the state that [`Self::scores`] carries from token to token: 0 without a cell.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.cell.as_ref().map_or(0, Cell::state_len)
    }

    /// Elements of working memory that [`Self::scores`] needs.
    #[must_use]
    pub fn scratch_len(&self) -> usize {
        let (projection, own) =
            self.cell.as_ref().map_or((0, 0), |c| (c.projection_len(), c.projection_len() + c.scratch_len()));
        RUN * (self.kv_heads + projection) + own
    }

    /// Scores `out` `[n, kv_heads]` of tokens `x` `[n, hidden_size]`; `state` is zero before the first token of a sequence.
    ///
    /// Scores do not depend, bit for bit, on how a sequence is cut into calls. Cost per token: one multiply-add per weight,
    /// two exponentials per element of the state; nothing is allocated.
    ///
    /// # Panics
    /// Wrong lengths, or a gate that [`Self::check`] refuses.
    pub fn scores(
        &self,
        kernels: &Kernels,
        x: &[f32],
        state: &mut [f32],
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let (heads, hidden) = (self.kv_heads, self.hidden_size);
        assert!(x.len().is_multiple_of(hidden), "gate: {} elements are no rows of {hidden}", x.len());
        assert_eq!(out.len(), x.len() / hidden * heads, "gate: wrong number of scores");
        assert_eq!(state.len(), self.state_len(), "gate: wrong length of the state");
        for (x, out) in x.chunks(RUN * hidden).zip(out.chunks_mut(RUN * heads)) {
            self.run(kernels, x, state, scratch, out);
        }
    }

    /// [`Self::scores`] of at most [`RUN`] tokens.
    fn run(&self, kernels: &Kernels, x: &[f32], state: &mut [f32], scratch: &mut [f32], out: &mut [f32]) {
        let (heads, n) = (self.kv_heads, x.len() / self.hidden_size);
        let width = self.cell.as_ref().map_or(0, Cell::projection_len);
        let (products, own) = scratch.split_at_mut(RUN * (heads + width));
        let (ridge, projections) = products[..n * (heads + width)].split_at_mut(n * heads);
        self.products(kernels, x, &self.ridge, ridge);
        let mut rest = &mut *projections;
        for w in self.cell.iter().flat_map(Cell::inputs) {
            let (y, after) = rest.split_at_mut(n * w.rows);
            self.products(kernels, x, &w.values, y);
            rest = after;
        }
        let (projection, own) = own.split_at_mut(width);
        for (t, out) in out.chunks_exact_mut(heads).enumerate() {
            for (head, (out, bias)) in out.iter_mut().zip(&self.bias).enumerate() {
                *out = ridge[head * n + t] + bias;
            }
            let Some(cell) = &self.cell else { continue };
            projection.iter_mut().enumerate().for_each(|(i, p)| *p = projections[i * n + t]);
            cell.advance(projection, state, own);
            self.read(state, out);
        }
    }

    /// `y[r][t] = w[r] · x[t]` for the rows of `w` and the tokens of `x`.
    fn products(&self, kernels: &Kernels, x: &[f32], w: &[f32], y: &mut [f32]) {
        let (hidden, n) = (self.hidden_size, x.len() / self.hidden_size);
        // The tokens are the rows of the product: a row has the same bits alone as among others, a column has not.
        let tokens = Matrix::new(n, hidden, Rows::F32(x)).expect("x was cut into whole rows");
        for (w, y) in w.chunks(COLUMNS * hidden).zip(y.chunks_mut(COLUMNS * n)) {
            let mut y: ArrayVec<_, COLUMNS> = y.chunks_exact_mut(n).collect();
            kernels.matmul(tokens, Columns::F32(w), &mut y);
        }
    }

    /// Adds what the state says.
    fn read(&self, state: &[f32], out: &mut [f32]) {
        if self.readout.is_empty() {
            let norm = vector::dot(state, state).sqrt();
            return out.iter_mut().for_each(|out| *out += norm);
        }
        for (out, readout) in out.iter_mut().zip(self.readout.chunks_exact(state.len())) {
            *out += vector::dot(readout, state);
        }
    }
}

fn check_vector(name: &str, v: &[f32], expected: usize) -> Result<()> {
    if v.len() != expected {
        bail!("gate.{name} has {} elements, expected {expected}", v.len());
    }
    if v.iter().any(|v| !v.is_finite()) {
        bail!("gate.{name} holds a number that is not finite");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
