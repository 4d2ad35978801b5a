//! Attention of one token over a long past, one layer: ours dense, in tiers and sparse, beside candle's. Medians of rounds
//! taken in turn. Then the parts of a step at the shape of Llama-7B.
//!
//! `cargo bench --bench attention` (microseconds per layer, all threads). `-- --test` runs it once, small.

#[path = "common/attention.rs"]
mod attention;
mod common;

use attention::{Layer, Shape, noise};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_sparse::{
    AttentionConfig, AttentionMode, FastGrnnGate, KvConfig,
    kv_cache::{KvDType, PAGE_LEN},
};
use candle_sparse_core::{KernelSet, kernel::rope};
use candle_sparse_kernels::Kernels;
use common::median;
use std::{hint::black_box, io::Write, time::Instant};

const TINYLLAMA: Shape = Shape { heads: 32, kv_heads: 4, head_dim: 64 };
const LLAMA_7B: Shape = Shape { heads: 32, kv_heads: 32, head_dim: 128 };

/// Keys and values as candle's Llama keeps them, and what it does with them.
struct Candle {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: usize,
}

impl Candle {
    fn new(shape: Shape, depth: usize) -> Result<Self> {
        let tensor = |heads: usize, n: usize, seed| {
            Tensor::from_vec(
                noise(heads * n * shape.head_dim, seed),
                (1, heads, n, shape.head_dim),
                &Device::Cpu,
            )
        };
        let (q, k, v) = (
            tensor(shape.heads, 1, 1)?,
            tensor(shape.kv_heads, depth, 2)?,
            tensor(shape.kv_heads, depth, 3)?,
        );
        Ok(Self {
            q,
            k: k.to_dtype(DType::F16)?,
            v: v.to_dtype(DType::F16)?,
            group: shape.heads / shape.kv_heads,
        })
    }

    /// `CausalSelfAttention::forward` of `candle_transformers::models::llama` 0.11 after RoPE.
    fn decode(&self) -> Result<Tensor> {
        let repeat = |x: &Tensor| candle_repeat_kv(x.to_dtype(DType::F32)?, self.group);
        let (k, v) = (repeat(&self.k)?, repeat(&self.v)?);
        let att = (self.q.matmul(&k.t()?)? / 8.0)?;
        let att = candle_nn::ops::softmax(&att, D::Minus1)?;
        att.matmul(&v.contiguous()?)
    }
}

/// `candle_transformers::utils::repeat_kv`
fn candle_repeat_kv(x: Tensor, group: usize) -> Result<Tensor> {
    if group == 1 {
        return Ok(x);
    }
    let (b, heads, n, d) = x.dims4()?;
    Tensor::cat(&vec![&x; group], 2)?.reshape((b, heads * group, n, d))
}

fn modes() -> [(&'static str, KvConfig, AttentionConfig); 5] {
    let (f16, dense) = (KvConfig::exact(KvDType::F16), AttentionConfig::default());
    let mode = AttentionConfig::new;
    [
        ("f16, dense", f16, dense),
        ("tiered, dense", KvConfig::tiered(), dense),
        ("tiered, window", KvConfig::tiered(), mode(AttentionMode::Window)),
        ("tiered, gated", KvConfig::tiered(), mode(AttentionMode::Gated)),
        ("tiered, recall", KvConfig::tiered(), mode(AttentionMode::Recall)),
    ]
}

fn seconds(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64())
}

/// As many layers as keep a past out of the caches, read in turn.
fn layers(shape: Shape, depth: usize, bytes: usize) -> usize {
    (bytes / (4 * depth * shape.kv_heads * shape.head_dim)).clamp(1, 32)
}

