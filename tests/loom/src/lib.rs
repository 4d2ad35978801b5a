//! The protocol of `src/team/board.rs` under loom: two or three threads, every order of their loads and stores that C11
//! allows, up to a number of preemptions.
//!
//! `cargo test -p candle-sparse-loom`. What is checked: who reads a piece finds all its values; two threads that compute
//! one piece do no harm; a thread that is late when the computation ends leaves; the next computation sees nothing of the
//! last one.

#[path = "../../../src/team/board.rs"]
#[cfg(test)]
mod board;
#[cfg(test)]
use loom::sync::atomic;

#[cfg(test)]
mod tests {
    use super::board::{Board, Cancelled, Outputs, Place};
    use loom::{
        model::Builder,
        sync::Arc,
        thread::{spawn, yield_now},
    };

    /// Elements of a phase and of its pieces: the first piece has a word and a half, the last half a word, or a whole one.
    const PHASES: [(usize, usize); 2] = [(4, 3), (5, 3)];

    fn value(computation: usize, phase: usize, i: usize) -> f32 {
        (100 * computation + 10 * phase + i + 1) as f32
    }

    /// What `Member::phase` does, phase by phase; `patient` threads wait for a missing piece, others compute it at once.
    fn program(
        board: &Board,
        phases: usize,
        thread: usize,
        computation: usize,
        patient: bool,
    ) -> Result<(), Cancelled> {
        let mut place = Place::default();
        for (phase, (len, piece)) in PHASES.into_iter().take(phases).enumerate() {
            let Some(slots) = board.enter(&mut place, len, piece)? else { panic!("more than was declared") };
            let mut out = [f32::NAN; 5];
            let out = &mut out[..len];
            let mut compute = |i: usize, out: &mut [f32]| {
                out.iter_mut().enumerate().for_each(|(j, v)| *v = value(computation, phase, i * piece + j));
            };
            slots.work(thread, out, &mut compute);
            slots.finish(thread, out, &mut compute, || {
                if patient {
                    yield_now();
                }
                !patient
            });
            assert!(out.iter().enumerate().all(|(i, v)| *v == value(computation, phase, i)), "{out:?}");
        }
        Ok(())
    }

    /// `computations` one after the other on `threads` threads, of which the first ends them.
    fn check([threads, phases, computations]: [usize; 3], preemptions: usize, patient: bool) {
        let mut model = Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let mut board = Arc::new(Board::default());
            for computation in 0..computations {
                let mut outputs = Outputs::of(threads);
                PHASES.iter().for_each(|(len, _)| outputs.add(*len));
                let Some(all) = Arc::get_mut(&mut board) else { panic!("a thread did not leave") };
                all.begin(&outputs);
                let others: Vec<_> = (1..threads)
                    .map(|thread| {
                        let board = board.clone();
                        // One that hears that all is over leaves: nothing it has read so far was wrong.
                        spawn(move || program(&board, phases, thread, computation, patient).ok())
                    })
                    .collect();
                assert_eq!(
                    program(&board, phases, 0, computation, patient),
                    Ok(()),
                    "the first thread ends it"
                );
                board.end();
                others.into_iter().for_each(|thread| assert!(thread.join().is_ok(), "a thread failed"));
            }
        });
    }

    #[test]
    fn two_threads_that_wait_see_every_value() {
        check([2, 2, 1], 3, true);
    }

    #[test]
    fn two_threads_that_compute_what_is_missing_see_every_value() {
        check([2, 1, 1], 2, false);
    }

    #[test]
    fn three_threads_see_every_value() {
        check([3, 1, 1], 1, true);
    }

    #[test]
    fn the_next_computation_sees_nothing_of_the_last_one() {
        check([2, 1, 2], 1, true);
    }
}
