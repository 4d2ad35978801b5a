//! The model at work on windows of text.

use super::course::Course;
use crate::{
    AttentionConfig, KvCache, KvConfig, KvDType,
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
    /// Attention reads everything, whatever the model is set to.
    pub(super) fn new(model: &Decoder) -> Result<Self> {
        let cache = KvCache::new(model.config(), KvConfig::exact(KvDType::F32));
        let model = model.with_attention(AttentionConfig::default())?;
        Ok(Self { model, cache, scratch: Scratch::default() })
    }

    /// Logits `[window, vocab_size]`.
    pub(super) fn logits(&mut self, window: &[u32], tap: Option<&mut dyn LayerTap>) -> Result<Tensor> {
        let logits = self.window(window, tap, Logits::All)?;
        Tensor::from_vec(logits, (window.len(), self.model.config().vocab_size), &Device::Cpu)
    }

    /// Shows a window to a tap; the head is left out, but for the last token's.
    pub(super) fn show(&mut self, window: &[u32], tap: &mut dyn LayerTap) -> Result<()> {
        self.window(window, Some(tap), Logits::Last)?;
        Ok(())
    }

    fn window(&mut self, window: &[u32], tap: Option<&mut dyn LayerTap>, wanted: Logits) -> Result<Vec<f32>> {
        let step = Step { batch: 1, seq_len: window.len(), index_pos: 0 };
        let rows = if wanted == Logits::All { window.len() } else { 1 };
        let mut logits = vec![0.0; rows * self.model.config().vocab_size];
        let (input, cache, scratch) = (Input::Ids(window), &mut self.cache, &mut self.scratch);
        match tap {
            Some(tap) => self.model.forward_tapped(input, step, cache, scratch, tap, wanted, &mut logits)?,
            None => self.model.forward(input, step, cache, scratch, wanted, &mut logits)?,
        }
        Ok(logits)
    }

    pub(super) fn over<T>(
        &mut self,
        windows: &[Vec<u32>],
        inputs: &mut Inputs<T>,
        stage: &'static str,
        course: &mut Course<'_>,
    ) -> Result<()> {
        for (done, window) in windows.iter().enumerate() {
            course.step(stage, done, windows.len())?;
            self.show(window, inputs)?;
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
