//! Working memory of a step, carved from what the caller gives.

use crate::{
    config::Config,
    error::Error,
    ffn::{PANEL, Run, choose::ChoiceScratch},
    format::{ActivationGroup, Format},
    forward::Model,
    kernel::KernelSet,
    kv_cache::PAGE_LEN,
    matrix::Columns,
    weights::Ffn,
};

/// Working memory of [`forward`](crate::forward::forward).
#[derive(Debug)]
pub struct Scratch<'a> {
    sizes: Sizes,
    /// Pages that lists have room for.
    pages: usize,
    /// `[hidden_size]`: the residual stream.
    pub(crate) x: &'a mut [f32],
    /// `[hidden_size]`
    pub(crate) normed: &'a mut [f32],
    /// `[hidden_size]`: what a part of a block adds.
    pub(crate) y: &'a mut [f32],
    /// `[layers, 2 · kv_dim]`
    pub(crate) kv: &'a mut [f32],
    pub(crate) cos: &'a mut [f32],
    pub(crate) sin: &'a mut [f32],
    /// `[layers]`
    pub(crate) runs: &'a mut [[u32; 2]],
    pub(crate) gates: GateScratch<'a>,
    pub(crate) attention: AttentionScratch<'a>,
    pub(crate) ffn: FfnScratch<'a>,
}

/// What the attention's gates say of the token.
#[derive(Debug)]
pub(crate) struct GateScratch<'a> {
    /// `[layers, kv_heads]`
    pub(crate) scores: &'a mut [f32],
    /// `[layers, state_len]`
    pub(crate) states: &'a mut [f32],
    pub(crate) room: &'a mut [f32],
}

/// Of one token's attention.
#[derive(Debug)]
pub(crate) struct AttentionScratch<'a> {
    /// `[q_dim]`
    pub(crate) q: &'a mut [f32],
    /// `[q_dim]`
    pub(crate) attended: &'a mut [f32],
    /// `[heads, PAGE_LEN]`
    pub(crate) scores: &'a mut [f32],
    /// `[heads]`: maximum and denominator of the softmax.
    pub(crate) stats: &'a mut [[f32; 2]],
    /// A position's values of all heads, in whole blocks.
    pub(crate) row: &'a mut [f32],
    /// `[2, kv_heads, pages / 32]`: the pages that each head reads, a bit each, and which of them stand for others.
    pub(crate) chosen: &'a mut [u32],
    /// `[pages]`
    pub(crate) pages: &'a mut [u32],
    /// `[pages]`
    pub(crate) recalled: &'a mut [u32],
    /// `[group, 2 · head_dim]`: negative and positive parts of queries.
    pub(crate) parts: &'a mut [f32],
    /// `[group, pages]`
    pub(crate) bounds: &'a mut [f32],
}

/// Of one token's FFN.
#[derive(Debug)]
pub(crate) struct FfnScratch<'a> {
    /// `[intermediate_size]`
    pub(crate) gate: &'a mut [f32],
    /// `[intermediate_size]`
    pub(crate) up: &'a mut [f32],
    /// `[intermediate_size]` where a block takes a top-k.
    pub(crate) scores: &'a mut [f32],
    /// `[intermediate_size]` where a block is neuron-major.
    pub(crate) list: &'a mut [u32],
    /// `[rank]`
    pub(crate) z: &'a mut [f32],
    pub(crate) room: &'a mut [f32],
    pub(crate) candidates: &'a mut [u32],
    pub(crate) groups: &'a mut [ActivationGroup],
}

/// How many elements each part has, in the order in which they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes([usize; 25]);

impl Sizes {
    fn new(model: &Model<'_>, pages: usize) -> Self {
        let c = model.config();
        let ffns = || model.weights().layers.iter().map(|l| &l.ffn);
        let plans = || ffns().filter_map(|f| if let Ffn::Sparse(_, plan) = f { *plan } else { None });
        let sparse = ffns().any(|f| matches!(f, Ffn::Sparse(..)));
        let rank = ffns().map(|f| if let Ffn::Sparse(f, Some(_)) = f { f.rank() } else { 0 });
        let (chooses, top) = (plans().next().is_some(), plans().any(|p| p.top.is_some()));
        let when = |condition: bool, n: usize| if condition { n } else { 0 };
        let (layers, heads, recalls) = (c.num_hidden_layers, c.num_attention_heads, model.recalls());
        let gates = model.state_len();
        Self([
            c.hidden_size,
            c.hidden_size,
            c.hidden_size,
            layers * 2 * c.kv_dim(),
            c.head_dim / 2,
            c.head_dim / 2,
            2 * layers,
            when(gates.is_some(), layers * c.num_key_value_heads),
            layers * gates.unwrap_or(0),
            model.gate_room(),
            c.q_dim(),
            c.q_dim(),
            heads * PAGE_LEN,
            2 * heads,
            c.kv_dim().next_multiple_of(PAGE_LEN),
            2 * c.num_key_value_heads * pages.div_ceil(32),
            pages,
            when(recalls, pages),
            when(recalls, 2 * c.group_size() * c.head_dim),
            when(recalls, c.group_size() * pages),
            c.intermediate_size,
            c.intermediate_size,
            when(top, c.intermediate_size),
            when(sparse, c.intermediate_size),
            rank.max().unwrap_or(0) + when(chooses, ChoiceScratch::elements(PANEL) + PANEL),
        ])
    }
}

