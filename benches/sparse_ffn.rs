//! The FFN of one token (hidden 2048, 5632 neurons, silu) at several active shares, beside dense ones: our own, candle's with
//! matmul as its Llama does, candle's quantised with `QMatMul`. Medians of rounds taken in turn; each call has other weights
//! and another set, as the blocks of a model have, so that no cache helps.
//!
//! `cargo bench --bench sparse_ffn` (microseconds per FFN, all threads). `-- --test` runs it once, small; `-- q8_0` a part.

mod common;

use candle_core::{
    DType, Device, Module, Result, Tensor,
    quantized::{GgmlDType, QMatMul, QStorage, QTensor},
};
use candle_sparse::{
    Format, Threads, Weight,
    ops::{NeuronWeights, matmul, sparse_ffn},
};
use candle_sparse_core::{Activation, GluActivation};
use candle_sparse_kernels::Kernels;
use common::{Activity, median, uniform};
use std::{hint::black_box, io::Write, time::Instant};

const SHARES: [f64; 7] = [0.05, 0.1, 0.25, 0.42, 0.5, 0.75, 1.0];
const SILU: GluActivation = GluActivation { act: Activation::Silu, shift: 0.0 };

/// Sizes of a run.
#[derive(Clone, Copy)]
struct Size {
    hidden: usize,
    inner: usize,
    /// All blocks of an engine take so much at least.
    bytes: usize,
    rounds: usize,
}

const FULL: Size = Size { hidden: 2048, inner: 5632, bytes: 256 << 20, rounds: 7 };
const SMALL: Size = Size { hidden: 256, inner: 512, bytes: 1, rounds: 1 };

impl Size {
    /// `gate_proj`, `up_proj` and `down_proj`.
    fn tensors(self) -> Result<[Tensor; 3]> {
        let (h, n) = (self.hidden, self.inner);
        let mut uniform = uniform(1);
        let mut tensor = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|_| (uniform() as f32 - 0.5) * 0.05).collect();
            Tensor::from_vec::<_, f32>(values, (rows, cols), &Device::Cpu)
        };
        Ok([tensor(n, h)?, tensor(n, h)?, tensor(h, n)?])
    }

    fn x(self) -> Result<Tensor> {
        let mut uniform = uniform(2);
        let values = (0..self.hidden).map(|_| uniform() as f32 - 0.5).collect();
        Tensor::from_vec::<_, f32>(values, (1, self.hidden), &Device::Cpu)
    }

    /// So many blocks that `bytes` each make [`Self::bytes`].
    fn blocks<T>(self, bytes: usize, block: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
        (0..self.bytes.div_ceil(bytes)).map(block).collect()
    }
}

/// One FFN of a block, dense.
type Dense = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

fn own_dense([gate, up, down]: &[Tensor; 3], format: Format) -> Result<Dense> {
    let weight = |t| Weight::from_tensor(t, format);
    let (gate, up, down) = (weight(gate)?, weight(up)?, weight(down)?);
    Ok(Box::new(move |x| matmul(&(matmul(x, &gate)?.silu()? * matmul(x, &up)?)?, &down)))
}

/// As `candle_transformers::models::llama` has it.
fn candle_dense(tensors: &[Tensor; 3], dtype: DType) -> Result<Dense> {
    let [gate, up, down] = tensors.each_ref().map(|t| Tensor::copy(&t.to_dtype(dtype)?));
    let linear = |t: Tensor| candle_nn::Linear::new(t, None);
    let (gate, up, down) = (linear(gate?), linear(up?), linear(down?));
    Ok(Box::new(move |x| {
        let x = x.to_dtype(dtype)?;
        down.forward(&(gate.forward(&x)?.silu()? * up.forward(&x)?)?)
    }))
}

/// As `candle_transformers::models::quantized_llama` has it. Quantising takes long and its speed is not measured: one row
/// stands for all.
fn candle_quantised(tensors: &[Tensor; 3], dtype: GgmlDType) -> Result<Dense> {
    let q = |t: &Tensor| {
        // Not a view: candle quantises all that its storage holds.
        let row = t.get(0)?.to_vec1::<f32>()?;
        let row = QTensor::quantize(&Tensor::from_vec(row, (1, t.dim(1)?), &Device::Cpu)?, dtype)?;
        let bytes = row.data()?.repeat(t.dim(0)?);
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, dtype)?;
        QMatMul::from_qtensor(QTensor::new(storage, t.shape())?)
    };
    let [gate, up, down] = tensors.each_ref().map(q);
    let (gate, up, down) = (gate?, up?, down?);
    Ok(Box::new(move |x| down.forward(&(gate.forward(x)?.silu()? * up.forward(x)?)?)))
}

