use super::*;
use crate::threads::testing::{several, wait_until};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::sleep,
};

mod crowd;

const STALL: Duration = Duration::from_millis(300);

fn own(threads: Threads) -> Vec<Mutex<Vec<f32>>> {
    (0..threads.count()).map(|_| Mutex::default()).collect()
}

fn value(phase: usize, i: usize) -> f32 {
    (phase * 1000 + i) as f32
}

/// A program of `lens.len()` phases whose outputs every thread checks; `at` is called before each piece.
fn checked(member: &mut Member<'_>, out: &mut Vec<f32>, lens: &[usize], at: impl Fn(usize)) -> Outcome {
    for (phase, &len) in lens.iter().enumerate() {
        out.clear();
        out.resize(len, f32::NAN);
        let piece = member.piece(len, usize::MAX, 1);
        let index = member.index;
        member.phase(out, piece, |i, out| {
            at(index);
            out.iter_mut().enumerate().for_each(|(j, v)| *v = value(phase, i * piece + j));
        })?;
        assert!(out.iter().enumerate().all(|(i, v)| *v == value(phase, i)), "phase {phase}");
    }
    Ok(())
}

const LENS: [usize; 6] = [1, 2, 7, 64, 1001, 3];

fn outputs(threads: usize, lens: &[usize]) -> Outputs {
    let mut outputs = Outputs::of(threads);
    lens.iter().for_each(|len| outputs.add(*len));
    outputs
}

fn of_lens(threads: Threads) -> Outputs {
    outputs(threads.count(), &LENS)
}

