//! FastGRNN (Kusupati et al. 2018), a recurrent cell of a few kilobytes, and what it says about a token.
//!
//! A gate of sparse attention reads the input of a layer token by token and gives each key/value head a salience:
//! `score[head] = ridge[head] · x_t + readout[head] · h_t + bias[head]`, where the cell's state `h_t` knows what came before.
//! Everything is generic over how the matrices are held, see [`CellMatrix`].

mod matrix;

use super::{special, vector};
use crate::error::Error;
pub use matrix::{CellMatrix, Int8Rows};

/// A recurrent cell with matrices of type `M` and vectors of type `V`; σ is the logistic function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell<M, V> {
    /// As published, W = W₁·W₂ and U = U₁·U₂ shared by gate and candidate: `z = σ(W·x + U·h + b_z)`,
    /// `c = tanh(W·x + U·h + b_h)`, `h ← (ζ·(1 − z) + ν)·c + z·h`.
    FastGrnn {
        /// W₁ `[hidden, rank_w]`
        w1: M,
        /// W₂ `[rank_w, input]`
        w2: M,
        /// U₁ `[hidden, rank_u]`
        u1: M,
        /// U₂ `[rank_u, hidden]`
        u2: M,
        /// `[hidden]`
        b_z: V,
        /// `[hidden]`
        b_h: V,
        /// ζ, 0 to 1
        zeta: f32,
        /// ν, 0 to 1
        nu: f32,
    },
    /// The cell of the crate `ruvllm_sparse_attention`, for weights that were trained for it: `g = σ(W_g·x + U_g·h + b_g)`,
    /// `c = tanh(W_u·x + U_u·h + b_u)`, `f = clamp(ζ·g + ν, 0, 1)`, `h ← f·h + (1 − f)·c`.
    Separate {
        /// `W_g` `[hidden, input]`
        w_g: M,
        /// `U_g` `[hidden, hidden]`
        u_g: M,
        /// `W_u` `[hidden, input]`
        w_u: M,
        /// `U_u` `[hidden, hidden]`
        u_u: M,
        /// `[hidden]`
        b_g: V,
        /// `[hidden]`
        b_u: V,
        /// ζ
        zeta: f32,
        /// ν
        nu: f32,
    },
}

