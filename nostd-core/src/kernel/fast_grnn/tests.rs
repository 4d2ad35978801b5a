use super::*;
use crate::matrix::{Matrix, Rows};
use std::{string::ToString, vec, vec::Vec};

fn matrix(rows: usize, values: &[f32]) -> Matrix<'_> {
    Matrix::new(rows, values.len() / rows, Rows::F32(values)).unwrap()
}

/// Numbers between −size and size.
fn numbers(n: usize, seed: u32, size: f32) -> Vec<f32> {
    let number = |i: u32| {
        let h = (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(0x9e37_79b1));
        let h = (h ^ (h >> 15)).wrapping_mul(0x85eb_ca6b);
        ((h >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..n as u32).map(number).collect()
}

fn close(a: f32, b: f64) -> bool {
    (f64::from(a) - b).abs() < 1e-6
}

#[test]
fn the_published_cell_by_hand() {
    let cell = Cell::FastGrnn {
        w1: matrix(2, &[1.0, -0.5]),
        w2: matrix(1, &[0.5, 2.0]),
        u1: matrix(2, &[0.25, 1.0]),
        u2: matrix(1, &[1.0, -1.0]),
        b_z: [0.5, 0.0],
        b_h: [0.0, -0.25],
        zeta: 0.75,
        nu: 0.125,
    };
    cell.check(2).unwrap();
    assert_eq!((cell.state_len(), cell.projection_len(), cell.scratch_len()), (2, 1, 5));
    let (mut h, mut scratch, mut p) = ([0.5, -0.5], [0.0; 5], [0.0]);
    cell.project(&[1.0, 0.25], &mut p);
    assert_eq!(p, [1.0]);
    cell.advance(&p, &mut h, &mut scratch);
    // W·x = [1, −0.5], U·h = [0.25, 1].
    let next = |sum: f64, b_z: f64, b_h: f64, h: f64| {
        let z = 1.0 / (1.0 + (-(sum + b_z)).exp());
        (0.75 * (1.0 - z) + 0.125) * (sum + b_h).tanh() + z * h
    };
    assert!(close(h[0], next(1.25, 0.5, 0.0, 0.5)) && close(h[1], next(0.5, 0.0, -0.25, -0.5)), "{h:?}");
}

#[test]
fn the_cell_with_separate_weights_by_hand() {
    let cell = Cell::Separate {
        w_g: matrix(1, &[2.0]),
        u_g: matrix(1, &[0.5]),
        w_u: matrix(1, &[-1.0]),
        u_u: matrix(1, &[1.0]),
        b_g: vec![0.1],
        b_u: vec![0.2],
        zeta: 1.0,
        nu: 0.25,
    };
    let gate = Salience {
        ridge: matrix(2, &[1.0, 0.0]),
        bias: vec![0.0, -1.0],
        threshold: vec![0.0; 2],
        cell: Some(cell),
        readout: None,
    };
    gate.check().unwrap();
    let (mut h, mut scratch, mut out) = ([-0.5], vec![0.0; gate.scratch_len()], [0.0; 2]);
    gate.score(&[-0.75], &mut h, &mut scratch, &mut out);
    let g = 1.0 / (1.0 + f64::exp(1.5 + 0.25 - 0.1));
    let f = g + 0.25;
    let want = f * -0.5 + (1.0 - f) * (0.75_f64 - 0.5 + 0.2).tanh();
    assert!(close(h[0], want), "{h:?} is not {want}");
    assert!(close(out[0], want.abs() - 0.75) && close(out[1], want.abs() - 1.0), "{out:?}");
}

/// The gate that a model of 288 hidden elements and 6 key/value heads would have, as f32 numbers.
struct Numbers {
    ridge: Vec<f32>,
    w1: Vec<f32>,
    w2: Vec<f32>,
    u1: Vec<f32>,
    u2: Vec<f32>,
    readout: Vec<f32>,
}

const INPUT: usize = 288;
const HEADS: usize = 6;
const HIDDEN: usize = 16;
const RANK: usize = 16;

impl Numbers {
    fn new() -> Self {
        Self {
            ridge: numbers(HEADS * INPUT, 1, 0.1),
            w1: numbers(HIDDEN * RANK, 2, 0.4),
            w2: numbers(RANK * INPUT, 3, 0.1),
            u1: numbers(HIDDEN * RANK, 4, 0.3),
            u2: numbers(RANK * HIDDEN, 5, 0.3),
            readout: numbers(HEADS * HIDDEN, 6, 1.0),
        }
    }

    /// The gate with each matrix, of so many rows, held as `form` says.
    fn gate<'a, M>(&'a self, form: impl Fn(usize, &'a [f32]) -> M) -> Salience<M, Vec<f32>> {
        let cell = Cell::FastGrnn {
            w1: form(HIDDEN, &self.w1),
            w2: form(RANK, &self.w2),
            u1: form(HIDDEN, &self.u1),
            u2: form(RANK, &self.u2),
            b_z: vec![1.0; HIDDEN],
            b_h: vec![0.1; HIDDEN],
            zeta: 0.9,
            nu: 0.05,
        };
        Salience {
            ridge: form(HEADS, &self.ridge),
            bias: vec![0.5; HEADS],
            threshold: vec![0.0; HEADS],
            cell: Some(cell),
            readout: Some(form(HEADS, &self.readout)),
        }
    }
}

#[test]
fn bytes_are_few_and_near_the_floats() {
    let numbers_of_gate = Numbers::new();
    let exact = numbers_of_gate.gate(matrix);
    exact.check().unwrap();
    let store: Vec<(Vec<f32>, Vec<i8>)> = {
        let n = &numbers_of_gate;
        let parts = [
            (&n.w1, HIDDEN),
            (&n.w2, RANK),
            (&n.u1, HIDDEN),
            (&n.u2, RANK),
            (&n.ridge, HEADS),
            (&n.readout, HEADS),
        ];
        parts
            .map(|(w, rows)| {
                let (mut scales, mut values) = (vec![0.0; rows], vec![0; w.len()]);
                Int8Rows::quantize(w, &mut scales, &mut values);
                (scales, values)
            })
            .into()
    };
    let form =
        |i: usize| Int8Rows::new(store[i].1.len() / store[i].0.len(), &store[i].0, &store[i].1).unwrap();
    let bytes = Salience {
        ridge: form(4),
        bias: exact.bias.clone(),
        threshold: exact.threshold.clone(),
        readout: Some(form(5)),
        cell: exact.cell.clone().map(|c| match c {
            Cell::FastGrnn { b_z, b_h, zeta, nu, .. } => {
                Cell::FastGrnn { w1: form(0), w2: form(1), u1: form(2), u2: form(3), b_z, b_h, zeta, nu }
            }
            Cell::Separate { .. } => unreachable!(),
        }),
    };
    bytes.check().unwrap();
    assert!(bytes.bytes() <= 8192, "{} bytes", bytes.bytes());
    assert_eq!(
        exact.bytes() - 4 * (2 * HEADS + 2 * HIDDEN + 2),
        4 * (HEADS * (INPUT + HIDDEN) + 3 * HIDDEN * RANK + RANK * INPUT)
    );

    let (mut h, mut h8) = (vec![0.0; HIDDEN], vec![0.0; HIDDEN]);
    let mut scratch = vec![0.0; exact.scratch_len()];
    let (mut worst, mut size) = (0.0_f32, 0.0_f32);
    for t in 0..300 {
        let x = numbers(INPUT, 100 + t, 1.7);
        let (mut out, mut out8) = ([0.0; HEADS], [0.0; HEADS]);
        exact.score(&x, &mut h, &mut scratch, &mut out);
        bytes.score(&x, &mut h8, &mut scratch, &mut out8);
        worst = out.iter().zip(&out8).fold(worst, |m, (a, b)| m.max((a - b).abs()));
        size = out.iter().fold(size, |m, a| m.max(a.abs()));
    }
    assert!(worst > 0.0 && worst < 0.02 * size, "{worst} of {size}");
}

#[test]
fn a_byte_errs_by_at_most_half_a_scale() {
    let mut w = numbers(4 * 33, 7, 3.0);
    w[33..66].fill(0.0);
    let (mut scales, mut values) = ([0.0; 4], vec![0; w.len()]);
    Int8Rows::quantize(&w, &mut scales, &mut values);
    for (i, (w, q)) in w.iter().zip(&values).enumerate() {
        let scale = scales[i / 33];
        assert!((w - scale * f32::from(*q)).abs() <= scale * 0.5001, "{w} {q}");
    }
    let x = numbers(33, 8, 1.0);
    let (mut y, mut want) = ([0.0; 4], [0.0; 4]);
    Int8Rows::new(33, &scales, &values).unwrap().product(&x, &mut y);
    matrix(4, &w).product(&x, &mut want);
    let reach: f32 = x.iter().map(|x| x.abs()).sum();
    for ((y, want), scale) in y.iter().zip(want).zip(scales) {
        assert!((y - want).abs() <= 0.501 * scale * reach, "{y} {want}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let n = Numbers::new();
    let good = || n.gate(matrix);
    type Spoil<'a> = &'a dyn Fn(&mut Salience<Matrix<'_>, Vec<f32>>);
    let other = vec![0.0; HIDDEN];
    let cases: [(Spoil<'_>, &str); 5] = [
        (&|g| g.bias.truncate(2), "bias"),
        (&|g| g.threshold[1] = f32::NAN, "threshold"),
        (&|g| g.readout = g.readout.map(|r| r.slice_rows(0..1)), "readout"),
        (&|g| g.cell = None, "cell"),
        (&|g| g.ridge = g.ridge.slice_rows(0..2), "bias"),
    ];
    for (spoil, needle) in cases {
        let mut gate = good();
        spoil(&mut gate);
        let err = gate.check().unwrap_err().to_string();
        assert!(err.contains(needle), "{needle}: {err}");
    }
    let mut gate = good();
    if let Some(Cell::FastGrnn { zeta, .. }) = &mut gate.cell {
        *zeta = 1.5;
    }
    assert_eq!(gate.check(), Err(Error::OutOfRange("zeta_nu")));
    let mut gate = good();
    if let Some(Cell::FastGrnn { u2, .. }) = &mut gate.cell {
        *u2 = matrix(1, &other);
    }
    assert!(gate.check().unwrap_err().to_string().contains("u2"));
    assert!(Int8Rows::new(3, &[1.0], &[1, 2]).is_err());
}
