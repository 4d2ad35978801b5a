//! Many tokens at once: one parallel region per operation, rows of activations side by side.

use super::{
    Decoder, Ffn, Input as Tokens, Layer, LayerTap, Logits, Projection, Step, add_bias, gate_up::GateUp,
    resize,
};
use crate::tuning::{DOWN_TASK_BYTES, DOWN_TASKS, FEW_ROWS, PREFILL_POSITIONS};
use crate::{
    attention::{Queries, attention},
    deadline::Deadline,
    kv_cache::{KvCache, PAGE_LEN},
    threads::{Policy, ranges},
    weight::{Activations, Compute, Prepared, ROW_STEP, split_columns},
};
use candle_core::Result;
use candle_sparse_core::{KernelSet, Matrix, kernel::rope};

/// Positions of a batch's sequences that go through the layers together.
pub(super) fn chunk(batch: usize) -> usize {
    (PREFILL_POSITIONS / batch.max(1)).max(1)
}

/// Working memory, grown to the largest step.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) qkv: Vec<f32>,
    pub(super) attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    partials: Vec<f32>,
    /// What a tap adds to the output of an FFN.
    added: Vec<f32>,
    last: Vec<f32>,
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) prepared: Prepared,
    pub(super) policies: Policies,
}

/// Whether layers, and heads, of so many rows run on all threads.
#[derive(Default)]
pub(super) struct Policies {
    rows: usize,
    pub(super) layer: Policy,
    head_rows: usize,
    head: Policy,
}

impl Decoder {
    /// Runs a checked `step`.
    pub(super) fn prefill(
        &self,
        input: Tokens<'_>,
        step: Step,
        cache: &mut KvCache,
        s: &mut Scratch,
        wanted: Logits,
        logits: &mut [f32],
        deadline: Option<Deadline>,
        mut tap: Option<&mut dyn LayerTap>,
    ) -> Result<()> {
        let vocab = self.config.vocab_size;
        let Step { batch, seq_len, index_pos } = step;
        cache.truncate(index_pos);
        let chunk = chunk(batch);
        for start in (0..seq_len).step_by(chunk) {
            let n = chunk.min(seq_len - start);
            // Part by part: what a sliding window has passed makes room for the next.
            cache.extend(batch, n);
            self.enter(input, step, start, n, &mut s.x)?;
            self.layers(
                Step { batch, seq_len: n, index_pos: index_pos + start },
                cache,
                s,
                deadline,
                &mut tap,
            )?;
            cache.advance(n);
            if wanted == Logits::All {
                for (b, logits) in logits.chunks_exact_mut(seq_len * vocab).enumerate() {
                    self.head(b * n..(b + 1) * n, s, &mut logits[start * vocab..(start + n) * vocab]);
                }
            } else if start + n == seq_len {
                self.head((n - 1..batch * n).step_by(n), s, logits);
            }
        }
        Ok(())
    }

    /// Fills `x` with tokens `start..start + n` of every sequence.
    fn enter(&self, input: Tokens<'_>, step: Step, start: usize, n: usize, x: &mut Vec<f32>) -> Result<()> {
        let hidden = self.config.hidden_size;
        resize(x, step.batch * n * hidden);
        for (b, x) in x.chunks_exact_mut(n * hidden).enumerate() {
            let at = b * step.seq_len + start;
            match input {
                Tokens::Ids(ids) => self.embed(&ids[at..at + n], x)?,
                Tokens::Embeddings(e) => x.copy_from_slice(&e[at * hidden..(at + n) * hidden]),
            }
        }
        Ok(())
    }

    fn layers(
        &self,
        step: Step,
        cache: &mut KvCache,
        s: &mut Scratch,
        deadline: Option<Deadline>,
        tap: &mut Option<&mut dyn LayerTap>,
    ) -> Result<()> {
        let c = &self.config;
        let rows = step.batch * step.seq_len;
        let half = c.head_dim / 2;
        resize(&mut s.cos, step.seq_len * half);
        resize(&mut s.sin, step.seq_len * half);
        for (t, (cos, sin)) in s.cos.chunks_exact_mut(half).zip(s.sin.chunks_exact_mut(half)).enumerate() {
            rope::angles(|i| self.inv_freq[i], c.rope.attention_factor(), step.index_pos + t, cos, sin);
        }
        self.resize_rows(rows, s);
        for (i, layer) in self.layers.iter().enumerate() {
            if let Some(deadline) = deadline {
                deadline.check()?;
            }
            let mut policy = s.policies.layer;
            self.threads.schedule(&mut policy, rows, || {
                self.attention(i, layer, step, cache, s, tap);
                self.mlp(i, layer, s, tap);
            });
            s.policies.layer = policy;
        }
        Ok(())
    }

