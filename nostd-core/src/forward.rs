//! One decoder step of a Llama, readable from top to bottom and generic over the kernel set.

use crate::{
    attention::{AttentionConfig, AttentionMode, Past, rotate},
    config::Config,
    error::Error,
    ffn,
    format::Format,
    kernel::{GluActivation, KernelSet, rms_norm::shifted_relu, rope},
    kv_cache::{KvCache, KvConfig, PAGE_LEN, Token, layout::Layout, page},
    scratch::{Forms, Scratch},
    weights::{Ffn, LayerWeights, Weights},
};

/// A model that was checked: its shape, its weights, and the settings it runs with.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    config: Config,
    weights: Weights<'a>,
    attention: AttentionConfig,
    kv: KvConfig,
}

impl<'a> Model<'a> {
    /// A dense model that keeps every position in F16.
    ///
    /// # Errors
    /// As [`Self::with_settings`].
    pub fn new(config: Config, weights: Weights<'a>) -> Result<Self, Error> {
        Self::with_settings(config, weights, AttentionConfig::default(), KvConfig::exact(Format::F16))
    }

    /// A model that reads its past as `attention` says and keeps it as `kv` says. How a block chooses its neurons stands beside
    /// its weights, [`Ffn::Sparse`].
    ///
    /// # Errors
    /// A tensor has another shape than `config` asks for, `config` or `kv` is no usable one, or [`AttentionMode::Gated`] for
    /// a model without gates in all layers.
    pub fn with_settings(
        config: Config,
        weights: Weights<'a>,
        attention: AttentionConfig,
        kv: KvConfig,
    ) -> Result<Self, Error> {
        weights.validate(&config)?;
        kv.validate()?;
        if attention.mode == AttentionMode::Gated && weights.layers.iter().any(|l| l.gate.is_none()) {
            return Err(Error::Missing("an attention gate in every layer, which gated attention needs"));
        }
        Ok(Self { config, weights, attention, kv })
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its weights.
    #[must_use]
    pub fn weights(&self) -> &Weights<'a> {
        &self.weights
    }

    /// What a token reads of its past.
    #[must_use]
    pub fn attention(&self) -> &AttentionConfig {
        &self.attention
    }

    /// How the past is kept.
    #[must_use]
    pub fn kv(&self) -> &KvConfig {
        &self.kv
    }

    /// The largest state of a layer's gate; `None` where no gate has a say.
    pub(crate) fn state_len(&self) -> Option<usize> {
        let gated = self.attention.mode == AttentionMode::Gated;
        let lens = self.weights.layers.iter().filter_map(|l| l.gate.as_ref()).map(|g| g.state_len());
        gated.then(|| lens.max().unwrap_or(0))
    }

    /// Elements of working memory that the gates need.
    pub(crate) fn gate_room(&self) -> usize {
        let lens = self.weights.layers.iter().filter_map(|l| l.gate.as_ref()).map(|g| g.scratch_len());
        self.state_len().map_or(0, |_| lens.max().unwrap_or(0))
    }

    pub(crate) fn recalls(&self) -> bool {
        self.attention.chooses_by_token()
    }

    fn layout(&self) -> Layout {
        Layout::new(&self.config, self.kv, self.state_len(), self.recalls())
    }

    fn layout_for(&self, positions: usize) -> Layout {
        self.layout().seeing(positions.div_ceil(PAGE_LEN).saturating_sub(1))
    }

    /// Pages that lists of working memory have room for.
    pub(crate) fn listed_pages(&self, positions: usize) -> usize {
        if self.attention.mode == AttentionMode::Dense { 0 } else { self.layout_for(positions).held() }
    }
}

impl<'a> KvCache<'a> {
    /// Words of 4 bytes that hold `positions` positions of a model before the first is dropped.
    #[must_use]
    pub fn words(model: &Model<'_>, positions: usize) -> usize {
        model.layout_for(positions).words()
    }

