//! Dot product and axpy of f32 vectors.

/// `Σ x[i] · y[i]`.
///
/// # Panics
/// The lengths differ.
#[must_use]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "dot: lengths differ");
    x.iter().zip(y).map(|(a, b)| a * b).sum()
}

/// `y[i] += alpha · x[i]`.
///
/// # Panics
/// The lengths differ.
pub fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths differ");
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}