#[test]
fn every_thread_sees_every_output_however_often_the_team_is_used() {
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let seen = AtomicUsize::new(0);
    for _ in 0..200 {
        // Whatever was measured: on a busy machine the calling thread may be better alone.
        team.policy = Policy::new();
        let outcome = threads.team(&mut team, &of_lens(threads), &own, |member, out| {
            checked(member, out, &LENS, |_| {})?;
            seen.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        assert_eq!(outcome, Ok(()));
    }
    let seen = seen.into_inner();
    assert!(
        seen > 200,
        "in {seen} programs of 200 computations no thread but the calling one came to the end"
    );
}

#[test]
fn one_thread_runs_without_a_board() {
    let one = Threads::new(1).unwrap();
    let (own, mut team) = (own(one), Team::default());
    let outcome = one.team(&mut team, &of_lens(one), &own, |member, out| {
        assert!(member.board.is_none());
        checked(member, out, &LENS, |_| {})
    });
    assert_eq!(outcome, Ok(()));
}

#[test]
fn a_thread_that_stalls_in_a_piece_holds_up_no_other() {
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let [stalled, done] = [false, false].map(AtomicBool::new);
    let outcome = threads.team(&mut team, &of_lens(threads), &own, |member, out| {
        let outcome = checked(member, out, &LENS, |index| {
            if index > 0 {
                stalled.store(true, Ordering::Relaxed);
                wait_until("the calling thread", || done.load(Ordering::Relaxed));
            } else {
                wait_until("a thread that stalls", || stalled.load(Ordering::Relaxed));
            }
        });
        done.fetch_or(member.is_caller(), Ordering::Relaxed);
        outcome
    });
    assert_eq!(outcome, Ok(()));
}

#[test]
fn a_thread_that_comes_late_leaves() {
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let (left, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let outcome = threads.team(&mut team, &of_lens(threads), &own, |member, out| {
        if member.is_caller() {
            let outcome = checked(member, out, &LENS, |_| {});
            done.store(true, Ordering::Release);
            return outcome;
        }
        wait_until("the calling thread", || done.load(Ordering::Acquire));
        // The calling thread has nothing to do any more but say so.
        sleep(STALL / 10);
        let outcome = checked(member, out, &LENS, |_| panic!("nothing was left to do"));
        left.fetch_add(usize::from(outcome == Err(Cancelled)), Ordering::Relaxed);
        outcome
    });
    assert_eq!(outcome, Ok(()));
    assert_eq!(left.into_inner(), threads.count() - 1);
}

#[test]
fn a_panic_reaches_the_caller_and_stops_nobody() {
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let mut hits = 0;
    for bad in 0..threads.count() {
        team.policy = Policy::new();
        let hit = AtomicBool::new(false);
        let mut run = || {
            threads.team(&mut team, &of_lens(threads), &own, |member, out| {
                checked(member, out, &LENS, |index| {
                    // Gives the others time to come.
                    sleep(STALL / 1000);
                    if index == bad {
                        hit.store(true, Ordering::Relaxed);
                        panic!("on purpose");
                    }
                })
            })
        };
        let result = catch_unwind(AssertUnwindSafe(&mut run));
        let hit = hit.into_inner();
        assert_eq!(result.is_err(), hit);
        hits += usize::from(hit);
    }
    assert!(hits >= 2, "panics of the calling thread and of another: {hits}");
    assert_eq!(
        threads.team(&mut team, &of_lens(threads), &own, |m, out| checked(m, out, &LENS, |_| {})),
        Ok(())
    );
}

#[test]
fn inside_a_region_a_team_is_one_thread() {
    let threads = several();
    let runs = AtomicUsize::new(0);
    let alone = || {
        let (own, mut team) = (own(threads), Team::default());
        let outcome = threads.team(&mut team, &of_lens(threads), &own, |member, out| {
            runs.fetch_add(1, Ordering::Relaxed);
            checked(member, out, &LENS, |_| {})
        });
        assert_eq!(outcome, Ok(()));
    };
    threads.on_all(|_| alone());
    assert_eq!(runs.into_inner(), threads.count());
}

#[test]
fn the_last_phase_is_for_the_caller() {
    const LEN: usize = 501;
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let mut logits = vec![0.0; LEN];
    let out = Mutex::new(Some(&mut logits));
    let outcome = threads.team(&mut team, &outputs(threads.count(), &[LEN]), &own, |member, own| {
        let piece = member.piece(LEN, usize::MAX, 4);
        let f = |i: usize, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(j, v)| *v = value(0, i * piece + j));
        };
        if member.is_caller() {
            return member.phase(out.lock().unwrap().take().unwrap(), piece, f);
        }
        own.resize(piece, 0.0);
        member.assist(LEN, piece, own, f)
    });
    assert_eq!(outcome, Ok(()));
    assert!(logits.iter().enumerate().all(|(i, v)| *v == value(0, i)));
}

#[test]
fn the_calling_thread_may_give_up() {
    let threads = several();
    let (own, mut team) = (own(threads), Team::default());
    let outcome = threads.team(&mut team, &of_lens(threads), &own, |member, out| {
        if member.is_caller() { Err(Cancelled) } else { checked(member, out, &LENS, |_| {}) }
    });
    assert_eq!(outcome, Err(Cancelled));
}

#[test]
fn a_computation_by_itself_tells_what_it_would_have_taken_alone() {
    let threads = several();
    let own = own(threads);
    // Sleeping threads do not slow each other down: alone it would have taken as long as all pieces.
    let piece = Duration::from_millis(4);
    let alone = crate::threads::testing::alone_extra_of(|| {
        let outcome = threads.schedule(&mut Policy::new(), 1, || {
            threads.team(&mut Team::default(), &of_lens(threads), &own, |member, out| {
                checked(member, out, &[64], |_| sleep(piece))
            })
        });
        assert_eq!(outcome, Ok(()));
    });
    assert_eq!(alone, 0.0, "what was scheduled is over");
    let alone = crate::threads::testing::alone_extra_of(|| {
        let outcome = threads.team(&mut Team::default(), &of_lens(threads), &own, |member, out| {
            checked(member, out, &[64], |_| sleep(piece))
        });
        assert_eq!(outcome, Ok(()));
    });
    assert!(alone > 2.0 * piece.as_secs_f64(), "{alone} s more alone");
    assert_eq!(threads.lone_team(&of_lens(threads), &own, |m, out| checked(m, out, &LENS, |_| {})), Ok(()));
}
