//! The model at work on windows of text.

use super::Progress;
use crate::{
    KvCache, KvConfig, KvDType,
    decoder::{Decoder, Input, LayerTap, Logits, Scratch, Step},
};
use candle_core::{Device, Error, Result, Tensor};

/// A model and the memory of its steps; every window starts from an empty past.
pub(super) struct Run {
    pub(super) model: Decoder,
    cache: KvCache,
    scratch: Scratch,
}

impl Run {
    pub(super) fn new(model: &Decoder) -> Self {
        let cache = KvCache::new(model.config(), KvConfig::exact(KvDType::F32));
        Self { model: model.clone(), cache, scratch: Scratch::default() }
    }

    /// Logits `[window, vocab_size]`.
    pub(super) fn logits(&mut self, window: &[u32], tap: Option<&mut dyn LayerTap>) -> Result<Tensor> {
        let vocab = self.model.config().vocab_size;
        let step = Step { batch: 1, seq_len: window.len(), index_pos: 0 };
        let mut logits = vec![0.0; window.len() * vocab];
        let (input, cache, scratch) = (Input::Ids(window), &mut self.cache, &mut self.scratch);
        match tap {
            Some(tap) => self.model.forward_tapped(input, step, cache, scratch, tap, &mut logits)?,
            None => self.model.forward(input, step, cache, scratch, Logits::All, &mut logits)?,
        }
        Tensor::from_vec(logits, (window.len(), vocab), &Device::Cpu)
    }

    pub(super) fn over<T>(
        &mut self,
        windows: &[Vec<u32>],
        inputs: &mut Inputs<T>,
        stage: &'static str,
        progress: &mut impl FnMut(Progress),
    ) -> Result<()> {
        for (done, window) in windows.iter().enumerate() {
            progress(Progress { stage, done, steps: windows.len() });
            self.logits(window, Some(inputs))?;
            if let Some(e) = inputs.failed.take() {
                return Err(e);
            }
        }
        Ok(())
    }
}

/// Shows the inputs of each FFN to something.
pub(super) struct Inputs<T> {
    pub(super) each: Vec<T>,
    add: fn(&mut T, &[f32]) -> Result<()>,
    failed: Option<Error>,
}

impl<T> Inputs<T> {
    pub(super) fn new(each: Vec<T>, add: fn(&mut T, &[f32]) -> Result<()>) -> Self {
        Self { each, add, failed: None }
    }
}

impl<T> LayerTap for Inputs<T> {
    fn ffn(&mut self, layer: usize, x: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {
        if let Err(e) = (self.add)(&mut self.each[layer], x) {
            self.failed.get_or_insert(e);
        }
    }
}
