//! A limit on how long a step may take.

use candle_core::{Error, Result};
use std::{
    fmt,
    time::{Duration, Instant},
};

/// A step took longer than it was allowed to; the cache is as it was before.
///
/// ```
/// use candle_sparse::decoder::{Input, Logits, Scratch, Step};
/// use candle_sparse::{DeadlineExceeded, KvCache, KvConfig, KvDType};
/// use std::time::Duration;
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let mut cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
/// let mut logits = vec![0.0; decoder.config().vocab_size];
/// let mut scratch = Scratch::default();
/// scratch.set_time_limit(Some(Duration::ZERO));
/// let step = Step { batch: 1, seq_len: 1, index_pos: 0 };
/// let late = decoder.forward(Input::Ids(&[5]), step, &mut cache, &mut scratch, Logits::Last, &mut logits);
/// let exceeded = *late.as_ref().err().and_then(DeadlineExceeded::of).expect("no step takes no time");
/// assert!(exceeded.elapsed > exceeded.limit);
/// assert!(cache.is_empty());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineExceeded {
    /// How long the step ran before it gave up.
    pub elapsed: Duration,
    /// How long it was allowed to.
    pub limit: Duration,
}

impl fmt::Display for DeadlineExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "deadline exceeded: the step ran {:?} of {:?} allowed; the cache is as before it",
            self.elapsed, self.limit
        )
    }
}

impl std::error::Error for DeadlineExceeded {}

impl DeadlineExceeded {
    /// The exceeded deadline that an error of a step tells of, if it does.
    #[must_use]
    pub fn of(error: &Error) -> Option<&Self> {
        match crate::Error::of(error) {
            Some(crate::Error::Deadline(exceeded)) => Some(exceeded),
            _ => None,
        }
    }
}

/// When a step must have ended; checked between layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    /// A step that begins now.
    #[must_use]
    pub(crate) fn new(limit: Duration) -> Self {
        Self { start: Instant::now(), limit }
    }

    /// Whether there is no time left.
    #[must_use]
    pub(crate) fn has_passed(&self) -> bool {
        self.start.elapsed() > self.limit
    }

    /// Whether the step may go on.
    ///
    /// # Errors
    /// [`DeadlineExceeded`], which [`DeadlineExceeded::of`] finds in the error.
    pub(crate) fn check(&self) -> Result<()> {
        let exceeded = DeadlineExceeded { elapsed: self.start.elapsed(), limit: self.limit };
        if exceeded.elapsed <= self.limit {
            return Ok(());
        }
        Err(crate::Error::Deadline(exceeded).into())
    }
}
