//! The decoder that every drop-in model runs on: weights held once, one step over plain slices.
//!
//! ```text
//! embed → per layer [norm → qkv → rope → cache → attention → o → add → norm → gate·up·act → down → add] → norm → head
//! ```
//!
//! Between two operations there is no `Tensor`: a decode step works in buffers that live in the cache, so a lone
//! token allocates nothing once the cache has room.

mod load;

use candle_core::{Result, bail};
use candle_sparse::{
    Threads, Weight,
    attention::{AttentionScratch, Queries, attention},
    core::{
        ActivationGroup, Columns, Config, KernelSet,
        kernel::{rms_norm::shifted_relu, rope},
    },
    kernels::{Kernels, Level},
    kv_cache::KvCache,
    threads::ranges,
    weight::{On, ROW_STEP, split_columns},
};
pub use load::{Extras, LoadOptions};

/// Positions of a prompt that go through the layers together; bounds the working memory of long prompts.
const CHUNK: usize = 512;

/// A projection and its bias.
#[derive(Debug)]
struct Projection {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: Vec<f32>,
    /// q, k and v one below the other, so that one hand-over serves all three.
    qkv_proj: Projection,
    o_proj: Projection,
    post_attention_layernorm: Vec<f32>,
    gate_proj: Projection,
    up_proj: Projection,
    down_proj: Projection,
}

/// A whole model, immutable; state lives in [`KvCache`] and [`Scratch`].
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    kernels: &'static Kernels,
    threads: Threads,
    embed_tokens: Weight,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Weight,
    notices: Vec<String>,
}

/// Working memory of a step; grows to the largest step and stays.
#[derive(Default)]
pub struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    last: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    groups: Vec<ActivationGroup>,
    attention: AttentionScratch,
}

impl core::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

impl Clone for Scratch {
    /// A clone starts empty: nothing in here outlives a step.
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// What enters the first layer.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids `[batch, seq_len]`.
    Ids(&'a [u32]),
    /// Embeddings `[batch, seq_len, hidden_size]`.
    Embeddings(&'a [f32]),
}

/// For which positions logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last of each sequence: `[batch, vocab_size]`.
    Last,
    /// All: `[batch, seq_len, vocab_size]`.
    All,
}

/// One forward call: `batch` sequences of `seq_len` tokens from position `index_pos`.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Position of the first token of each.
    pub index_pos: usize,
}

impl Decoder {
    /// The shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The instruction set in use.
    #[must_use]
    pub fn level(&self) -> Level {
        self.kernels.level()
    }

    /// The threads in use.
    #[must_use]
    pub fn threads(&self) -> Threads {
        self.threads
    }