    /// An empty cache for a model in the memory that there is: for its whole context, or for as many pages as fit.
    ///
    /// # Errors
    /// `memory` has no room for four pages of each layer: the first, two that a token sees, and one to step back.
    pub fn new(model: &Model<'_>, memory: &'a mut [u32]) -> Result<Self, Error> {
        Self::with_layout(model.layout(), memory)
    }
}

/// Writes the logits `[vocab_size]` of the token that follows `token` at `position`, where they are wanted: tokens of a
/// prompt but the last need none.
///
/// `position` may lie anywhere in the past that is still held: the cache is cut back to it. `has_passed` is asked before each
/// block and before the head whether the caller's time is over. Cost: every weight once, of an FFN that chooses its neurons
/// those of the chosen ones; `2 · q_dim` multiply-adds per block and position read.
///
/// # Errors
/// A token not in the vocabulary, a position that leaves a gap, is past the context or sees what was dropped, logits of the
/// wrong length, a cache or scratch for another model, an input of a choosing FFN that is not finite, or
/// [`Error::Deadline`]. The cache is as it was before then.
pub fn forward<K: KernelSet>(
    kernels: &K,
    model: &Model<'_>,
    (token, position): (usize, usize),
    cache: &mut KvCache<'_>,
    s: &mut Scratch<'_>,
    logits: Option<&mut [f32]>,
    has_passed: &mut dyn FnMut() -> bool,
) -> Result<(), Error> {
    let (c, weights) = (&model.config, &model.weights);
    check(model, (token, position), cache, s, logits.as_deref())?;
    weights.embed_tokens.dequantize_row(token, s.x);
    rope::angles(|i| c.rope.inv_freq(i, c.head_dim), c.rope.attention_factor(), position, s.cos, s.sin);
    for (i, layer) in weights.layers.iter().enumerate() {
        if has_passed() {
            return Err(Error::Deadline);
        }
        attention(kernels, model, (i, layer), position, cache, s);
        kernels.axpy(1.0, s.y, s.x);
        ffn(kernels, c, (i, layer), cache.dense_left[i] > 0, s)?;
        kernels.axpy(1.0, s.y, s.x);
    }
    kernels.rms_norm(s.x, weights.norm, c.rms_norm_eps, s.normed);
    if let Some(logits) = logits {
        if has_passed() {
            return Err(Error::Deadline);
        }
        let forms = Forms::new(kernels, [weights.lm_head.format()].into_iter(), s.normed, s.ffn.groups);
        kernels.matmul(weights.lm_head, forms.of(weights.lm_head.format()), &mut [logits]);
    }
    cache.push(Token { position, kv: s.kv, scores: s.gates.scores, states: s.gates.states });
    note_runs(c, weights, cache, s);
    Ok(())
}

/// Everything that a step can fail of beforehand.
fn check(
    model: &Model<'_>,
    (token, position): (usize, usize),
    cache: &KvCache<'_>,
    s: &Scratch<'_>,
    logits: Option<&[f32]>,
) -> Result<(), Error> {
    let c = &model.config;
    let layout = *cache.layout();
    if (Layout { visible: layout.visible, ..model.layout() }) != layout {
        return Err(Error::WrongModel("kv cache"));
    }
    if !s.fits(model, if model.attention.mode == AttentionMode::Dense { 0 } else { layout.held() }) {
        return Err(Error::WrongModel("scratch"));
    }
    if token >= c.vocab_size {
        return Err(Error::TokenId { token, vocab_size: c.vocab_size });
    }
    if position >= c.max_position_embeddings {
        return Err(Error::Position { position, limit: c.max_position_embeddings });
    }
    match logits {
        Some(logits) if logits.len() != c.vocab_size => {
            Err(Error::Length { what: "logits", expected: c.vocab_size, got: logits.len() })
        }
        _ => cache.check(position),
    }
}

