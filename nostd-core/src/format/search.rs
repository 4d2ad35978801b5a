//! How quantisers choose a grid: round to one, fit it to what came out, round again.
//!
//! After candle's `quantized/utils.rs` operation by operation, so that every number rounds alike.

use super::BLOCK_LEN;

/// The nearest integer, halves away from zero; too large saturates, NaN is 0.
///
/// `roundf(v) as i32` without its bit operations: a quantiser spends most of its time here.
pub(super) fn nearest(v: f32) -> i32 {
    let whole = v as i32;
    let rest = v - whole as f32;
    whole.saturating_add(i32::from(rest >= 0.5) - i32::from(rest <= -0.5))
}

/// The element of largest magnitude, the first of equals.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |max: f32, &v| if v.abs() > max.abs() { v } else { max })
}

/// A fold whose order does not matter, in lanes: one chain of 32 waits for each step.
pub(super) fn fold(x: &[f32; BLOCK_LEN], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 8];
    for eight in x.as_chunks::<8>().0 {
        lanes.iter_mut().zip(eight).for_each(|(lane, v)| *lane = f(*lane, *v));
    }
    lanes.into_iter().fold(start, f)
}

/// `(step, minimum, quants)` of the grid `step · q + minimum`, `q` in 0..=`top`, from the least to the largest element.
pub(super) fn between(x: &[f32; BLOCK_LEN], top: u8) -> (f32, f32, [u8; BLOCK_LEN]) {
    let min = fold(x, f32::INFINITY, |min, v| v.min(min));
    let max = fold(x, f32::NEG_INFINITY, |max, v| v.max(max));
    let d = (max - min) / f32::from(top);
    let id = if d == 0.0 { 0.0 } else { 1.0 / d };
    (d, min, x.map(|v| below((v - min) * id + 0.5, top)))
}

/// The largest integer up to `v`, at most `top`, which is all ones; `v` is not negative.
///
/// A conversion would saturate, which takes several instructions; here 2²³ leaves no bits behind the point.
fn below(v: f32, top: u8) -> u8 {
    const NO_FRACTION: f32 = 8_388_608.0;
    let most = f32::from(top);
    let v = if v > most { most } else { v };
    let near = (v + NO_FRACTION) - NO_FRACTION;
    let whole = if near > v { near - 1.0 } else { near };
    (whole + NO_FRACTION).to_bits() as u8 & top
}

/// `(scale, minimum)`, neither negative, of the grid `scale · l − minimum`, `l` in 0..=`top`, for at most 32 elements.
///
/// In turn: `l` by rounding; `scale = Σ (x + minimum)·l / Σ l²`; `minimum = −mean(x − scale·l)`; at most five times.
pub(super) fn offset(x: &[f32], top: i32) -> (f32, f32) {
    let mut min = x.iter().copied().fold(f32::INFINITY, f32::min);
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == min {
        return (0.0, 0.0);
    }
    min = min.min(0.0);
    let mut l = [0; BLOCK_LEN];
    let (mut scale, mut inverse) = (0.0, top as f32 / (max - min));
    for _ in 0..5 {
        let (mut changed, mut xl, mut ll) = (false, 0.0, 0);
        for (l, v) in l.iter_mut().zip(x) {
            let new = nearest(inverse * (v - min)).clamp(0, top);
            changed |= new != *l;
            *l = new;
            xl += (v - min) * new as f32;
            ll += new * new;
        }
        scale = xl / ll as f32;
        let sum: f32 = x.iter().zip(&l).map(|(v, &l)| v - scale * l as f32).sum();
        min = sum / x.len() as f32;
        if min > 0.0 {
            min = 0.0;
        }
        inverse = 1.0 / scale;
        if !changed {
            break;
        }
    }
    (scale, -min)
}

/// Elements that share a scale in [`symmetric`].
pub(super) const GROUP: usize = 16;

