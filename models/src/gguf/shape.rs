//! What the metadata of a GGUF file says about the model.

use super::tokenizer::{self, metadata::integer};
use crate::{
    llama::{Config, Llama3RopeConfig, Llama3RopeType, LlamaEosToks, YarnRope, activation},
    message::first_line,
};
use candle_core::{
    Error, Result, bail,
    quantized::gguf_file::{Content, Value},
};
use candle_sparse_core::Activation;

/// `general.architecture` of the files that are read.
pub(crate) const ARCHITECTURES: [&str; 3] = [LLAMA, OWN, ARCEE];
pub(crate) const LLAMA: &str = "llama";
/// What `convert` writes where others must not guess.
pub(crate) const OWN: &str = "candle_sparse_llama";
/// A Llama whose FFN has no gate, with `relu2`.
pub(crate) const ARCEE: &str = "arcee";

/// The context of files that do not say, as in candle.
const DEFAULT_CONTEXT: usize = 4096;
/// That of files that do not say, as in llama.cpp.
const DEFAULT_ROPE_BASE: f64 = 10_000.0;

struct Metadata<'a> {
    content: &'a Content,
    architecture: &'a str,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<(String, &Value)> {
        let key = format!("{}.{key}", self.architecture);
        self.content.metadata.get(&key).map(|v| (key, v))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some((key, value)) = self.get(key) else { return Ok(None) };
        match integer(value).and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => bail!("{key} is no size, or differs from layer to layer"),
        }
    }

    fn needed(&self, key: &str) -> Result<usize> {
        match self.size(key)? {
            Some(n) => Ok(n),
            None => bail!("metadata {}.{key} is missing", self.architecture),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some((_, Value::F32(x))) => Ok(Some(f64::from(*x))),
            Some((_, Value::F64(x))) => Ok(Some(*x)),
            Some((key, _)) => bail!("{key} is no number"),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some((_, Value::String(s))) => Ok(Some(s)),
            Some((key, _)) => bail!("{key} is no text"),
        }
    }

    /// That of files which `convert` writes; all others have what their architecture has.
    fn hidden_act(&self) -> Result<Activation> {
        let of_architecture = if self.architecture == ARCEE { Activation::Relu2 } else { Activation::Silu };
        let Some(name) = self.text("hidden_act")? else { return Ok(of_architecture) };
        activation(name, self.number("hidden_act_param")?.map(|x| x as f32)).map_err(Error::Msg)
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some((_, Value::Bool(flag))) => Ok(*flag),
            Some((key, _)) => bail!("{key} is neither true nor false"),
        }
    }

    /// As llama.cpp reads it: `attn_factor` is on top of what follows from the factor.
    fn yarn(&self, factor: f32) -> Result<Llama3RopeConfig> {
        let number =
            |key: &str| Ok::<_, Error>(self.number(&format!("rope.scaling.{key}"))?.map(|x| x as f32));
        if let Some(other) = number("yarn_ext_factor")?.filter(|x| *x != 1.0 && *x >= 0.0) {
            bail!("rope.scaling.yarn_ext_factor {other} is not supported, only 1");
        }
        let all = number("yarn_log_multiplier")?.filter(|x| *x != 0.0);
        let inferred = YarnRope::mscale(factor, 1.0) / all.map_or(1.0, |all| YarnRope::mscale(factor, all));
        let on_top = number("attn_factor")?.or(number("yarn_attn_factor")?).unwrap_or(1.0);
        let [fast, slow] = YarnRope::BETA;
        let original = self.size("rope.scaling.original_context_length")?;
        let original = original.or(self.size("context_length")?).unwrap_or(DEFAULT_CONTEXT);
        let yarn = YarnRope {
            beta_fast: number("yarn_beta_fast")?.unwrap_or(fast),
            beta_slow: number("yarn_beta_slow")?.unwrap_or(slow),
            attention_factor: inferred * on_top,
            truncate: self.flag("rope.scaling.yarn_truncate", true)?,
        };
        Ok(Llama3RopeConfig {
            factor,
            original_max_position_embeddings: original,
            rope_type: Llama3RopeType::Yarn(yarn),
            ..Default::default()
        })
    }

    fn rope_scaling(&self) -> Result<Option<Llama3RopeConfig>> {
        let factor = self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?);
        match (self.text("rope.scaling.type")?, factor) {
            (None | Some("none"), None) | (Some("none"), _) => Ok(None),
            (None | Some("linear"), Some(factor)) => Ok(Some(Llama3RopeConfig {
                factor: factor as f32,
                rope_type: Llama3RopeType::Linear,
                ..Default::default()
            })),
            (Some("yarn"), Some(factor)) => self.yarn(factor as f32).map(Some),
            (Some(kind @ ("linear" | "yarn")), None) => {
                bail!("rope scaling is {kind}, but {} is missing", "rope.scaling.factor")
            }
            (Some(other), _) => bail!("rope scaling '{other}' is not supported: none, linear and yarn are"),
        }
    }
}

fn architecture(content: &Content) -> Result<&str> {
    match content.metadata.get("general.architecture") {
        Some(Value::String(name)) if ARCHITECTURES.contains(&name.as_str()) => Ok(name),
        Some(Value::String(name)) => bail!(
            "general.architecture '{name}' is not supported: {LLAMA} is (Llama, Mistral, and what has their shape), and {ARCEE}"
        ),
        _ => bail!("metadata general.architecture is missing: is this a language model?"),
    }
}

