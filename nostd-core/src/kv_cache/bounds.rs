//! Bounds of what the keys of a page can score, for bringing pages back that nothing else chose.
//!
//! `q · k ≤ Σ_c max(q_c · min_c, q_c · max_c) = q⁻ · min + q⁺ · max` for every key of a page, with `min` and `max` the
//! extremes of its channels (Quest: Tang et al. 2024, <https://arxiv.org/abs/2406.10774>). The bounds of many pages lie
//! side by side, `[min, max][head_dim][pages]`, so that a query scores all of them in one weighted sum of rows.

use super::page::PAGE_LEN;
use crate::matrix::Matrix;
use half::f16;

/// Writes the bounds of a head's `keys` `[head_dim, PAGE_LEN]` as column `at` of `bounds` `[2 · head_dim, pages]`.
///
/// In F16: a scale over several pages would make the bounds of one depend on later ones.
///
/// # Panics
/// `bounds` is shorter.
pub fn note(keys: Matrix<'_>, pages: usize, at: usize, bounds: &mut [f16]) {
    let mut row = [0.0; PAGE_LEN];
    for channel in 0..keys.rows() {
        keys.dequantize_row(channel, &mut row);
        let min = row.iter().fold(f32::INFINITY, |m, v| v.min(m));
        let max = row.iter().fold(f32::NEG_INFINITY, |m, v| v.max(m));
        bounds[channel * pages + at] = f16::from_f32(min);
        bounds[(keys.rows() + channel) * pages + at] = f16::from_f32(max);
    }
}

/// Writes the negative part of a query, then the positive one: the weights of [`note`]'s rows.
///
/// # Panics
/// `parts` is not twice as long as `query`.
pub fn parts(query: &[f32], parts: &mut [f32]) {
    let (negative, positive) = parts.split_at_mut(query.len());
    negative.iter_mut().zip(query).for_each(|(n, q)| *n = q.min(0.0));
    positive.iter_mut().zip(query).for_each(|(p, q)| *p = q.max(0.0));
}
