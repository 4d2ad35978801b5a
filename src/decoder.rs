//! The decoder that every drop-in model runs on: weights held once, one step over plain slices.
//!
//! ```text
//! embed → per layer [norm → qkv → rope → cache → attention → o → add → norm → gate·up·act → down → add] → norm → head
//! ```
//!
//! Between two operations there is no `Tensor`: a step works in buffers that live in the cache. A lone token goes through
//! `decode.rs`, where all threads run the whole step; everything else through `prefill.rs`, one region per operation.

mod checkpoint;
mod core;
mod decode;
mod forward;
mod gate_up;
mod inventory;
mod load;
mod payoff;
mod prefill;
mod settings;
mod state;
mod step;
mod stored;
mod tap;
mod turns;

use crate::{
    AttentionConfig, Threads, Weight,
    gate::FastGrnnGate,
    kv_cache::Origin,
    sparse::{ModelSelection, Points, SparseFfn},
    weight::{Compute, Prepared, Stack},
};
use candle_core::{Result, bail};
use candle_sparse_core::{
    Config, KernelSet,
    kernel::{rms_norm::shifted_relu, rope},
};
use candle_sparse_kernels::{Kernels, Level};
pub use checkpoint::{Checkpoint, Extras, LoadOptions};
pub use inventory::{check_names, has_mlp_bias};
pub use state::{LayerStats, SparseStats};
use std::sync::Arc;
pub use step::{Input, Logits, Scratch, Step};
pub use stored::{Held, Stored};
pub use tap::LayerTap;
pub use turns::{BatchScratch, Turn};

/// A projection and its bias.
#[derive(Clone, Debug)]
struct Projection<W = Stack> {
    weight: W,
    bias: Option<Vec<f32>>,
}

#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: Vec<f32>,
    /// q, k and v one below the other, so that one hand-over serves all three.
    qkv_proj: Projection,
    o_proj: Projection,
    post_attention_layernorm: Vec<f32>,
    ffn: Ffn,
}

/// What a block holds of its FFN.
#[derive(Clone, Debug)]
enum Ffn {
    Dense(DenseFfn),
    /// Neuron by neuron: with a profile, or where the activation shuts neurons.
    Sparse(SparseFfn),
}

#[derive(Clone, Debug)]
struct DenseFfn {
    /// `None` for an FFN without a gate.
    gate_proj: Option<Projection<Weight>>,
    up_proj: Projection<Weight>,
    down_proj: Projection,
}

impl Layer {
    /// Bytes of the matrices that a token reads when all neurons are computed.
    fn bytes(&self) -> usize {
        self.qkv_proj.weight.bytes() + self.o_proj.weight.bytes() + self.ffn.dense_bytes()
    }
}

impl Ffn {
    fn sparse(&self) -> Option<&SparseFfn> {
        match self {
            Self::Sparse(ffn) => Some(ffn),
            Self::Dense(_) => None,
        }
    }

    /// Bytes that all neurons read.
    fn dense_bytes(&self) -> usize {
        match self {
            Self::Dense(f) => {
                let gate = f.gate_proj.as_ref().map_or(0, |p| p.weight.bytes());
                gate + f.up_proj.weight.bytes() + f.down_proj.weight.bytes()
            }
            Self::Sparse(f) => f.dense_bytes(),
        }
    }
}

/// How FFNs that leave neurons out run.
#[derive(Clone, Debug)]
struct Sparse {
    points: Points,
    plans: Arc<ModelSelection>,
}

/// A whole model: immutable, with its state in [`KvCache`](crate::KvCache) and [`Scratch`]. `Clone` shares the weights.
///
/// ```
/// use candle_sparse::decoder::{Input, Logits, Scratch, Step};
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let mut cache = KvCache::new(decoder.config(), KvConfig::exact(KvDType::F16));
/// let mut scratch = Scratch::default();
/// let mut logits = vec![0.0; decoder.config().vocab_size];
/// // A prompt of three tokens, then one token.
/// let prompt = Step { batch: 1, seq_len: 3, index_pos: 0 };
/// decoder.forward(Input::Ids(&[5, 6, 7]), prompt, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
/// let token = Step { batch: 1, seq_len: 1, index_pos: 3 };
/// decoder.forward(Input::Ids(&[8]), token, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
/// assert_eq!(cache.len(), 4);
/// assert!(logits.iter().all(|l| l.is_finite()));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Decoder {
    config: Config,
    /// Angle per position of each pair of a head.
    inv_freq: Arc<[f32]>,
    kernels: &'static Kernels,
    threads: Threads,
    embed_tokens: Weight,
    layers: Arc<[Layer]>,
    /// `None`: all blocks are dense.
    sparse: Option<Sparse>,
    /// Why all blocks are dense though there was a profile.
    not_sparse: Option<String>,
    attention: AttentionConfig,
    /// One per layer, or none.
    gates: Arc<[FastGrnnGate]>,
    recall_shares: Arc<[Vec<f32>]>,
    norm: Vec<f32>,
    lm_head: Weight,
    notices: Vec<String>,
    /// What makes keys and values this model's.
    origin: Arc<Origin>,
}

