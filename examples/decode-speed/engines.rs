//! The engines that are measured, behind one trait.

use super::{
    Cli,
    gguf::gguf,
    source::Source,
    sparse::{Drawn, Ffn},
};
use anyhow::{Context, Result, bail};
use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType,
        gguf_file::{Content, TensorInfo},
    },
};
use candle_sparse::{
    AttentionMode, FastGrnnGate, FfnMode, Format, KvCache, Selection, SparseConfig, Threads,
    decoder::{Decoder, Input, Logits, Scratch, Step},
};
use candle_sparse_kernels::Kernels;
use candle_sparse_models::{decoder::LoadOptions, gguf::GgufFile, llama};
use candle_transformers::models::{llama as candle_llama, quantized_llama};
use std::{
    fs::File,
    io::{BufReader, Seek},
    sync::Arc,
};

/// Something that decodes.
pub(crate) trait Engine {
    fn name(&self) -> &'static str;
    /// Runs a prompt of `n` tokens from `index_pos`.
    fn prefill(&mut self, n: usize, index_pos: usize) -> Result<()>;
    /// Puts `depth` tokens in an empty cache.
    fn fill(&mut self, depth: usize) -> Result<()>;
    /// Runs one token at a position.
    fn decode(&mut self, index_pos: usize) -> Result<()>;
    /// Bytes of all matrices.
    fn weight_bytes(&self) -> usize;
    /// Bytes of the matrices that a token reads: all but the embedding.
    fn weight_bytes_per_token(&self) -> usize;
    /// The mean share of neurons that decoded tokens computed.
    fn active_fraction(&self) -> f64 {
        1.0
    }
}

/// Positions that are filled together.
const CHUNK: usize = 256;

/// Numbers in −1 .. 1 without a pattern.
fn noise(n: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn prompt(n: usize) -> Result<Tensor> {
    let ids: Vec<u32> = (0..n as u32).map(|i| i * 7919 % 256).collect();
    Ok(Tensor::from_vec(ids, (1, n), &Device::Cpu)?)
}

/// Our model.
pub(crate) struct Ours {
    name: &'static str,
    model: llama::Llama,
    cache: llama::Cache,
    config: llama::Config,
    cache_dtype: DType,
    logits: Vec<f32>,
}

impl Ours {
    pub(crate) fn load(
        source: &Source,
        threads: Threads,
        drawn: Option<Drawn>,
        positions: usize,
    ) -> Result<Self> {
        let mut config = source.config()?;
        let mut options = LoadOptions::default().with_format(source.format).with_threads(Some(threads));
        options.sparse.mode = FfnMode::Dense;
        let model = if let Some(path) = source.gguf_file() {
            llama::Llama::from_gguf(&GgufFile::open(path)?, options)?
        } else {
            config.max_position_embeddings = config.max_position_embeddings.max(positions);
            let vb = source.var_builder()?;
            if let Some(drawn) = drawn {
                if drawn.ffn != Ffn::ExactZero {
                    options.profile = Some(Arc::new(drawn.profile(&vb, &config)?));
                }
                // This program measures whether it pays.
                (options.sparse.mode, options.sparse.force) = (drawn.ffn.into(), true);
            }
            llama::Llama::load_with(vb, &config, options)?
        };
        let (limit, cache_dtype) = (config.max_position_embeddings, source.cache_dtype()?);
        if positions > limit {
            bail!(
                "the model has {limit} positions: {positions} of --prefill, --depth and --steps do not fit"
            );
        }
        let cache = llama::Cache::new(true, cache_dtype, &config, &Device::Cpu)?;
        let logits = vec![0.0; config.vocab_size];
        let mut ours = Self { name: "dense", model, cache, config, cache_dtype, logits };
        // Exact zeros are the weights' own.
        if let Some(drawn) = drawn.filter(|d| d.ffn != Ffn::ExactZero) {
            ours.tune(drawn)?;
        }
        Ok(ours)
    }

    /// With the memory of the flags; gates are drawn, since random weights teach nothing.
    pub(crate) fn reading(mut self, cli: &Cli) -> Result<Self> {
        let (kv, attention) = (cli.memory.kv(self.cache_dtype)?, cli.memory.attention()?);
        let c = &self.config;
        self.cache = llama::Cache::with_config(true, kv, c, &Device::Cpu)?;
        if attention.mode == AttentionMode::Gated {
            let gate = |layer: usize| {
                let ridge = noise(c.num_key_value_heads * c.hidden_size, layer);
                let bias = vec![0.0; c.num_key_value_heads];
                let threshold = vec![f32::MIN; c.num_key_value_heads];
                FastGrnnGate::new(c.hidden_size, ridge, bias, threshold)
            };
            let gates = (0..c.num_hidden_layers).map(gate).collect::<candle_core::Result<_>>()?;
            self.model = self.model.with_gates(gates)?;
        }
        self.model = self.model.with_attention(attention)?;
        self.name = "candle-sparse";
        Ok(self)
    }

    /// Scales the thresholds until the share is what was asked for: the drawn ones assume numbers that are quite normal.
    fn tune(&mut self, drawn: Drawn) -> Result<()> {
        let (mut low, mut high) = (0.1_f32, 10.0_f32);
        for _ in 0..12 {
            let scale = (low * high).sqrt();
            let config = SparseConfig::default()
                .with_mode(drawn.ffn.into())
                .with_selection(Selection::Scale(scale))
                .with_force(true);
            self.model = self.model.with_sparse(config)?;
            self.cache.clear();
            (0..6).try_for_each(|i| self.decode(i))?;
            if self.active_fraction() > f64::from(drawn.share) { low = scale } else { high = scale }
        }
        self.cache.clear();
        Ok(())
    }

    /// The decoder underneath.
    pub(crate) fn decoder(&self) -> &Decoder {
        self.model.decoder()
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.logits.len()
    }

    /// A new cache that holds `depth` positions.
    pub(crate) fn filled(&self, depth: usize) -> Result<KvCache> {
        let mut kv = KvCache::new(self.decoder().config(), *self.cache.kv().config());
        kv.set_origin(self.decoder().origin());
        fill(self.decoder(), &mut kv, depth)?;
        Ok(kv)
    }

    /// Logits after a prompt of `n` tokens.
    #[cfg(test)]
    pub(crate) fn logits(&mut self, n: usize) -> Result<Vec<f32>> {
        Ok(self.model.forward(&prompt(n)?, 0, &mut self.cache)?.flatten_all()?.to_vec1()?)
    }
}

impl Engine for Ours {
    fn name(&self) -> &'static str {
        self.name
    }

    fn prefill(&mut self, n: usize, index_pos: usize) -> Result<()> {
        self.model.forward(&prompt(n)?, index_pos, &mut self.cache)?;
        Ok(())
    }

    fn fill(&mut self, depth: usize) -> Result<()> {
        fill(self.model.decoder(), self.cache.kv_mut(), depth)
    }

    fn decode(&mut self, index_pos: usize) -> Result<()> {
        // Another token each time, as its neurons are others.
        let token = (index_pos * 7919 % self.logits.len()) as u32;
        Ok(self.model.decode(token, index_pos, &mut self.cache, &mut self.logits)?)
    }

    fn weight_bytes(&self) -> usize {
        self.model.decoder().weight_bytes()
    }

    fn weight_bytes_per_token(&self) -> usize {
        self.model.decoder().read_bytes_per_token(&self.cache.sparse_stats())
    }

    fn active_fraction(&self) -> f64 {
        self.cache.sparse_stats().active_share()
    }
}