impl<M, V> Cell<M, V> {
    /// The matrices and what they are called in files: those that read the input last in each pair of `W`.
    pub fn matrices(&self) -> [(&'static str, &M); 4] {
        match self {
            Self::FastGrnn { w1, w2, u1, u2, .. } => [("w1", w1), ("w2", w2), ("u1", u1), ("u2", u2)],
            Self::Separate { w_g, u_g, w_u, u_u, .. } => {
                [("w_g", w_g), ("u_g", u_g), ("w_u", w_u), ("u_u", u_u)]
            }
        }
    }

    /// The biases and what they are called in files.
    pub fn biases(&self) -> [(&'static str, &V); 2] {
        match self {
            Self::FastGrnn { b_z, b_h, .. } => [("b_z", b_z), ("b_h", b_h)],
            Self::Separate { b_g, b_u, .. } => [("b_g", b_g), ("b_u", b_u)],
        }
    }

    /// ζ and ν.
    #[must_use]
    pub fn zeta_nu(&self) -> [f32; 2] {
        let (Self::FastGrnn { zeta, nu, .. } | Self::Separate { zeta, nu, .. }) = self;
        [*zeta, *nu]
    }

    /// The matrices that read the input, in the order of their products in a projection.
    pub fn inputs(&self) -> impl Iterator<Item = &M> {
        match self {
            Self::FastGrnn { w2, .. } => [Some(w2), None],
            Self::Separate { w_g, w_u, .. } => [Some(w_g), Some(w_u)],
        }
        .into_iter()
        .flatten()
    }

    /// The same with each matrix in another form.
    #[must_use]
    pub fn map<N>(self, f: impl Fn(M) -> N) -> Cell<N, V> {
        match self {
            Self::FastGrnn { w1, w2, u1, u2, b_z, b_h, zeta, nu } => {
                Cell::FastGrnn { w1: f(w1), w2: f(w2), u1: f(u1), u2: f(u2), b_z, b_h, zeta, nu }
            }
            Self::Separate { w_g, u_g, w_u, u_u, b_g, b_u, zeta, nu } => {
                Cell::Separate { w_g: f(w_g), u_g: f(u_g), w_u: f(w_u), u_u: f(u_u), b_g, b_u, zeta, nu }
            }
        }
    }
}

impl<M, V: AsRef<[f32]>> Cell<M, V> {
    /// The same with vectors borrowed and each matrix in another form.
    pub fn view<'a, N>(&'a self, f: impl Fn(&'a M) -> N) -> Cell<N, &'a [f32]> {
        match self {
            Self::FastGrnn { w1, w2, u1, u2, b_z, b_h, zeta, nu } => {
                let (b_z, b_h) = (b_z.as_ref(), b_h.as_ref());
                Cell::FastGrnn { w1: f(w1), w2: f(w2), u1: f(u1), u2: f(u2), b_z, b_h, zeta: *zeta, nu: *nu }
            }
            Self::Separate { w_g, u_g, w_u, u_u, b_g, b_u, zeta, nu } => {
                let (b_g, b_u) = (b_g.as_ref(), b_u.as_ref());
                Cell::Separate {
                    w_g: f(w_g),
                    u_g: f(u_g),
                    w_u: f(w_u),
                    u_u: f(u_u),
                    b_g,
                    b_u,
                    zeta: *zeta,
                    nu: *nu,
                }
            }
        }
    }
}

impl<M: CellMatrix, V: AsRef<[f32]>> Cell<M, V> {
    /// That all shapes fit an input of `input` elements, and that biases, ζ and ν are usable.
    ///
    /// # Errors
    /// One is not; it is named.
    pub fn check(&self, input: usize) -> Result<(), Error> {
        let n = self.state_len();
        let expected = match self {
            Self::FastGrnn { w1, u1, .. } => {
                let (rank_w, rank_u) = (w1.shape()[1], u1.shape()[1]);
                [[n, rank_w], [rank_w, input], [n, rank_u], [rank_u, n]]
            }
            Self::Separate { .. } => [[n, input], [n, n], [n, input], [n, n]],
        };
        for ((what, matrix), expected) in self.matrices().into_iter().zip(expected) {
            let got = matrix.shape();
            if got != expected || got.contains(&0) {
                return Err(Error::Shape { what, layer: None, expected, got });
            }
        }
        for (what, bias) in self.biases() {
            check_vector(what, bias.as_ref(), n)?;
        }
        let usable = match self {
            Self::FastGrnn { .. } => |v: &f32| (0.0..=1.0).contains(v),
            Self::Separate { .. } => |v: &f32| v.is_finite(),
        };
        if self.zeta_nu().iter().all(usable) { Ok(()) } else { Err(Error::OutOfRange("zeta_nu")) }
    }

    /// Elements of the state; a sequence begins with zeros.
    pub fn state_len(&self) -> usize {
        self.biases()[0].1.as_ref().len()
    }

    /// Elements of [`Self::project`]'s result.
    pub fn projection_len(&self) -> usize {
        self.inputs().map(|m| m.shape()[0]).sum()
    }

    /// Elements of working memory that [`Self::advance`] needs.
    pub fn scratch_len(&self) -> usize {
        let low = match self {
            Self::FastGrnn { u1, .. } => u1.shape()[1],
            Self::Separate { .. } => 0,
        };
        2 * self.state_len() + low
    }

    /// What the cell reads of an input, `W₂·x` or `W_g·x` and `W_u·x`: it does not depend on the state.
    ///
    /// # Panics
    /// Wrong lengths.
    pub fn project(&self, x: &[f32], projection: &mut [f32]) {
        let mut rest = projection;
        for m in self.inputs() {
            let (y, after) = rest.split_at_mut(m.shape()[0]);
            m.product(x, y);
            rest = after;
        }
    }

    /// Takes `state` over one token, of which `projection` is what [`Self::project`] said.
    ///
    /// # Panics
    /// Wrong lengths; `scratch` may be longer.
    pub fn advance(&self, projection: &[f32], state: &mut [f32], scratch: &mut [f32]) {
        let n = state.len();
        let (a, rest) = scratch[..self.scratch_len()].split_at_mut(n);
        let (b, low) = rest.split_at_mut(n);
        let [zeta, nu] = self.zeta_nu();
        let [(_, gate_bias), (_, candidate_bias)] = self.biases();
        let biases = gate_bias.as_ref().iter().zip(candidate_bias.as_ref());
        match self {
            Self::FastGrnn { w1, u1, u2, .. } => {
                w1.product(projection, a);
                u2.product(state, low);
                u1.product(low, b);
                for ((h, (b_z, b_h)), (a, b)) in state.iter_mut().zip(biases).zip(a.iter().zip(b.iter())) {
                    let sum = a + b;
                    let (z, c) = (sigmoid(sum + b_z), special::tanh(sum + b_h));
                    *h = (zeta * (1.0 - z) + nu) * c + z * *h;
                }
            }
            Self::Separate { u_g, u_u, .. } => {
                let (x_g, x_u) = projection.split_at(n);
                u_g.product(state, a);
                u_u.product(state, b);
                vector::axpy(1.0, x_g, a);
                vector::axpy(1.0, x_u, b);
                for ((h, (b_g, b_u)), (a, b)) in state.iter_mut().zip(biases).zip(a.iter().zip(b.iter())) {
                    let f = (zeta * sigmoid(a + b_g) + nu).clamp(0.0, 1.0);
                    *h = f * *h + (1.0 - f) * special::tanh(b + b_u);
                }
            }
        }
    }
}

/// The gate of one layer, in any form; the definition of its scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Salience<M, V> {
    /// `[kv_heads, input]`
    pub ridge: M,
    /// `[kv_heads]`
    pub bias: V,
    /// `[kv_heads]`: a token is salient for a head from this score on.
    pub threshold: V,
    /// What remembers the tokens before.
    pub cell: Option<Cell<M, V>>,
    /// `[kv_heads, hidden]`; a cell without adds its state's norm ‖h‖₂ to every head.
    pub readout: Option<M>,
}

impl<M: CellMatrix, V: AsRef<[f32]>> Salience<M, V> {
    /// That all shapes fit.
    ///
    /// # Errors
    /// One does not; it is named.
    pub fn check(&self) -> Result<(), Error> {
        let [heads, input] = self.ridge.shape();
        check_vector("bias", self.bias.as_ref(), heads)?;
        check_vector("threshold", self.threshold.as_ref(), heads)?;
        let Some(cell) = &self.cell else {
            return if self.readout.is_none() { Ok(()) } else { Err(Error::Zero("the cell of a readout")) };
        };
        cell.check(input)?;
        let expected = [heads, cell.state_len()];
        match self.readout.as_ref().map(CellMatrix::shape) {
            Some(got) if got != expected => Err(Error::Shape { what: "readout", layer: None, expected, got }),
            _ => Ok(()),
        }
    }

    /// Elements of the state, 0 without a cell.
    pub fn state_len(&self) -> usize {
        self.cell.as_ref().map_or(0, Cell::state_len)
    }

    /// Elements of working memory that [`Self::score`] needs.
    pub fn scratch_len(&self) -> usize {
        let heads = self.ridge.shape()[0];
        self.cell.as_ref().map_or(0, |c| (c.projection_len() + c.scratch_len()).max(heads))
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        let vectors = 2 * size_of_val(self.bias.as_ref());
        let cell = self.cell.as_ref().map_or(0, |c| {
            let matrices: usize = c.matrices().iter().map(|m| m.1.bytes()).sum();
            matrices + 2 * (c.state_len() + 1) * size_of::<f32>()
        });
        self.ridge.bytes() + vectors + cell + self.readout.as_ref().map_or(0, CellMatrix::bytes)
    }

    /// Takes `state` over one token `x` and writes each head's score; the state of a sequence begins with zeros.
    ///
    /// Cost: one multiply-add per weight, two exponentials per element of the state.
    ///
    /// # Panics
    /// Wrong lengths; `scratch` may be longer.
    pub fn score(&self, x: &[f32], state: &mut [f32], scratch: &mut [f32], out: &mut [f32]) {
        self.ridge.product(x, out);
        vector::axpy(1.0, self.bias.as_ref(), out);
        let Some(cell) = &self.cell else { return };
        let (projection, rest) = scratch.split_at_mut(cell.projection_len());
        cell.project(x, projection);
        cell.advance(projection, state, rest);
        match &self.readout {
            Some(readout) => {
                let read = &mut scratch[..out.len()];
                readout.product(state, read);
                vector::axpy(1.0, read, out);
            }
            None => {
                let norm = libm::sqrtf(vector::dot(state, state));
                out.iter_mut().for_each(|o| *o += norm);
            }
        }
    }
}

fn check_vector(what: &'static str, v: &[f32], expected: usize) -> Result<(), Error> {
    if v.len() != expected {
        return Err(Error::Length { what, expected, got: v.len() });
    }
    if v.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(Error::OutOfRange(what)) }
}

/// `1 / (1 + e^−x)`
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

#[cfg(test)]
mod tests;