    /// Sizes the working memory of `rows` rows of activations.
    pub(super) fn resize_rows(&self, rows: usize, s: &mut Scratch) {
        let c = &self.config;
        resize(&mut s.normed, rows * c.hidden_size);
        resize(&mut s.qkv, rows * (c.q_dim() + 2 * c.kv_dim()));
        resize(&mut s.attended, rows * c.q_dim());
        resize(&mut s.gate, rows * c.intermediate_size);
        resize(&mut s.up, rows * c.intermediate_size);
        if core::mem::replace(&mut s.policies.rows, rows) != rows {
            s.policies.layer.forget_times();
        }
    }

    /// `x += o(attention(norm(x)))`
    fn attention(
        &self,
        i: usize,
        layer: &Layer,
        step: Step,
        cache: &mut KvCache,
        s: &mut Scratch,
        tap: &mut Option<&mut dyn LayerTap>,
    ) {
        let (c, on) = (&self.config, self.on());
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let width = q_dim + 2 * kv_dim;
        self.norm(&s.x, &layer.input_layernorm, &mut s.normed);
        layer.qkv_proj.matmul(on, &s.normed, &mut s.prepared, &mut s.qkv);
        self.rotate(step, s);
        if let Some(tap) = tap {
            tap.attention(i, &s.normed, &s.qkv);
        }
        for (row, qkv) in s.qkv.chunks_exact(width).enumerate() {
            let (sequence, position) = (row / step.seq_len, step.index_pos + row % step.seq_len);
            let (k, v) = qkv[q_dim..].split_at(kv_dim);
            cache.write(sequence, i, position, k, v);
        }
        let (select, end) = (self.selector(), step.index_pos + step.seq_len);
        if let Some(gate) = select.gate(i) {
            for (sequence, x) in s.normed.chunks_exact(step.seq_len * c.hidden_size).enumerate() {
                cache.observe(sequence, i, gate, self.kernels, step.index_pos, x);
            }
        }
        if select.config().chooses_by_token() {
            cache.update_bounds(i, end / PAGE_LEN);
        }
        let q = Queries { rows: &s.qkv, width, seq_len: step.seq_len, index_pos: step.index_pos };
        attention(on, c, cache, i, &select, q, &mut s.attended);
        layer.o_proj.matmul(on, &s.attended, &mut s.prepared, &mut s.normed);
        self.add(&s.normed, &mut s.x);
    }

