//! What a checkpoint holds beside what its configuration asks for: used, refused by name, or named in a notice.
//!
//! A tensor that nobody takes makes another model of the same files: a Qwen without its `q_norm` says nothing sensible. A
//! `VarBuilder` cannot list its tensors, so known names are asked for; where they can be listed, [`check_names`] sees all.

use super::Extras;
use crate::Error;
use candle_core::Result;
use candle_nn::VarBuilder;
use candle_sparse_core::Config;

const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
const ATTENTION: [&str; 4] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
const MLP: [&str; 3] = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
const GATE: &str = "mlp.gate_proj.weight";
/// Of a layer of other models.
const FOREIGN: [&str; 8] = [
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.sinks",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.bias",
    "mlp.gate.weight",
];
/// Of other models, beside their layers.
const FOREIGN_ONCE: [&str; 2] = ["model.norm.bias", "lm_head.bias"];
/// What old versions of transformers saved though it follows from the configuration.
const HARMLESS: [&str; 4] = [
    "self_attn.rotary_emb.inv_freq",
    "self_attn.rotary_emb.cos_cached",
    "self_attn.rotary_emb.sin_cached",
    "self_attn.masked_bias",
];
/// The same beside the layers.
const HARMLESS_ONCE: [&str; 2] = ["model.rotary_emb.inv_freq", "model.position_ids"];

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    /// Biases are used wherever there are any.
    pub(super) optional_biases: bool,
    /// FFNs have biases.
    pub(super) mlp_bias: bool,
    pub(super) notices: Vec<String>,
}

impl Inventory {
    /// Asks for what may be there beside what `config` and `extras` ask for.
    pub(super) fn of(vb: &VarBuilder<'_>, config: &Config, extras: Extras) -> Result<Self> {
        // Backends that make tensors, such as zeros, have whatever they are asked for.
        if vb.contains_tensor("candle_sparse.no_such_tensor") {
            return Ok(Self { mlp_bias: extras.mlp_bias, ..Self::default() });
        }
        let layers = config.num_hidden_layers;
        let there = layers_of(vb, layers);
        let found = |names: &[&str], once: &[&str]| -> Vec<String> {
            let each =
                (0..there).flat_map(|i| names.iter().map(move |name| format!("model.layers.{i}.{name}")));
            let once = once.iter().map(|name| (*name).to_string());
            once.chain(each).filter(|name| vb.contains_tensor(name)).collect()
        };
        refuse(&found(&FOREIGN, &FOREIGN_ONCE), layers)?;
        if !config.gated_mlp {
            refuse_gates(&found(&[GATE], &[]))?;
        }
        let next = format!("model.layers.{layers}.{}.weight", NORMS[0]);
        refuse(&[next].into_iter().filter(|name| vb.contains_tensor(name)).collect::<Vec<_>>(), layers)?;
        let mut notices = Vec::new();
        let biases = |of: &[&str]| {
            let names: Vec<_> = of.iter().map(|name| format!("{name}.bias")).collect();
            found(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[])
        };
        let (attention, mlp) = (biases(&ATTENTION), biases(&MLP));
        let unasked = [(&attention, extras.attention_bias), (&mlp, extras.mlp_bias)];
        let unasked: Vec<_> =
            unasked.into_iter().filter(|(_, asked)| !asked).flat_map(|(names, _)| names).collect();
        if let Some(first) = unasked.first() {
            let n = unasked.len();
            notices.push(format!(
                "{n} biases are used that the configuration does not speak of, such as {first}"
            ));
        }
        let left_out = found(&HARMLESS, &HARMLESS_ONCE);
        if let Some(first) = left_out.first() {
            let n = left_out.len();
            notices.push(format!(
                "{n} tensors are not used, since the configuration says the same, such as {first}"
            ));
        }
        if extras.tie_word_embeddings && vb.contains_tensor(HEAD) {
            check_tied(vb, config)?;
            notices.push(format!("{HEAD} is not used: it is the embedding"));
        }
        Ok(Self { optional_biases: true, mlp_bias: extras.mlp_bias || !mlp.is_empty(), notices })
    }
}

/// How many of the layers that are asked for there are, for the number may be absurd.
fn layers_of(vb: &VarBuilder<'_>, asked: usize) -> usize {
    let there = |i: &usize| vb.contains_tensor(&format!("model.layers.{i}.{}.weight", NORMS[0]));
    (0..asked).take_while(there).count()
}

/// Whether the FFN of any of the first `layers` blocks has biases; no tensor is read.
///
/// ```
/// use candle_core::Device;
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/model.safetensors");
/// let vb = candle_sparse::loading::var_builder(&[path], None, &Device::Cpu)?;
/// assert!(!candle_sparse::decoder::has_mlp_bias(&vb, 4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn has_mlp_bias(vb: &VarBuilder<'_>, layers: usize) -> bool {
    let bias = |i: usize, name: &&str| vb.contains_tensor(&format!("model.layers.{i}.{name}.bias"));
    (0..layers_of(vb, layers)).any(|i| MLP.iter().any(|name| bias(i, name)))
}

