//! Where the threads of a computation publish what they computed: pieces of the outputs of its phases.
//!
//! 1. A piece is a pure function of its number: who computes it does not matter, nor does it that two threads do.
//! 2. Values lie in atomic words, so publishing needs no lock, and two threads that publish one piece write the same bits.
//!    A piece's publisher is stored after its words (`Release`) and read before them (`Acquire`).
//! 3. A phase has words of its own until the computation ends, so nothing is written that a late thread reads.
//!
//! `tests/loom` compiles this file against loom's atomics and tries every order of two threads.

use super::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::ops::Range;

/// Words, and publishers, of a cache line.
const LINE: usize = 8;
const PUBLISHERS: usize = 16;
/// Pieces per thread at most, where they are long: a thread that is slow for a while leaves the rest to others.
pub(super) const MANY: usize = 8;

/// The computation has ended, or was given up: a thread that gets this leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cancelled;

/// Pieces of a phase at most.
pub(super) fn most_pieces(threads: usize) -> usize {
    threads * MANY
}

/// Where a thread stands on the board, or how much of it a computation takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    phases: usize,
    publishers: usize,
    words: usize,
}

impl Place {
    /// The place behind a phase of `len` elements in pieces of `piece`.
    fn behind(self, len: usize, piece: usize) -> Self {
        // The last piece may be far shorter than the others.
        let (whole, last) = (len / piece, len % piece);
        Self {
            phases: self.phases + 1,
            publishers: self.publishers + len.div_ceil(piece).next_multiple_of(PUBLISHERS),
            words: self.words + whole * words(piece) + words(last),
        }
    }
}

/// Words of a piece: two elements each, whole lines.
fn words(piece: usize) -> usize {
    piece.div_ceil(2).next_multiple_of(LINE)
}

/// The outputs of a computation's phases, as the program declares them: what the board must hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outputs {
    most_pieces: usize,
    place: Place,
}

impl Outputs {
    /// No phase yet, for a number of threads.
    #[must_use]
    pub(crate) fn of(threads: usize) -> Self {
        Self { most_pieces: most_pieces(threads), place: Place::default() }
    }

    /// A phase whose output has at most `len` elements, however it is cut.
    pub(crate) fn add(&mut self, len: usize) {
        let pieces = self.most_pieces.min(len);
        self.place.phases += 1;
        self.place.publishers += pieces.next_multiple_of(PUBLISHERS);
        // A line more per piece than elements: each piece begins a line.
        self.place.words += len.div_ceil(2) + pieces * LINE;
    }
}

/// Kept between computations, since it is large.
#[derive(Debug, Default)]
pub(super) struct Board {
    phases: Vec<Phase>,
    /// Who published a piece, counted from 1; 0: nobody yet.
    publishers: Vec<AtomicU32>,
    /// Two f32 each.
    words: Vec<AtomicU64>,
    over: AtomicBool,
}

/// Pieces claimed, and more once all are. Alone on its cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Phase(AtomicUsize);

impl Board {
    /// Makes room for what is declared and forgets what was published.
    pub(super) fn begin(&mut self, outputs: &Outputs) {
        self.hold(outputs.place);
        self.phases.fill_with(Phase::default);
        self.publishers.fill_with(AtomicU32::default);
        self.over = AtomicBool::default();
    }

    /// Makes room for a computation that comes to `place`.
    pub(super) fn hold(&mut self, place: Place) {
        let Self { phases, publishers, words, .. } = self;
        phases.resize_with(phases.len().max(place.phases), Phase::default);
        publishers.resize_with(publishers.len().max(place.publishers), AtomicU32::default);
        words.resize_with(words.len().max(place.words), AtomicU64::default);
    }

    /// Ends the computation for all threads.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// The computation is over.
    pub(super) fn check_over(&self) -> Result<(), Cancelled> {
        if self.over.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }

    /// The part of the phase at `place`, which moves behind it. `None` where the board is too small, which it is for all
    /// threads: each computes the phase for itself then.
    ///
    /// # Errors
    /// The computation is over.
    pub(super) fn enter(
        &self,
        place: &mut Place,
        len: usize,
        piece: usize,
    ) -> Result<Option<Slots<'_>>, Cancelled> {
        self.check_over()?;
        let start = *place;
        *place = start.behind(len, piece);
        let pieces = len.div_ceil(piece);
        let slots = || {
            Some(Slots {
                phase: self.phases.get(start.phases)?,
                publishers: self.publishers.get(start.publishers..place.publishers)?.get(..pieces)?,
                words: self.words.get(start.words..place.words)?,
                piece,
                len,
            })
        };
        Ok(slots())
    }
}

