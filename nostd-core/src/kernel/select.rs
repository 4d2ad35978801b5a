//! Which neurons of an FFN a token needs.
//!
//! A neuron contributes `act(g) · u · down`, whose size is `|act(g)| · |u| · n`, `n` the norm of its down row. A rule
//! compares the expected square of what is known of it with a threshold; thresholds are given divided by `n²`.
//!
//! A threshold above 0 never lets an exact zero pass, one below 0 lets everything pass. What cannot be compared (NaN)
//! passes: it is computed and shows in the output, as it would in the dense FFN.

/// Bits of a NaN that no arithmetic makes.
const INACTIVE: u32 = 0x7fc5_0a55;
/// Another.
const REJECTED: u32 = 0x7fc5_0a56;

/// In place of a gate: the neuron is not active.
#[must_use]
pub const fn inactive() -> f32 {
    f32::from_bits(INACTIVE)
}

/// In place of a gate: the neuron was a candidate, its exact gate decided against it.
#[must_use]
pub const fn rejected() -> f32 {
    f32::from_bits(REJECTED)
}

/// What is expected of each neuron. Equal lengths.
#[derive(Clone, Copy, Debug)]
pub struct Predicted<'a> {
    /// The expected `act(g)²`, see [`expected_square`].
    pub gate_square: &'a [f32],
    /// `û`
    pub up: &'a [f32],
    /// What the prediction of up misses, squared.
    pub up_variance: &'a [f32],
}

/// The expected `act(g)²` of a gate of which a prediction and its error are known, from `act` at one deviation below and one
/// above the prediction: `(low² + high²) / 2`.
#[must_use]
#[inline]
pub fn expected_square(low: f32, high: f32) -> f32 {
    0.5 * (low * low + high * high)
}

/// `act(g)² · (u² + v_u)`
#[must_use]
#[inline]
pub fn score(gate_square: f32, u: f32, up_variance: f32) -> f32 {
    gate_square * (u * u + up_variance)
}

/// Whether a score is not below a threshold.
#[must_use]
#[inline]
pub fn passes(score: f32, threshold: f32) -> bool {
    !matches!(score.partial_cmp(&threshold), Some(core::cmp::Ordering::Less))
}

/// Writes `base + i` for each `i` whose expected square `act(g_i)² · (u_i² + v_u,i)` reaches `thresholds[i] · factor`
/// to the front of `list`, increasing, and returns how many. Cost: a few operations per neuron, no branch.
///
/// # Panics
/// Lengths differ, or `list` is shorter.
pub fn candidates(p: Predicted<'_>, thresholds: &[f32], factor: f32, base: u32, list: &mut [u32]) -> usize {
    let n = thresholds.len();
    let Predicted { gate_square, up, up_variance } = p;
    let lengths = [gate_square.len(), up.len(), up_variance.len()];
    assert!(lengths == [n; 3] && list.len() >= n, "candidates: lengths differ");
    let mut count = 0;
    for i in 0..n {
        let score = score(gate_square[i], up[i], up_variance[i]);
        list[count] = base + i as u32;
        count += usize::from(passes(score, thresholds[i] * factor));
    }
    count
}

/// Puts [`inactive`] in place of each gate with `act(g_i)² · square[i] < thresholds[i] · factor`.
///
/// `activated` is `act(g − shift)`, `square` the expected square of up.
///
/// # Panics
/// Lengths differ.
pub fn keep(activated: &[f32], square: &[f32], thresholds: &[f32], factor: f32, gates: &mut [f32]) {
    let n = gates.len();
    assert!([activated.len(), square.len(), thresholds.len()] == [n; 3], "keep: lengths differ");
    for i in 0..n {
        if !passes(activated[i] * activated[i] * square[i], thresholds[i] * factor) {
            gates[i] = inactive();
        }
    }
}

/// Puts [`inactive`] in place of each gate whose `activated`, `act(g − shift)`, is 0; NaN stays and shows in the output.
///
/// # Panics
/// Lengths differ.
pub fn not_zero(activated: &[f32], gates: &mut [f32]) {
    assert_eq!(activated.len(), gates.len(), "not_zero: lengths differ");
    for (gate, a) in gates.iter_mut().zip(activated) {
        if *a == 0.0 {
            *gate = inactive();
        }
    }
}

/// Active neurons and candidates of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Neurons with a gate.
    pub active: usize,
    /// Those, and the ones that were [`rejected`].
    pub candidates: usize,
}

/// Writes the indices of gates that stand for themselves to the front of `list`, increasing, and the gates beside them.
///
/// # Panics
/// `list` or `kept` is shorter than `gates`.
pub fn active(gates: &[f32], list: &mut [u32], kept: &mut [f32]) -> Count {
    assert!(list.len() >= gates.len() && kept.len() >= gates.len(), "active: no room");
    let (mut active, mut rejected) = (0, 0);
    for (i, gate) in gates.iter().enumerate() {
        let bits = gate.to_bits();
        list[active] = i as u32;
        kept[active] = *gate;
        active += usize::from(bits != INACTIVE && bits != REJECTED);
        rejected += usize::from(bits == REJECTED);
    }
    Count { active, candidates: active + rejected }
}

