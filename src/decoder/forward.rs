//! A forward call from the check of what it is given to its logits.

use super::{Decoder, Input, LayerTap, Logits, Scratch, Step, prefill};
use crate::{Error, deadline::Deadline, kv_cache::KvCache};
use candle_core::{Result, bail};

impl Decoder {
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

    /// Runs `step` and writes the logits that are wanted, `[batch, vocab_size]` or `[batch, seq_len, vocab_size]`; the cache is cut
    /// back to `step.index_pos` first.
    ///
    /// Cost: one multiply-add per element of the matrices and token, and those of attention (`2 · q_dim` per layer and position
    /// that is read). One token reads [`Self::weight_bytes_per_token`]; more read each matrix once per 512 positions.
    ///
    /// # Errors
    /// An empty input, a token that is not in the vocabulary, a position that leaves a gap or is past the context, another batch
    /// than the cached one, or a cache that was made for another shape or filled by another model; in a decode step of a
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
        self.settle(cache, s);
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

    /// Decodes one token and takes it back, so that the first real token is as fast as the others: weights are in memory, threads
    /// run, working memory is there. Cache and statistics are as before; nothing is done for a full cache or a batch.
    ///
    /// Cost: that of a decode step.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn warm_up(&self, cache: &mut KvCache, s: &mut Scratch) -> Result<()> {
        self.settle(cache, s);
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

    /// As [`Self::forward`]; `tap` is called in every block, see [`LayerTap`]. A lone token is computed as a prompt is, with all
    /// neurons.
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
        wanted: Logits,
        logits: &mut [f32],
    ) -> Result<()> {
        self.settle(cache, s);
        self.check_all(input, step, cache, wanted, logits)?;
        cache.set_origin(&self.origin);
        self.prefill(input, step, cache, &mut s.prefill, wanted, logits, None, Some(tap))
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
}
