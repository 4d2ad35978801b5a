//! What the gate said of the pages of a layer: how much later tokens will want them.

use super::PAGE_LEN;
use crate::gate::FastGrnnGate;
use candle_sparse_kernels::Kernels;

/// The salience of a layer of a sequence, page by page.
#[derive(Clone, Debug, Default)]
pub(super) struct Salience {
    /// Pages before it were forgotten.
    first: usize,
    /// `[page − first, kv_heads]`: the largest of a page's tokens; ∞ where the gate did not see all of them.
    pages: Vec<f32>,
    /// `[page − first, state_len]`: the gate's state before each page, and before the one to come.
    states: Vec<f32>,
    /// `[tokens, hidden_size]`: inputs of the page that is not full yet.
    pending: Vec<f32>,
    /// Positions seen.
    seen: usize,
    /// Positions of them that were not cut off since.
    valid: usize,
    /// Tokens of the page that is not full yet were not seen.
    torn: bool,
    /// Working memory.
    scores: Vec<f32>,
    scratch: Vec<f32>,
}

impl Salience {
    /// Reads the layer's inputs `x` `[n, hidden_size]` of the positions from `position` on.
    pub(super) fn observe(&mut self, gate: &FastGrnnGate, kernels: &Kernels, position: usize, x: &[f32]) {
        if self.valid < position {
            self.rewind(gate, self.valid);
        }
        self.rewind(gate, position);
        let hidden = gate.hidden_size;
        for x in x.chunks_exact(hidden) {
            self.pending.extend_from_slice(x);
            self.seen += 1;
            if self.seen.is_multiple_of(PAGE_LEN) {
                self.close(gate, kernels);
            }
        }
        self.valid = self.seen;
    }

    /// Forgets the positions from `len` on.
    pub(super) fn cut(&mut self, len: usize) {
        self.valid = self.valid.min(len);
    }

    /// Forgets the pages before `held`.
    pub(super) fn forget(&mut self, gate: &FastGrnnGate, held: usize) {
        let gone = held.saturating_sub(self.first).min(self.pages.len() / gate.kv_heads);
        self.pages.drain(..gone * gate.kv_heads);
        self.states.drain(..gone * gate.state_len());
        self.first += gone;
    }

    /// Takes the last page's tokens to the gate.
    fn close(&mut self, gate: &FastGrnnGate, kernels: &Kernels) {
        let (heads, len) = (gate.kv_heads, gate.state_len());
        self.states.extend_from_within(self.states.len() - len..);
        if self.torn {
            self.pages.resize(self.pages.len() + heads, f32::INFINITY);
        } else {
            let end = self.states.len();
            self.scores.resize(PAGE_LEN * heads, 0.0);
            self.scratch.resize(gate.scratch_len(), 0.0);
            let state = &mut self.states[end - len..];
            gate.scores(kernels, &self.pending, state, &mut self.scratch, &mut self.scores);
            let page = self.pages.len();
            self.pages.resize(page + heads, f32::NEG_INFINITY);
            for scores in self.scores.chunks_exact(heads) {
                self.pages[page..].iter_mut().zip(scores).for_each(|(m, s)| *m = s.max(*m));
            }
        }
        self.pending.clear();
        self.torn = false;
    }

    /// Forgets what lies at `position` and behind; what lies before and was not seen counts as wanted.
    fn rewind(&mut self, gate: &FastGrnnGate, position: usize) {
        let (heads, len, page) = (gate.kv_heads, gate.state_len(), position / PAGE_LEN);
        self.states.resize(self.states.len().max(len), 0.0);
        if position == self.seen {
            return;
        }
        let same_page = page == self.seen / PAGE_LEN && position < self.seen;
        if same_page {
            self.pending.truncate(position % PAGE_LEN * gate.hidden_size);
        } else {
            self.pending.clear();
            self.torn = !position.is_multiple_of(PAGE_LEN);
            if page < self.first {
                self.first = page;
                self.pages.clear();
                self.states.clear();
                self.states.resize(len, 0.0);
            }
            let held = page - self.first;
            self.pages.resize(held * heads, f32::INFINITY);
            while self.states.len() < (held + 1) * len {
                self.states.extend_from_within(self.states.len() - len..);
            }
            self.states.truncate((held + 1) * len);
        }
        self.seen = position;
    }

    /// Bytes of what grows with the pages.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        (self.pages.capacity() + self.states.capacity() + self.pending.capacity()) * size_of::<f32>()
    }

    /// Of a page for a head; ∞ where the gate knows nothing.
    pub(super) fn of(&self, heads: usize, page: usize, head: usize) -> f32 {
        let known = (page + 1) * PAGE_LEN <= self.valid;
        let held = page.checked_sub(self.first).filter(|_| known);
        held.and_then(|page| self.pages.get(page * heads + head)).copied().unwrap_or(f32::INFINITY)
    }
}
