//! The measured model as GGUF, which llama.cpp and candle's quantised llama open.

use super::engines::Source;
use anyhow::{Context, Result, bail};
use candle_core::{
    DType, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use candle_nn::VarBuilder;
use candle_sparse::core::Format;
use candle_sparse_models::llama::Config;
use std::{
    io::{BufWriter, Seek, Write},
    path::Path,
};

/// Projections of a layer: GGUF's name, ours, and whether RoPE turns the outcome.
const PROJECTIONS: [(&str, &str, bool); 7] = [
    ("attn_q", "self_attn.q_proj", true),
    ("attn_k", "self_attn.k_proj", true),
    ("attn_v", "self_attn.v_proj", false),
    ("attn_output", "self_attn.o_proj", false),
    ("ffn_gate", "mlp.gate_proj", false),
    ("ffn_up", "mlp.up_proj", false),
    ("ffn_down", "mlp.down_proj", false),
];

/// Matrices in one ggml type, norms in F32, no tokenizer.
pub(crate) struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
    dtype: GgmlDType,
}

impl Gguf {
    /// Takes the tensors that our engine loads, one at a time, so that no more than one is held in its first width.
    pub(crate) fn new(source: &Source, format: Format, name: &str) -> Result<Self> {
        let (config, vb) = (source.config()?, source.var_builder()?);
        let (dtype, file_type) = ggml_type(format)?;
        let mut gguf = Self { metadata: metadata(&config, name, file_type), tensors: Vec::new(), dtype };
        let table = (config.vocab_size, config.hidden_size);
        gguf.matrix("token_embd", vb.pp("model.embed_tokens").get(table, "weight")?)?;
        if !config.tie_word_embeddings {
            gguf.matrix("output", vb.pp("lm_head").get(table, "weight")?)?;
        }
        for i in 0..config.num_hidden_layers {
            gguf.layer(&config, &format!("blk.{i}"), &vb.pp(format!("model.layers.{i}")))?;
        }
        gguf.norm("output_norm", &vb.pp("model.norm"), config.hidden_size)?;
        Ok(gguf)
    }

    fn layer(&mut self, config: &Config, to: &str, from: &VarBuilder<'_>) -> Result<()> {
        for (name, ours, turned) in PROJECTIONS {
            let (rows, cols, heads) = shape(config, name);
            let t = from.pp(ours).get((rows, cols), "weight")?;
            self.matrix(&format!("{to}.{name}"), if turned { neighbours(&t, heads)? } else { t })?;
        }
        self.norm(&format!("{to}.attn_norm"), &from.pp("input_layernorm"), config.hidden_size)?;
        self.norm(&format!("{to}.ffn_norm"), &from.pp("post_attention_layernorm"), config.hidden_size)
    }

    /// As in our engine, rows that are no whole number of blocks keep their dtype.
    fn matrix(&mut self, name: &str, t: Tensor) -> Result<()> {
        let fits = t.dim(1)?.is_multiple_of(self.dtype.block_size());
        let dtype = match t.dtype() {
            _ if fits => self.dtype,
            DType::F32 => GgmlDType::F32,
            DType::BF16 => GgmlDType::BF16,
            _ => GgmlDType::F16,
        };
        self.tensors.push((format!("{name}.weight"), QTensor::quantize(&t, dtype)?));
        Ok(())
    }

    fn norm(&mut self, name: &str, from: &VarBuilder<'_>, n: usize) -> Result<()> {
        let t = QTensor::quantize(&from.get(n, "weight")?, GgmlDType::F32)?;
        self.tensors.push((format!("{name}.weight"), t));
        Ok(())
    }

    /// The matrices by name.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = (&str, &QTensor)> {
        self.tensors.iter().filter(|(_, t)| t.rank() == 2).map(|(name, t)| (name.as_str(), t))
    }

    /// Writes the file.
    pub(crate) fn write(&self, out: impl Write + Seek) -> Result<()> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        let mut out = BufWriter::new(out);
        gguf_file::write(&mut out, &metadata, &tensors)?;
        Ok(out.flush()?)
    }

    /// Writes the file beside its place first, so that a run that fails leaves no half of it.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let written = || {
            let mut file = tempfile::Builder::new().suffix(".tmp").tempfile_in(folder)?;
            self.write(file.as_file_mut())?;
            Ok::<_, anyhow::Error>(file.persist(path)?)
        };
        written().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(())
    }
}

/// Rows, columns and heads of a projection.
fn shape(config: &Config, name: &str) -> (usize, usize, usize) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let head_dim = config.head_dim.unwrap_or(hidden / heads);
    match name {
        "attn_q" => (heads * head_dim, hidden, heads),
        "attn_k" | "attn_v" => (kv_heads * head_dim, hidden, kv_heads),
        "attn_output" => (hidden, heads * head_dim, heads),
        "ffn_down" => (hidden, inner, 1),
        _ => (inner, hidden, 1),
    }
}

/// Hugging Face turns row `i` of a head with row `i + head_dim / 2`, GGUF's llama with its neighbour.
fn neighbours(t: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, cols) = t.dims2()?;
    Ok(t.reshape((heads, 2, rows / heads / 2, cols))?.transpose(1, 2)?.contiguous()?.reshape((rows, cols))?)
}