/// Decodes a token at the end of a cache.
pub(crate) fn decode_one(
    decoder: &Decoder,
    i: usize,
    kv: &mut KvCache,
    scratch: &mut Scratch,
    logits: &mut [f32],
) -> Result<()> {
    let token = (i * 7919 % logits.len()) as u32;
    let step = Step { batch: 1, seq_len: 1, index_pos: kv.len() };
    Ok(decoder.forward(Input::Ids(&[token]), step, kv, scratch, Logits::Last, logits)?)
}

/// Puts `depth` positions of random numbers in a cache: decode takes as long as after a prompt, which at this length would take
/// minutes.
fn fill(decoder: &Decoder, kv: &mut KvCache, depth: usize) -> Result<()> {
    let c = decoder.config();
    kv.clear();
    for start in (0..depth).step_by(CHUNK) {
        let n = CHUNK.min(depth - start);
        kv.begin(1, start, n)?;
        for layer in 0..c.num_hidden_layers {
            if decoder.attention_config().mode == AttentionMode::Gated {
                let (gate, x) = (&decoder.gates()[layer], noise(n * c.hidden_size, start));
                kv.observe(0, layer, gate, Kernels::get()?, start, &x);
            }
            for position in start..start + n {
                let [k, v] = [0, 1].map(|i| noise(c.kv_dim(), 2 * position + i));
                kv.write(0, layer, position, &k, &v);
            }
        }
        kv.advance(n);
    }
    Ok(())
}

/// candle's model.
pub(crate) struct Candle {
    model: candle_llama::Llama,
    config: candle_llama::Config,
    cache: candle_llama::Cache,
    dtype: DType,
    weight_bytes_per_token: usize,
}

impl Candle {
    pub(crate) fn load(source: &Source) -> Result<Self> {
        let config: candle_llama::LlamaConfig =
            serde_json::from_slice(source.config_json()?).context("config.json")?;
        let config = config.into_config(false);
        let vb = source.var_builder()?;
        let dtype = vb.dtype();
        let model = candle_llama::Llama::load(vb, &config)?;
        let cache = candle_llama::Cache::new(true, dtype, &config, &Device::Cpu)?;
        let (h, i) = (config.hidden_size, config.intermediate_size);
        let kv = h / config.num_attention_heads * config.num_key_value_heads;
        let elements =
            config.num_hidden_layers * (2 * h * h + 2 * h * kv + 3 * h * i) + config.vocab_size * h;
        let weight_bytes_per_token = elements * dtype.size_in_bytes();
        Ok(Self { model, config, cache, dtype, weight_bytes_per_token })
    }
}

