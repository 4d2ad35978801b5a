//! Codes that tell tokens apart: unit vectors of which any two have a product of at most 1/4.

use super::random::Random;

/// Elements of a code.
pub const LEN: usize = 32;
/// Codes there are.
pub const COUNT: usize = 1024;

/// Largest product of two different codes.
pub const CROSS: f32 = 0.25;

/// The codes of tokens `0..count`, a row each.
///
/// The functions Tr(a x³ + b x) over GF(2⁵) as signs (Gold 1968) differ pairwise in 12, 16 or 20 of 32 places. Token `32 a + b`
/// has the signs of (a, b): tokens of one `a` are orthogonal. A random rotation makes elements of them that look like
/// any embedding's, which quantisation does not hit exactly.
pub fn codes(count: usize, seed: u64) -> Vec<[f32; LEN]> {
    assert!(count <= COUNT, "{count} codes");
    let turn = rotation(seed);
    let signs = |token: usize| {
        let (a, b) = ((token / LEN) as u8, (token % LEN) as u8);
        std::array::from_fn::<f32, LEN, _>(|x| {
            let x = x as u8;
            let odd = trace(times(a, times(x, times(x, x))) ^ times(b, x));
            let sign = if odd { -1.0 } else { 1.0 };
            sign / (LEN as f32).sqrt()
        })
    };
    (0..count).map(signs).map(|code| std::array::from_fn(|i| dot(&turn[i], &code))).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Product in GF(2⁵), modulo x⁵ + x² + 1.
fn times(mut a: u8, b: u8) -> u8 {
    let mut product = 0;
    for bit in 0..5 {
        if b >> bit & 1 == 1 {
            product ^= a;
        }
        a <<= 1;
        if a & 0x20 != 0 {
            a ^= 0x25;
        }
    }
    product
}

fn trace(y: u8) -> bool {
    let (mut power, mut sum) = (y, 0);
    for _ in 0..5 {
        sum ^= power;
        power = times(power, power);
    }
    sum == 1
}

/// Random orthonormal rows (Gram and Schmidt, twice for the digits).
fn rotation(seed: u64) -> Vec<[f32; LEN]> {
    let mut random = Random::new(seed);
    let mut rows: Vec<[f32; LEN]> = Vec::with_capacity(LEN);
    while rows.len() < LEN {
        let mut row: [f32; LEN] = std::array::from_fn(|_| random.normal());
        for _ in 0..2 {
            for other in &rows {
                let along = dot(&row, other);
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
            let norm = dot(&row, &row).sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        rows.push(row);
    }
    rows
}
