//! The two-matrix FFN of some neurons in F32 beside `ruvector-sparse-inference` 2.3.0, which runs on one thread. Medians of
//! rounds taken in turn, other weights in each call.
//!
//! `CANDLE_NUM_THREADS=1 cargo bench -p candle-sparse-peers` (microseconds per FFN). `-- --test` runs it once, small.
//!
//! That crate's predictor is not trained, so its sets say nothing about a model; both get the sets it picks, and only the
//! kernels are compared. Its `from_weights` refuses row-major weights (2.3.0), so its weights are its own random ones.

#[path = "../../common/mod.rs"]
mod common;

use candle_core::{Device, Result, Tensor};
use candle_sparse::{
    Format, Threads,
    ops::{NeuronWeights, sparse_ffn},
};
use candle_sparse_core::{Activation, GluActivation};
use common::{median, uniform};
use ruvector_sparse_inference::{
    config::{ActivationType, SparsityConfig},
    predictor::{LowRankPredictor, Predictor},
    sparse::SparseFfn,
};
use std::{hint::black_box, io::Write, time::Instant};

const SHARES: [f64; 7] = [0.05, 0.1, 0.25, 0.42, 0.5, 0.75, 1.0];
const RANK: usize = 64;

/// One block of both, and the set of neurons.
struct Block {
    theirs: SparseFfn,
    ours: NeuronWeights,
}

impl Block {
    fn new(hidden: usize, inner: usize, (act, their_act): (Activation, ActivationType)) -> Result<Self> {
        let mut uniform = uniform(3);
        let mut tensor = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|_| uniform() as f32 * 0.01).collect();
            Tensor::from_vec::<_, f32>(values, (rows, cols), &Device::Cpu)
        };
        let (w1, w2) = (tensor(inner, hidden)?, tensor(hidden, inner)?);
        let act = GluActivation { act, shift: 0.0 };
        Ok(Self {
            theirs: SparseFfn::new(hidden, inner, hidden, their_act).map_err(candle_core::Error::msg)?,
            ours: NeuronWeights::two_matrix(Format::F32, act, (&w1, None), (&w2, None))?,
        })
    }
}

/// What their predictor picks.
fn their_set(hidden: usize, inner: usize, share: f64, x: &[f32]) -> Result<Vec<usize>> {
    let k = (share * inner as f64) as usize;
    // A top-k of all neurons loses one there.
    if k >= inner {
        return Ok((0..inner).collect());
    }
    LowRankPredictor::new(hidden, inner, RANK, SparsityConfig::with_top_k(k))
        .and_then(|p| p.predict(x))
        .map_err(candle_core::Error::msg)
}

fn measure(
    hidden: usize,
    inner: usize,
    (blocks, rounds): (usize, usize),
    acts: (Activation, ActivationType),
    out: &mut impl Write,
) -> Result<()> {
    let blocks = (0..blocks).map(|_| Block::new(hidden, inner, acts)).collect::<Result<Vec<_>>>()?;
    let mut uniform = uniform(4);
    let x: Vec<f32> = (0..hidden).map(|_| uniform() as f32 - 0.5).collect();
    let x_tensor = Tensor::new(&*x, &Device::Cpu)?;
    for share in SHARES {
        let sets = blocks.iter().map(|_| their_set(hidden, inner, share, &x)).collect::<Result<Vec<_>>>()?;
        let ours: Vec<Vec<u32>> = sets.iter().map(|s| s.iter().map(|&i| i as u32).collect()).collect();
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            for (engine, times) in times.iter_mut().enumerate() {
                let start = Instant::now();
                for (i, b) in blocks.iter().enumerate() {
                    match engine {
                        0 => drop(black_box(sparse_ffn(&x_tensor, &b.ours, &ours[i])?)),
                        1 => drop(black_box(
                            b.theirs.forward_sparse(&x, &sets[i]).map_err(candle_core::Error::msg)?,
                        )),
                        _ => drop(black_box(b.theirs.forward_dense(&x).map_err(candle_core::Error::msg)?)),
                    }
                }
                times.push(start.elapsed().as_secs_f64() / blocks.len() as f64);
            }
        }
        let [ours, theirs, dense] = times.map(median);
        writeln!(
            out,
            "{hidden}x{inner}x{hidden} {:?} {:5.1} %: ours {:7.1} µs, ruvector {:7.1} µs ({:.2} x), its dense {:7.1} µs",
            acts.0,
            share * 100.0,
            ours * 1e6,
            theirs * 1e6,
            theirs / ours,
            dense * 1e6
        )?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let test = std::env::args().any(|a| a == "--test");
    let mut out = std::io::stdout();
    writeln!(
        out,
        "ours on {} threads, ruvector on 1; sets: top-k of its untrained predictor",
        Threads::default().count()
    )?;
    let acts = [(Activation::Relu, ActivationType::Relu), (Activation::Silu, ActivationType::Silu)];
    for acts in acts {
        if test {
            measure(64, 256, (1, 1), acts, &mut out)?;
        } else {
            measure(512, 2048, (16, 7), acts, &mut out)?;
            measure(2048, 5632, (2, 7), acts, &mut out)?;
        }
    }
    Ok(())
}
