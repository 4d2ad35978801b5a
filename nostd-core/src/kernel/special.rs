//! Functions that LLVM cannot compile for the FPU of Xtensa chips as libm has them: its code there cannot choose between two
//! float constants by a condition (<https://github.com/esp-rs/rust/issues/282>), which libm's `erfcf` and `tanhf` do.

/// `a[0] + x·(a[1] + x·(a[2] + …))`
fn polynomial<const N: usize>(a: [f32; N], x: f32) -> f32 {
    a.iter().rev().fold(0.0, |sum, a| a + x * sum)
}

/// The complementary error function `1 − erf(x)`, the bits of libm's.
///
/// Source: `s_erff.c` of FreeBSD (Sun Microsystems 1993), as in the crate `libm`.
pub(super) fn erfc(x: f32) -> f32 {
    let size = x.abs();
    if x.is_nan() || size < f32::from_bits(0x2380_0000) {
        return 1.0 - x;
    }
    if size < 0.843_75 {
        let z = x * x;
        let r = polynomial(
            [1.2837916613e-01, -3.2504209876e-01, -2.8481749818e-02, -5.7702702470e-03, -2.3763017452e-05],
            z,
        );
        let s = polynomial(
            [1.0, 3.9791721106e-01, 6.5022252500e-02, 5.0813062117e-03, 1.3249473704e-04, -3.9602282413e-06],
            z,
        );
        let y = r / s;
        return if x < 0.25 { 1.0 - (x + x * y) } else { 0.5 - (x - 0.5 + x * y) };
    }
    if size >= 28.0 {
        // 0 or 2.
        return 1.0 - 1_f32.copysign(x);
    }
    let tail = if size < 1.25 { near_one(size) } else { far(size) };
    if x < 0.0 { 2.0 - tail } else { tail }
}

/// For 0.84375 to 1.25.
fn near_one(x: f32) -> f32 {
    const ERX: f32 = 8.4506291151e-01;
    let p = polynomial(
        [
            -2.3621185683e-03,
            4.1485610604e-01,
            -3.7220788002e-01,
            3.1834661961e-01,
            -1.1089469492e-01,
            3.5478305072e-02,
            -2.1663755178e-03,
        ],
        x - 1.0,
    );
    let q = polynomial(
        [
            1.0,
            1.0642088205e-01,
            5.4039794207e-01,
            7.1828655899e-02,
            1.2617121637e-01,
            1.3637083583e-02,
            1.1984500103e-02,
        ],
        x - 1.0,
    );
    1.0 - ERX - p / q
}

/// For 1.25 to 28.
fn far(x: f32) -> f32 {
    let s = 1.0 / (x * x);
    let ratio = if x.to_bits() < 0x4036_db6d { nearer(s) } else { farther(s) };
    let z = f32::from_bits(x.to_bits() & 0xffff_e000);
    libm::expf(-z * z - 0.5625) * libm::expf((z - x) * (z + x) + ratio) / x
}

fn nearer(s: f32) -> f32 {
    let r = [
        -9.8649440333e-03,
        -6.9385856390e-01,
        -1.0558626175e+01,
        -6.2375331879e+01,
        -1.6239666748e+02,
        -1.8460508728e+02,
        -8.1287437439e+01,
        -9.8143291473e+00,
    ];
    let d = [
        1.0,
        1.9651271820e+01,
        1.3765776062e+02,
        4.3456588745e+02,
        6.4538726807e+02,
        4.2900814819e+02,
        1.0863500214e+02,
        6.5702495575e+00,
        -6.0424413532e-02,
    ];
    polynomial(r, s) / polynomial(d, s)
}

fn farther(s: f32) -> f32 {
    let r = [
        -9.8649431020e-03,
        -7.9928326607e-01,
        -1.7757955551e+01,
        -1.6063638306e+02,
        -6.3756646729e+02,
        -1.0250950928e+03,
        -4.8351919556e+02,
    ];
    let d = [
        1.0,
        3.0338060379e+01,
        3.2579251099e+02,
        1.5367296143e+03,
        3.1998581543e+03,
        2.5530502930e+03,
        4.7452853394e+02,
        -2.2440952301e+01,
    ];
    polynomial(r, s) / polynomial(d, s)
}

/// The hyperbolic tangent; its relative error is below 2 · 2⁻²³.
///
/// Source: `tanhf` of the Cephes library (Moshier 1989).
pub(super) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    if size >= 0.625 || x.is_nan() {
        // Past 10 it is 1 in f32.
        let e = libm::expf(-2.0 * size);
        return ((1.0 - e) / (1.0 + e)).copysign(x);
    }
    let a = [-3.333_328_2e-1, 1.333_144_2e-1, -5.373_971_6e-2, 2.063_908_8e-2, -5.704_988_8e-3];
    let z = x * x;
    x + x * (z * polynomial(a, z))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all sizes and both signs.
    fn all() -> impl Iterator<Item = f32> {
        (0..u32::MAX).step_by(9973).map(f32::from_bits)
    }

    #[test]
    fn erfc_is_libms() {
        for x in all() {
            let (got, want) = (erfc(x), libm::erfcf(x));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x}: {got} {want}");
        }
    }

    #[test]
    fn tanh_agrees_with_f64() {
        for x in all() {
            let (got, want) = (tanh(x), libm::tanh(f64::from(x)));
            let bound = 2.0 * f64::from(f32::EPSILON) * want.abs() + 1e-45;
            assert!(
                (f64::from(got) - want).abs() <= bound || got.is_nan() && want.is_nan(),
                "{x}: {got} {want}"
            );
        }
        assert_eq!([tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(-0.0)], [1.0, -1.0, -0.0]);
    }
}
