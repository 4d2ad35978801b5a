//! The choice of a level, and the operations at it.

use crate::{
    arch::Token,
    kernel::{
        activation::Gated,
        axpy_rows::AxpyRows,
        matmul::{Matmul, Matvec},
        matmul_t::MatmulT,
        prefetch::Ahead,
        quantize::Quantize,
        rms_norm::RmsNorm,
        softmax::{ExpSum, Softmax},
        sparse_ffn::{MatvecRows, SparseFfn},
        vector::{Axpy, Dot},
    },
    level::{Level, LevelError},
};
use candle_sparse_core::{
    Activation, ActivationGroup, Columns, GluActivation, KernelSet, Matrix, Neurons, Scalar,
    kernel::{
        matmul::{check_matmul, check_matmul_t},
        sparse_ffn::{check_axpy_rows, check_matvec_rows, check_sparse_ffn},
    },
};
use std::sync::OnceLock;

/// The operations at one level.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    pub(crate) level: Level,
    /// None is the scalar level.
    pub(crate) token: Option<Token>,
}

impl Kernels {
    /// The kernels of the level that `CANDLE_SPARSE_LEVEL` names, else of the best one; chosen once per process.
    ///
    /// # Errors
    /// The variable names no level, or one that this CPU lacks.
    pub fn get() -> Result<&'static Self, LevelError> {
        static CHOSEN: OnceLock<Result<Kernels, LevelError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| {
                let setting = std::env::var("CANDLE_SPARSE_LEVEL").ok();
                let level = Level::choose(setting.as_deref())?;
                Ok(Self { level, token: Token::detect(level) })
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The kernels of a level, `None` where this CPU lacks it.
    #[must_use]
    pub fn for_level(level: Level) -> Option<Self> {
        level.is_supported().then(|| Self { level, token: Token::detect(level) })
    }

    /// The kernels of every level this CPU has, lowest first; tests and benches walk this.
    pub fn available() -> impl Iterator<Item = Self> {
        Level::ALL.into_iter().filter_map(Self::for_level)
    }

    /// [`KernelSet::matmul_t`] over pages of a cache, while it asks for the memory of what is read next: pages are short
    /// and lie apart, and the hardware does not see them coming.
    pub fn matmul_t_before(
        &self,
        w: Matrix<'_>,
        a: &[&[f32]],
        y: &mut [&mut [f32]],
        next: Option<Matrix<'_>>,
    ) {
        let Some(token) = self.token else { return Scalar.matmul_t(w, a, y) };
        check_matmul_t(&w, a, y);
        token.run_rows(w, MatmulT { cols: w.cols(), a, y, ahead: Ahead::new(w, next) });
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }
}

impl KernelSet for Kernels {
    fn matmul(&self, w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
        let Some(token) = self.token else { return Scalar.matmul(w, x, y) };
        check_matmul(&w, &x, y);
        match y {
            [y] => token.run_rows(w, Matvec { x, y }),
            y => match (self.own_packing(w, y.len()), x) {
                (Some(packing), Columns::F32(x)) => self.pack_and_multiply(packing, w, x, y),
                (_, x) => token.run_rows(w, Matmul { x, y }),
            },
        }
    }

    fn matmul_t(&self, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
        self.matmul_t_before(w, a, y, None);
    }

    fn matvec_rows(&self, w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.matvec_rows(w, rows, x, y) };
        check_matvec_rows(&w, rows, &x, y);
        token.run_rows(w, MatvecRows { rows, x, y });
    }

    fn axpy_rows(&self, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.axpy_rows(w, rows, a, y) };
        check_axpy_rows(&w, rows, a, y);
        token.run_rows(w, AxpyRows { rows, a, y });
    }

    fn sparse_ffn(
        &self,
        w: Neurons<'_>,
        act: GluActivation,
        active: &[u32],
        x: Columns<'_>,
        gate: &mut [f32],
        y: &mut [f32],
    ) {
        let Some(token) = self.token else { return Scalar.sparse_ffn(w, act, active, x, gate, y) };
        check_sparse_ffn(&w, active, &x, gate, y);
        let rows_per_neuron = w.rows_per_neuron();
        token.run_rows(w.matrix(), SparseFfn { rows_per_neuron, act, active, x, gate, y });
    }

    fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        let Some(token) = self.token else { return Scalar.dot(x, y) };
        token.run(Dot { x, y })
    }

    fn axpy(&self, alpha: f32, x: &[f32], y: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.axpy(alpha, x, y) };
        token.run(Axpy { alpha, x, y });
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.rms_norm(x, weight, eps, y) };
        token.run(RmsNorm { x, weight, eps, y });
    }

    fn softmax(&self, x: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.softmax(x) };
        token.run(Softmax(x));
    }

    fn exp_sum(&self, x: &mut [f32], max_before: f32) -> (f32, f32) {
        let Some(token) = self.token else { return Scalar.exp_sum(x, max_before) };
        token.run(ExpSum { x, max_before })
    }

    fn gated(&self, act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
        let Some(token) = self.token else { return Scalar.gated(act, gate_shift, gate, y) };
        token.run(Gated { act, shift: gate_shift, gate, y });
    }

    fn quantize(&self, x: &[f32], groups: &mut [ActivationGroup]) {
        let Some(token) = self.token else { return Scalar.quantize(x, groups) };
        token.run(Quantize { x, groups });
    }
}
