//! Every kernel compiled for every level, and the choice between them.

use crate::{
    kernel,
    level::{Level, LevelError},
};
use candle_sparse_core::{Activation, ActivationGroup, Columns, Gate, KernelSet, Matrix, Neurons, Scalar};
use std::sync::OnceLock;

type Matmul = unsafe fn(Matrix<'_>, Columns<'_>, &mut [&mut [f32]]);
type MatmulT = unsafe fn(Matrix<'_>, &[&[f32]], &mut [&mut [f32]]);
type MatmulTBefore = unsafe fn(Matrix<'_>, &[&[f32]], &mut [&mut [f32]], Option<Matrix<'_>>);
type SparseFfn = unsafe fn(Neurons<'_>, Gate, &[u32], Columns<'_>, &mut [f32], &mut [f32]);

/// The kernels of one level. Entries are `unsafe` to call because the CPU must have the level's instructions.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    level: Level,
    matmul: Matmul,
    matmul_t: MatmulT,
    matvec_rows: unsafe fn(Matrix<'_>, &[u32], Columns<'_>, &mut [f32]),
    axpy_rows: unsafe fn(Matrix<'_>, &[u32], &[f32], &mut [f32]),
    sparse_ffn: SparseFfn,
    dot: unsafe fn(&[f32], &[f32]) -> f32,
    axpy: unsafe fn(f32, &[f32], &mut [f32]),
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    softmax: unsafe fn(&mut [f32]),
    exp_sum: unsafe fn(&mut [f32], f32) -> (f32, f32),
    gated: unsafe fn(Activation, f32, &[f32], &mut [f32]),
    quantize: unsafe fn(&[f32], &mut [ActivationGroup]),
    matmul_t_before: MatmulTBefore,
    prefetch: unsafe fn(Matrix<'_>),
}

macro_rules! table {
    ($level:expr, $token:expr, $features:literal) => {{
        #[target_feature(enable = $features)]
        fn matmul(w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
            // SAFETY: this function's own features are the ones the token stands for.
            kernel::matmul::matmul(unsafe { $token }, w, x, y);
        }
        #[target_feature(enable = $features)]
        fn matmul_t(w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
            // SAFETY: as in `matmul`.
            kernel::matmul_t::matmul_t(unsafe { $token }, w, a, y);
        }
        #[target_feature(enable = $features)]
        fn matvec_rows(w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::sparse_ffn::matvec_rows(unsafe { $token }, w, rows, x, y);
        }
        #[target_feature(enable = $features)]
        fn axpy_rows(w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::axpy_rows::axpy_rows(unsafe { $token }, w, rows, a, y);
        }
        #[target_feature(enable = $features)]
        fn sparse_ffn(
            w: Neurons<'_>,
            act: Gate,
            active: &[u32],
            x: Columns<'_>,
            gate: &mut [f32],
            y: &mut [f32],
        ) {
            // SAFETY: as in `matmul`.
            kernel::sparse_ffn::sparse_ffn(unsafe { $token }, w, act, active, x, gate, y);
        }
        #[target_feature(enable = $features)]
        fn dot(x: &[f32], y: &[f32]) -> f32 {
            // SAFETY: as in `matmul`.
            kernel::vector::dot(unsafe { $token }, x, y)
        }
        #[target_feature(enable = $features)]
        fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::vector::axpy(unsafe { $token }, alpha, x, y);
        }
        #[target_feature(enable = $features)]
        fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::rms_norm::rms_norm(unsafe { $token }, x, weight, eps, y);
        }
        #[target_feature(enable = $features)]
        fn softmax(x: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::softmax::softmax(unsafe { $token }, x);
        }
        #[target_feature(enable = $features)]
        fn exp_sum(x: &mut [f32], max_before: f32) -> (f32, f32) {
            // SAFETY: as in `matmul`.
            kernel::softmax::exp_sum(unsafe { $token }, x, max_before)
        }
        #[target_feature(enable = $features)]
        fn gated(act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
            // SAFETY: as in `matmul`.
            kernel::activation::gated(unsafe { $token }, act, gate_shift, gate, y);
        }
        #[target_feature(enable = $features)]
        fn quantize(x: &[f32], groups: &mut [ActivationGroup]) {
            // SAFETY: as in `matmul`.
            kernel::quantize::quantize(unsafe { $token }, x, groups);
        }
        #[target_feature(enable = $features)]
        fn matmul_t_before(w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]], next: Option<Matrix<'_>>) {
            // SAFETY: as in `matmul`.
            kernel::matmul_t::matmul_t_before(unsafe { $token }, w, a, y, next);
        }
        #[target_feature(enable = $features)]
        fn prefetch(w: Matrix<'_>) {
            // SAFETY: as in `matmul`.
            kernel::prefetch::prefetch(unsafe { $token }, w);
        }
        Kernels {
            level: $level,
            matmul,
            matmul_t,
            matvec_rows,
            axpy_rows,
            sparse_ffn,
            dot,
            axpy,
            rms_norm,
            softmax,
            exp_sum,
            gated,
            quantize,
            matmul_t_before,
            prefetch,
        }
    }};
}