/// ggml's type of a format, by name so that a new format needs no change here, and llama.cpp's number for files of it.
fn ggml_type(format: Format) -> Result<(GgmlDType, u32)> {
    Ok(match format.name() {
        "f32" => (GgmlDType::F32, 0),
        "f16" => (GgmlDType::F16, 1),
        "bf16" => (GgmlDType::BF16, 32),
        "q4_0" => (GgmlDType::Q4_0, 2),
        "q4_1" => (GgmlDType::Q4_1, 3),
        "q5_0" => (GgmlDType::Q5_0, 8),
        "q5_1" => (GgmlDType::Q5_1, 9),
        "q8_0" => (GgmlDType::Q8_0, 7),
        "q2_k" => (GgmlDType::Q2K, 10),
        "q3_k" => (GgmlDType::Q3K, 11),
        "q4_k" => (GgmlDType::Q4K, 14),
        "q5_k" => (GgmlDType::Q5K, 16),
        "q6_k" => (GgmlDType::Q6K, 18),
        other => bail!("GGUF as candle writes it has no {other}"),
    })
}

fn metadata(config: &Config, name: &str, file_type: u32) -> Vec<(String, Value)> {
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads);
    let text = |s: &str| Value::String(s.to_string());
    let count = |n: usize| Value::U32(n as u32);
    [
        ("general.architecture", text("llama")),
        ("general.name", text(name)),
        ("general.file_type", Value::U32(file_type)),
        ("llama.vocab_size", count(config.vocab_size)),
        ("llama.context_length", count(config.max_position_embeddings)),
        ("llama.embedding_length", count(config.hidden_size)),
        ("llama.block_count", count(config.num_hidden_layers)),
        ("llama.feed_forward_length", count(config.intermediate_size)),
        ("llama.attention.head_count", count(config.num_attention_heads)),
        ("llama.attention.head_count_kv", count(config.num_key_value_heads)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("llama.rope.dimension_count", count(head_dim)),
        ("llama.rope.freq_base", Value::F32(config.rope_theta)),
        // What llama.cpp calls a model that is given token ids alone.
        ("tokenizer.ggml.model", text("no_vocab")),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use super::super::engines::{CandleQuantized, Ours};
    use super::*;
    use candle_core::Device;
    use candle_sparse::{Threads, Weight};
    use gguf_file::Content;

    fn source(format: Format, tied: bool) -> Source {
        // 288 is a multiple of 32 and not of 256.
        let config = serde_json::json!({
            "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64
        });
        Source::random(config.to_string(), format)
    }

    #[test]
    fn the_file_holds_what_our_engine_holds() {
        let dir = tempfile::tempdir().unwrap();
        for (format, tied) in Format::ALL.into_iter().flat_map(|f| [(f, false), (f, true)]) {
            let (source, path) = (source(format, tied), dir.path().join("m.gguf"));
            Gguf::new(&source, format, "m").unwrap().save(&path).unwrap();
            let mut file = std::fs::File::open(&path).unwrap();
            let content = Content::read(&mut file).unwrap();
            assert_eq!(content.tensor_infos.len(), 2 * 9 + if tied { 2 } else { 3 });
            assert_eq!(content.metadata["llama.attention.head_count_kv"].to_u32().unwrap(), 2);
            assert_eq!(content.tensor_infos["output_norm.weight"].ggml_dtype, GgmlDType::F32);
            let vb = source.var_builder().unwrap();
            for (name, rows, cols) in [("ffn_down", 256, 288), ("attn_v", 128, 256)] {
                let t = content.tensor(&mut file, &format!("blk.1.{name}.weight"), &Device::Cpu).unwrap();
                let ours = Weight::from_tensor(&vb.get((rows, cols), name).unwrap(), format).unwrap();
                assert_eq!(t.dtype(), ggml_type(ours.format()).unwrap().0, "{name} {format:?}");
                let theirs: Vec<Vec<f32>> = t.dequantize(&Device::Cpu).unwrap().to_vec2().unwrap();
                let mut row = vec![0.0; cols];
                for (i, theirs) in theirs.iter().enumerate() {
                    ours.matrix().dequantize_row(i, &mut row);
                    assert_eq!(&row, theirs, "{name} {format:?} row {i}");
                }
            }
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a temporary file stayed");
    }

    #[test]
    fn candle_says_the_same_with_the_file() {
        for (format, tied, tolerance) in
            [(Format::F32, true, 1e-4), (Format::F32, false, 1e-4), (Format::Q8_0, true, 0.02)]
        {
            let source = source(format, tied);
            let mut ours = Ours::load(&source, format, Threads::default(), None, 12).unwrap();
            let mut theirs = CandleQuantized::load(&source, format, Threads::default(), 12).unwrap();
            let (a, b) = (ours.logits(12).unwrap(), theirs.logits(12).unwrap());
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let size = a.iter().fold(0.0_f32, |m, a| m.max(a.abs()));
            assert!(worst < tolerance * size, "{format:?} tied {tied}: {worst} of {size}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let gguf = Gguf::new(&source(Format::Q4_0, true), Format::Q4_0, "m").unwrap();
        let err = format!("{:#}", gguf.save(Path::new("/no/such/folder/m.gguf")).unwrap_err());
        assert!(err.contains("/no/such/folder/m.gguf"), "{err}");
    }
}
