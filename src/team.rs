//! A whole computation in one region: threads that run one program and hand each other only what is costly.
//!
//! ```text
//! every thread, in vectors of its own:
//!     for each phase of the program:               (the same on all threads)
//!         while a piece is unclaimed: claim, compute and publish it
//!         until all are published: wait, but not long; then compute what does not come
//!         copy the pieces of others
//!         what is cheap: every thread for itself   (no hand-over)
//! ```
//!
//! 1. Pieces are pure: who computes one does not matter, nor does it that two do. So a thread that lost its core with a
//!    claimed piece is not waited for, and one that comes late copies finished phases until it has caught up.
//! 2. Published values lie in atomic words: publishing needs no lock, and two threads that publish one piece write the
//!    same bits. A phase has words of its own until the computation ends, so nothing is written that a late thread reads.

mod trial;

use crate::threads::Threads;
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use trial::Trial;

/// Pieces of a phase at most: one bit each.
const MOST_PIECES: usize = 64;
/// Pieces per thread where pieces are short: each costs a hand-over, which shows in a phase of 20 µs.
const FEW: usize = 2;
/// And where they are long: a thread that is slow for a while leaves the rest to others.
const MANY: usize = 8;
/// Bytes of a long piece, some 25 µs of reading.
const LONG_BYTES: usize = 512 * 1024;
/// A piece of fewer bytes costs less to compute twice than to hand over.
const MIN_PIECE_BYTES: usize = 16 * 1024;
/// How long a piece may stay out beyond the time that pieces take.
const GRACE: Duration = Duration::from_micros(30);
/// Pieces never take longer, threads that lose their core do.
const LONGEST_PIECE: Duration = Duration::from_millis(1);
/// Looks at a phase before the clock is asked.
const SPINS: usize = 64;
/// Words of a cache line.
const LINE: usize = 8;

/// Where the threads of a [`Threads::team`] publish; kept between computations, since it is large.
#[derive(Debug, Default)]
pub(crate) struct Board {
    phases: Vec<Phase>,
    /// Two f32 each.
    words: Vec<AtomicU64>,
    over: AtomicBool,
    trial: Trial,
}

/// Alone on its cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Phase {
    /// Pieces claimed, and more once all are.
    claimed: AtomicUsize,
    /// Bit `i`: piece `i` is published.
    published: AtomicU64,
}

/// The computation is over, or was given up: a thread that hears it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Over;

/// What a thread's part of a computation ends with.
pub(crate) type Outcome = Result<(), Over>;

/// What a computation publishes at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Phases.
    pub phases: usize,
    /// Elements of all their outputs.
    pub elements: usize,
}

impl Board {
    /// Makes room and forgets what was published.
    fn reset(&mut self, threads: usize, Room { phases, elements }: Room) {
        // Each piece begins a line.
        let words = elements.div_ceil(2) + phases * most_pieces(threads) * LINE;
        if self.phases.len() < phases {
            self.phases.resize_with(phases, Phase::default);
        }
        if self.words.len() < words {
            self.words.resize_with(words, AtomicU64::default);
        }
        for phase in &mut self.phases {
            *phase.claimed.get_mut() = 0;
            *phase.published.get_mut() = 0;
        }
        *self.over.get_mut() = false;
    }
}

fn most_pieces(threads: usize) -> usize {
    (threads * MANY).min(MOST_PIECES)
}

/// One thread of a team and how far it has come.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    /// `None`: it is alone.
    board: Option<&'a Board>,
    threads: usize,
    index: usize,
    phase: usize,
    word: usize,
    /// How long its last pieces took.
    pace: Duration,
}

