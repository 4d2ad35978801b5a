//! The tokens of several sequences in one step: every matrix is read once, and every token gets the bits of one that is decoded
//! alone.
//!
//! One region per operation, as for a prompt; attention and FFNs that leave neurons out go token by token. The tokens of one
//! sequence follow each other layer by layer: pages become colder between them, as they do between steps.

mod ffn;

use super::{Decoder, Ffn, Input, Layer, Scratch, prefill, resize, state::LayerRun, state::State};
use crate::{
    attention::{PagePlan, Selector, Token, TokensScratch, lone_tokens},
    kv_cache::{KvCache, PAGE_LEN},
};
use candle_core::{Result, bail};
use candle_sparse_core::kernel::rope;
use ffn::FfnScratch;
use std::ops::Range;

/// Positions of a sequence that a step can take.
const MOST_TOKENS: usize = PAGE_LEN;

/// The tokens of one sequence in a step of several, see [`Decoder::decode_turns`].
#[derive(Debug)]
pub struct Turn<'a> {
    /// Its next tokens.
    pub ids: &'a [u32],
    /// What it has seen.
    pub cache: &'a mut KvCache,
    /// The memory of its steps: what its sparse FFNs counted, which pages it reads.
    pub scratch: &'a mut Scratch,
}

/// Working memory of [`Decoder::decode_turns`]; grows to the largest step and keeps that size.
#[derive(Default)]
pub struct BatchScratch {
    rows: prefill::Scratch,
    attention: TokensScratch,
    ffn: FfnScratch,
    /// What attention read, `[gated layers][rows, hidden_size]`.
    inputs: Vec<Vec<f32>>,
    /// What the sparse FFNs did, `[layers][rows]`.
    runs: Vec<Vec<LayerRun>>,
    states: Vec<State>,
}

impl core::fmt::Debug for BatchScratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BatchScratch").finish_non_exhaustive()
    }
}

/// What is noted of tokens once they are there to stay.
#[derive(Clone, Debug, Default)]
pub(super) struct Trial {
    first: usize,
    tokens: usize,
    /// `[gated layers][tokens, hidden_size]`
    inputs: Vec<Vec<f32>>,
    /// `[tokens][layers]`
    runs: Vec<Vec<LayerRun>>,
}