/// `Σ w·x·l` and `Σ w·l²`, `w = x²`: their ratio is the scale with the least `Σ w·(x − scale·l)²`.
#[derive(Clone, Copy)]
struct Sums {
    xl: f32,
    ll: f32,
}

impl Sums {
    fn scale(self) -> f32 {
        self.xl / self.ll
    }
}

/// `(scale, quants)` of the grid `scale · l`, `l` in −`n`..`n`.
///
/// Rounds everything by the fitted scale up to `rounds` times, then single elements wherever that improves the fit.
/// `square` is `w·l²`: candle's two searches round it differently.
pub(super) fn symmetric(
    x: &[f32; GROUP],
    n: i32,
    rounds: usize,
    square: impl Fn(f32, i32) -> f32 + Copy,
) -> (f32, [i32; GROUP]) {
    let max = extreme(x);
    if max == 0.0 {
        return (0.0, [-n; GROUP]);
    }
    let (mut l, mut sums) = round_all(x, -(n as f32) / max, n, square);
    for _ in 0..rounds {
        let (new_l, new) = round_all(x, 1.0 / sums.scale(), n, square);
        if new_l == l || new.ll == 0.0 || new.xl * new.xl <= sums.scale() * sums.xl * new.ll {
            break;
        }
        (l, sums) = (new_l, new);
    }
    for _ in 0..5 {
        let mut changed = false;
        for (l, &v) in l.iter_mut().zip(x) {
            changed |= improve(l, v, &mut sums, n, square);
        }
        if !changed {
            break;
        }
    }
    (sums.scale(), l)
}

fn round_all(
    x: &[f32; GROUP],
    inverse: f32,
    n: i32,
    square: impl Fn(f32, i32) -> f32,
) -> ([i32; GROUP], Sums) {
    let l = x.map(|v| nearest(inverse * v).clamp(-n, n - 1));
    let mut sums = Sums { xl: 0.0, ll: 0.0 };
    for (&v, &l) in x.iter().zip(&l) {
        sums.xl += v * v * v * l as f32;
        sums.ll += square(v * v, l);
    }
    (l, sums)
}

/// Rounds one element by the scale that the others ask for; whether that was better.
fn improve(l: &mut i32, v: f32, sums: &mut Sums, n: i32, square: impl Fn(f32, i32) -> f32) -> bool {
    let w = v * v;
    let others = Sums { xl: sums.xl - w * v * *l as f32, ll: sums.ll - square(w, *l) };
    // Also true of NaN, which sums of products that underflow become.
    if others.xl <= 0.0 || others.xl.is_nan() {
        return false;
    }
    let new = nearest(v * others.ll / others.xl).clamp(-n, n - 1);
    let with = Sums { xl: others.xl + w * v * new as f32, ll: others.ll + square(w, new) };
    let better = new != *l && with.ll > 0.0 && with.xl * with.xl * sums.ll > sums.xl * sums.xl * with.ll;
    if better {
        (*l, *sums) = (new, with);
    }
    better
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_equals_roundf() {
        let special = [0.5, -0.5, 1.5, 2.5, 0.499_999_97, 8_388_607.5, 3e9, -3e9, f32::NAN, f32::INFINITY];
        let random = (0..1_000_000_u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for v in special.into_iter().chain(random) {
            assert_eq!(nearest(v), libm::roundf(v) as i32, "{v}");
        }
    }

    #[test]
    fn below_is_a_conversion_of_what_is_not_negative() {
        let special = [0.0, 0.5, 0.999_999_94, 1.0, 14.999_999, 15.0, 15.5, 31.5, 32.0, 1e9, f32::INFINITY];
        let random = (0..1_000_000_u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)).abs());
        for v in special.into_iter().chain(random.filter(|v| !v.is_nan())) {
            for top in [15, 31] {
                assert_eq!(below(v, top), (v as i32).clamp(0, i32::from(top)) as u8, "{v}");
            }
        }
    }
}