impl Threads {
    /// Runs `program` on every thread with a value of its own, the calling thread with `own[0]`; returns when all have left.
    ///
    /// Every thread must call the same phases in the same order. The calling thread's outcome ends the computation: the
    /// others hear [`Over`] in their next phase. Allocates nothing once the board has room.
    ///
    /// # Errors
    /// `program` gave up on the calling thread.
    ///
    /// # Panics
    /// `program` panicked on any thread, or `own` is shorter than [`Self::count`].
    pub(crate) fn team<P: Send>(
        self,
        board: &mut Board,
        room: Room,
        own: &[Mutex<P>],
        program: impl Fn(&mut Member<'_>, &mut P) -> Outcome + Sync,
    ) -> Outcome {
        assert!(own.len() >= self.count(), "team: a thread has no value of its own");
        let run = |index: usize, board: Option<&Board>| {
            // Only this thread takes this lock; what a panic left in it is overwritten by the next computation.
            let mut own = own[index].lock().unwrap_or_else(PoisonError::into_inner);
            let pace = Duration::ZERO;
            let mut member = Member { board, threads: self.count(), index, phase: 0, word: 0, pace };
            program(&mut member, &mut own)
        };
        if self.alone() {
            return run(0, None);
        }
        let start = Instant::now();
        let outcome = Mutex::new((Err(Over), Duration::ZERO));
        if board.trial.alone() {
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = (run(0, None), start.elapsed());
        } else {
            board.reset(self.count(), room);
            let board = &*board;
            self.on_all(|index| {
                if index > 0 {
                    // A thread that leaves early is none that failed.
                    let _ = run(index, Some(board));
                    return;
                }
                let _over = OnDrop(&board.over);
                let done = (run(0, Some(board)), start.elapsed());
                *outcome.lock().unwrap_or_else(PoisonError::into_inner) = done;
            });
        }
        let (outcome, own_time) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        let time = start.elapsed();
        board.trial.note(time, time - own_time);
        outcome
    }
}

/// Says that a computation is over, also when its calling thread panics.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Member<'a> {
    /// Whether this is the thread that called [`Threads::team`].
    #[must_use]
    pub(crate) fn is_caller(&self) -> bool {
        self.index == 0
    }

    /// How many of `units` things, which read `bytes` in total, make a good piece; a multiple of `step`.
    #[must_use]
    pub(crate) fn piece(&self, units: usize, bytes: usize, step: usize) -> usize {
        if self.board.is_none() {
            return units.next_multiple_of(step).max(1);
        }
        let most = most_pieces(self.threads);
        let few = (bytes / MIN_PIECE_BYTES).clamp(1, (self.threads * FEW).min(most));
        let n = few.max((bytes / LONG_BYTES).min(most));
        // An uneven number of pieces would leave threads waiting for the last.
        let n = if n > self.threads { n / self.threads * self.threads } else { n };
        units.div_ceil(n).next_multiple_of(step).max(1)
    }

    /// `f(i, piece i of out)` for all pieces, each `piece` elements long but the last, on all threads; `out` is then full.
    ///
    /// `f` must be a pure function of `i`: it may run several times, on several threads. A single piece is computed by
    /// every thread for itself.
    ///
    /// # Errors
    /// The computation is over.
    ///
    /// # Panics
    /// More pieces than [`Self::piece`] makes, or more phases or elements than there is [`Room`] for.
    pub(crate) fn phase(
        &mut self,
        out: &mut [f32],
        piece: usize,
        mut f: impl FnMut(usize, &mut [f32]),
    ) -> Outcome {
        let Some(slots) = self.enter(out.len(), piece)? else {
            out.chunks_mut(piece.max(1)).enumerate().for_each(|(i, out)| f(i, out));
            return Ok(());
        };
        let mut mine = 0_u64;
        let start = Instant::now();
        while let Some(i) = slots.claim() {
            mine |= 1 << i;
            let out = &mut out[slots.range(i)];
            f(i, out);
            slots.publish(i, out);
        }
        self.await_all(&slots, start, mine.count_ones(), |i| {
            mine |= 1 << i;
            let out = &mut out[slots.range(i)];
            f(i, out);
            slots.publish(i, out);
        });
        for i in (0..slots.pieces).filter(|i| mine >> i & 1 == 0) {
            slots.read(i, &mut out[slots.range(i)]);
        }
        Ok(())
    }

    /// Helps with a phase of `len` elements whose result this thread does not need; `room` holds a piece.
    ///
    /// # Errors
    /// The computation is over.
    ///
    /// # Panics
    /// As [`Self::phase`].
    pub(crate) fn assist(
        &mut self,
        len: usize,
        piece: usize,
        room: &mut [f32],
        mut f: impl FnMut(usize, &mut [f32]),
    ) -> Outcome {
        let Some(slots) = self.enter(len, piece)? else { return Ok(()) };
        while let Some(i) = slots.claim() {
            let out = &mut room[..slots.range(i).len()];
            f(i, out);
            slots.publish(i, out);
        }
        Ok(())
    }

