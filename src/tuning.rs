//! Numbers that were measured, each with its unit, the bench that shows it, and where it was seen.
//!
//! Seen: A = AMD EPYC (Zen 5), AVX-512, 2 cores. Change one only with both builds in alternation on a quiet machine, and write
//! down where (`CONTRIBUTING.md`, *Bench*). Those of the kernels stand beside them: `BLOCK_BYTES` in `kernels/src/format/panel.rs`, `PANEL_BYTES` in
//! `kernels/src/format/tile.rs`, `CACHED_BYTES`, `ROW_BYTES`, `COLUMN_BYTES` and `Pays` in `kernels/src/format/packed.rs`, `LEAST_ROWS` in `kernels/src/packing.rs`, `PACKED_BYTES` in `src/weight/prepared.rs`, `RowsOf::ahead` in `kernels/src/format/mod.rs`; the share past which an FFN that is held sparse
//! computes all neurons is `candle_sparse_core::ffn::CROSSOVER`. What differs most by machine, whether a profile pays, is
//! not here but measured when a model is loaded (`src/decoder/payoff.rs`).

use std::time::Duration;

// Threads: `decode-speed --shape smollm2-135m --dtype q4_0 --against dense`, beside 0, 1 and 2 busy processes. A

/// Pieces of a phase per thread where pieces are short: each costs a hand-over, which shows in a phase of 20 µs.
pub(crate) const SHORT_PIECES_PER_THREAD: usize = 2;
/// Bytes of a long piece, some 25 µs of reading.
pub(crate) const LONG_PIECE_BYTES: usize = 512 * 1024;
/// Bytes: a smaller piece costs less to compute twice than to hand over.
pub(crate) const MIN_PIECE_BYTES: usize = 16 * 1024;
/// How long a piece may stay out beyond the time that pieces take.
pub(crate) const PIECE_GRACE: Duration = Duration::from_micros(30);
/// Pieces never take longer, threads that lose their core do.
pub(crate) const LONGEST_PIECE: Duration = Duration::from_millis(1);
/// How often a missing piece is checked for before the clock is read.
pub(crate) const SPINS: u32 = 64;
/// Bytes: less work in a region is not worth waking a worker.
pub(crate) const MIN_TASK_BYTES: usize = 16 * 1024;
/// Tasks of a region per thread: a late worker then costs at most an eighth of it.
pub(crate) const TASKS_PER_THREAD: usize = 8;

// Prompts: `decode-speed --prefill 512`. A

/// Positions of a prompt that go through the layers together; bounds the working memory of long prompts.
pub(crate) const PREFILL_POSITIONS: usize = 512;
/// Rows of activations: fewer share the neurons of `down` among threads instead of the rows.
pub(crate) const FEW_ROWS: usize = 8;
/// Tasks of `down` for few rows at most, and bytes of weights that make one worth handing over.
pub(crate) const DOWN_TASKS: usize = 16;
pub(crate) const DOWN_TASK_BYTES: usize = 256 * 1024;

// Sparse FFNs: `cargo bench -p candle-sparse-benches --bench sparse_ffn`. A

/// Bytes of up and down rows that make a piece of the list of active neurons.
pub(crate) const LIST_PIECE_BYTES: usize = 256 * 1024;
/// Pieces of that list at most: each hands over a whole hidden vector.
pub(crate) const LIST_PIECES: usize = 16;
/// Bytes of a part of [`sparse_ffn`](crate::ops::sparse_ffn()): its sum of `hidden_size` elements then costs little beside it.
pub(crate) const OP_PART_BYTES: usize = 64 * 1024;
/// Parts of it at most: more serve no machine that decode is bound by memory on.
pub(crate) const OP_PARTS: usize = 32;
/// Share of a dense token's time that a profile must save to be used, beyond the noise of the measurement.
pub(crate) const LEAST_SAVED: f64 = 0.02;
/// Bytes of FFNs that are timed while loading: more than most caches hold, so that they come from memory as in a large model.
pub(crate) const TIMED_BYTES: usize = 64 << 20;

// Attention: `cargo bench -p candle-sparse-benches --bench attention`. A

/// Shares of all heads together, as far as a head has at least two and at most [`HEAD_SHARES`]: enough for threads to help
/// each other, few to add up.
pub(crate) const ATTENTION_SHARES: usize = 32;
pub(crate) const HEAD_SHARES: usize = 16;
/// Pages of the smallest share.
pub(crate) const MIN_SHARE_PAGES: usize = 4;
/// Pages of a prompt's attention that are scored at once.
pub(crate) const SCORED_PAGES: usize = 8;
/// Columns (query heads × tokens) of a prompt that read a page together.
pub(crate) const SCORED_COLUMNS: usize = 64;