    /// What was done otherwise than asked while loading, one line each.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Bytes of all matrices, a tied head counted once.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let tied = self.embed_tokens.shares_memory(&self.lm_head);
        self.weight_bytes_per_token() + if tied { 0 } else { self.embed_tokens.bytes() }
    }

    /// Bytes of the matrices that one decoded token reads: all but the embedding, of which it reads a row.
    #[must_use]
    pub fn weight_bytes_per_token(&self) -> usize {
        let layer = |l: &Layer| {
            [&l.qkv_proj, &l.o_proj, &l.gate_proj, &l.up_proj, &l.down_proj]
                .map(|p| p.weight.bytes())
                .iter()
                .sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.lm_head.bytes()
    }

    /// Writes the embeddings `[n, hidden_size]` of `n` tokens.
    ///
    /// # Errors
    /// A token is not below `vocab_size`.
    ///
    /// # Panics
    /// `out` has the wrong length.
    pub fn embed(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        let c = &self.config;
        self.check_ids(ids)?;
        assert_eq!(out.len(), ids.len() * c.hidden_size, "embed: out is not [n, hidden_size]");
        let table = self.embed_tokens.matrix();
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(c.hidden_size)) {
            table.dequantize_row(*id as usize, out);
        }
        Ok(())
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            bail!("token id {id} is not below vocab_size {vocab}: does the tokenizer belong to the model?");
        }
        Ok(())
    }

    /// Whether [`Self::forward`] would succeed; changes nothing and allocates nothing.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn check(&self, input: Input<'_>, step: Step, cache: &KvCache) -> Result<()> {
        if step.batch * step.seq_len == 0 {
            bail!("the input is empty: give at least one token");
        }
        if !cache.fits(&self.config) {
            bail!("the cache was made for a model of another shape");
        }
        if let Input::Ids(ids) = input {
            self.check_ids(ids)?;
        }
        cache.check(step.batch, step.index_pos, step.seq_len)
    }

    /// Runs `step` and writes the logits that are wanted; the cache is cut back to `step.index_pos` first.
    ///
    /// # Errors
    /// An empty input, a token that is not in the vocabulary, a position that leaves a gap or is past the context,
    /// another batch than the cached one, or a cache made for another shape. The cache is unchanged then.
    ///
    /// # Panics
    /// `input` or `logits` has not the length that `step` says.
    pub fn forward(
        &self,
        input: Input<'_>,
        step: Step,
        cache: &mut KvCache,
        s: &mut Scratch,
        wanted: Logits,
        logits: &mut [f32],
    ) -> Result<()> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let Step { batch, seq_len, index_pos } = step;
        self.check(input, step, cache)?;
        let rows = batch * if wanted == Logits::All { seq_len } else { 1 };
        assert_eq!(logits.len(), rows * vocab, "forward: wrong number of logits");
        match input {
            Input::Ids(ids) => assert_eq!(ids.len(), batch * seq_len, "forward: wrong number of tokens"),
            Input::Embeddings(e) => {
                assert_eq!(e.len(), batch * seq_len * hidden, "forward: wrong number of embeddings");
            }
        }
        cache.begin(batch, index_pos, seq_len)?;
        let chunk = (CHUNK / batch).max(1);
        for start in (0..seq_len).step_by(chunk) {
            let n = chunk.min(seq_len - start);
            self.enter(input, step, start, n, &mut s.x)?;
            self.layers(Step { batch, seq_len: n, index_pos: index_pos + start }, cache, s);
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
    fn enter(&self, input: Input<'_>, step: Step, start: usize, n: usize, x: &mut Vec<f32>) -> Result<()> {
        let hidden = self.config.hidden_size;
        resize(x, step.batch * n * hidden);
        for (b, x) in x.chunks_exact_mut(n * hidden).enumerate() {
            let at = b * step.seq_len + start;
            match input {
                Input::Ids(ids) => self.embed(&ids[at..at + n], x)?,
                Input::Embeddings(e) => x.copy_from_slice(&e[at * hidden..(at + n) * hidden]),
            }
        }
        Ok(())
    }

    fn on(&self) -> On<'_> {
        On { kernels: self.kernels, threads: self.threads }
    }

    fn layers(&self, step: Step, cache: &mut KvCache, s: &mut Scratch) {
        let c = &self.config;
        let rows = step.batch * step.seq_len;
        let half = c.head_dim / 2;
        resize(&mut s.cos, step.seq_len * half);
        resize(&mut s.sin, step.seq_len * half);
        for (t, (cos, sin)) in s.cos.chunks_exact_mut(half).zip(s.sin.chunks_exact_mut(half)).enumerate() {
            rope::angles(&c.rope, step.index_pos + t, cos, sin);
        }
        resize(&mut s.normed, rows * c.hidden_size);
        resize(&mut s.qkv, rows * (c.q_dim() + 2 * c.kv_dim()));
        resize(&mut s.attended, rows * c.q_dim());
        resize(&mut s.gate, rows * c.intermediate_size);
        resize(&mut s.up, rows * c.intermediate_size);
        let widest = c.hidden_size.max(c.intermediate_size).max(c.q_dim());
        s.groups.resize(rows * ActivationGroup::count(widest), ActivationGroup::ZERO);
        for (i, layer) in self.layers.iter().enumerate() {
            self.attention(i, layer, step, cache, s);
            self.mlp(layer, s);
        }
    }

    /// `x += o(attention(norm(x)))`
    fn attention(&self, i: usize, layer: &Layer, step: Step, cache: &mut KvCache, s: &mut Scratch) {
        let (c, on) = (&self.config, self.on());
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let width = q_dim + 2 * kv_dim;
        self.norm(&s.x, &layer.input_layernorm, &mut s.normed);
        layer.qkv_proj.matmul(on, &s.normed, &mut s.groups, &mut s.qkv);
        self.rotate(step, s);
        for (row, qkv) in s.qkv.chunks_exact(width).enumerate() {
            let (sequence, position) = (row / step.seq_len, step.index_pos + row % step.seq_len);
            let (k, v) = qkv[q_dim..].split_at(kv_dim);
            cache.write(sequence, i, position, k, v);
        }
        let q = Queries { rows: &s.qkv, width, seq_len: step.seq_len, index_pos: step.index_pos };
        attention(on, c, cache, i, q, &mut s.attention, &mut s.attended);
        layer.o_proj.matmul(on, &s.attended, &mut s.groups, &mut s.normed);
        self.add(&s.normed, &mut s.x);
    }

    /// Rotates queries and keys in place and scales the queries by `1/√head_dim`.
    fn rotate(&self, step: Step, s: &mut Scratch) {
        let c = &self.config;
        let (q_dim, kv_dim, half) = (c.q_dim(), c.kv_dim(), c.head_dim / 2);
        let width = q_dim + 2 * kv_dim;
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let (cos, sin) = (&s.cos, &s.sin);
        self.by_rows(width, &mut s.qkv, |first, rows| {
            for (row, qkv) in rows.chunks_exact_mut(width).enumerate() {
                let t = (first + row) % step.seq_len * half;
                for head in qkv[..q_dim + kv_dim].chunks_exact_mut(c.head_dim) {
                    rope::rope(head, &cos[t..t + half], &sin[t..t + half], c.rope.interleaved);
                }
                qkv[..q_dim].iter_mut().for_each(|v| *v *= scale);
            }
        });
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`
    fn mlp(&self, layer: &Layer, s: &mut Scratch) {
        let (c, on) = (&self.config, self.on());
        self.norm(&s.x, &layer.post_attention_layernorm, &mut s.normed);
        let format = layer.gate_proj.weight.format();
        let columns = on.columns(format, c.hidden_size, &s.normed, &mut s.groups);
        self.gate_up(layer, columns, &mut s.gate, &mut s.up);
        layer.down_proj.matmul(on, &s.up, &mut s.groups, &mut s.normed);
        self.add(&s.normed, &mut s.x);
    }

    /// `up = act(gate_proj · x − gate_shift) · (up_proj · x)` in one region: each task keeps its neurons to itself.
    fn gate_up(&self, layer: &Layer, x: Columns<'_>, gate: &mut [f32], up: &mut [f32]) {
        let (c, on) = (&self.config, self.on());
        let (gate_w, up_w) = (layer.gate_proj.weight.matrix(), layer.up_proj.weight.matrix());
        let n = x.count(c.hidden_size);
        let tasks = on.threads.tasks(c.intermediate_size.div_ceil(ROW_STEP), 2 * n * gate_w.bytes());
        let work = |r: std::ops::Range<usize>, gate: &mut [&mut [f32]], up: &mut [&mut [f32]]| {
            on.kernels.matmul(gate_w.slice_rows(r.clone()), x, gate);
            on.kernels.matmul(up_w.slice_rows(r.clone()), x, up);
            for (gate, up) in gate.iter_mut().zip(up) {
                add_bias(gate, layer.gate_proj.bias.as_deref().map(|b| &b[r.clone()]));
                add_bias(up, layer.up_proj.bias.as_deref().map(|b| &b[r.clone()]));
                on.kernels.gated(c.hidden_act, c.gate_shift, gate, up);
            }
        };
        let ranges = ranges(c.intermediate_size, tasks, ROW_STEP);
        if n == 1 {
            let (mut gate, mut up) = (gate, up);
            let tasks = ranges.map(|r| {
                let parts = (take(&mut gate, r.len()), take(&mut up, r.len()));
                (r, parts)
            });
            on.threads.for_each(tasks, |(r, (gate, up))| work(r, &mut [gate], &mut [up]));
        } else {
            let ranges: Vec<_> = ranges.collect();
            let widths = || ranges.iter().map(ExactSizeIterator::len);
            let gate = split_columns(gate, c.intermediate_size, widths());
            let up = split_columns(up, c.intermediate_size, widths());
            let tasks = ranges.iter().zip(gate.into_iter().zip(up));
            on.threads.for_each(tasks, |(r, (mut gate, mut up))| work(r.clone(), &mut gate, &mut up));
        }
    }

    /// Logits of some rows of `x`.
    fn head(&self, rows: impl ExactSizeIterator<Item = usize>, s: &mut Scratch, logits: &mut [f32]) {
        let (c, hidden) = (&self.config, self.config.hidden_size);
        resize(&mut s.last, rows.len() * hidden);
        for (row, y) in rows.zip(s.last.chunks_exact_mut(hidden)) {
            let x = &s.x[row * hidden..(row + 1) * hidden];
            self.kernels.rms_norm(x, &self.norm, c.rms_norm_eps, y);
        }
        self.lm_head.matmul(self.on(), &s.last, &mut s.groups, logits);
    }

    /// What attention and FFN read: the norm, for shifted-ReLU models `max(norm − shift, 0)`.
    fn norm(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let (c, hidden) = (&self.config, self.config.hidden_size);
        self.by_rows(hidden, y, |first, rows| {
            for (x, y) in x[first * hidden..].chunks_exact(hidden).zip(rows.chunks_exact_mut(hidden)) {
                self.kernels.rms_norm(x, weight, c.rms_norm_eps, y);
                if let Some(shift) = c.norm_shift {
                    shifted_relu(y, shift);
                }
            }
        });
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
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
    fn matmul(&self, on: On<'_>, x: &[f32], groups: &mut [ActivationGroup], y: &mut [f32]) {
        self.weight.matmul(on, x, groups, y);
        for y in y.chunks_exact_mut(self.weight.rows()) {
            add_bias(y, self.bias.as_deref());
        }
    }
}

fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

fn take<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    head
}

/// Sets the length; shrinking keeps the memory.
fn resize(v: &mut Vec<f32>, n: usize) {
    v.resize(n, 0.0);
}