/// The configuration of the model in a GGUF file.
///
/// The context is the file's, where candle stops at 4096 positions.
///
/// ```
/// use candle_sparse_models::gguf::{self, GgufFile};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// let config = gguf::config(GgufFile::open(&path)?.content())?;
/// assert_eq!((config.hidden_size, config.vocab_size, config.max_position_embeddings), (256, 2048, 1024));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// An architecture that is not supported, a mixture of experts, or metadata that are missing or make no sense; named.
pub fn config(content: &Content) -> Result<Config> {
    // Names in the file stand in the messages.
    read(content).map_err(|e| Error::Msg(first_line(&e)))
}

fn read(content: &Content) -> Result<Config> {
    let m = Metadata { content, architecture: architecture(content)? };
    if let Some(n) = m.size("expert_count")?.filter(|n| *n > 0) {
        bail!("the model is a mixture of {n} experts, which is not supported");
    }
    let hidden_size = m.needed("embedding_length")?;
    let heads = m.needed("attention.head_count")?;
    let Some(eps) = m.number("attention.layer_norm_rms_epsilon")? else {
        bail!("metadata {}.attention.layer_norm_rms_epsilon is missing", m.architecture)
    };
    let vocab = content.tensor_infos.get("token_embd.weight").map(|t| t.shape.dims().to_vec());
    let Some(&[vocab_size, _]) = vocab.as_deref() else {
        bail!("tensor token_embd.weight is missing, or no matrix")
    };
    let head_dim = match m.size("attention.key_length")? {
        Some(n) => n,
        None => hidden_size.checked_div(heads).unwrap_or(0),
    };
    if let Some(n) = m.size("attention.value_length")?.filter(|n| *n != head_dim) {
        bail!("keys have {head_dim} channels, values {n}: that is not supported");
    }
    if let Some(n) = m.size("rope.dimension_count")?.filter(|n| *n != head_dim) {
        bail!("RoPE turns {n} of {head_dim} channels: that is not supported");
    }
    let token = |key: &str| content.metadata.get(key).and_then(|v| v.to_u32().ok());
    Ok(Config {
        hidden_size,
        intermediate_size: m.needed("feed_forward_length")?,
        vocab_size,
        num_hidden_layers: m.needed("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: m.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim: Some(head_dim),
        use_flash_attn: false,
        rms_norm_eps: eps,
        rope_theta: m.number("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE) as f32,
        bos_token_id: token("tokenizer.ggml.bos_token_id"),
        eos_token_id: Some(tokenizer::eos_tokens(content))
            .filter(|e| !e.is_empty())
            .map(LlamaEosToks::Multiple),
        rope_scaling: m.rope_scaling()?,
        max_position_embeddings: m.size("context_length")?.unwrap_or(DEFAULT_CONTEXT),
        tie_word_embeddings: !content.tensor_infos.contains_key("output.weight"),
        hidden_act: m.hidden_act()?,
        gated_mlp: m.flag("gated_mlp", m.architecture != ARCEE)?,
        attention_bias: content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        mlp_bias: ["gate", "up"]
            .iter()
            .any(|m| content.tensor_infos.contains_key(&format!("blk.0.ffn_{m}.bias"))),
        gate_shift: m.number("gate_shift")?.unwrap_or(0.0) as f32,
        norm_shift: m.number("norm_shift")?.map(|x| x as f32),
        sliding_window: m.size("attention.sliding_window")?.filter(|w| *w > 0),
    })
}

/// What [`config`] takes for granted where a wrong guess would change what the model says without an error.
pub(crate) fn notices(content: &Content) -> Vec<String> {
    let Ok(architecture) = architecture(content) else { return Vec::new() };
    let m = Metadata { content, architecture };
    let context = || format!("a context of {DEFAULT_CONTEXT} tokens is taken");
    let base =
        || format!("rotary frequencies of base {DEFAULT_ROPE_BASE} are taken, as Llama 1 and 2 have them");
    let defaults = [("context_length", context()), ("rope.freq_base", base())];
    let missing = defaults.into_iter().filter(|(key, _)| m.get(key).is_none());
    missing.map(|(key, taken)| format!("GGUF metadata: `{architecture}.{key}` is missing: {taken}")).collect()
}

/// Parts of a layer, in GGUF's words and ours.
pub(crate) const LAYER_NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_up_down", "mlp.up_down_proj"),
    ("ffn_down_rows", "mlp.down_rows"),
];

/// The Hugging Face name of a tensor of a llama with so many layers; `None`: it is none.
pub(super) fn hugging_face_name(gguf: &str, layers: usize) -> Option<String> {
    Some(match gguf {
        "token_embd.weight" => "model.embed_tokens.weight".to_string(),
        "output_norm.weight" => "model.norm.weight".to_string(),
        "output.weight" => "lm_head.weight".to_string(),
        _ => {
            let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
            let (part, kind) = rest.split_once('.')?;
            let (_, name) = LAYER_NAMES.iter().find(|(gguf, _)| *gguf == part)?;
            let n: usize = layer.parse().ok().filter(|n| *n < layers)?;
            if kind != "weight" && !(kind == "bias" && name.ends_with("_proj")) {
                return None;
            }
            format!("model.layers.{n}.{name}.{kind}")
        }
    })
}