impl Engine for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn prefill(&mut self, n: usize, index_pos: usize) -> Result<()> {
        if index_pos == 0 {
            // candle's cache cannot be cut back.
            self.cache = candle_llama::Cache::new(true, self.dtype, &self.config, &Device::Cpu)?;
        }
        self.model.forward(&prompt(n)?, index_pos, &mut self.cache)?;
        Ok(())
    }

    fn fill(&mut self, depth: usize) -> Result<()> {
        self.cache = candle_llama::Cache::new(true, self.dtype, &self.config, &Device::Cpu)?;
        // In pieces: candle holds a score for every pair of positions.
        for start in (0..depth).step_by(256) {
            self.prefill(256.min(depth - start), start)?;
        }
        Ok(())
    }

    fn decode(&mut self, index_pos: usize) -> Result<()> {
        let x = Tensor::new(&[[7_u32]], &Device::Cpu)?;
        self.model.forward(&x, index_pos, &mut self.cache)?;
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        let embedding = self.config.vocab_size * self.config.hidden_size * self.dtype.size_in_bytes();
        self.weight_bytes_per_token + if self.config.tie_word_embeddings { 0 } else { embedding }
    }

    fn weight_bytes_per_token(&self) -> usize {
        self.weight_bytes_per_token
    }
}

/// candle's model for quantised weights, which come from GGUF alone.
pub(crate) struct CandleQuantized {
    model: quantized_llama::ModelWeights,
    weight_bytes: usize,
    weight_bytes_per_token: usize,
}

impl CandleQuantized {
    /// A model that is asked for `positions` positions at most.
    pub(crate) fn load(source: &Source, threads: Threads, positions: usize) -> Result<Self> {
        if threads.count() != Threads::default().count() {
            bail!(
                "candle's quantised llama uses all of candle's pool: set CANDLE_NUM_THREADS, not --threads"
            );
        }
        let limit = quantized_llama::MAX_SEQ_LEN;
        if positions > limit {
            bail!(
                "candle's quantised llama has {limit} positions: {positions} of --prefill, --depth and --steps do not fit"
            );
        }
        let c = source.config()?;
        let mut file = BufReader::new(match (source.format, source.gguf_file()) {
            (None, Some(path)) => File::open(path)?,
            (format, _) => made_for_candle(source, format.unwrap_or(Format::F16))?,
        });
        let content = Content::read(&mut file)?;
        let matrices = content.tensor_infos.iter().filter(|(_, t)| t.shape.rank() == 2);
        let read = matrices.filter(|(name, _)| c.tie_word_embeddings || *name != "token_embd.weight");
        let weight_bytes_per_token: usize = read.map(|(_, t)| held_bytes(t)).sum();
        // candle unpacks the embedding to F32, beside a tied head that stays quantised.
        let weight_bytes = weight_bytes_per_token + c.vocab_size * c.hidden_size * size_of::<f32>();
        let model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
        Ok(Self { model, weight_bytes, weight_bytes_per_token })
    }

    /// Logits after a prompt of `n` tokens.
    #[cfg(test)]
    pub(crate) fn logits(&mut self, n: usize) -> Result<Vec<f32>> {
        Ok(self.model.forward(&prompt(n)?, 0)?.flatten_all()?.to_vec1()?)
    }
}

/// Through a file without a name: in memory it would be one more copy of the model while loading.
fn made_for_candle(source: &Source, format: Format) -> Result<File> {
    let mut file = tempfile::tempfile()?;
    gguf(source, format, "for candle")?.write(&mut file)?;
    file.rewind()?;
    Ok(file)
}

/// Bytes that candle holds for a matrix: what is not quantised becomes F32.
fn held_bytes(t: &TensorInfo) -> usize {
    let (elements, dtype) = (t.shape.elem_count(), t.ggml_dtype);
    match dtype {
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => elements * size_of::<f32>(),
        _ => elements / dtype.block_size() * dtype.type_size(),
    }
}

impl Engine for CandleQuantized {
    fn name(&self) -> &'static str {
        "candle"
    }

    /// The cache empties itself at position 0.
    fn prefill(&mut self, n: usize, index_pos: usize) -> Result<()> {
        self.model.forward(&prompt(n)?, index_pos)?;
        Ok(())
    }

    fn fill(&mut self, depth: usize) -> Result<()> {
        self.model.clear_kv_cache();
        // In pieces, as for the other.
        for start in (0..depth).step_by(256) {
            self.prefill(256.min(depth - start), start)?;
        }
        Ok(())
    }

    fn decode(&mut self, index_pos: usize) -> Result<()> {
        let x = Tensor::new(&[[7_u32]], &Device::Cpu)?;
        self.model.forward(&x, index_pos)?;
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn weight_bytes_per_token(&self) -> usize {
        self.weight_bytes_per_token
    }
}
