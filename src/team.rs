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
//! A thread that lost its core with a claimed piece is not waited for, one that comes late copies finished phases until it
//! has caught up, and a slow one claims fewer pieces. `board.rs` is the protocol.

mod board;

use crate::threads::{Policy, Sample, Threads, add_alone_extra};
use crate::tuning::{
    LONG_PIECE_BYTES, LONGEST_PIECE, MIN_PIECE_BYTES, PIECE_GRACE, SHORT_PIECES_PER_THREAD, SPINS,
};
use board::{Board, Place, Slots, most_pieces};
pub(crate) use board::{Cancelled, Outputs};
use std::{
    sync::{Mutex, PoisonError, atomic},
    time::{Duration, Instant},
};

/// What a thread's part of a computation ends with.
pub(crate) type Outcome = Result<(), Cancelled>;

/// What a team keeps between computations of one kind.
#[derive(Debug, Default)]
pub(crate) struct Team {
    board: Board,
    policy: Policy,
}

/// One thread of a team and how far it has come.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    /// `None`: it is alone.
    board: Option<&'a Board>,
    threads: usize,
    index: usize,
    place: Place,
    /// How long its last pieces took.
    pace: Duration,
    pieces: Pieces,
}

/// What a thread knows of the work of the others.
#[derive(Clone, Copy, Debug, Default)]
struct Pieces {
    /// How long it would have taken for their pieces.
    others: Duration,
    /// How long it waited for them.
    waited: Duration,
}

/// What the calling thread brings back from a computation.
struct Report {
    outcome: Outcome,
    place: Place,
    pieces: Pieces,
    /// When it had nothing left to do.
    time: Duration,
}

impl Threads {
    /// Runs `program` on every thread with a value of its own, the calling thread with `own[0]`; returns when all have left.
    ///
    /// Every thread must call the same phases in the same order. The calling thread's outcome ends the computation: the
    /// others get [`Cancelled`] in their next phase. Allocates nothing once there is room for `outputs`; a program that
    /// publishes more than them computes the rest on each thread.
    ///
    /// # Errors
    /// `program` gave up on the calling thread.
    ///
    /// # Panics
    /// `program` panicked on any thread, or `own` is shorter than [`Self::count`].
    pub(crate) fn team<P: Send>(
        self,
        team: &mut Team,
        outputs: &Outputs,
        own: &[Mutex<P>],
        program: impl Fn(&mut Member<'_>, &mut P) -> Outcome + Sync,
    ) -> Outcome {
        assert!(own.len() >= self.count(), "team: a thread has no value of its own");
        let start = Instant::now();
        let run = |index: usize, board: Option<&Board>| {
            // Only this thread takes this lock; what a panic left in it is overwritten by the next computation.
            let mut own = own[index].lock().unwrap_or_else(PoisonError::into_inner);
            let mut member = Member::new(board, self.count(), index);
            let outcome = program(&mut member, &mut own);
            Report { outcome, place: member.place, pieces: member.pieces, time: start.elapsed() }
        };
        if self.alone() {
            return run(0, None).outcome;
        }
        let report = if team.policy.alone() {
            run(0, None)
        } else {
            team.board.begin(outputs);
            let report = self.together(&team.board, run);
            // Nothing, unless more was published than declared.
            team.board.hold(report.place);
            report
        };
        let Pieces { others, waited } = report.pieces;
        let alone = (report.time + others).saturating_sub(waited);
        let time = start.elapsed();
        add_alone_extra(alone.as_secs_f64() - time.as_secs_f64());
        team.policy.note(Sample { work: 1.0, time, alone });
        report.outcome
    }

    /// As [`Self::team`], for a computation of which nothing is kept: it is scheduled as a region by itself.
    ///
    /// # Errors
    /// As [`Self::team`].
    ///
    /// # Panics
    /// As [`Self::team`].
    pub(crate) fn lone_team<P: Send>(
        self,
        outputs: &Outputs,
        own: &[Mutex<P>],
        program: impl Fn(&mut Member<'_>, &mut P) -> Outcome + Sync,
    ) -> Outcome {
        self.schedule_region(|| self.team(&mut Team::default(), outputs, own, program))
    }

    /// Runs a computation on all threads; what the calling one reports.
    fn together(self, board: &Board, run: impl Fn(usize, Option<&Board>) -> Report + Sync) -> Report {
        let report = Mutex::new(None);
        self.on_all(|index| {
            if index > 0 {
                // A thread that leaves early is none that failed.
                run(index, Some(board));
                return;
            }
            let _over = OnDrop(board);
            let done = run(0, Some(board));
            *report.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        });
        let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.unwrap_or_else(|| unreachable!("the calling thread ran, or its panic was resumed"))
    }
}

/// Says that a computation is over, also when its calling thread panics.
struct OnDrop<'a>(&'a Board);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl<'a> Member<'a> {
    fn new(board: Option<&'a Board>, threads: usize, index: usize) -> Self {
        let (place, pieces) = (Place::default(), Pieces::default());
        Self { board, threads, index, place, pace: Duration::ZERO, pieces }
    }

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
        let few = (bytes / MIN_PIECE_BYTES).clamp(1, self.threads * SHORT_PIECES_PER_THREAD);
        let n = few.max((bytes / LONG_PIECE_BYTES).min(most));
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
        let start = Instant::now();
        let done = slots.work(self.index, out, &mut f);
        let worked = self.worked(&slots, start, done);
        if slots.finish(self.index, out, &mut f, self.patience()) {
            self.waited(&slots, worked, done);
        }
        Ok(())
    }

