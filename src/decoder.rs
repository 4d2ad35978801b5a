//! The decoder that every drop-in model runs on: weights held once, one step over plain slices.
//!
//! ```text
//! embed → per layer [norm → qkv → rope → cache → attention → o → add → norm → gate·up·act → down → add] → norm → head
//! ```
//!
//! Between two operations there is no `Tensor`: a step works in buffers that live in the cache. A lone token goes through
//! `decode.rs`, where all threads run the whole step; everything else through `prefill.rs`, one region per operation.

mod decode;
mod inventory;
mod load;
mod payoff;
mod prefill;
mod settings;
mod state;
mod stored;
mod tap;

use crate::{
    AttentionConfig, Error, Threads, Weight,
    attention::Plan,
    deadline::Deadline,
    gate::FastGrnnGate,
    kv_cache::{KvCache, Origin},
    sparse::{Plans, Points, SparseFfn},
    weight::{On, Stack},
};
use candle_core::{Result, bail};
use candle_sparse_core::{
    ActivationGroup, Config, KernelSet,
    kernel::{rms_norm::shifted_relu, rope},
};
use candle_sparse_kernels::{Kernels, Level};
pub use inventory::{check_names, has_mlp_bias};
pub use load::{Checkpoint, Extras, LoadOptions};
pub use state::{LayerStats, SparseStats};
use std::{sync::Arc, time::Duration};
pub use stored::{Held, Stored};
pub use tap::LayerTap;

/// A projection and its bias.
#[derive(Clone, Debug)]
struct Projection<W = Stack> {
    weight: W,
    bias: Option<Vec<f32>>,
}

#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: Vec<f32>,
    /// q, k and v one below the other, so that one hand-over serves all three.
    qkv_proj: Projection,
    o_proj: Projection,
    post_attention_layernorm: Vec<f32>,
    ffn: Ffn,
}

/// What a block holds of its FFN.
#[derive(Clone, Debug)]
enum Ffn {
    Dense(DenseFfn),
    /// With a profile.
    Sparse(SparseFfn),
}

#[derive(Clone, Debug)]
struct DenseFfn {
    gate_proj: Projection<Weight>,
    up_proj: Projection<Weight>,
    down_proj: Projection,
}

impl Layer {
    /// Bytes of the matrices that a token reads when all neurons are computed.
    fn bytes(&self) -> usize {
        self.qkv_proj.weight.bytes() + self.o_proj.weight.bytes() + self.ffn.dense_bytes()
    }
}

impl Ffn {
    fn sparse(&self) -> Option<&SparseFfn> {
        match self {
            Self::Sparse(ffn) => Some(ffn),
            Self::Dense(_) => None,
        }
    }

    /// Bytes that all neurons read.
    fn dense_bytes(&self) -> usize {
        match self {
            Self::Dense(f) => {
                f.gate_proj.weight.bytes() + f.up_proj.weight.bytes() + f.down_proj.weight.bytes()
            }
            Self::Sparse(f) => f.dense_bytes(),
        }
    }
}

/// How the FFNs of a model with a profile run.
#[derive(Clone, Debug)]
struct Sparse {
    points: Points,
    plans: Arc<Plans>,
}

/// A whole model, immutable; state lives in [`KvCache`] and [`Scratch`]. `Clone` shares the weights.
#[derive(Clone, Debug)]
pub struct Decoder {
    config: Config,
    /// Angle per position of each pair of a head.
    inv_freq: Arc<[f32]>,
    kernels: &'static Kernels,
    threads: Threads,
    embed_tokens: Weight,
    layers: Arc<[Layer]>,
    /// `None`: all blocks are dense.
    sparse: Option<Sparse>,
    /// Why all blocks are dense though there was a profile.
    not_sparse: Option<String>,
    attention: AttentionConfig,
    /// One per layer, or none.
    gates: Arc<[FastGrnnGate]>,
    norm: Vec<f32>,
    lm_head: Weight,
    notices: Vec<String>,
    /// What makes keys and values this model's.
    origin: Arc<Origin>,
}

/// Working memory of a step; grows to the largest step and stays.
#[derive(Default)]
pub struct Scratch {
    prefill: prefill::Scratch,
    decode: decode::Scratch,
    state: state::State,
    plan: Plan,
    time_limit: Option<Duration>,
}

impl Scratch {
    /// What the sparse FFNs did, see [`SparseStats`].
    #[must_use]
    pub fn sparse_stats(&self) -> SparseStats {
        self.state.stats()
    }

    /// How long a step may take; `None`: as long as it takes.
    pub fn set_time_limit(&mut self, limit: Option<Duration>) {
        self.time_limit = limit;
    }

    /// Begins to count anew; what the guard has learned stays.
    pub fn reset_sparse_stats(&mut self) {
        self.state.reset();
    }
}

impl core::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

impl Clone for Scratch {
    /// A clone starts without working memory; only the state of the sparse FFNs outlives a step.
    fn clone(&self) -> Self {
        Self { state: self.state.clone(), time_limit: self.time_limit, ..Self::default() }
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

    /// What keys and values of this model are told from others' by, its fingerprint among it.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        &self.origin
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
        let predictor = |l: &Layer| l.ffn.sparse().map_or(0, |f| f.bytes() - f.dense_bytes());
        let embedding = if tied { 0 } else { self.embed_tokens.bytes() };
        self.weight_bytes_per_token() + self.layers.iter().map(predictor).sum::<usize>() + embedding
    }

    /// Bytes of the matrices that one decoded token reads when all neurons are computed: all but the embedding, of which
    /// it reads a row. [`SparseStats`] has what was read.
    #[must_use]
    pub fn weight_bytes_per_token(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.lm_head.bytes()
    }