fn depths(depths: &[usize], rounds: usize, bytes: usize, out: &mut impl Write) -> Result<()> {
    for &depth in depths {
        let count = layers(TINYLLAMA, depth, bytes);
        let make = |(name, kv, select)| {
            let all =
                (0..count).map(|_| Layer::new(TINYLLAMA, kv, select, depth)).collect::<Result<Vec<_>>>()?;
            Ok((name, all))
        };
        let mut ours = modes().into_iter().map(make).collect::<Result<Vec<_>>>()?;
        let theirs = (0..count).map(|_| Candle::new(TINYLLAMA, depth)).collect::<Result<Vec<_>>>()?;
        let mut times = vec![Vec::new(); ours.len() + 1];
        for _ in 0..rounds {
            for ((_, layers), times) in ours.iter_mut().zip(&mut times) {
                times.push(seconds(|| layers.iter_mut().try_for_each(Layer::decode))? / count as f64);
            }
            let candle = || theirs.iter().try_for_each(|t| t.decode().map(|y| drop(black_box(y))));
            times[ours.len()].push(seconds(candle)? / count as f64);
        }
        let candle = median(times.pop().unwrap_or_default());
        write!(out, "{depth:6} positions: candle {:9.1} µs", candle * 1e6)?;
        for ((name, _), times) in ours.iter().zip(times) {
            let t = median(times);
            write!(out, "; {name} {:8.1} µs ({:5.1} x)", t * 1e6, candle / t)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// The parts of a decode step, one layer of the shape of Llama-7B.
fn parts(rounds: usize, out: &mut impl Write) -> Result<()> {
    let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
    let mut say = |name: &str, times: Vec<f64>| writeln!(out, "{name:38} {:8.1} µs", median(times) * 1e6);
    let all =
        |f: &mut dyn FnMut() -> Result<()>| (0..rounds).map(|_| seconds(&mut *f)).collect::<Result<Vec<_>>>();

    let mut layer = Layer::new(LLAMA_7B, KvConfig::exact(KvDType::F16), AttentionConfig::default(), 256)?;
    say("attention over 256 positions", all(&mut || layer.decode())?)?;
    let (k, v) = (noise(4096, 1), noise(4096, 2));
    let mut cache = layer.cache;
    let append = || {
        cache.begin(1, 256, 1)?;
        cache.write(0, 0, 256, &k, &v);
        cache.advance(1);
        Ok(())
    };
    let mut append = append;
    say("append of a token", all(&mut append)?)?;
    for (name, hot, warm) in [("a page to Q8_0", 32, 1 << 20), ("a page to Q4_1", 32, 32)] {
        let tiers = KvConfig::tiered().with_hot(hot).with_warm(warm);
        let mut times = Vec::new();
        let mut layer = Layer::new(LLAMA_7B, tiers, AttentionConfig::default(), 95)?;
        for round in 0..rounds {
            let position = 95 + round * PAGE_LEN;
            layer.cache.begin(1, position, 1)?;
            layer.cache.write(0, 0, position, &k, &v);
            times.push(seconds(|| {
                layer.cache.advance(1);
                Ok(())
            })?);
            (position + 1..position + PAGE_LEN).try_for_each(|p| layer.append(p))?;
        }
        say(name, times)?;
    }
    let (hidden, heads) = (4096, LLAMA_7B.kv_heads);
    let gate = FastGrnnGate::new(hidden, noise(heads * hidden, 6), vec![0.0; heads], vec![f32::MIN; heads])?;
    let mut layer = Layer::new(LLAMA_7B, KvConfig::tiered(), AttentionConfig::default(), 64)?;
    let x = noise(hidden, 7);
    let mut times = Vec::new();
    // It works once a page.
    for page in 0..rounds {
        let mut sum = 0.0;
        for position in 64 + page * PAGE_LEN..64 + (page + 1) * PAGE_LEN {
            layer.cache.begin(1, position, 1)?;
            layer.cache.write(0, 0, position, &k, &v);
            sum += seconds(|| {
                layer.cache.observe(0, 0, &gate, kernels, position, &x);
                Ok(())
            })?;
            layer.cache.advance(1);
        }
        times.push(sum / PAGE_LEN as f64);
    }
    say("gate of a token", times)?;
    let (mut row, c) = (noise(8192, 3), LLAMA_7B.config());
    let (mut cos, mut sin) = (vec![0.0; 64], vec![0.0; 64]);
    let rotate = || {
        rope::angles(|i| c.rope.inv_freq(i, c.head_dim), 1.0, 1000, &mut cos, &mut sin);
        row.chunks_exact_mut(128).for_each(|head| rope::rope(head, &cos, &sin, false));
        Ok(())
    };
    let mut rotate = rotate;
    say("RoPE of queries and keys", all(&mut rotate)?)?;
    let (x, weight, mut y) = (noise(4096, 4), noise(4096, 5), vec![0.0; 4096]);
    let mut norm = || {
        kernels.rms_norm(&x, &weight, 1e-5, black_box(&mut y));
        Ok(())
    };
    say("RMSNorm", all(&mut norm)?)?;
    Ok(())
}

fn main() -> Result<()> {
    let test = std::env::args().any(|a| a == "--test");
    let mut out = std::io::stdout();
    let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
    let threads = candle_sparse::Threads::default().count();
    writeln!(
        out,
        "level {}, {threads} threads, 32 heads on 4 of 64, random keys and values",
        kernels.level()
    )?;
    let (rounds, bytes) = if test { (1, 1) } else { (15, 256 << 20) };
    depths(if test { &[300] } else { &[256, 2048, 8192, 16_384, 32_768] }, rounds, bytes, &mut out)?;
    parts(if test { 1 } else { 31 }, &mut out)
}
