//! A model whose next tokens are drafted, behind the interface of every model.

use super::{Costs, Drafter, Expected, Speculation, SpeculationStats};
use crate::{causal_lm::CausalLm, sampling::Sampler};
use candle_core::{DType, Device, Result, Tensor};
use candle_sparse::decoder::BatchScratch;
use std::time::Duration;

/// A model that drafts tokens and verifies several in a step, see [the module](crate::speculation): the same logits as the model
/// itself, sooner. Of a model that is not of this crate, or where nothing is drafted, it is the model itself.
///
/// A step may take as long as its draft is long: a [time limit](CausalLm::set_time_limit) holds for steps of one token.
#[derive(Debug)]
pub struct Speculative<M> {
    model: M,
    drafter: Drafter,
    costs: Costs,
    batch: BatchScratch,
    expected: Expected,
    logits: Vec<f32>,
    limited: bool,
}

impl<M: CausalLm> Speculative<M> {
    /// `model`, drafting as `speculation` says.
    #[must_use]
    pub fn new(model: M, speculation: Speculation) -> Self {
        Self {
            model,
            drafter: Drafter::new(speculation),
            costs: Costs::default(),
            batch: BatchScratch::default(),
            expected: Expected { left: usize::MAX, ..Expected::default() },
            logits: Vec::new(),
            limited: false,
        }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, without what was guessed.
    ///
    /// # Errors
    /// Those of [`CausalLm::truncate`].
    pub fn into_model(mut self) -> Result<M> {
        self.drop_guesses()?;
        Ok(self.model)
    }

    /// The model, which may hold guesses behind [`cached_len`](CausalLm::cached_len): [`truncate`](CausalLm::truncate) to that takes
    /// them back.
    #[must_use]
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// What became of drafts.
    #[must_use]
    pub fn stats(&self) -> SpeculationStats {
        self.drafter.stats
    }

    /// Positions that are not guesses; what the model read by itself, from a file for example, is none.
    fn len(&self) -> usize {
        self.model.cached_len().saturating_sub(self.drafter.guesses())
    }

    fn drop_guesses(&mut self) -> Result<()> {
        let len = self.len();
        self.drafter.cut(len);
        if self.model.cached_len() > len { self.model.truncate(len) } else { Ok(()) }
    }
}

impl<M: CausalLm> CausalLm for Speculative<M> {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        let next = index_pos == self.len() && self.drafter.len() == index_pos && index_pos > 0;
        let alone = ids.dims() == [1, 1] && ids.dtype() == DType::U32;
        if next && alone && !self.drafter.is_off() && !self.limited {
            let id = ids.flatten_all()?.to_vec1::<u32>()?[0];
            let Self { model, drafter, costs, batch, expected, logits, .. } = self;
            if let Some(on) = model.decoding() {
                let (vocab, dtype) = (on.decoder.config().vocab_size, on.logits_dtype);
                // A token that is refused is not part of the text.
                if let Err(error) = drafter.next(id, on, costs, batch, expected, logits) {
                    drafter.cut(index_pos);
                    return Err(error);
                }
                return Tensor::from_slice(logits, (1, vocab), &Device::Cpu)?
                    .to_dtype(dtype)?
                    .to_dtype(DType::F32);
            }
        }
        self.drop_guesses()?;
        let logits = self.model.forward(ids, index_pos)?;
        if !self.drafter.is_off() && ids.dim(0)? == 1 {
            self.drafter.read(index_pos, &ids.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?);
        }
        Ok(logits)
    }

    fn cached_len(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len < self.model.cached_len() {
            self.model.truncate(len)?;
        }
        self.drafter.cut(len);
        Ok(())
    }

    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        self.limited = limit.is_some();
        self.model.set_time_limit(limit)
    }

    fn expect(&mut self, sampler: &Sampler, written: &[u32], left: usize) {
        if !self.drafter.is_off() {
            self.expected = Expected { sampler: Some(sampler.clone()), written: written.to_vec(), left };
        }
    }
}
