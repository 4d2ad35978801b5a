//! What a forward call is given: tokens or embeddings, their place, working memory.

use super::{SparseStats, decode, prefill, state, turns::Trial};
use crate::attention::PagePlan;
use std::time::Duration;

/// Working memory of steps, and what their sparse FFNs counted; grows to the largest step and keeps that size.
///
/// ```
/// use candle_sparse::decoder::Scratch;
/// use std::time::Duration;
///
/// let mut scratch = Scratch::default();
/// scratch.set_time_limit(Some(Duration::from_millis(50)));
/// assert_eq!(scratch.sparse_stats().active_share(), 1.0);
/// ```
#[derive(Default)]
pub struct Scratch {
    pub(super) prefill: prefill::Scratch,
    pub(super) decode: decode::Scratch,
    pub(super) state: state::State,
    pub(super) plan: PagePlan,
    /// Those of the further tokens of a turn.
    pub(super) more_plans: Vec<PagePlan>,
    pub(super) trial: Option<Trial>,
    pub(super) time_limit: Option<Duration>,
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

    /// Begins to count anew; what the guard has changed stays.
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

/// What enters the first layer: token ids or embeddings.
///
/// ```
/// use candle_sparse::decoder::{Input, Logits, Scratch, Step};
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let (hidden_size, vocab_size) = (decoder.config().hidden_size, decoder.config().vocab_size);
/// let mut embeddings = vec![0.0; 2 * hidden_size];
/// decoder.embed(&[5, 6], &mut embeddings)?;
///
/// let step = Step { batch: 1, seq_len: 2, index_pos: 0 };
/// let logits = [Input::Ids(&[5, 6]), Input::Embeddings(&embeddings)].map(|input| {
///     let mut cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
///     let mut logits = vec![0.0; vocab_size];
///     decoder.forward(input, step, &mut cache, &mut Scratch::default(), Logits::Last, &mut logits).map(|()| logits)
/// });
/// let [ids, embeddings] = logits;
/// assert!(ids? == embeddings?, "the table's rows are the tokens' embeddings");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids `[batch, seq_len]`.
    Ids(&'a [u32]),
    /// Embeddings `[batch, seq_len, hidden_size]`.
    Embeddings(&'a [f32]),
}

/// The positions for which logits are wanted; the head costs `hidden_size · vocab_size` multiply-adds for each.
///
/// ```
/// use candle_sparse::decoder::{Input, Logits, Scratch, Step};
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let vocab_size = decoder.config().vocab_size;
/// let mut cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
/// let (mut scratch, mut last, mut all) = (Scratch::default(), vec![0.0; vocab_size], vec![0.0; 2 * vocab_size]);
/// let (ids, step) = (Input::Ids(&[5, 6]), Step { batch: 1, seq_len: 2, index_pos: 0 });
/// decoder.forward(ids, step, &mut cache, &mut scratch, Logits::Last, &mut last)?;
/// decoder.forward(ids, step, &mut cache, &mut scratch, Logits::All, &mut all)?;
/// let apart = last.iter().zip(&all[vocab_size..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
/// assert!(apart < 1e-3, "{apart}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last of each sequence: `[batch, vocab_size]`.
    Last,
    /// All: `[batch, seq_len, vocab_size]`.
    All,
}

/// One forward call: `batch` sequences of `seq_len` tokens each, from position `index_pos` on.
///
/// ```
/// use candle_sparse::decoder::{Input, Step};
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
/// let step = Step { batch: 2, seq_len: 2, index_pos: 0 };
/// assert!(decoder.check(Input::Ids(&[5, 6, 7, 8]), step, &cache).is_ok());
/// // Nothing is at position 0 yet.
/// let gap = Step { index_pos: 1, ..step };
/// assert!(decoder.check(Input::Ids(&[5, 6, 7, 8]), gap, &cache).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Position of the first token of each.
    pub index_pos: usize,
}
