//! Softmax in place.

/// `x[i] ← e^(x[i] − max) / Σ e^(x[j] − max)`; an empty slice stays empty.
pub fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| v.max(m));
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = libm::expf(*v - max);
        sum += *v;
    }
    let scale = 1.0 / sum;
    for v in x.iter_mut() {
        *v *= scale;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn by_hand_and_far_from_zero() {
        for shift in [0.0, 1e4, -1e4] {
            let mut x = [shift, shift + libm::logf(3.0)];
            super::softmax(&mut x);
            assert!((x[0] - 0.25).abs() < 1e-3 && (x[1] - 0.75).abs() < 1e-3, "{x:?}");
        }
        super::softmax(&mut []);
    }
}