    /// Helps with a phase of `len` elements whose result this thread does not need; `room` holds a piece.
    ///
    /// # Errors
    /// The computation is over.
    ///
    /// # Panics
    /// `room` is too short.
    pub(crate) fn assist(
        &mut self,
        len: usize,
        piece: usize,
        room: &mut [f32],
        mut f: impl FnMut(usize, &mut [f32]),
    ) -> Outcome {
        let Some(slots) = self.enter(len, piece)? else { return Ok(()) };
        while let Some(i) = slots.claim() {
            slots.compute(self.index, i, &mut room[..slots.range(i).len()], &mut f);
        }
        Ok(())
    }

    /// The next phase's part of the board; `None` if each thread computes the phase for itself.
    fn enter(&mut self, len: usize, piece: usize) -> Result<Option<Slots<'a>>, Cancelled> {
        match self.board {
            Some(board) if len > piece => board.enter(&mut self.place, len, piece),
            Some(board) => board.check_over().map(|()| None),
            None => Ok(None),
        }
    }

    /// Notes how long this thread took for its pieces, which the pieces of others would have taken too; says when it was
    /// done.
    fn worked(&mut self, slots: &Slots<'_>, start: Instant, done: usize) -> Instant {
        let now = Instant::now();
        if let Some(pace) = (now - start).checked_div(done as u32) {
            self.pace = pace.min(LONGEST_PIECE);
            self.pieces.others += pace * (slots.count() - done) as u32;
        }
        now
    }

    /// Notes how long this thread waited after its pieces; if it had none, the others are taken to have worked until now.
    fn waited(&mut self, slots: &Slots<'_>, since: Instant, done: usize) {
        let waited = since.elapsed();
        self.pieces.waited += waited;
        if done == 0 {
            self.pieces.others += waited * slots.count().min(self.threads - 1) as u32;
        }
    }

    /// Says, each time a missing piece is checked for, whether it has been out for too long.
    fn patience(&self) -> impl FnMut() -> bool + use<> {
        let (grace, mut checks, mut deadline) = (PIECE_GRACE + 2 * self.pace, 0_u32, None);
        move || {
            std::hint::spin_loop();
            checks = checks.wrapping_add(1);
            if !checks.is_multiple_of(SPINS) {
                return false;
            }
            let now = Instant::now();
            now > *deadline.get_or_insert_with(|| now + grace)
        }
    }
}

#[cfg(test)]
mod tests;