/// A phase's part of the board.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots<'a> {
    phase: &'a Phase,
    publishers: &'a [AtomicU32],
    words: &'a [AtomicU64],
    piece: usize,
    len: usize,
}

impl Slots<'_> {
    /// Pieces.
    pub(super) fn count(&self) -> usize {
        self.publishers.len()
    }

    /// Elements of piece `i`.
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        i * self.piece..((i + 1) * self.piece).min(self.len)
    }

    /// The next piece that no thread has claimed.
    pub(super) fn claim(&self) -> Option<usize> {
        // A late thread only reads: the line stays with those that work.
        let left = self.phase.0.load(Ordering::Relaxed) < self.count();
        let i = left.then(|| self.phase.0.fetch_add(1, Ordering::Relaxed))?;
        (i < self.count()).then_some(i)
    }

    /// Computes and publishes pieces until all are claimed; says how many.
    pub(super) fn work(
        &self,
        thread: usize,
        out: &mut [f32],
        f: &mut impl FnMut(usize, &mut [f32]),
    ) -> usize {
        std::iter::from_fn(|| self.claim())
            .map(|i| self.compute(thread, i, &mut out[self.range(i)], f))
            .count()
    }

    /// Waits until all pieces are published and copies those of others into `out`. `late` is called again and again
    /// while one is missing; where it says true, a missing piece is computed here. Returns whether any was missing.
    pub(super) fn finish(
        &self,
        thread: usize,
        out: &mut [f32],
        f: &mut impl FnMut(usize, &mut [f32]),
        mut late: impl FnMut() -> bool,
    ) -> bool {
        let mut waited = false;
        for i in 0..self.count() {
            while self.publisher(i).is_none() {
                waited = true;
                if late() {
                    let i = self.missing(i, thread);
                    self.compute(thread, i, &mut out[self.range(i)], f);
                }
            }
        }
        for i in (0..self.count()).filter(|&i| self.publisher(i) != Some(thread)) {
            self.read(i, &mut out[self.range(i)]);
        }
        waited
    }

    /// Computes piece `i` into `out` and publishes it.
    pub(super) fn compute(
        &self,
        thread: usize,
        i: usize,
        out: &mut [f32],
        f: &mut impl FnMut(usize, &mut [f32]),
    ) {
        f(i, out);
        self.publish(thread, i, out);
    }

    /// A piece that is not published, from `first` on, which is not; threads that wait together begin with different ones.
    fn missing(&self, first: usize, thread: usize) -> usize {
        let missing = || (first..self.count()).filter(|&i| self.publisher(i).is_none());
        let skip = thread % missing().count().max(1);
        missing().nth(skip).unwrap_or(first)
    }

    fn publisher(&self, i: usize) -> Option<usize> {
        (self.publishers[i].load(Ordering::Acquire) as usize).checked_sub(1)
    }

    fn publish(&self, thread: usize, i: usize, values: &[f32]) {
        if self.publisher(i).is_some() {
            return;
        }
        let words = &self.words[i * words(self.piece)..];
        let (pairs, rest) = values.as_chunks();
        for (word, pair) in words.iter().zip(pairs) {
            word.store(pack(*pair), Ordering::Relaxed);
        }
        if let [last] = rest {
            words[pairs.len()].store(pack([*last, 0.0]), Ordering::Relaxed);
        }
        self.publishers[i].store(thread as u32 + 1, Ordering::Release);
    }

    fn read(&self, i: usize, values: &mut [f32]) {
        let words = &self.words[i * words(self.piece)..];
        let (pairs, rest) = values.as_chunks_mut();
        for (word, pair) in words.iter().zip(&mut *pairs) {
            *pair = unpack(word.load(Ordering::Relaxed));
        }
        if let [last] = rest {
            [*last, _] = unpack(words[pairs.len()].load(Ordering::Relaxed));
        }
    }
}

fn pack([a, b]: [f32; 2]) -> u64 {
    u64::from(a.to_bits()) | u64::from(b.to_bits()) << 32
}

fn unpack(word: u64) -> [f32; 2] {
    [f32::from_bits(word as u32), f32::from_bits((word >> 32) as u32)]
}
