//! Attention of one token over a long past beside `ruvllm_sparse_attention` 0.1.1, which runs on one thread: 32 heads on 4 of
//! 64 elements, random keys and values. Medians of rounds taken in turn.
//!
//! `CANDLE_NUM_THREADS=1 cargo bench -p candle-sparse-peers --bench ruvllm` (microseconds per layer). `-- --test` runs it once,
//! small.
//!
//! What that crate reads (window, a stride that grows, block means) differs from what ours reads; both have their defaults, and
//! positions per token say how much that is. Its cache is F32 (its F16 one needs another feature); ours F16 or tiers.

#[path = "../../common/attention.rs"]
mod attention;
#[path = "../../common/mod.rs"]
mod common;

use attention::{Layer, Shape, noise};
use candle_core::{Error, Result};
use candle_sparse::{AttentionConfig, AttentionMode, KvConfig, kv_cache::KvDType};
use common::median;
use ruvllm_sparse_attention::{KvCache, SparseAttentionConfig, SubquadraticSparseAttention, Tensor3};
use std::{hint::black_box, io::Write, time::Instant};

const SHAPE: Shape = Shape { heads: 32, kv_heads: 4, head_dim: 64 };

struct Theirs {
    attention: SubquadraticSparseAttention,
    cache: KvCache,
    q: Tensor3,
}

impl Theirs {
    fn new(depth: usize) -> Result<Self> {
        let Shape { heads, kv_heads, head_dim } = SHAPE;
        let config = SparseAttentionConfig::default();
        let mut cache = KvCache::new(depth, kv_heads, head_dim, config.block_size);
        let tensor = |heads: usize, seed| {
            Tensor3::from_vec(noise(heads * head_dim, seed), 1, heads, head_dim).map_err(Error::msg)
        };
        for position in 0..depth as u64 {
            cache.try_append(&tensor(kv_heads, position)?, &tensor(kv_heads, !position)?).map_err(named)?;
        }
        let attention = SubquadraticSparseAttention::new(config).map_err(named)?;
        Ok(Self { attention, cache, q: tensor(heads, 1)? })
    }

    fn decode(&mut self) -> Result<()> {
        black_box(self.attention.decode_step(&self.q, &self.cache).map_err(named)?);
        Ok(())
    }
}

fn named(e: impl std::fmt::Debug) -> Error {
    Error::msg(format!("ruvllm_sparse_attention: {e:?}"))
}

fn main() -> Result<()> {
    let test = std::env::args().any(|a| a == "--test");
    let (rounds, depths): (usize, &[usize]) =
        if test { (1, &[300]) } else { (15, &[2048, 8192, 16_384, 32_768]) };
    let mut out = std::io::stdout();
    for &depth in depths {
        let mode = AttentionConfig::new;
        let mut ours = [
            ("f16, dense", KvConfig::exact(KvDType::F16), AttentionConfig::default()),
            ("tiered, dense", KvConfig::tiered(), AttentionConfig::default()),
            ("tiered, window", KvConfig::tiered(), mode(AttentionMode::Window)),
            ("tiered, gated", KvConfig::tiered(), mode(AttentionMode::Gated)),
        ]
        .map(|(name, kv, select)| (name, Layer::new(SHAPE, kv, select, depth)));
        let mut theirs = Theirs::new(depth)?;
        let mut times = vec![Vec::new(); ours.len() + 1];
        for _ in 0..rounds {
            for ((_, layer), times) in ours.iter_mut().zip(&mut times) {
                let layer = layer.as_mut().map_err(|e| Error::msg(e.to_string()))?;
                let start = Instant::now();
                layer.decode()?;
                times.push(start.elapsed().as_secs_f64());
            }
            let start = Instant::now();
            theirs.decode()?;
            times[4].push(start.elapsed().as_secs_f64());
        }
        let reference = median(times.pop().unwrap_or_default());
        write!(out, "{depth:6} positions: ruvllm {:8.1} µs", reference * 1e6)?;
        for ((name, _), times) in ours.iter().zip(times) {
            let t = median(times);
            write!(out, "; {name} {:8.1} µs ({:4.1} x)", t * 1e6, reference / t)?;
        }
        writeln!(out)?;
    }
    Ok(())
}
