//! One layer's attention at a depth, for the benches.

use candle_core::Result;
use candle_sparse::{
    AttentionConfig, FastGrnnGate, KvCache, KvConfig, Threads,
    attention::{LoneScratch, Plan, Selector, Token, lone_token, room},
    core::{Activation, Config, Rope, RopeScaling},
    kernels::Kernels,
    kv_cache::PAGE_LEN,
    team::{Board, Room},
};
use std::sync::Mutex;

use super::common::uniform;

/// Heads, key/value heads and their size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Shape {
    pub(crate) fn config(self) -> Config {
        Config {
            hidden_size: 64,
            intermediate_size: 1,
            vocab_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: 1 << 16,
            hidden_act: Activation::Silu,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        }
    }
}

/// Numbers in −1 .. 1.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut uniform = uniform(seed);
    (0..n).map(|_| uniform() as f32 * 2.0 - 1.0).collect()
}

/// A layer with a past, and one token that reads it.
pub(crate) struct Layer {
    pub(crate) config: Config,
    pub(crate) cache: KvCache,
    select: AttentionConfig,
    gates: Vec<FastGrnnGate>,
    queries: Vec<f32>,
    kv: Vec<f32>,
    plan: Plan,
    board: Board,
    own: Vec<Mutex<(LoneScratch, Vec<f32>)>>,
    threads: Threads,
}

impl Layer {
    pub(crate) fn new(shape: Shape, kv: KvConfig, select: AttentionConfig, depth: usize) -> Result<Self> {
        let (config, threads) = (shape.config(), Threads::default());
        let (hidden, heads) = (config.hidden_size, config.num_key_value_heads);
        let gate =
            FastGrnnGate::new(hidden, noise(heads * hidden, 1), vec![0.0; heads], vec![f32::MIN; heads])?;
        let own =
            (0..threads.count()).map(|_| Mutex::new((LoneScratch::default(), vec![0.0; config.q_dim()])));
        let mut layer = Self {
            cache: KvCache::new(&config, kv),
            select,
            gates: vec![gate],
            queries: noise(config.q_dim(), 2),
            kv: noise(2 * config.kv_dim(), 3),
            plan: Plan::default(),
            board: Board::default(),
            own: own.collect(),
            threads,
            config,
        };
        for position in 0..depth {
            layer.append(position)?;
        }
        Ok(layer)
    }

    /// Writes a position and lets pages settle.
    pub(crate) fn append(&mut self, position: usize) -> Result<()> {
        let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
        let (k, v) =
            (noise(self.config.kv_dim(), position as u64), noise(self.config.kv_dim(), !position as u64));
        self.cache.begin(1, position, 1)?;
        self.cache.write(0, 0, position, &k, &v);
        let x = noise(self.config.hidden_size, 7 * position as u64);
        self.cache.observe(0, 0, &self.gates[0], kernels, position, &x);
        self.cache.advance(1);
        Ok(())
    }

    /// Attention of the next token.
    pub(crate) fn decode(&mut self) -> Result<()> {
        let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
        let (position, c) = (self.cache.len(), &self.config);
        let select = Selector::new(self.select, &self.gates, 1)?;
        if self.select.recalled_pages() > 0 {
            self.cache.update_bounds(0, position / PAGE_LEN);
        }
        self.plan.update(&select, &self.cache, [1, c.num_key_value_heads], position);
        let (keys, values) = self.kv.split_at(c.kv_dim());
        let (cache, plan, queries) = (&self.cache, &self.plan, &self.queries[..]);
        let token = Token { cache, select, plan, layer: 0, position, queries, keys, values };
        let room = Room { phases: 2, elements: room(c, &select, cache) };
        let outcome = self.threads.team(&mut self.board, room, &self.own, |member, (scratch, out)| {
            lone_token(member, kernels, c, token, scratch, out)
        });
        outcome.map_err(|_| candle_core::Error::msg("the team gave up"))
    }
}
