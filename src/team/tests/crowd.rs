//! Any number of threads, whatever candle's pool has.

use super::*;
use std::thread::scope;

/// Runs `program` to its end on `n` threads that share a board, however late they are.
fn crowd(n: usize, board: &Board, program: impl Fn(&mut Member<'_>) -> Outcome + Sync) {
    let run = |index| assert_eq!(program(&mut Member::new(Some(board), n, index)), Ok(()), "thread {index}");
    scope(|s| (0..n).for_each(|index| drop(s.spawn(move || run(index)))));
}

fn board(n: usize, lens: &[usize]) -> Board {
    let mut board = Board::default();
    board.begin(&outputs(n, lens));
    board
}

#[test]
fn a_hundred_threads_share_more_pieces_than_a_word_has_bits() {
    const MANY: [usize; 4] = [3000, 900, 1, 2000];
    for n in [2, 3, 48, 100] {
        let board = board(n, &MANY);
        crowd(n, &board, |member| {
            let pieces = 3000_usize.div_ceil(member.piece(3000, usize::MAX, 1));
            assert_eq!(pieces > 64, n > 16, "{pieces} pieces for {n} threads");
            checked(member, &mut Vec::new(), &MANY, |_| {})
        });
    }
}

#[test]
fn a_slow_thread_takes_fewer_pieces_and_nobody_waits_for_it() {
    const N: usize = 4;
    let counts = [const { AtomicUsize::new(0) }; N];
    let finished = AtomicUsize::new(0);
    let slow_has_one = || counts[N - 1].load(Ordering::Relaxed) > 0;
    crowd(N, &board(N, &[1000]), |member| {
        let me = member.index;
        let outcome = checked(member, &mut Vec::new(), &[1000], |_| {
            counts[me].fetch_add(1, Ordering::Relaxed);
            if me == N - 1 {
                // As slow as can be: its piece takes as long as the whole phase takes the others.
                wait_until("the fast threads", || finished.load(Ordering::Relaxed) == N - 1);
            } else {
                wait_until("the slow thread", slow_has_one);
            }
        });
        finished.fetch_add(1, Ordering::Relaxed);
        outcome
    });
    let counts = counts.map(AtomicUsize::into_inner);
    assert_eq!(counts[N - 1], 1, "{counts:?}");
    // The slow thread's piece was computed by a fast one too.
    assert!(counts.iter().sum::<usize>() > N * board::MANY, "{counts:?}");
}

#[test]
fn what_is_not_declared_is_computed_by_each_thread_and_then_known() {
    for (declared, shared) in [(&LENS[..0], 0), (&LENS[..3], 2), (&LENS[..], 5)] {
        let mut board = board(2, declared);
        crowd(2, &board, |member| checked(member, &mut Vec::new(), &LENS, |_| {}));
        // The same program on one thread: what it finds on the board, before and after it is known what it needs.
        let run = |board: &Board| {
            let (mut member, mut found) = (Member::new(Some(board), 2, 0), 0);
            for len in LENS {
                let piece = member.piece(len, usize::MAX, 1);
                found += usize::from(member.enter(len, piece).unwrap().is_some());
            }
            (member.place, found)
        };
        board.begin(&outputs(2, declared));
        let (place, found) = run(&board);
        assert_eq!(found, shared, "{declared:?}: one of the outputs is a single piece");
        board.hold(place);
        assert_eq!(run(&board), (place, 5));
    }
}

#[test]
fn a_short_last_piece_takes_no_more_room_than_is_declared() {
    // Attention's: few units, each large, and a number of pieces that does not divide them.
    let (unit, units, per_piece) = (528, 31, 6);
    let lens = [unit * units; 40];
    for n in [2, 4, 64] {
        let board = board(n, &lens);
        let mut member = Member::new(Some(&board), n, 0);
        for len in lens {
            assert!(member.enter(len, per_piece * unit).unwrap().is_some(), "{n} threads");
        }
    }
}

#[test]
fn declared_outputs_have_room_however_they_are_cut() {
    for threads in (1..40).chain([64, 100, 256]) {
        for (units, bytes, unit) in
            [(1, 1, 1), (49_152, 30 << 20, 1), (10, usize::MAX, 3), (31, 900 << 10, 528)]
        {
            for step in [1, 4, 128] {
                let mut board = board(threads, &[units * unit]);
                let mut member = Member::new(Some(&board), threads, 0);
                let piece = member.piece(units, bytes, step);
                assert!(piece.is_multiple_of(step) && units.div_ceil(piece) <= most_pieces(threads));
                let alone = units <= piece;
                let slots = member.enter(units * unit, piece * unit).unwrap();
                assert_eq!(slots.is_none(), alone, "{threads} threads, {units} units by {step}");
                board.end();
                board.begin(&outputs(threads, &[]));
                assert!(board.check_over().is_ok());
            }
        }
    }
}