    /// The same where the FFNs read what `stats` counted.
    #[must_use]
    pub fn read_bytes_per_token(&self, stats: &SparseStats) -> usize {
        let dense = self.layers.iter().zip(&stats.layers).map(|(l, _)| l.ffn.dense_bytes()).sum::<usize>();
        let read = stats.layers.iter().map(|l| l.bytes_per_token).sum::<f64>();
        self.weight_bytes_per_token() - dense + read as usize
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
            let problem = "it was made for a model of another shape or sliding window".into();
            return Err(Error::WrongModel { what: "the kv cache", problem }.into());
        }
        if step.index_pos > 0 {
            cache.check_origin(&self.origin)?;
        }
        if let Input::Ids(ids) = input {
            self.check_ids(ids)?;
        }
        cache.check_in_parts(step.batch, step.index_pos, step.seq_len, prefill::chunk(step.batch))
    }

    /// Runs `step` and writes the logits that are wanted; the cache is cut back to `step.index_pos` first.
    ///
    /// # Errors
    /// An empty input, a token that is not in the vocabulary, a position that leaves a gap or is past the context,
    /// another batch than the cached one, or a cache made for another shape or filled by another model; in a decode step of a
    /// model with a profile also a number that is not finite; a [`DeadlineExceeded`](crate::DeadlineExceeded) where a
    /// time limit is set, at most a layer too late. The cache is unchanged then.
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
        self.check_all(input, step, cache, wanted, logits)?;
        cache.set_origin(&self.origin);
        let deadline = s.time_limit.map(Deadline::new);
        if step.batch * step.seq_len == 1 {
            return self.decode(input, step.index_pos, cache, s, deadline, logits);
        }
        let Some(deadline) = deadline else {
            return self.prefill(input, step, cache, &mut s.prefill, wanted, logits, None, None);
        };
        let before = cache.remember(step.index_pos);
        let done = self.prefill(input, step, cache, &mut s.prefill, wanted, logits, Some(deadline), None);
        match done {
            Ok(()) => cache.settled(),
            Err(_) => cache.restore(before),
        }
        done
    }

    /// Touches what the first real decode step would: weights, threads, working memory; cache and statistics are as before.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn warm_up(&self, cache: &mut KvCache, s: &mut Scratch) -> Result<()> {
        let (position, mut logits) = (cache.len(), vec![0.0; self.config.vocab_size]);
        if position >= self.config.max_position_embeddings || cache.batch_size() > 1 {
            return Ok(());
        }
        let (before, state, limit) = (cache.remember(position), s.state.clone(), s.time_limit.take());
        let step = Step { batch: 1, seq_len: 1, index_pos: position };
        let done = self.forward(Input::Ids(&[0]), step, cache, s, Logits::Last, &mut logits);
        cache.restore(before);
        (s.state, s.time_limit) = (state, limit);
        done
    }

    /// As [`Self::forward`] for the logits of all positions, with `tap` between the activations and the down projection
    /// of every block; a lone token takes this path too.
    ///
    /// # Errors
    /// As [`Self::forward`].
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_tapped(
        &self,
        input: Input<'_>,
        step: Step,
        cache: &mut KvCache,
        s: &mut Scratch,
        tap: &mut dyn LayerTap,
        logits: &mut [f32],
    ) -> Result<()> {
        self.check_all(input, step, cache, Logits::All, logits)?;
        cache.set_origin(&self.origin);
        self.prefill(input, step, cache, &mut s.prefill, Logits::All, logits, None, Some(tap))
    }

    /// [`Self::check`], and panics unless the lengths are those that `step` says.
    fn check_all(
        &self,
        input: Input<'_>,
        step: Step,
        cache: &KvCache,
        wanted: Logits,
        logits: &[f32],
    ) -> Result<()> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let Step { batch, seq_len, .. } = step;
        self.check(input, step, cache)?;
        let rows = batch * if wanted == Logits::All { seq_len } else { 1 };
        assert_eq!(logits.len(), rows * vocab, "forward: wrong number of logits");
        match input {
            Input::Ids(ids) => assert_eq!(ids.len(), batch * seq_len, "forward: wrong number of tokens"),
            Input::Embeddings(e) => {
                assert_eq!(e.len(), batch * seq_len * hidden, "forward: wrong number of embeddings");
            }
        }
        Ok(())
    }

    fn on(&self) -> On<'_> {
        On { kernels: self.kernels, threads: self.threads }
    }

    /// What attention and FFN read: the norm, for shifted-ReLU models `max(norm − shift, 0)`.
    fn norm_row(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        self.kernels.rms_norm(x, weight, self.config.rms_norm_eps, y);
        if let Some(shift) = self.config.norm_shift {
            shifted_relu(y, shift);
        }
    }

    /// Rotates queries and keys of a row of `[q, k, v]` and scales the queries by `1/√head_dim`.
    fn rotate_row(&self, qkv: &mut [f32], cos: &[f32], sin: &[f32]) {
        let c = &self.config;
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        for head in qkv[..c.q_dim() + c.kv_dim()].chunks_exact_mut(c.head_dim) {
            rope::rope(head, cos, sin, c.rope.interleaved);
        }
        qkv[..c.q_dim()].iter_mut().for_each(|v| *v *= scale);
    }

    /// Sizes the working memory of `rows` quantised rows of the widest projection.
    fn resize_groups(&self, rows: usize, groups: &mut Vec<ActivationGroup>) {
        let c = &self.config;
        let widest = c.hidden_size.max(c.intermediate_size).max(c.q_dim());
        groups.resize(rows * ActivationGroup::count(widest), ActivationGroup::ZERO);
    }
}

fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

/// Sets the length; shrinking keeps the memory.
fn resize(v: &mut Vec<f32>, n: usize) {
    v.resize(n, 0.0);
}