impl Decoder {
    /// The shape: sizes, RoPE, activation, context.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What tells keys and values of this model from those of others, its fingerprint among it.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    /// The instruction set in use.
    #[must_use]
    pub fn level(&self) -> Level {
        self.kernels.level()
    }

    /// The threads in use.
    #[must_use]
    pub fn threads(&self) -> Threads {
        self.threads
    }

    /// What was done otherwise than asked while loading, one line each.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Bytes of all matrices, those of predictions among them; a head that is the embedding counts once.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let tied = self.embed_tokens.shares_memory(&self.lm_head);
        let predictor = |l: &Layer| l.ffn.sparse().map_or(0, |f| f.bytes() - f.dense_bytes());
        let embedding = if tied { 0 } else { self.embed_tokens.bytes() };
        self.weight_bytes_per_token() + self.layers.iter().map(predictor).sum::<usize>() + embedding
    }

    /// Bytes of the matrices that one decoded token reads when all neurons are computed: all but the embedding, of which
    /// it reads a row. [`SparseStats`] has what was read.
    #[must_use]
    pub fn weight_bytes_per_token(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.lm_head.bytes()
    }

    /// Bytes of the matrices that one decoded token reads, the FFNs as `stats` counted them.
    #[must_use]
    pub fn read_bytes_per_token(&self, stats: &SparseStats) -> usize {
        let dense = self.layers.iter().zip(&stats.layers).map(|(l, _)| l.ffn.dense_bytes()).sum::<usize>();
        let read = stats.layers.iter().map(|l| l.bytes_per_token).sum::<f64>();
        self.weight_bytes_per_token() - dense + read as usize
    }

    /// Writes the embeddings `out` `[n, hidden_size]` of `n` tokens.
    ///
    /// Cost: `n` rows of the table are read and converted to f32.
    ///
    /// # Errors
    /// A token is not below `vocab_size`.
    ///
    /// # Panics
    /// `out` has the wrong length.
    pub fn embed(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        let c = &self.config;
        self.check_ids(ids)?;
        assert_eq!(out.len(), ids.len() * c.hidden_size, "embed: out is not [n, hidden_size]");
        let table = self.embed_tokens.matrix();
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(c.hidden_size)) {
            table.dequantize_row(*id as usize, out);
        }
        Ok(())
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            bail!("token id {id} is not below vocab_size {vocab}: does the tokenizer belong to the model?");
        }
        Ok(())
    }

    fn on(&self) -> Compute<'_> {
        Compute { kernels: self.kernels, threads: self.threads }
    }

    /// What attention and FFN read: the norm, for shifted-ReLU models `max(norm − shift, 0)`.
    fn norm_row(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        self.kernels.rms_norm(x, weight, self.config.rms_norm_eps, y);
        if let Some(shift) = self.config.norm_shift {
            shifted_relu(y, shift);
        }
    }

    /// Rotates queries and keys of a row of `[q, k, v]` and scales the queries by `1/√head_dim`.
    fn rotate_row(&self, qkv: &mut [f32], cos: &[f32], sin: &[f32]) {
        let c = &self.config;
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        for head in qkv[..c.q_dim() + c.kv_dim()].chunks_exact_mut(c.head_dim) {
            rope::rope(head, cos, sin, c.rope.interleaved);
        }
        qkv[..c.q_dim()].iter_mut().for_each(|v| *v *= scale);
    }

    /// Makes room for a token of the widest projection.
    fn reserve_token(&self, prepared: &mut Prepared) {
        let c = &self.config;
        prepared.reserve(1, c.hidden_size.max(c.intermediate_size).max(c.q_dim()));
    }
}

fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

/// Sets the length; shrinking keeps the memory.
fn resize(v: &mut Vec<f32>, n: usize) {
    v.resize(n, 0.0);
}