impl<'a> Scratch<'a> {
    /// Elements of f32 that a model needs with a cache that was made for `positions` positions.
    #[must_use]
    pub fn elements(model: &Model<'_>, positions: usize) -> usize {
        Sizes::new(model, model.listed_pages(positions)).0.into_iter().fold(0, usize::saturating_add)
    }

    /// Activation groups that a model with quantised weights needs.
    #[must_use]
    pub fn groups(c: &Config) -> usize {
        ActivationGroup::count(c.hidden_size.max(c.intermediate_size).max(c.q_dim()))
    }

    /// Carves the buffers.
    ///
    /// # Errors
    /// `data` is shorter than [`Self::elements`], or `groups` than [`Self::groups`].
    pub fn new(
        model: &Model<'_>,
        positions: usize,
        data: &'a mut [f32],
        groups: &'a mut [ActivationGroup],
    ) -> Result<Self, Error> {
        let (expected, got) = (Self::elements(model, positions), data.len());
        if got < expected {
            return Err(Error::Length { what: "scratch", expected, got });
        }
        let (expected, got) = (Self::groups(model.config()), groups.len());
        if got < expected {
            return Err(Error::Length { what: "activation groups", expected, got });
        }
        let pages = model.listed_pages(positions);
        let sizes = Sizes::new(model, pages);
        let (mut lens, mut rest) = (sizes.0.into_iter(), data);
        let mut take = || {
            let n = lens.next().unwrap_or(0);
            let (head, tail) = core::mem::take(&mut rest).split_at_mut(n);
            rest = tail;
            head
        };
        let [x, normed, y, kv, cos, sin] = core::array::from_fn(|_| take());
        let runs = bytemuck::cast_slice_mut(take());
        let gates = GateScratch { scores: take(), states: take(), room: take() };
        let attention = AttentionScratch {
            q: take(),
            attended: take(),
            scores: take(),
            stats: take().as_chunks_mut().0,
            row: take(),
            chosen: bytemuck::cast_slice_mut(take()),
            pages: bytemuck::cast_slice_mut(take()),
            recalled: bytemuck::cast_slice_mut(take()),
            parts: take(),
            bounds: take(),
        };
        let [gate, up, scores] = core::array::from_fn(|_| take());
        let list = bytemuck::cast_slice_mut(take());
        let rest = take();
        let chooses = rest.len() >= ChoiceScratch::elements(PANEL) + PANEL;
        let room = if chooses { ChoiceScratch::elements(PANEL) + PANEL } else { 0 };
        let (z, room) = rest.split_at_mut(rest.len() - room);
        let (candidates, room) = room.split_at_mut(PANEL.min(room.len()));
        let candidates = bytemuck::cast_slice_mut(candidates);
        let ffn = FfnScratch { gate, up, scores, list, z, room, candidates, groups };
        Ok(Self { sizes, pages, x, normed, y, kv, cos, sin, runs, gates, attention, ffn })
    }

    /// Whether it was made for such a model, with lists of at least `pages` pages.
    pub(crate) fn fits(&self, model: &Model<'_>, pages: usize) -> bool {
        self.pages >= pages && self.sizes == Sizes::new(model, self.pages)
    }

    /// `[hidden_size]`: what the head reads, the last norm's output, after a step that succeeded.
    #[must_use]
    pub fn hidden(&self) -> &[f32] {
        self.normed
    }

    /// What the FFN of a block computed in the last step.
    ///
    /// # Panics
    /// There is no such block.
    #[must_use]
    pub fn run(&self, layer: usize) -> Run {
        let [active, candidates] = self.runs[layer];
        Run { active, candidates }
    }
}

/// One column in the forms that matrices are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Forms<'a> {
    x: &'a [f32],
    groups: &'a [ActivationGroup],
}

impl<'a> Forms<'a> {
    /// Rounds `x` once if any of `formats` wants that.
    pub(crate) fn new<K: KernelSet>(
        kernels: &K,
        mut formats: impl Iterator<Item = Format>,
        x: &'a [f32],
        groups: &'a mut [ActivationGroup],
    ) -> Self {
        let groups = &mut groups[..ActivationGroup::count(x.len())];
        if formats.any(Format::is_quantized) {
            kernels.quantize(x, groups);
        }
        Self { x, groups }
    }

    /// The form that matrices of `format` want.
    pub(crate) fn of(&self, format: Format) -> Columns<'a> {
        if format.is_quantized() { Columns::Quantized(self.groups) } else { Columns::F32(self.x) }
    }
}