/// What attention and FFN read: the norm, for shifted-ReLU models `max(norm − shift, 0)`.
fn norm<K: KernelSet>(kernels: &K, c: &Config, x: &[f32], weight: &[f32], y: &mut [f32]) {
    kernels.rms_norm(x, weight, c.rms_norm_eps, y);
    if let Some(shift) = c.norm_shift {
        shifted_relu(y, shift);
    }
}

/// `y = o(attention(norm(x)))`; the token's keys and values, and what the gate says of it, wait for the end of the step.
fn attention<K: KernelSet>(
    kernels: &K,
    model: &Model<'_>,
    (i, layer): (usize, &LayerWeights<'_>),
    position: usize,
    cache: &KvCache<'_>,
    s: &mut Scratch<'_>,
) {
    let c = &model.config;
    norm(kernels, c, s.x, layer.input_layernorm, s.normed);
    let gate = layer.gate.as_ref().filter(|_| model.attention.mode == AttentionMode::Gated);
    if let Some(gate) = gate {
        let (heads, n) = (c.num_key_value_heads, gate.state_len());
        let all = s.gates.states.len() / c.num_hidden_layers;
        let state = &mut s.gates.states[i * all..i * all + n];
        state.copy_from_slice(&cache.state_at(i, position)[..n]);
        gate.score(s.normed, state, s.gates.room, &mut s.gates.scores[i * heads..(i + 1) * heads]);
    }
    let kv = &mut s.kv[i * 2 * c.kv_dim()..(i + 1) * 2 * c.kv_dim()];
    let (k, v) = kv.split_at_mut(c.kv_dim());
    let formats = [&layer.q_proj, &layer.k_proj, &layer.v_proj].map(|p| p.weight.format());
    let x = Forms::new(kernels, formats.into_iter(), s.normed, s.ffn.groups);
    layer.q_proj.product_of(kernels, &x, s.attention.q);
    layer.k_proj.product_of(kernels, &x, k);
    layer.v_proj.product_of(kernels, &x, v);
    rotate(c, s.attention.q, s.cos, s.sin);
    rotate(c, k, s.cos, s.sin);
    page::round(model.kv.dtype, k);
    page::round(model.kv.dtype, v);
    let thresholds = gate.map(|g| g.threshold);
    let recall_shares = layer.recall_shares;
    let past =
        Past { config: c, attention: &model.attention, thresholds, recall_shares, cache, layer: i, position };
    past.attend(kernels, k, v, &mut s.attention);
    layer.o_proj.product(kernels, s.attention.attended, s.ffn.groups, s.y);
}

/// `y = ffn(norm(x))`
fn ffn<K: KernelSet>(
    kernels: &K,
    c: &Config,
    (i, layer): (usize, &LayerWeights<'_>),
    dense: bool,
    s: &mut Scratch<'_>,
) -> Result<(), Error> {
    norm(kernels, c, s.x, layer.post_attention_layernorm, s.normed);
    let act = GluActivation { act: c.hidden_act, shift: c.gate_shift };
    match &layer.ffn {
        Ffn::Dense(ffn) => ffn::dense(kernels, act, ffn, s.normed, &mut s.ffn, s.y),
        Ffn::Sparse(ffn, plan) => {
            if !s.normed.iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { layer: i });
            }
            let plan = plan.as_ref().filter(|_| !dense);
            let run = ffn::sparse(kernels, act, ffn, plan, s.normed, &mut s.ffn, s.y);
            s.runs[i] = [run.active, run.candidates];
            return Ok(());
        }
    }
    s.runs[i] = [c.intermediate_size as u32; 2];
    Ok(())
}

/// A block that needed nearly all neurons runs dense for a while.
fn note_runs(c: &Config, weights: &Weights<'_>, cache: &mut KvCache<'_>, s: &Scratch<'_>) {
    for ((left, layer), [active, _]) in cache.dense_left.iter_mut().zip(weights.layers).zip(&*s.runs) {
        if let Ffn::Sparse(_, Some(_)) = layer.ffn {
            *left = ffn::dense_left(*left, *left > 0, *active as usize, c.intermediate_size);
        }
    }
}
