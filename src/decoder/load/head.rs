//! A head in halves: which columns its input is large in, and whether it is faster on this machine.

use crate::decoder::{Decoder, HeadMode, Input, Logits, Scratch, Step, payoff::times, table::Table};
use crate::{KvCache, KvConfig, KvDType, weight::Halved};
use candle_core::Result;
use candle_sparse_core::Format;
use std::sync::Arc;

/// Tokens of the vocabulary, evenly drawn, by which columns are picked: the same few are large for any text.
const DRAWN: usize = 16;

impl Decoder {
    /// This loaded model with another head, where that is possible and pays, or is forced; else a notice why not.
    pub(super) fn with_head(mut self, mode: HeadMode, force: bool) -> Result<Self> {
        if mode == HeadMode::Exact {
            return Ok(self);
        }
        let whole = match &self.lm_head {
            Table::Whole(w) if w.format() == Format::Q8_0 => w.clone(),
            other => {
                let format = other.format().name();
                self.notices.push(format!(
                    "a shortlist needs a head in q8_0, this one is in {format}: all of it is read (--dtype q8_0 converts)"
                ));
                return Ok(self);
            }
        };
        let halved = Table::Halved(Arc::new(Halved::new(&whole, self.largest_columns()?)?));
        let tied = self.embed_tokens.shares_memory(&self.lm_head);
        let embed_tokens = if tied { halved.clone() } else { self.embed_tokens.clone() };
        let with = Self { embed_tokens, lm_head: halved, head: mode, ..self.clone() };
        if !force {
            let [exact, listed] = times([&self, &with])?;
            if listed >= exact {
                self.notices.push(format!(
                    "a shortlist does not pay here: a token takes {:.2} ms with it and {:.2} ms without; all of the head is read",
                    1e3 * listed,
                    1e3 * exact
                ));
                return Ok(self);
            }
        }
        whole.release();
        Ok(with)
    }

    /// The columns in which the head's input is largest, in order.
    fn largest_columns(&self) -> Result<Vec<usize>> {
        let c = &self.config;
        let n = DRAWN.min(c.max_position_embeddings);
        let ids: Vec<u32> = (0..n).map(|i| (i * c.vocab_size / n) as u32).collect();
        let mut cache = KvCache::new(c, KvConfig::exact(KvDType::F16));
        let (mut scratch, mut logits) = (Scratch::default(), vec![0.0; n * c.vocab_size]);
        let step = Step { batch: 1, seq_len: n, index_pos: 0 };
        // Not `forward`, which decodes a lone token.
        self.prefill(
            Input::Ids(&ids),
            step,
            &mut cache,
            &mut scratch.prefill,
            Logits::All,
            &mut logits,
            None,
            None,
        )?;
        let mut energy = vec![0.0_f32; c.hidden_size];
        for x in scratch.prefill.head_input().chunks_exact(c.hidden_size) {
            energy.iter_mut().zip(x).for_each(|(e, v)| *e += v * v);
        }
        let mut columns: Vec<usize> = (0..c.hidden_size).collect();
        columns.sort_by(|&a, &b| energy[b].total_cmp(&energy[a]));
        columns.truncate(Halved::picked(c.hidden_size));
        columns.sort_unstable();
        Ok(columns)
    }
}