const SCALAR: Kernels = Kernels {
    level: Level::Scalar,
    matmul: |w, x, y| Scalar.matmul(w, x, y),
    matmul_t: |w, a, y| Scalar.matmul_t(w, a, y),
    matvec_rows: |w, rows, x, y| Scalar.matvec_rows(w, rows, x, y),
    axpy_rows: |w, rows, a, y| Scalar.axpy_rows(w, rows, a, y),
    sparse_ffn: |w, act, active, x, gate, y| Scalar.sparse_ffn(w, act, active, x, gate, y),
    dot: |x, y| Scalar.dot(x, y),
    axpy: |alpha, x, y| Scalar.axpy(alpha, x, y),
    rms_norm: |x, weight, eps, y| Scalar.rms_norm(x, weight, eps, y),
    softmax: |x| Scalar.softmax(x),
    exp_sum: |x, max_before| Scalar.exp_sum(x, max_before),
    gated: |act, gate_shift, gate, y| Scalar.gated(act, gate_shift, gate, y),
    quantize: |x, groups| Scalar.quantize(x, groups),
    matmul_t_before: |w, a, y, _| Scalar.matmul_t(w, a, y),
    prefetch: |_| (),
};

macro_rules! call {
    ($e:expr) => {{
        // SAFETY: `for_level` hands a table out only after the CPU was found to have its level's instructions.
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the macro exists to say the reason once")]
        unsafe {
            $e
        }
    }};
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
                Ok(Self::for_level(level).unwrap_or(SCALAR))
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The kernels of a level, `None` where this CPU lacks it.
    #[must_use]
    pub fn for_level(level: Level) -> Option<Self> {
        if !level.is_supported() {
            return None;
        }
        match level {
            Level::Scalar => Some(SCALAR),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Some(table!(Level::Avx2, crate::arch::avx2::Avx2::new(), "avx2,fma,f16c")),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Some(table!(
                Level::Avx512,
                crate::arch::avx512::Avx512::new(),
                "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
            )),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => Some(table!(Level::Neon, crate::arch::neon::Neon::<false>::new(), "neon")),
            #[cfg(target_arch = "aarch64")]
            Level::NeonDotprod => {
                Some(table!(Level::NeonDotprod, crate::arch::neon::Neon::<true>::new(), "neon,dotprod"))
            }
            #[allow(unreachable_patterns, reason = "levels of other architectures, none on some")]
            _ => None,
        }
    }

    /// The kernels of every level this CPU has, lowest first; tests and benches walk this.
    pub fn available() -> impl Iterator<Item = Self> {
        Level::ALL.into_iter().filter_map(Self::for_level)
    }

    /// [`KernelSet::matmul_t`] over pages of a cache, while it asks for the memory of what is read next: pages are short
    /// and lie apart, and the hardware does not see them coming.
    #[inline]
    pub fn matmul_t_before(
        &self,
        w: Matrix<'_>,
        a: &[&[f32]],
        y: &mut [&mut [f32]],
        next: Option<Matrix<'_>>,
    ) {
        if kernel::matmul_t::has_before(w) {
            return call!((self.matmul_t_before)(w, a, y, next));
        }
        if let Some(next) = next {
            call!((self.prefetch)(next));
        }
        call!((self.matmul_t)(w, a, y));
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }
}

impl KernelSet for Kernels {
    #[inline]
    fn matmul(&self, w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
        call!((self.matmul)(w, x, y));
    }

    #[inline]
    fn matmul_t(&self, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
        call!((self.matmul_t)(w, a, y));
    }

    #[inline]
    fn matvec_rows(&self, w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
        call!((self.matvec_rows)(w, rows, x, y));
    }

    #[inline]
    fn axpy_rows(&self, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
        call!((self.axpy_rows)(w, rows, a, y));
    }

    #[inline]
    fn sparse_ffn(
        &self,
        w: Neurons<'_>,
        act: Gate,
        active: &[u32],
        x: Columns<'_>,
        gate: &mut [f32],
        y: &mut [f32],
    ) {
        call!((self.sparse_ffn)(w, act, active, x, gate, y));
    }

    #[inline]
    fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        call!((self.dot)(x, y))
    }

    #[inline]
    fn axpy(&self, alpha: f32, x: &[f32], y: &mut [f32]) {
        call!((self.axpy)(alpha, x, y));
    }

    #[inline]
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        call!((self.rms_norm)(x, weight, eps, y));
    }

    #[inline]
    fn softmax(&self, x: &mut [f32]) {
        call!((self.softmax)(x));
    }

    #[inline]
    fn exp_sum(&self, x: &mut [f32], max_before: f32) -> (f32, f32) {
        call!((self.exp_sum)(x, max_before))
    }

    #[inline]
    fn gated(&self, act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
        call!((self.gated)(act, gate_shift, gate, y));
    }

    #[inline]
    fn quantize(&self, x: &[f32], groups: &mut [ActivationGroup]) {
        call!((self.quantize)(x, groups));
    }
}