    fn rotate(&self, step: Step, s: &mut Scratch) {
        let c = &self.config;
        let (width, half) = (c.q_dim() + 2 * c.kv_dim(), c.head_dim / 2);
        let (cos, sin) = (&s.cos, &s.sin);
        self.by_rows(width, &mut s.qkv, |first, rows| {
            for (row, qkv) in rows.chunks_exact_mut(width).enumerate() {
                let t = (first + row) % step.seq_len * half;
                self.rotate_row(qkv, &cos[t..t + half], &sin[t..t + half]);
            }
        });
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`, or `x += down(act(up(norm(x))))`
    pub(super) fn mlp(&self, i: usize, layer: &Layer, s: &mut Scratch, tap: &mut Option<&mut dyn LayerTap>) {
        let (c, on) = (&self.config, self.on());
        self.norm(&s.x, &layer.post_attention_layernorm, &mut s.normed);
        let gate_up = GateUp::of(&layer.ffn);
        let x = on.input(gate_up.formats(), c.hidden_size, &s.normed, &mut s.prepared);
        self.gate_up(gate_up, x, &mut s.gate, &mut s.up);
        if let Some(tap) = tap {
            s.added.clear();
            resize(&mut s.added, s.x.len());
            tap.ffn(i, &s.normed, &s.gate, &mut s.up, &mut s.added);
            self.add(&s.added, &mut s.x);
        }
        match &layer.ffn {
            Ffn::Dense(ffn) => ffn.down_proj.matmul(on, &s.up, &mut s.prepared, &mut s.normed),
            Ffn::Sparse(ffn) => {
                self.down(ffn.down(), &s.up, &mut s.partials, &mut s.normed);
            }
        }
        self.add(&s.normed, &mut s.x);
    }

    /// [`GateUp::activations`] in one region: each task keeps its neurons to itself.
    fn gate_up(&self, w: GateUp<'_>, x: Activations<'_>, gate: &mut [f32], up: &mut [f32]) {
        let (c, on) = (&self.config, self.on());
        let n = gate.len() / c.intermediate_size;
        let bytes = n * w.bytes();
        let tasks = on.threads.tasks(c.intermediate_size.div_ceil(ROW_STEP), bytes);
        let ranges: Vec<_> = ranges(c.intermediate_size, tasks, ROW_STEP).collect();
        let widths = || ranges.iter().map(ExactSizeIterator::len);
        let gate = split_columns(gate, c.intermediate_size, widths());
        let up = split_columns(up, c.intermediate_size, widths());
        let tasks = ranges.iter().zip(gate.into_iter().zip(up));
        on.threads.for_each(tasks, |(r, (mut gate, mut up))| {
            w.activations(on.kernels, c, x, r.clone(), &mut gate, &mut up);
        });
    }

    /// `y = a · w` for `w` `[intermediate_size, hidden_size]`, cut by the shape alone: a sum over rows has other bits
    /// where it is cut otherwise, or alone.
    fn down(&self, w: Matrix<'_>, a: &[f32], partials: &mut Vec<f32>, y: &mut [f32]) {
        let (inner, hidden) = (w.rows(), w.cols());
        let rows = y.len() / hidden;
        if rows >= FEW_ROWS {
            // Each task converts the whole of w: few tasks of many rows. Rows do not depend on those beside them.
            let run = rows.div_ceil(2 * self.threads.count()).max(FEW_ROWS / 2);
            let tasks = a.chunks(run * inner).zip(y.chunks_mut(run * hidden));
            return self.threads.for_each(tasks, |(a, y)| self.sum_rows(w, inner, a, y));
        }
        let pieces = (w.bytes() / DOWN_TASK_BYTES).clamp(1, DOWN_TASKS);
        let piece = inner.div_ceil(pieces);
        // Rounded up, so that fewer may do.
        let pieces = inner.div_ceil(piece);
        resize(partials, pieces * y.len());
        let tasks = partials.chunks_mut(y.len()).enumerate();
        self.threads.for_each(tasks, |(i, y)| {
            let r = i * piece..((i + 1) * piece).min(inner);
            self.sum_rows(w.slice_rows(r.clone()), inner, &a[r.start..], y);
        });
        y.fill(0.0);
        partials.chunks_exact(y.len()).for_each(|part| self.kernels.axpy(1.0, part, y));
    }

    /// `y = a · w`, where the rows of `a` begin `stride` apart.
    fn sum_rows(&self, w: Matrix<'_>, stride: usize, a: &[f32], y: &mut [f32]) {
        y.fill(0.0);
        let a: Vec<_> = a.chunks(stride).map(|a| &a[..w.rows()]).collect();
        let mut y: Vec<_> = y.chunks_exact_mut(w.cols()).collect();
        self.kernels.matmul_t(w, &a[..y.len()], &mut y);
    }

    /// Logits of some rows of `x`.
    pub(super) fn head(
        &self,
        rows: impl ExactSizeIterator<Item = usize>,
        s: &mut Scratch,
        logits: &mut [f32],
    ) {
        let (c, hidden) = (&self.config, self.config.hidden_size);
        resize(&mut s.last, rows.len() * hidden);
        for (row, y) in rows.zip(s.last.chunks_exact_mut(hidden)) {
            let x = &s.x[row * hidden..(row + 1) * hidden];
            self.kernels.rms_norm(x, &self.norm, c.rms_norm_eps, y);
        }
        let Scratch { last, prepared, policies: p, .. } = s;
        let rows = last.len() / hidden;
        if core::mem::replace(&mut p.head_rows, rows) != rows {
            p.head.forget_times();
        }
        self.threads.schedule(&mut p.head, rows, || self.lm_head.matmul(self.on(), last, prepared, logits));
    }

    pub(super) fn norm(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let hidden = self.config.hidden_size;
        self.by_rows(hidden, y, |first, rows| {
            for (x, y) in x[first * hidden..].chunks_exact(hidden).zip(rows.chunks_exact_mut(hidden)) {
                self.norm_row(x, weight, y);
            }
        });
    }

    pub(super) fn add(&self, x: &[f32], y: &mut [f32]) {
        let hidden = self.config.hidden_size;
        self.by_rows(hidden, y, |first, rows| {
            let start = first * hidden;
            self.kernels.axpy(1.0, &x[start..start + rows.len()], rows);
        });
    }

    /// Calls `f(first row, rows)` for runs of whole rows of `y`, in parallel where there are many.
    fn by_rows(&self, width: usize, y: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = y.len() / width;
        let tasks = if rows == 1 { 1 } else { self.threads.tasks(rows, size_of_val(y)) };
        if tasks == 1 {
            return f(0, y);
        }
        let run = rows.div_ceil(tasks);
        let tasks = y.chunks_mut(run * width).enumerate();
        self.threads.for_each(tasks, |(i, rows)| f(i * run, rows));
    }
}

impl Projection {
    pub(super) fn matmul(&self, on: Compute<'_>, x: &[f32], prepared: &mut Prepared, y: &mut [f32]) {
        self.weight.matmul(on, x, prepared, y);
        for y in y.chunks_exact_mut(self.weight.rows()) {
            add_bias(y, self.bias.as_deref());
        }
    }
}
