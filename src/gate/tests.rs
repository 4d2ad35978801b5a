use super::*;
use candle_sparse_core::kernel::fast_grnn::Salience;

/// Numbers between −size and size from a fixed hash.
pub(crate) fn numbers(n: usize, seed: u64, size: f32) -> Vec<f32> {
    let value = |i: usize| {
        let mut h = (seed << 32 | i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((h >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..n).map(value).collect()
}

fn weight(rows: usize, cols: usize, seed: u64, size: f32) -> CellWeight {
    CellWeight { rows, values: numbers(rows * cols, seed, size) }
}

const INPUT: usize = 288;
const HEADS: usize = 6;

fn ridge() -> FastGrnnGate {
    FastGrnnGate::new(INPUT, numbers(HEADS * INPUT, 1, 0.1), numbers(HEADS, 2, 1.0), vec![0.0; HEADS])
        .unwrap()
}

fn published() -> FastGrnnGate {
    let cell = Cell::FastGrnn {
        w1: weight(16, 16, 3, 0.4),
        w2: weight(16, INPUT, 4, 0.1),
        u1: weight(16, 16, 5, 0.3),
        u2: weight(16, 16, 6, 0.3),
        b_z: vec![1.0; 16],
        b_h: vec![0.1; 16],
        zeta: 0.9,
        nu: 0.05,
    };
    ridge().with_cell(cell, numbers(HEADS * 16, 7, 1.0)).unwrap()
}

fn imported() -> FastGrnnGate {
    let cell = Cell::Separate {
        w_g: weight(20, INPUT, 3, 0.1),
        u_g: weight(20, 20, 4, 0.3),
        w_u: weight(20, INPUT, 5, 0.1),
        u_u: weight(20, 20, 6, 0.3),
        b_g: vec![0.0; 20],
        b_u: vec![0.0; 20],
        zeta: 1.0,
        nu: 0.0,
    };
    FastGrnnGate::from_state_norm(HEADS, cell, 0.5).unwrap()
}

/// Scores of tokens given in pieces of so many.
fn scores(gate: &FastGrnnGate, kernels: &Kernels, x: &[f32], piece: usize) -> Vec<f32> {
    let (mut state, mut scratch) = (vec![0.0; gate.state_len()], vec![f32::NAN; gate.scratch_len()]);
    let mut all = vec![0.0; x.len() / INPUT * HEADS];
    for (x, out) in x.chunks(piece * INPUT).zip(all.chunks_mut(piece * HEADS)) {
        gate.scores(kernels, x, &mut state, &mut scratch, out);
    }
    all
}

#[test]
fn scores_are_those_of_the_definition() {
    let x = numbers(70 * INPUT, 10, 1.7);
    for gate in [ridge(), published(), imported()] {
        let definition = Salience {
            ridge: CellWeight { rows: HEADS, values: gate.ridge.clone() },
            bias: gate.bias.clone(),
            threshold: gate.threshold.clone(),
            cell: gate.cell.clone(),
            readout: (!gate.readout.is_empty())
                .then(|| CellWeight { rows: HEADS, values: gate.readout.clone() }),
        };
        definition.check().unwrap();
        let (mut state, mut scratch) =
            (vec![0.0; definition.state_len()], vec![0.0; definition.scratch_len()]);
        for kernels in Kernels::available() {
            state.fill(0.0);
            let got = scores(&gate, &kernels, &x, 70);
            for (x, got) in x.chunks_exact(INPUT).zip(got.chunks_exact(HEADS)) {
                let mut want = [0.0; HEADS];
                definition.score(x, &mut state, &mut scratch, &mut want);
                let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * (1.0 + b.abs());
                assert!(got.iter().zip(&want).all(close), "{got:?} {want:?}");
            }
        }
    }
}

#[test]
fn pieces_and_later_tokens_change_no_bit() {
    let x = numbers(70 * INPUT, 10, 1.7);
    let mut other = x.clone();
    other[50 * INPUT..].copy_from_slice(&numbers(20 * INPUT, 11, 5.0));
    for gate in [ridge(), published(), imported()] {
        for kernels in Kernels::available() {
            let whole = scores(&gate, &kernels, &x, 70);
            for piece in [1, 2, 7, 31, 33, 64] {
                assert_eq!(scores(&gate, &kernels, &x, piece), whole, "{:?}, {piece}", kernels.level());
            }
            let changed = scores(&gate, &kernels, &other, 70);
            assert_eq!(changed[..50 * HEADS], whole[..50 * HEADS]);
            assert_ne!(changed[50 * HEADS..51 * HEADS], whole[50 * HEADS..51 * HEADS]);
        }
    }
}

#[test]
fn by_hand() {
    let gate = FastGrnnGate::new(2, vec![1.0, 2.0, -1.0, 0.5], vec![0.5, -0.5], vec![0.0; 2]).unwrap();
    let identity = || CellWeight { rows: 1, values: vec![1.0] };
    let cell = Cell::FastGrnn {
        w1: identity(),
        w2: CellWeight { rows: 1, values: vec![1.0, 1.0] },
        u1: identity(),
        u2: identity(),
        b_z: vec![0.0],
        b_h: vec![0.0],
        zeta: 1.0,
        nu: 0.0,
    };
    let gate = gate.with_cell(cell, vec![1.0, -2.0]).unwrap();
    let (mut state, mut out) = ([0.0], [0.0; 4]);
    let mut scratch = vec![0.0; gate.scratch_len()];
    gate.scores(Kernels::get().unwrap(), &[1.0, 1.0, 0.0, -1.0], &mut state, &mut scratch, &mut out);
    let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
    let first = (1.0 - sigma(2.0)) * 2_f64.tanh();
    let second = (1.0 - sigma(first - 1.0)) * (first - 1.0).tanh() + sigma(first - 1.0) * first;
    let want = [3.5 + first, -1.0 - 2.0 * first, -1.5 + second, -1.0 - 2.0 * second];
    assert!(out.iter().zip(want).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6), "{out:?} {want:?}");
}

#[test]
fn what_does_not_fit_is_named() {
    type Spoil<'a> = &'a dyn Fn(&mut FastGrnnGate);
    let cases: [(Spoil<'_>, &str); 7] = [
        (&|g| g.ridge.truncate(5), "gate.ridge"),
        (&|g| g.bias[0] = f32::NAN, "gate.bias"),
        (&|g| g.threshold.push(0.0), "gate.threshold"),
        (&|g| g.readout.truncate(5), "gate.readout"),
        (&|g| g.cell = None, "gate.readout"),
        (&|g| g.hidden_size = 0, "0 inputs"),
        (&|g| g.cell = imported().cell.map(|c| c.map(|w| CellWeight { rows: w.rows + 1, ..w })), "gate."),
    ];
    for (spoil, needle) in cases {
        let mut gate = published();
        spoil(&mut gate);
        let err = gate.check().unwrap_err().to_string();
        assert!(err.contains(needle), "{needle}: {err}");
    }
    let mut gate = published();
    if let Some(Cell::FastGrnn { u2, .. }) = &mut gate.cell {
        u2.values[3] = f32::INFINITY;
    }
    assert!(gate.check().unwrap_err().to_string().contains("gate.u2"));
}
