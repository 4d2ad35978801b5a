//! Rotary position embedding of one head (Su et al. 2021).

/// Cosine and sine of `position · inv_freq(i)` for every pair `i` of a head, times `attention_factor`.
///
/// Both are those of the configuration ([`Rope::inv_freq`](crate::config::Rope::inv_freq),
/// [`Rope::attention_factor`](crate::config::Rope::attention_factor)), or what a checkpoint makes of them. Cost: a sine and a cosine per pair.
///
/// # Panics
/// `cos` and `sin` differ in length.
pub fn angles(
    inv_freq: impl Fn(usize) -> f32,
    attention_factor: f32,
    position: usize,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    assert_eq!(cos.len(), sin.len(), "angles: lengths differ");
    for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
        let (s, c) = libm::sincosf(position as f32 * inv_freq(i));
        (*sin, *cos) = (s * attention_factor, c * attention_factor);
    }
}

/// Rotates the pairs of a head; `interleaved` says whether a pair is `(2i, 2i+1)` or `(i, i + head_dim/2)`.
///
/// # Panics
/// `x` is not twice as long as `cos` and `sin`.
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    let half = cos.len();
    assert!(sin.len() == half && x.len() == 2 * half, "rope: lengths do not fit");
    if interleaved {
        for (pair, (c, s)) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos.iter().zip(sin)) {
            let [a, b] = *pair;
            *pair = [a * c - b * s, a * s + b * c];
        }
    } else {
        let (first, second) = x.split_at_mut(half);
        for ((a, b), (c, s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Rope, RopeScaling};

    #[test]
    fn both_layouts_rotate_the_same_pairs() {
        let (cos, sin) = ([0.6, 0.8], [0.8, 0.6]);
        let mut halves = [1.0, 2.0, 3.0, 4.0];
        let mut neighbours = [1.0, 3.0, 2.0, 4.0];
        rope(&mut halves, &cos, &sin, false);
        rope(&mut neighbours, &cos, &sin, true);
        assert_eq!(halves, [neighbours[0], neighbours[2], neighbours[1], neighbours[3]]);
        assert!((halves[0] - (0.6 - 2.4)).abs() < 1e-6);
    }

    #[test]
    fn products_depend_on_the_distance_only() {
        let r = Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false };
        let score = |p: usize, q: usize| {
            let (mut a, mut b) = ([0.3, -0.2, 0.9, 0.1], [0.5, 0.4, -0.7, 0.2]);
            for (v, pos) in [(&mut a, p), (&mut b, q)] {
                let (mut cos, mut sin) = ([0.0; 2], [0.0; 2]);
                angles(|i| r.inv_freq(i, 4), 1.0, pos, &mut cos, &mut sin);
                rope(v, &cos, &sin, false);
            }
            crate::kernel::vector::dot(&a, &b)
        };
        assert!((score(7, 3) - score(104, 100)).abs() < 1e-5);
        assert!((score(7, 3) - score(7, 4)).abs() > 1e-3);
    }
}
