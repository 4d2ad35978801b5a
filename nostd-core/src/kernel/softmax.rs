//! Softmax, at once or piece by piece.

/// `x[i] ← e^(x[i] − max) / Σ e^(x[j] − max)`; an empty slice stays empty.
pub fn softmax(x: &mut [f32]) {
    let (_, sum) = exp_sum(x, f32::NEG_INFINITY);
    let scale = 1.0 / sum;
    for v in x.iter_mut() {
        *v *= scale;
    }
}

/// One piece of a softmax: `max = max(max_before, x)`, `x[i] ← e^(x[i] − max)`; returns `max` and the sum of the new `x`.
///
/// Sums of earlier pieces are to be multiplied with `e^(max_before − max)` (Milakov and Gimelshein 2018).
pub fn exp_sum(x: &mut [f32], max_before: f32) -> (f32, f32) {
    let max = x.iter().fold(max_before, |m, &v| v.max(m));
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = libm::expf(*v - max);
        sum += *v;
    }
    (max, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand_and_far_from_zero() {
        for shift in [0.0, 1e4, -1e4] {
            let mut x = [shift, shift + libm::logf(3.0)];
            softmax(&mut x);
            assert!((x[0] - 0.25).abs() < 1e-3 && (x[1] - 0.75).abs() < 1e-3, "{x:?}");
        }
        softmax(&mut []);
    }

    #[test]
    fn pieces_make_the_whole() {
        let all = [0.5, -1.0, 3.0, 2.0, -0.5];
        let mut whole = all;
        softmax(&mut whole);
        let (mut a, mut b) = ([0.5, -1.0], [3.0, 2.0, -0.5]);
        let (max_a, sum_a) = exp_sum(&mut a, f32::NEG_INFINITY);
        let (max, sum_b) = exp_sum(&mut b, max_a);
        let rescale = libm::expf(max_a - max);
        let sum = sum_a * rescale + sum_b;
        assert!((a[0] * rescale / sum - whole[0]).abs() < 1e-6);
        assert!((b[1] / sum - whole[3]).abs() < 1e-6);
    }
}