const HEAD: &str = "lm_head.weight";

/// A head beside an embedding that is said to be the head must be the same; which is meant otherwise nobody can tell.
fn check_tied(vb: &VarBuilder<'_>, c: &Config) -> Result<()> {
    const ROWS: usize = 1024;
    let shape = (c.vocab_size, c.hidden_size);
    let (head, embedding) = (vb.get(shape, HEAD)?, vb.get(shape, "model.embed_tokens.weight")?);
    for start in (0..c.vocab_size).step_by(ROWS) {
        let rows = ROWS.min(c.vocab_size - start);
        let differs = head.narrow(0, start, rows)?.ne(&embedding.narrow(0, start, rows)?)?;
        if differs.flatten_all()?.max(0)?.to_scalar::<u8>()? != 0 {
            return Err(Error::WrongModel {
                what: HEAD,
                problem:
                    "it is not the embedding, though tie_word_embeddings is true: set that to false to use it"
                        .into(),
            }
            .into());
        }
    }
    Ok(())
}

/// Refuses names of tensors that have no place in a llama with so many layers.
///
/// ```
/// use candle_sparse::decoder::check_names;
///
/// let llama = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"];
/// assert!(check_names(llama.into_iter(), 1).is_ok());
/// // Qwen 3 has norms that a Llama would leave out.
/// let error = check_names(["model.layers.0.self_attn.q_norm.weight"].into_iter(), 1).unwrap_err();
/// assert!(error.to_string().contains("q_norm"), "{error}");
/// ```
///
/// # Errors
/// [`Error::WrongModel`], with the names.
pub fn check_names<'a>(names: impl Iterator<Item = &'a str>, layers: usize) -> Result<()> {
    let mut unknown: Vec<_> = names.filter(|name| !is_known(name, layers)).map(String::from).collect();
    unknown.sort();
    refuse(&unknown, layers)
}

fn is_known(name: &str, layers: usize) -> bool {
    let whole = ["model.embed_tokens.weight", "model.norm.weight", HEAD];
    if whole.contains(&name) || HARMLESS_ONCE.contains(&name) || name.starts_with("model.sparse.") {
        return true;
    }
    let of_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = of_layer else { return false };
    let in_layer = layer.parse::<usize>().is_ok_and(|n| n < layers && n.to_string() == layer);
    let (base, kind) = part.rsplit_once('.').unwrap_or_default();
    let projection = ATTENTION.contains(&base) || MLP.contains(&base);
    let ours = part.starts_with("mlp.predictor.") || part.starts_with("self_attn.gate.");
    in_layer
        && match kind {
            "weight" if projection || NORMS.contains(&base) => true,
            "bias" if projection => true,
            _ => ours || HARMLESS.contains(&part),
        }
}

fn refuse(names: &[String], layers: usize) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let shown = names[..names.len().min(3)].join(", ");
    let more = if names.len() > 3 { format!(" and {} more", names.len() - 3) } else { String::new() };
    let problem = format!(
        "a llama of {layers} layers (num_hidden_layers) has no place for {shown}{more}: it would run as another model here"
    );
    Err(Error::WrongModel { what: "the checkpoint", problem }.into())
}

/// A gate that the configuration does not know would be left out without a word.
fn refuse_gates(found: &[String]) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    let problem = format!(
        "it has {first}, but its FFN has no gate by the configuration (model_type or architecture arcee): take the \
         configuration that belongs to these weights"
    );
    Err(Error::WrongModel { what: "the checkpoint", problem }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_llama_knows() {
        for name in [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.layers.1.self_attn.q_proj.bias",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.mlp.predictor.gate.hot",
            "model.layers.1.self_attn.gate.ridge",
            "model.sparse.shares",
        ] {
            assert!(is_known(name, 2), "{name}");
        }
        for name in [
            "model.layers.2.mlp.down_proj.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.input_layernorm.bias",
            "model.layers.0.self_attn.q_proj.scales",
            "model.layers.-1.mlp.up_proj.weight",
            "model.layers.0",
            "lm_head.bias",
            "layers.0.mlp.up_proj.weight",
            "",
        ] {
            assert!(!is_known(name, 2), "{name}");
        }
        let e = check_names(["b", "a", "c", "d", "model.norm.weight"].into_iter(), 2).unwrap_err();
        assert!(matches!(Error::of(&e), Some(Error::WrongModel { .. })));
        assert!(e.to_string().contains("a, b, c and 1 more"), "{e}");
    }
}
