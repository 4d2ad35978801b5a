//! What the model has not been told, it does not say.

use crate::synthetic::{
    ask::{Reading, ask},
    model::{FILLERS, config, load},
    tasks::{Share, Task, count, multi_needle, passkey, variables},
};
use candle_core::{DType, Device};
use candle_sparse_models::llama::{Cache, Llama};

fn answers(llama: &Llama, task: &Task) -> Vec<Reading> {
    ask(llama, &mut Cache::new(true, DType::F32, &config(), &Device::Cpu).unwrap(), task).unwrap()
}

#[test]
fn without_their_needles_questions_are_answered_by_chance() {
    let llama = load().unwrap();
    let (mut asked, mut right) = (0, 0);
    for seed in 0..4 {
        for mut task in [passkey(512, 0.4, seed), multi_needle(512, 6, seed), variables(512, 4, seed)] {
            assert!(answers(&llama, &task).iter().all(|r| r.margin > 1.0));
            for question in &task.questions {
                task.context[*question.needles.last().unwrap()] = FILLERS.start;
            }
            let readings = answers(&llama, &task);
            asked += readings.len();
            right += readings.iter().filter(|r| r.got == r.expected).count();
        }
    }
    // The guess is one of 64 values, the same for all questions of a text, and theirs are different.
    assert!(asked == 44 && right <= 3, "{right} of {asked}");
}

#[test]
fn a_needle_that_was_cut_off_is_forgotten_and_another_is_not() {
    let llama = load().unwrap();
    let early = passkey(1024, 0.25, 1).of_the_last(512);
    assert!(early.questions[0].needles.is_empty() && answers(&llama, &early)[0].margin < 0.0);
    let late = passkey(1024, 0.75, 1).of_the_last(512);
    let (needle, answer) = (late.questions[0].needles[0], late.questions[0].answer);
    assert_eq!(late.context[needle], answer);
    assert!(answers(&llama, &late)[0].margin > 1.0);
}

#[test]
fn either_half_of_a_chain_is_needed() {
    let llama = load().unwrap();
    let task = variables(600, 3, 5);
    for half in 0..2 {
        let mut broken = task.clone();
        broken.context[task.questions[0].needles[half]] = FILLERS.start;
        let readings = answers(&llama, &broken);
        assert!(readings[0].margin < 0.0, "half {half}: {readings:?}");
        assert!(readings[1..].iter().all(|r| r.margin > 1.0), "the other chains: {readings:?}");
    }
}

#[test]
fn the_end_of_a_misleading_count_says_the_opposite() {
    let llama = load().unwrap();
    let share = Share { most: 0.25, other: 0.2, misleading: 400 };
    for seed in 0..3 {
        let task = count(2048, share, seed);
        assert!(answers(&llama, &task)[0].margin > 0.0);
        let reading = answers(&llama, &task.of_the_last(400))[0];
        let other = task.context[*task.questions[0].needles.last().unwrap()];
        assert!(reading.got == other && reading.margin < -1.0, "{reading:?}");
    }
}
