use super::*;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread::sleep,
};

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

fn room() -> Room {
    Room { phases: LENS.len(), elements: LENS.iter().sum() }
}

#[test]
fn every_thread_sees_every_output_however_often_the_board_is_used() {
    for threads in [Threads::new(1).unwrap(), Threads::default()] {
        let (own, mut board) = (own(threads), Board::default());
        for _ in 0..200 {
            let seen = AtomicUsize::new(0);
            let outcome = threads.team(&mut board, room(), &own, |member, out| {
                checked(member, out, &LENS, |_| {})?;
                seen.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            assert_eq!(outcome, Ok(()));
            assert!(seen.into_inner() >= 1);
        }
    }
}

#[test]
fn a_short_last_piece_takes_no_more_room_than_its_elements() {
    // Attention's: few units, each large, and a number of pieces that does not divide them.
    let (unit, units, per_piece, phases) = (528, 31, 6, 40);
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    let room = Room { phases, elements: phases * units * unit };
    let outcome = threads.team(&mut board, room, &own, |member, out| {
        for phase in 0..phases {
            out.clear();
            out.resize(units * unit, f32::NAN);
            let piece = per_piece * unit;
            member.phase(out, piece, |i, out| {
                out.iter_mut().enumerate().for_each(|(j, v)| *v = value(phase, i * piece + j));
            })?;
            assert!(out.iter().enumerate().all(|(i, v)| *v == value(phase, i)), "phase {phase}");
        }
        Ok(())
    });
    assert_eq!(outcome, Ok(()));
}

#[test]
fn a_thread_that_stalls_in_a_piece_holds_up_no_other() {
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    let took = Mutex::new(Duration::ZERO);
    let outcome = threads.team(&mut board, room(), &own, |member, out| {
        let start = Instant::now();
        checked(member, out, &LENS, |index| if index > 0 { sleep(STALL) } else { sleep(STALL / 1000) })?;
        if member.is_caller() {
            *took.lock().unwrap() = start.elapsed();
        }
        Ok(())
    });
    assert_eq!(outcome, Ok(()));
    let took = took.into_inner().unwrap();
    assert!(took < STALL / 2, "{took:?}");
}

#[test]
fn a_thread_that_comes_late_leaves() {
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    let left = AtomicUsize::new(0);
    let outcome = threads.team(&mut board, room(), &own, |member, out| {
        if !member.is_caller() {
            sleep(STALL / 10);
        }
        let outcome = checked(member, out, &LENS, |index| assert_eq!(index, 0, "nothing was left to do"));
        if outcome == Err(Over) {
            left.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    });
    assert_eq!(outcome, Ok(()));
    assert_eq!(left.into_inner(), threads.count() - 1);
}

#[test]
fn a_panic_reaches_the_caller_and_stops_nobody() {
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    for bad in 0..threads.count() {
        let hit = AtomicBool::new(false);
        let mut run = || {
            threads.team(&mut board, room(), &own, |member, out| {
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
        assert_eq!(result.is_err(), hit.into_inner());
    }
    assert_eq!(threads.team(&mut board, room(), &own, |m, out| checked(m, out, &LENS, |_| {})), Ok(()));
}

#[test]
fn inside_a_region_a_team_is_one_thread() {
    let threads = Threads::default();
    let runs = AtomicUsize::new(0);
    let alone = || {
        let (own, mut board) = (own(threads), Board::default());
        let outcome = threads.team(&mut board, room(), &own, |member, out| {
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
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    let mut logits = vec![0.0; LEN];
    let out = Mutex::new(Some(&mut logits));
    let outcome = threads.team(&mut board, Room { phases: 1, elements: LEN }, &own, |member, own| {
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
    let threads = Threads::default();
    let (own, mut board) = (own(threads), Board::default());
    let outcome = threads.team(&mut board, room(), &own, |member, out| {
        if member.is_caller() { Err(Over) } else { checked(member, out, &LENS, |_| {}) }
    });
    assert_eq!(outcome, Err(Over));
}

#[test]
fn pieces_are_few_and_whole_steps() {
    for threads in 1..100 {
        let board = Board::default();
        let member = Member { board: Some(&board), threads, index: 0, phase: 0, word: 0, pace: GRACE };
        for (units, bytes) in [(1, 1), (49_152, 30 << 20), (576, 352 << 10), (10, usize::MAX)] {
            let piece = member.piece(units, bytes, 4);
            assert!(piece.is_multiple_of(4) && units.div_ceil(piece) <= most_pieces(threads));
        }
    }
}