/// Seconds per block of running them all one after the other.
fn seconds<T>(blocks: &[T], mut run: impl FnMut(usize, &T) -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    for (i, block) in blocks.iter().enumerate() {
        black_box(run(i, block)?);
    }
    Ok(start.elapsed().as_secs_f64() / blocks.len() as f64)
}

/// The dense engines that stand beside a format.
fn engines(size: Size, format: Format, tensors: &[Tensor; 3]) -> Result<Vec<(&'static str, Vec<Dense>)>> {
    let elements = 3 * size.hidden * size.inner;
    let own =
        size.blocks(elements / format.block_len() * format.block_bytes(), |_| own_dense(tensors, format))?;
    let tensor =
        |dtype: DType| size.blocks(elements * dtype.size_in_bytes(), |_| candle_dense(tensors, dtype));
    let quantised = |dtype: GgmlDType| {
        let bytes = elements / dtype.block_size() * dtype.type_size();
        size.blocks(bytes, |_| candle_quantised(tensors, dtype))
    };
    Ok(match format {
        Format::F32 => vec![("own dense", own), ("candle f32", tensor(DType::F32)?)],
        Format::F16 => vec![("own dense", own), ("candle f16", tensor(DType::F16)?)],
        Format::Q8_0 => vec![("own dense", own), ("candle q8_0", quantised(GgmlDType::Q8_0)?)],
        _ => vec![
            ("own dense", own),
            ("candle q4_0", quantised(GgmlDType::Q4_0)?),
            ("candle q4_k", quantised(GgmlDType::Q4K)?),
        ],
    })
}

fn measure(size: Size, format: Format, out: &mut impl Write) -> Result<()> {
    let (tensors, x) = (size.tensors()?, size.x()?);
    let [gate, up, down] = &tensors;
    let first = NeuronWeights::gated(format, SILU, gate, up, down)?;
    let bytes = first.neuron_bytes();
    let mut first = Some(first);
    let sparse = size.blocks(bytes * size.inner, |_| match first.take() {
        Some(w) => Ok(w),
        None => NeuronWeights::gated(format, SILU, gate, up, down),
    })?;
    let dense = engines(size, format, &tensors)?;
    for (share, activity) in SHARES.into_iter().flat_map(|s| Activity::BOTH.map(|a| (s, a))) {
        let sets: Vec<_> = (0..sparse.len()).map(|i| activity.set(size.inner, share, i as u64)).collect();
        let mut times = vec![Vec::new(); dense.len() + 1];
        for _ in 0..size.rounds {
            times[0].push(seconds(&sparse, |i, w| sparse_ffn(&x, w, &sets[i]))?);
            for ((_, blocks), times) in dense.iter().zip(&mut times[1..]) {
                times.push(seconds(blocks, |_, ffn| ffn(&x))?);
            }
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        let active = sets.iter().map(Vec::len).sum::<usize>() as f64 / sets.len() as f64;
        write!(
            out,
            "{:>5} {:5.1} % active, {:7}: {:7.1} µs, {:5.1} GB/s",
            format.name(),
            active / size.inner as f64 * 100.0,
            activity.name(),
            times[0] * 1e6,
            active * bytes as f64 / times[0] / 1e9
        )?;
        for ((name, _), t) in dense.iter().zip(&times[1..]) {
            write!(out, "; {name} {:7.1} µs ({:5.2} x)", t * 1e6, t / times[0])?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let size = if args.iter().any(|a| a == "--test") { SMALL } else { FULL };
    let wanted = |f: &Format| {
        let mut names = args.iter().filter(|a| !a.starts_with('-')).peekable();
        names.peek().is_none() || names.any(|a| a == f.name())
    };
    let mut out = std::io::stdout();
    let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
    writeln!(
        out,
        "level {}, {} threads, hidden {}, {} neurons; uniform: all neurons equally likely; skewed: neuron i with \
         probability min(1, c / (i + 1)^0.7)",
        kernels.level(),
        Threads::default().count(),
        size.hidden,
        size.inner
    )?;
    let formats = [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0];
    formats.iter().filter(|f| wanted(f)).try_for_each(|&f| measure(size, f, &mut out))
}
