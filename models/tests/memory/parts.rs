//! The parts the tasks are made of.

use crate::synthetic::{
    codes::{COUNT, CROSS, codes, dot},
    model::{CONTEXT, VALUES, name_of, reference_to, step_score, turn_of_codes},
    outliers::{TIMES, head},
    tasks::{Share, Task, count, multi_needle, passkey, variables},
};

#[test]
fn codes_are_unit_vectors_far_apart() {
    let codes = codes(COUNT, 3);
    for (i, a) in codes.iter().enumerate() {
        assert!((dot(a, a) - 1.0).abs() < 1e-5, "{i}");
        for (j, b) in codes[..i].iter().enumerate() {
            let product = dot(a, b).abs();
            assert!(product < CROSS + 1e-5, "{i} {j}: {product}");
            assert!(i / 32 != j / 32 || product < 1e-5, "{i} {j} should be orthogonal: {product}");
        }
    }
}

#[test]
fn turns_tell_the_token_before_from_all_others_and_no_codes() {
    assert_eq!(step_score(1), 0.0);
    let ahead = (0..CONTEXT).filter(|d| *d != 1).map(|d| -step_score(d)).fold(f32::INFINITY, f32::min);
    assert!(ahead > 26.0, "{ahead} nats");
    assert!(turn_of_codes() < 0.011, "{}", turn_of_codes());
}

#[test]
fn tasks_have_their_length_their_needles_and_come_back() {
    let share = Share { most: 0.2, other: 0.15, misleading: 64 };
    let make = |seed: u64| -> [Task; 4] {
        [
            passkey(300, 0.5, seed),
            multi_needle(300, 8, seed),
            variables(300, 8, seed),
            count(300, share, seed),
        ]
    };
    assert_eq!(make(1), make(1));
    assert!(make(1).iter().zip(&make(2)).all(|(a, b)| a != b));
    let [passkey, needles, chains, count] = make(1);
    for task in [&passkey, &needles, &chains, &count] {
        (0..task.questions.len()).for_each(|i| assert_eq!(task.prompt(i).len(), 300));
    }
    for task in [&passkey, &needles] {
        for q in &task.questions {
            let at = q.needles[0];
            assert_eq!(task.context[at - 1..=at], [q.tokens[0], q.answer]);
        }
    }
    for q in &chains.questions {
        let (link, value) = (q.needles[0], q.needles[1]);
        assert_eq!(name_of(q.tokens[0]), chains.context[link - 1]);
        assert_eq!(chains.context[link], reference_to(chains.context[value - 1]));
        assert_eq!(chains.context[value], q.answer);
    }
    let of = |token: u32| count.context.iter().filter(|t| **t == token).count();
    let values: Vec<usize> = VALUES.map(of).filter(|n| *n > 0).collect();
    assert_eq!((values.len(), of(count.questions[0].answer)), (2, 60));
    assert_eq!(values.iter().sum::<usize>(), count.questions[0].needles.len());
}

#[test]
fn a_passkey_stands_at_its_depth() {
    let at = |depth: f64| passkey(1000, depth, 7).questions[0].needles[0];
    // The name at 1 and its value after it; at the other end the question at 999 follows the value.
    assert_eq!((at(0.0), at(0.5), at(1.0)), (2, 500, 998));
}

#[test]
fn outlier_channels_are_ten_times_as_large_in_keys_alone() {
    let (positions, dim) = (4000, 64);
    let sample = head(positions, 16, dim, 3, 5);
    assert_eq!(sample, head(positions, 16, dim, 3, 5));
    assert_ne!(sample.keys, head(positions, 16, dim, 3, 6).keys);
    assert_eq!((sample.outliers.len(), sample.queries.len()), (3, 16 * dim));
    let deviation = |rows: &[f32], channel: usize| {
        let squares: f32 = rows.chunks(dim).map(|row| row[channel] * row[channel]).sum();
        (squares / positions as f32).sqrt()
    };
    for channel in 0..dim {
        let want = if sample.outliers.contains(&channel) { TIMES } else { 1.0 };
        let (key, value) = (deviation(&sample.keys, channel), deviation(&sample.values, channel));
        assert!((key / want - 1.0).abs() < 0.06 && (value - 1.0).abs() < 0.06, "{channel}: {key} {value}");
    }
}
