//! Root-mean-square normalisation.

/// `y[i] = x[i] / √(mean(x²) + eps) · weight[i]`.
///
/// # Panics
/// The three lengths differ.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "rms_norm: lengths differ");
    if x.is_empty() {
        return;
    }
    let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / libm::sqrtf(mean + eps);
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * w;
    }
}

/// `y[i] ← max(y[i] − shift, 0)`, what a shifted-ReLU model puts between a norm and its readers; NaN stays NaN.
pub fn shifted_relu(y: &mut [f32], shift: f32) {
    for v in y {
        *v = if *v < shift { 0.0 } else { *v - shift };
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn by_hand() {
        let mut y = [0.0; 2];
        super::rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut y);
        let rms = libm::sqrtf(12.5);
        assert!((y[0] - 3.0 / rms).abs() < 1e-6 && (y[1] - 8.0 / rms).abs() < 1e-6);
    }
}