/// The `k` largest scores above 0 (all of them if there are fewer), and all that are infinite or NaN, written as increasing
/// indices to the front of `list`; of equal ones the first. Returns how many. `room` is as long as `scores`.
///
/// Cost: linear on average.
///
/// # Panics
/// `list` or `room` is shorter than `scores`.
pub fn largest(scores: &[f32], k: usize, room: &mut [f32], list: &mut [u32]) -> usize {
    let key = |s: &f32| if s.is_nan() { f32::INFINITY } else { *s };
    let room = &mut room[..scores.len()];
    room.iter_mut().zip(scores).for_each(|(r, s)| *r = key(s));
    let bound = match k.min(scores.len()) {
        0 => f32::INFINITY,
        k => *room.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
    };
    let above = scores.iter().filter(|s| key(s) > bound).count();
    let mut ties = k.saturating_sub(above);
    let mut count = 0;
    for (i, s) in scores.iter().map(key).enumerate() {
        let tie = s == bound && ties > 0;
        ties -= usize::from(tie);
        list[count] = i as u32;
        count += usize::from(s > 0.0 && (s > bound || tie || s == f32::INFINITY));
    }
    count
}

/// The same for a top-k: the neurons of the `k` [`largest`] scores to the front of `list`, the gates beside them to that of
/// `kept`, whose whole length serves as room.
///
/// # Panics
/// `list` or `kept` is shorter than `gates`, or `scores` has another length.
pub fn active_of_largest(
    gates: &[f32],
    scores: &[f32],
    k: usize,
    list: &mut [u32],
    kept: &mut [f32],
) -> Count {
    let candidates = gates.iter().filter(|g| g.to_bits() != INACTIVE).count();
    let active = largest(scores, k, kept, list);
    kept.iter_mut().zip(&list[..active]).for_each(|(kept, &n)| *kept = gates[n as usize]);
    Count { active, candidates }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_by_hand() {
        // Squares 1·4, 0·9, 1·(1 + 1), NaN.
        let gate_square = &[1.0, 0.0, 1.0, f32::NAN];
        let (up, up_variance) = (&[2.0, 3.0, 1.0, 1.0], &[0.0, 0.0, 1.0, 0.0]);
        let select = |t: f32, factor| {
            let mut list = [9; 4];
            let predicted = Predicted { gate_square, up, up_variance };
            let n = candidates(predicted, &[t; 4], factor, 10, &mut list);
            list.iter().copied().take(n).collect::<std::vec::Vec<_>>()
        };
        assert_eq!(select(4.0, 1.0), [10, 13], "the threshold itself passes, so does NaN");
        assert_eq!(select(4.0, 0.5), [10, 12, 13]);
        assert_eq!(select(1e-30, 1.0), [10, 12, 13], "an exact zero never counts above 0");
        assert_eq!(select(0.0, 1.0), [10, 11, 12, 13]);
        assert_eq!(select(-1.0, 1.0), [10, 11, 12, 13]);
        assert_eq!(select(f32::INFINITY, 1.0), [13]);
    }

    #[test]
    fn kept_gates_stand_for_themselves() {
        let mut gates = [5.0, -6.0, f32::NAN, 7.0, rejected()];
        keep(&[1.0, -2.0, f32::NAN, 0.0], &[1.0; 4], &[2.0; 4], 1.0, &mut gates[..4]);
        let (mut list, mut kept) = ([0; 5], [0.0; 5]);
        let count = active(&gates, &mut list, &mut kept);
        assert_eq!(count, Count { active: 2, candidates: 3 });
        assert_eq!((&list[..2], kept[0], kept[1].is_nan()), (&[1, 2][..], -6.0, true));
    }

    #[test]
    fn zeros_alone_are_left_out() {
        let mut gates = [1.0, -2.0, f32::NAN, 3.0, 4.0];
        // The smallest number there is counts, for it is none; a square of it would be 0.
        not_zero(&[1.0, -0.0, f32::NAN, 0.0, f32::from_bits(1)], &mut gates);
        let (mut list, mut kept) = ([0; 5], [0.0; 5]);
        assert_eq!(active(&gates, &mut list, &mut kept), Count { active: 3, candidates: 3 });
        assert_eq!((&list[..3], kept[0], kept[2]), (&[0, 2, 4][..], 1.0, 4.0));
    }

    #[test]
    fn the_largest_are_found_with_ties_in_order() {
        let scores = [1.0, 3.0, 0.0, 3.0, 2.0, 3.0, -f32::NAN];
        let largest = |k| {
            let (mut room, mut list) = ([0.0; 7], [0; 7]);
            let n = largest(&scores, k, &mut room, &mut list);
            list.iter().copied().take(n).collect::<std::vec::Vec<_>>()
        };
        assert_eq!(largest(0), [6]);
        assert_eq!(largest(3), [1, 3, 6]);
        assert_eq!(largest(5), [1, 3, 4, 5, 6]);
        assert_eq!(largest(100), [0, 1, 3, 4, 5, 6], "an exact zero is not among them");
    }
}
