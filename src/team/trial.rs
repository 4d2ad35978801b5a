//! Whether a team is worth it just now.
//!
//! A computation ends when every thread has left, and one that lost its core leaves a time slice later. How much that
//! costs depends on who else wants the cores: half a core may still help, a thirtieth does not. So where threads come
//! late, the calling thread tries it alone and keeps to what is faster, for longer each time it proves so.

use std::time::Duration;

/// Computations of a trial, and of the first stint after it.
const TRIAL: u32 = 8;
const LONGEST: u32 = 512;
/// What a late computation counts more than one in time, and from where on there is reason for a trial.
const LATE: u32 = 4;
const SUSPECT: u32 = 8;

/// A series of computations in one of the two ways.
#[derive(Clone, Copy, Debug, Default)]
struct Stint {
    alone: bool,
    /// The computations to go on for; `None`: as long as nobody is late.
    len: Option<u32>,
    count: u32,
    late: u32,
    time: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Trial {
    stint: Stint,
    /// How long a computation took in the other way.
    rival: Duration,
    /// Length of the last stint that was won.
    won: u32,
}

impl Trial {
    /// Whether the next computation is to run on the calling thread alone.
    pub(super) fn alone(&self) -> bool {
        self.stint.alone
    }

    /// A computation took `time`, the last `wait` of it for other threads to leave.
    pub(super) fn note(&mut self, time: Duration, wait: Duration) {
        let late = wait > Duration::from_micros(50) && wait > time / 8;
        let stint = &mut self.stint;
        stint.count += 1;
        stint.time += time;
        let Some(len) = stint.len else {
            stint.late = if late { stint.late + LATE } else { stint.late.saturating_sub(1) };
            if stint.late >= SUSPECT {
                self.turn(TRIAL);
            } else if stint.count == TRIAL {
                // The rival of a trial is what was measured last.
                *stint = Stint { late: stint.late, ..Stint::default() };
            }
            return;
        };
        stint.late += u32::from(late);
        let lost = stint.time > self.rival * len;
        if stint.count < len && !(len == TRIAL && lost) {
            return;
        }
        if !stint.alone && stint.late == 0 {
            *self = Self::default();
        } else if len != TRIAL {
            self.turn(TRIAL);
        } else {
            self.judge(lost);
        }
    }

    /// Ends a trial.
    fn judge(&mut self, lost: bool) {
        self.won = if lost { (2 * self.won).clamp(2 * TRIAL, LONGEST) } else { 2 * TRIAL };
        if lost {
            self.turn(self.won);
        } else {
            let Stint { alone, .. } = self.stint;
            self.stint = Stint { alone, len: Some(self.won), ..Stint::default() };
        }
    }

    /// Goes on in the other way.
    fn turn(&mut self, len: u32) {
        let Stint { alone, count, time, .. } = self.stint;
        self.rival = time / count.max(1);
        self.stint = Stint { alone: !alone, len: Some(len), ..Stint::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of `n` computations that ran alone, where a team takes `team` µs, `wait` of it for late threads.
    fn share(trial: &mut Trial, n: u32, team: u64, wait: u64, alone: u64) -> f64 {
        let mut count = 0;
        for _ in 0..n {
            if trial.alone() {
                count += 1;
                trial.note(Duration::from_micros(alone), Duration::ZERO);
            } else {
                trial.note(Duration::from_micros(team), Duration::from_micros(wait));
            }
        }
        f64::from(count) / f64::from(n)
    }

    #[test]
    fn what_is_faster_wins_and_late_threads_are_forgiven() {
        let mut trial = Trial::default();
        assert_eq!(share(&mut trial, 1000, 5_000, 20, 8_000), 0.0, "nobody is late");
        assert!(share(&mut trial, 4000, 40_000, 30_000, 6_000) > 0.95, "a team that waits long");
        share(&mut trial, LONGEST + TRIAL, 5_000, 20, 8_000);
        assert_eq!(share(&mut trial, 1000, 5_000, 20, 8_000), 0.0, "the cores are free again");
        assert!(share(&mut trial, 4000, 10_000, 4_000, 12_000) < 0.05, "half a core still helps");
    }

    #[test]
    fn one_late_thread_is_no_reason() {
        let mut trial = Trial::default();
        for _ in 0..100 {
            assert_eq!(share(&mut trial, 1, 9_000, 4_000, 8_000), 0.0);
            assert_eq!(share(&mut trial, 20, 5_000, 20, 8_000), 0.0);
        }
    }
}