    /// The next phase's part of the board; `None` if each thread computes the phase for itself.
    fn enter(&mut self, len: usize, piece: usize) -> Result<Option<Slots<'a>>, Over> {
        let Some(board) = self.board else { return Ok(None) };
        if board.over.load(Ordering::Relaxed) {
            return Err(Over);
        }
        if len <= piece {
            return Ok(None);
        }
        let pieces = len.div_ceil(piece);
        assert!(pieces <= most_pieces(self.threads), "phase: {pieces} pieces are too many");
        let stride = piece.div_ceil(2).next_multiple_of(LINE);
        // The last piece may be far shorter; a room has a line more per piece than elements, no whole pieces.
        let last = len - (pieces - 1) * piece;
        let words = (pieces - 1) * stride + last.div_ceil(2).next_multiple_of(LINE);
        let words = &board.words[self.word..self.word + words];
        let slots = Slots { phase: &board.phases[self.phase], words, stride, pieces, piece, len };
        self.phase += 1;
        self.word += words.len();
        Ok(Some(slots))
    }

    /// Waits for the pieces that others claimed; what does not come in time goes to `redo`.
    fn await_all(&mut self, slots: &Slots<'_>, start: Instant, done: u32, mut redo: impl FnMut(usize)) {
        let mut deadline = None;
        loop {
            let missing = slots.missing();
            if missing == 0 {
                return;
            }
            let deadline = *deadline.get_or_insert_with(|| {
                let now = Instant::now();
                if let Some(pace) = (now - start).checked_div(done) {
                    self.pace = pace.min(LONGEST_PIECE);
                }
                now + GRACE + 2 * self.pace
            });
            if Instant::now() > deadline {
                // Threads that wait together begin with different pieces.
                let skip = self.index as u32 % missing.count_ones();
                let missing = (0..skip).fold(missing, |m, _| m & (m - 1));
                redo(missing.trailing_zeros() as usize);
            }
        }
    }
}

/// A phase's part of the board.
struct Slots<'a> {
    phase: &'a Phase,
    words: &'a [AtomicU64],
    stride: usize,
    pieces: usize,
    piece: usize,
    len: usize,
}

impl Slots<'_> {
    fn claim(&self) -> Option<usize> {
        // A late thread only reads: the line stays with those that work.
        let left = self.phase.claimed.load(Ordering::Relaxed) < self.pieces;
        let i = left.then(|| self.phase.claimed.fetch_add(1, Ordering::Relaxed))?;
        (i < self.pieces).then_some(i)
    }

    fn range(&self, i: usize) -> std::ops::Range<usize> {
        i * self.piece..((i + 1) * self.piece).min(self.len)
    }

    /// The pieces that are not published after a few looks, one bit each.
    fn missing(&self) -> u64 {
        let all = u64::MAX >> (MOST_PIECES - self.pieces);
        let look = || all & !self.phase.published.load(Ordering::Acquire);
        let mut missing = look();
        for _ in 0..SPINS {
            if missing == 0 {
                break;
            }
            std::hint::spin_loop();
            missing = look();
        }
        missing
    }

    fn publish(&self, i: usize, values: &[f32]) {
        if self.phase.published.load(Ordering::Relaxed) >> i & 1 == 1 {
            return;
        }
        let words = &self.words[i * self.stride..];
        let (pairs, rest) = values.as_chunks();
        for (word, pair) in words.iter().zip(pairs) {
            word.store(pack(*pair), Ordering::Relaxed);
        }
        if let [last] = rest {
            words[pairs.len()].store(pack([*last, 0.0]), Ordering::Relaxed);
        }
        self.phase.published.fetch_or(1 << i, Ordering::Release);
    }

    fn read(&self, i: usize, values: &mut [f32]) {
        let words = &self.words[i * self.stride..];
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

#[cfg(test)]
mod tests;