impl Decoder {
    /// Decodes the tokens of every turn from the end of its cache on, and writes the logits after each: `[Σ ids, vocab_size]`, turn
    /// by turn. Every row has the bits that [`Self::forward`] gives for that token alone, whatever its company.
    ///
    /// After a turn of several tokens [`KvCache::truncate`] to a position within them goes back exactly, as if the rest had never
    /// been read: that is how drafts of tokens are tried out. A turn has at most 32 tokens; where attention leaves pages out they
    /// must not cross a page, see [`Self::most_tokens`].
    ///
    /// Cost: as [`Self::forward`], each matrix being read once for all; FFNs that leave neurons out are read token by token.
    ///
    /// ```
    /// use candle_sparse::decoder::{BatchScratch, Input, Logits, Scratch, Step, Turn};
    /// use candle_sparse::{KvCache, KvConfig, KvDType};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
    /// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// let decoder = loaded.model.decoder(); // of a Llama
    /// let vocab_size = decoder.config().vocab_size;
    /// let new = || (KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16)), Scratch::default());
    /// let ((mut a, mut a_scratch), (mut b, mut b_scratch)) = (new(), new());
    /// let mut logits = vec![0.0; 3 * vocab_size];
    /// let mut turns = [
    ///     Turn { ids: &[5, 6], cache: &mut a, scratch: &mut a_scratch },
    ///     Turn { ids: &[7], cache: &mut b, scratch: &mut b_scratch },
    /// ];
    /// decoder.decode_turns(&mut turns, &mut BatchScratch::default(), &mut logits)?;
    /// // The second token of the first turn was a wrong guess.
    /// a.truncate(1);
    /// assert_eq!((a.len(), b.len()), (1, 1));
    ///
    /// let (mut alone, mut scratch) = new();
    /// let mut wanted = vec![0.0; vocab_size];
    /// let step = Step { batch: 1, seq_len: 1, index_pos: 0 };
    /// decoder.forward(Input::Ids(&[5]), step, &mut alone, &mut scratch, Logits::Last, &mut wanted)?;
    /// assert!(wanted == logits[..vocab_size], "bit for bit");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::check_turn`] for any turn; in a model with a profile also a number that is not finite, of whichever turn. No cache
    /// is changed then.
    ///
    /// # Panics
    /// `logits` has another length than `Σ ids · vocab_size`.
    pub fn decode_turns(
        &self,
        turns: &mut [Turn<'_>],
        s: &mut BatchScratch,
        logits: &mut [f32],
    ) -> Result<()> {
        let rows = turns.iter().map(|t| t.ids.len()).sum::<usize>();
        assert_eq!(logits.len(), rows * self.config.vocab_size, "decode_turns: wrong number of logits");
        for turn in turns.iter_mut() {
            self.settle(turn.cache, turn.scratch);
        }
        turns.iter().try_for_each(|turn| self.check_turn(turn.ids, turn.cache))?;
        if rows == 0 {
            return Ok(());
        }
        s.states.clear();
        for turn in turns.iter_mut() {
            self.enter_turn(turn, &mut s.states);
        }
        if let Err(error) = self.all_layers(turns, s, rows) {
            turns.iter_mut().for_each(|turn| turn.cache.give_up());
            return Err(error);
        }
        self.head(0..rows, &mut s.rows, logits);
        let mut row = 0;
        for turn in turns {
            self.leave_turn(turn, row..row + turn.ids.len(), s);
            row += turn.ids.len();
        }
        Ok(())
    }

    /// Whether a turn of these tokens alone would succeed in [`Self::decode_turns`]; changes nothing.
    ///
    /// # Errors
    /// No token or more than [`Self::most_tokens`], a token that is not in the vocabulary, no room in the context or the cache's
    /// budget, a cache of more than one sequence, or one that was made for another shape or filled by another model.
    pub fn check_turn(&self, ids: &[u32], cache: &KvCache) -> Result<()> {
        let (n, index_pos) = (ids.len(), cache.len());
        let most = self.most_tokens(index_pos);
        if n > most {
            bail!(
                "a turn from position {index_pos} on can have {most} tokens, not {n}: see Decoder::most_tokens"
            );
        }
        let step = super::Step { batch: 1, seq_len: n, index_pos };
        self.check(Input::Ids(ids), step, cache)
    }

    /// How many tokens a turn of [`Self::decode_turns`] from `position` on can have.
    #[must_use]
    pub fn most_tokens(&self, position: usize) -> usize {
        match self.attention.mode {
            crate::AttentionMode::Dense | crate::AttentionMode::Window => MOST_TOKENS,
            // What is known of a page is known when its last token was read.
            _ => PAGE_LEN - position % PAGE_LEN,
        }
    }

    /// Notes what the tokens of the last turn did that are still there: they stay.
    pub(super) fn settle(&self, cache: &mut KvCache, s: &mut Scratch) {
        let trial = s.trial.take().filter(|t| cache.on_trial() == Some(t.first));
        if let Some(trial) = trial {
            let kept = cache.len().saturating_sub(trial.first).min(trial.tokens);
            let select = self.selector();
            for (layer, x) in trial.inputs.iter().enumerate() {
                if let (Some(gate), true) = (select.gate(layer), kept > 0) {
                    let x = &x[..kept * self.config.hidden_size];
                    cache.observe(0, layer, gate, self.kernels, trial.first, x);
                }
            }
            if let Some(sparse) = &self.sparse {
                trial.runs[..kept.min(trial.runs.len())]
                    .iter()
                    .for_each(|runs| s.state.note(&sparse.plans, runs));
            }
        }
        cache.end_trial();
    }

    /// Makes room for a turn's tokens, and chooses the pages that each reads.
    fn enter_turn(&self, turn: &mut Turn<'_>, states: &mut Vec<State>) {
        let Turn { ids, cache, scratch } = turn;
        let (position, select) = (cache.len(), self.selector());
        cache.set_origin(&self.origin);
        cache.extend(1, ids.len());
        if select.config().chooses_by_token() {
            (0..self.layers.len()).for_each(|layer| cache.update_bounds(layer, position / PAGE_LEN));
        }
        let shape = [self.layers.len(), self.config.num_key_value_heads];
        scratch.plan.update(&select, cache, shape, position);
        scratch
            .more_plans
            .resize_with(ids.len().saturating_sub(1).max(scratch.more_plans.len()), PagePlan::default);
        for (plan, position) in scratch.more_plans.iter_mut().zip(position + 1..position + ids.len()) {
            plan.update(&select, cache, shape, position);
        }
        cache.try_out();
        if let Some(sparse) = &self.sparse {
            scratch.state.begin(&sparse.plans, self.config.intermediate_size);
            states.push(scratch.state.clone());
        }
    }

    /// Makes a turn's tokens part of the past; several of them stay on trial.
    fn leave_turn(&self, turn: &mut Turn<'_>, rows: Range<usize>, s: &BatchScratch) {
        let (first, hidden) = (turn.cache.len(), self.config.hidden_size);
        let inputs = s.inputs.iter().map(|x| x[rows.start * hidden..rows.end * hidden].to_vec()).collect();
        let of_token = |row: usize| s.runs.iter().map(|layer| layer[row]).collect();
        let runs = if self.sparse.is_some() { rows.clone().map(of_token).collect() } else { Vec::new() };
        turn.scratch.trial = Some(Trial { first, tokens: rows.len(), inputs, runs });
        turn.cache.advance(rows.len());
        if rows.len() == 1 {
            self.settle(turn.cache, turn.scratch);
        }
    }

    fn all_layers(&self, turns: &mut [Turn<'_>], s: &mut BatchScratch, rows: usize) -> Result<()> {
        let c = &self.config;
        let half = c.head_dim / 2;
        self.resize_rows(rows, &mut s.rows);
        resize(&mut s.rows.x, rows * c.hidden_size);
        resize(&mut s.rows.cos, rows * half);
        resize(&mut s.rows.sin, rows * half);
        let mut row = 0;
        for turn in &*turns {
            let n = turn.ids.len();
            self.embed(turn.ids, &mut s.rows.x[row * c.hidden_size..(row + n) * c.hidden_size])?;
            for position in turn.cache.len()..turn.cache.len() + n {
                let at = row * half..(row + 1) * half;
                let (cos, sin) = (&mut s.rows.cos[at.clone()], &mut s.rows.sin[at]);
                rope::angles(|i| self.inv_freq[i], c.rope.attention_factor(), position, cos, sin);
                row += 1;
            }
        }
        let gated = if self.selector().gate(0).is_some() { self.layers.len() } else { 0 };
        s.inputs.resize_with(gated, Vec::new);
        s.runs.resize_with(if self.sparse.is_some() { self.layers.len() } else { 0 }, Vec::new);
        for (i, layer) in self.layers.iter().enumerate() {
            let mut policy = s.rows.policies.layer;
            let done = self.threads.schedule(&mut policy, rows, || {
                self.attend_turns((i, layer), turns, s);
                self.ffn_turns((i, layer), turns, s)
            });
            s.rows.policies.layer = policy;
            done?;
        }
        Ok(())
    }

    /// `x += o(attention(norm(x)))`
    fn attend_turns(&self, (i, layer): (usize, &Layer), turns: &mut [Turn<'_>], s: &mut BatchScratch) {
        let (c, on) = (&self.config, self.on());
        let (q_dim, kv_dim, half) = (c.q_dim(), c.kv_dim(), c.head_dim / 2);
        let width = q_dim + 2 * kv_dim;
        let BatchScratch { rows: r, attention, inputs, .. } = s;
        self.norm(&r.x, &layer.input_layernorm, &mut r.normed);
        if let Some(inputs) = inputs.get_mut(i) {
            inputs.clone_from(&r.normed);
        }
        layer.qkv_proj.matmul(on, &r.normed, &mut r.prepared, &mut r.qkv);
        for (row, qkv) in r.qkv.chunks_exact_mut(width).enumerate() {
            self.rotate_row(qkv, &r.cos[row * half..(row + 1) * half], &r.sin[row * half..(row + 1) * half]);
        }
        let mut rows = r.qkv.chunks_exact_mut(width);
        for turn in &mut *turns {
            for (position, qkv) in (turn.cache.len()..).zip(rows.by_ref().take(turn.ids.len())) {
                turn.cache.round(&mut qkv[q_dim..]);
                let (k, v) = qkv[q_dim..].split_at(kv_dim);
                turn.cache.write(0, i, position, k, v);
            }
        }
        // Tokens that see the same tiers go together.
        let mut done = vec![0; turns.len()];
        while let Some(parts) = next_parts(turns, i, &done) {
            let (mut tokens, mut of_rows, mut row) = (Vec::new(), Vec::new(), 0);
            for (turn, part) in turns.iter().zip(&parts) {
                for t in part.clone() {
                    let qkv = &r.qkv[(row + t) * width..(row + t + 1) * width];
                    tokens.push(self.token(turn, i, t, qkv));
                    of_rows.push(row + t);
                }
                row += turn.ids.len();
            }
            if tokens.len() == row {
                lone_tokens(on, c, &tokens, attention, &mut r.attended);
            } else {
                let mut out = vec![0.0; tokens.len() * q_dim];
                lone_tokens(on, c, &tokens, attention, &mut out);
                for (row, out) in of_rows.iter().zip(out.chunks_exact(q_dim)) {
                    r.attended[row * q_dim..(row + 1) * q_dim].copy_from_slice(out);
                }
            }
            done.iter_mut().zip(parts).for_each(|(done, part)| *done = part.end);
        }
        layer.o_proj.matmul(on, &r.attended, &mut r.prepared, &mut r.normed);
        self.add(&r.normed, &mut r.x);
    }

    /// What the `t`th token of a turn attends to in a layer.
    fn token<'a>(&'a self, turn: &'a Turn<'_>, layer: usize, t: usize, qkv: &'a [f32]) -> Token<'a> {
        let (queries, kv) = qkv.split_at(self.config.q_dim());
        let (keys, values) = kv.split_at(self.config.kv_dim());
        let plan = if t == 0 { &turn.scratch.plan } else { &turn.scratch.more_plans[t - 1] };
        let (cache, select): (_, Selector<'_>) = (&*turn.cache, self.selector());
        Token { cache, select, plan, layer, position: cache.len() + t, queries, keys, values }
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`
    fn ffn_turns(&self, (i, layer): (usize, &Layer), turns: &[Turn<'_>], s: &mut BatchScratch) -> Result<()> {
        match (&layer.ffn, &self.sparse) {
            (Ffn::Sparse(ffn), Some(sparse)) => {
                self.sparse_ffn_turns((i, layer, ffn), &sparse.plans, turns, s)
            }
            _ => {
                self.mlp(i, layer, &mut s.rows, &mut None);
                if let Some(runs) = s.runs.get_mut(i) {
                    let run = LayerRun::all(self.config.intermediate_size, layer.ffn.dense_bytes());
                    runs.clear();
                    runs.resize(s.rows.x.len() / self.config.hidden_size, run);
                }
                Ok(())
            }
        }
    }
}

/// The tokens of each turn from `done` on that see the same tiers of a layer, those that come next; `None` when all are done.
///
/// Pages become as cold as they are for the first of them.
fn next_parts(turns: &mut [Turn<'_>], layer: usize, done: &[usize]) -> Option<Vec<Range<usize>>> {
    if turns.iter().zip(done).all(|(turn, done)| *done == turn.ids.len()) {
        return None;
    }
    let part = |(turn, &start): (&mut Turn<'_>, &usize)| {
        let (len, n) = (turn.cache.len(), turn.ids.len());
        if start > 0 && start < n {
            turn.cache.settle_layer(layer, len + start);
        }
        let end = (start + 1..n).find(|t| turn.cache.settles_at(layer, len + t));
        start..end.unwrap_or(n)
    };
    Some(turns.iter_mut().zip(done).map(part).collect())
}
