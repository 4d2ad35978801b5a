//! Texts and questions whose answers are known.

use super::{
    model::{FILLERS, MOST, NAMES, START, VALUES, reference_to},
    random::Random,
};

/// What is asked after the context, and what must come out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Stand right after the context, each question in place of the others.
    pub tokens: Vec<u32>,
    /// The token with the largest logit after them.
    pub answer: u32,
    /// Positions that the finding heads (query heads 0 and 1) must reach, first that of layer 1, then that of layer 2. The name
    /// asked for stands one before; layer 0 has brought it here. Of a count, all positions of both candidates.
    pub needles: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Begins with `START`, which the finding heads attend to when there is nothing to find.
    pub context: Vec<u32>,
    pub questions: Vec<Question>,
}

impl Task {
    /// The context and one question.
    pub fn prompt(&self, question: usize) -> Vec<u32> {
        [&self.context[..], &self.questions[question].tokens].concat()
    }

    /// The same questions after `START` and the last `count` tokens of the context alone; of the needles, those that are left.
    pub fn of_the_last(&self, count: usize) -> Self {
        let dropped = self.context.len() - count;
        assert!(dropped > 0, "{count} tokens are the whole context");
        let context = [&[START], &self.context[dropped..]].concat();
        let keep = |q: &Question| Question {
            // START takes one position of those that are gone.
            needles: q.needles.iter().filter(|p| **p >= dropped).map(|p| p + 1 - dropped).collect(),
            ..q.clone()
        };
        Self { context, questions: self.questions.iter().map(keep).collect() }
    }
}

/// One name with its value at `depth` (0: right after the start, 1: right before the end) of `length` tokens, question included.
pub fn passkey(length: usize, depth: f64, seed: u64) -> Task {
    assert!(length >= 4 && (0.0..=1.0).contains(&depth), "length {length}, depth {depth}");
    let mut random = Random::new(seed);
    let mut context = filler(length - 1, &mut random);
    let (name, value) = (random.choose(NAMES, 1)[0], random.choose(VALUES, 1)[0]);
    let at = 1 + (depth * (length - 4) as f64).round() as usize;
    context[at..at + 2].copy_from_slice(&[name, value]);
    Task { context, questions: vec![Question { tokens: vec![name], answer: value, needles: vec![at + 1] }] }
}

/// `count` names at random places, each with a value of its own and asked for in a random order.
pub fn multi_needle(length: usize, count: usize, seed: u64) -> Task {
    let mut random = Random::new(seed);
    let mut context = filler(length - 1, &mut random);
    let (names, values) = (random.choose(NAMES, count), random.choose(VALUES, count));
    let places = places(context.len(), count, &mut random);
    let questions = names.into_iter().zip(values).zip(places).map(|((name, value), at)| {
        context[at..at + 2].copy_from_slice(&[name, value]);
        Question { tokens: vec![name], answer: value, needles: vec![at + 1] }
    });
    let questions = questions.collect();
    Task { context, questions }
}

/// `chains` variables, each assigned another (by a reference) that was assigned a value before, at random places among each other:
/// `a 5 … b $a … $b` has the answer 5, two steps away.
pub fn variables(length: usize, chains: usize, seed: u64) -> Task {
    let mut random = Random::new(seed);
    let mut context = filler(length - 1, &mut random);
    let (names, values) = (random.choose(NAMES, 2 * chains), random.choose(VALUES, chains));
    let places = places(context.len(), 2 * chains, &mut random);
    let questions = names.chunks(2).zip(values).zip(places.chunks(2)).map(|((names, value), at)| {
        let (first, second) = (at[0].min(at[1]), at[0].max(at[1]));
        context[first..first + 2].copy_from_slice(&[names[0], value]);
        context[second..second + 2].copy_from_slice(&[names[1], reference_to(names[0])]);
        let tokens = vec![reference_to(names[1])];
        Question { tokens, answer: value, needles: vec![second + 1, first + 1] }
    });
    let questions = questions.collect();
    Task { context, questions }
}

/// How two values share a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Of the text that the more frequent one has.
    pub most: f64,
    /// Of the text that the other has.
    pub other: f64,
    /// Positions at the end where only the other occurs, in every second place: who looks at these alone answers wrong.
    pub misleading: usize,
}

/// Two values occur many times among the filler; the more frequent one is asked for.
pub fn count(length: usize, share: Share, seed: u64) -> Task {
    let mut random = Random::new(seed);
    let mut context = filler(length - 1, &mut random);
    let (n, pair) = (context.len(), random.choose(VALUES, 2));
    let times = |share: f64| (share * n as f64).round() as usize;
    let (most, other, late) = (times(share.most), times(share.other), share.misleading / 2);
    assert!(late <= other && other < most, "{share:?} of {n} tokens");
    let early = random.choose(1..n - share.misleading, most + other - late);
    let late = random.choose(n - share.misleading..n, late);
    early[..most].iter().for_each(|at| context[*at] = pair[0]);
    early[most..].iter().chain(&late).for_each(|at| context[*at] = pair[1]);
    let mut needles = [early, late].concat();
    needles.sort_unstable();
    Task { context, questions: vec![Question { tokens: vec![MOST], answer: pair[0], needles }] }
}

fn filler(length: usize, random: &mut Random) -> Vec<u32> {
    let all: Vec<u32> = FILLERS.collect();
    (0..length).map(|i| if i == 0 { START } else { all[random.below(all.len())] }).collect()
}

/// Where to write `count` pairs of tokens into a context of `length`, none upon another.
fn places(length: usize, count: usize, random: &mut Random) -> Vec<usize> {
    random.choose((0..(length - 1) / 2).map(|i| 1 + 2 * i), count)
}
