//! The scalar kernels with the rows of every matrix divided between two cores. A row has the same bits whoever computes it.

use candle_sparse_core::{
    Activation, ActivationGroup, Columns, GluActivation, KernelSet, Matrix, Neurons, Scalar,
};
use core::{
    cell::Cell,
    hint::spin_loop,
    marker::PhantomData,
    ptr::null_mut,
    sync::atomic::{AtomicPtr, Ordering},
};

/// Rows below which a matrix is not worth the way to the other core.
const LEAST_ROWS: usize = 16;

/// Half of a product.
struct Job<'a> {
    w: Matrix<'a>,
    x: Columns<'a>,
    y: &'a mut [f32],
}

/// Where the first core leaves work for the second.
pub(crate) struct Mailbox {
    /// Null: there is none.
    job: AtomicPtr<Job<'static>>,
}

impl Mailbox {
    pub(crate) const fn new() -> Self {
        Self { job: AtomicPtr::new(null_mut()) }
    }

    /// Does the work that waits, if any. The second core calls this for ever, and nobody else.
    pub(crate) fn serve(&self) {
        let job = self.job.load(Ordering::Acquire);
        if job.is_null() {
            return spin_loop();
        }
        {
            // SAFETY: `TwoCores::matmul` has put a valid job here and neither moves, reads nor drops it before the pointer is
            // null again, which it becomes below, after the last use of this reference. One core alone serves.
            let Job { w, x, y } = unsafe { &mut *job };
            Scalar.matmul(*w, *x, &mut [&mut **y]);
        }
        self.job.store(null_mut(), Ordering::Release);
    }
}

/// The kernels of the first core. Not `Sync`, and made once for a mailbox: a second job would overwrite the first.
pub(crate) struct TwoCores<'a> {
    mailbox: &'a Mailbox,
    one_core_only: PhantomData<Cell<()>>,
}

impl<'a> TwoCores<'a> {
    pub(crate) fn new(mailbox: &'a mut Mailbox) -> (Self, &'a Mailbox) {
        let mailbox = &*mailbox;
        (Self { mailbox, one_core_only: PhantomData }, mailbox)
    }
}

impl KernelSet for TwoCores<'_> {
    fn matmul(&self, w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
        let [y] = y else { return Scalar.matmul(w, x, y) };
        if w.rows() < LEAST_ROWS {
            return Scalar.matmul(w, x, &mut [&mut **y]);
        }
        let half = w.rows() / 2;
        let (mine, theirs) = y.split_at_mut(half);
        let mut job = Job { w: w.slice_rows(half..w.rows()), x, y: theirs };
        self.mailbox.job.store((&raw mut job).cast(), Ordering::Release);
        // A panic in here would end this frame while the other core uses it; firmware aborts on a panic.
        Scalar.matmul(w.slice_rows(0..half), x, &mut [mine]);
        while !self.mailbox.job.load(Ordering::Acquire).is_null() {
            spin_loop();
        }
    }

    fn matmul_t(&self, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
        Scalar.matmul_t(w, a, y);
    }

    fn matvec_rows(&self, w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
        Scalar.matvec_rows(w, rows, x, y);
    }

    fn axpy_rows(&self, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
        Scalar.axpy_rows(w, rows, a, y);
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
        Scalar.sparse_ffn(w, act, active, x, gate, y);
    }

    fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        Scalar.dot(x, y)
    }

    fn axpy(&self, alpha: f32, x: &[f32], y: &mut [f32]) {
        Scalar.axpy(alpha, x, y);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        Scalar.rms_norm(x, weight, eps, y);
    }

    fn softmax(&self, x: &mut [f32]) {
        Scalar.softmax(x);
    }

    fn exp_sum(&self, x: &mut [f32], max_before: f32) -> (f32, f32) {
        Scalar.exp_sum(x, max_before)
    }

    fn gated(&self, act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
        Scalar.gated(act, gate_shift, gate, y);
    }

    fn quantize(&self, x: &[f32], groups: &mut [ActivationGroup]) {
        Scalar.quantize(x, groups);
    }
}
