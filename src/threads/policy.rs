//! Whether the threads of the pool share a computation, or the calling thread does it alone.
//!
//! A shared computation ends when every thread has left it, and a thread that lost its core leaves a time slice later.
//! What that costs depends on who else wants the cores and on how long a computation is: half a core may still help, and
//! sixteen threads gain more than one late thread costs. So both ways are measured, in time per unit of work:
//!
//! ```text
//! credit = 2 computations when a way is taken up, 8 at most
//! after each computation:   credit += what the other way would have taken − what this one took
//! credit < 0:               back to the other way, for at least 16 times what was lost (32, 64 if it happens again)
//! now and then:             try the other way, if there is reason to
//! ```
//!
//! 1. Beside the better of both ways a trial loses at most the credit and one computation's excess, and no trial begins
//!    before 16 times the last one's loss has passed: at most 1/16 of the time, 1/64 while the same way keeps winning. A
//!    change of the machine's load costs the credit once more.
//! 2. One thread of many would be slow: alone is tried only where the calling thread's pace says that the threads did the
//!    work of fewer than 1.5, so a trial costs at most half of its time more. The pace among others is no faster than the
//!    pace alone, since threads share memory; so this estimate never makes alone look better than it is.

use std::time::Duration;

/// Computations that a way may lose when it is taken up, and that it may lose at most after it has saved more.
const LEAST_CREDIT: f64 = 2.0;
const MOST_CREDIT: f64 = 8.0;
/// How many times its loss a failed trial is followed by the other way.
const LEAST_STAY: f64 = 16.0;
const MOST_STAY: f64 = 64.0;
/// Threads whose work must be seen done, or alone is tried.
const WORTH: f64 = 1.5;
/// Computations of a mean; older ones count half.
const WINDOW: f64 = 16.0;
/// And those that say something about the machine.
const ENOUGH: f64 = 4.0;

/// One computation, or a part of one that always comes again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// How much was done, in a unit that the caller of the policy keeps to.
    pub(crate) work: f64,
    /// How long it took.
    pub(crate) time: Duration,
    /// How long the calling thread alone would have taken, by its pace among the others.
    pub(crate) alone: Duration,
}

/// Sums over the last computations.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    count: f64,
    work: f64,
    time: f64,
    alone: f64,
}

impl Pace {
    fn add(&mut self, Sample { work, time, alone }: Sample) {
        if self.count >= WINDOW {
            let Self { count, work, time, alone } = *self;
            *self = Self { count: count / 2.0, work: work / 2.0, time: time / 2.0, alone: alone / 2.0 };
        }
        self.count += 1.0;
        self.work += work;
        self.time += time.as_secs_f64();
        self.alone += alone.as_secs_f64();
    }

    /// Seconds of a computation.
    fn mean(&self) -> f64 {
        self.time / self.count.max(1.0)
    }
}

/// The way in which computations of one kind run, and what is known of both ways. Times in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    alone: bool,
    pace: Pace,
    /// Seconds per unit of work in the other way.
    rival: Option<f64>,
    /// What this way may still lose against the other, and what it was given when it was taken up.
    credit: f64,
    given: f64,
    /// Whether it has earned the most credit since.
    proven: bool,
    /// How long the other way is not tried.
    stay: f64,
    stays: f64,
}

impl Default for Policy {
    fn default() -> Self {
        Self::new()
    }
}

impl Policy {
    /// Together, until something is known.
    pub(crate) const fn new() -> Self {
        let pace = Pace { count: 0.0, work: 0.0, time: 0.0, alone: 0.0 };
        Self {
            alone: false,
            pace,
            rival: None,
            credit: 0.0,
            given: 0.0,
            proven: false,
            stay: 0.0,
            stays: LEAST_STAY,
        }
    }

    /// Whether the next computation is to run on the calling thread alone.
    pub(crate) fn alone(&self) -> bool {
        self.alone
    }

    /// Learns from a computation that ran as [`Self::alone`] said.
    pub(crate) fn note(&mut self, sample: Sample) {
        let time = sample.time.as_secs_f64();
        self.pace.add(sample);
        self.stay -= time;
        if let Some(rival) = self.rival {
            let most = MOST_CREDIT * self.pace.mean();
            self.credit = (self.credit + rival * sample.work - time).min(most.max(self.given));
            self.proven |= self.credit >= most && self.credit > self.given;
        }
        if self.credit < 0.0 {
            self.fall_back();
        } else if self.stay <= 0.0 && self.doubts() {
            self.change(self.stays * LEAST_CREDIT * self.pace.mean());
        }
    }

    /// What comes takes another time per unit of work: keeps to this way, forgets how long both took.
    pub(crate) fn forget_times(&mut self) {
        let Self { alone, stay, stays, .. } = *self;
        *self = Self { alone, stay, stays, ..Self::new() };
    }

    /// Whether there is reason to try the other way.
    fn doubts(&self) -> bool {
        self.alone || self.pace.count >= ENOUGH && self.pace.alone < WORTH * self.pace.time
    }

    /// Leaves a way that lost its credit.
    fn fall_back(&mut self) {
        let lost = self.given - self.credit;
        self.stays = if self.proven { LEAST_STAY } else { (2.0 * self.stays).min(MOST_STAY) };
        self.change(self.stays * lost);
    }

    /// Takes up the other way, at least for `stay` unless it loses its credit.
    fn change(&mut self, stay: f64) {
        let given = LEAST_CREDIT * self.pace.mean();
        let rival = Some(self.pace.time / self.pace.work.max(f64::MIN_POSITIVE));
        let (alone, stays) = (!self.alone, self.stays);
        *self = Self { alone, rival, credit: given, given, stay, stays, ..Self::new() };
    }
}

#[cfg(test)]
mod tests;
