//! The weights of a Llama-shaped model, borrowed from where they lie: a file in memory, or flash.

use crate::{
    config::Config,
    error::Error,
    ffn::{FfnPlan, SparseFfn},
    format::ActivationGroup,
    kernel::{
        KernelSet,
        fast_grnn::{CellMatrix, Int8Rows, Salience},
        vector,
    },
    matrix::Matrix,
    scratch::Forms,
};

/// A matrix `[out, in]` and what is added to its product.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out, in]`
    pub weight: Matrix<'a>,
    /// `[out]`
    pub bias: Option<&'a [f32]>,
}

impl<'a> From<Matrix<'a>> for Projection<'a> {
    fn from(weight: Matrix<'a>) -> Self {
        Self { weight, bias: None }
    }
}

impl Projection<'_> {
    /// `y = W·x + b`
    pub(crate) fn product<K: KernelSet>(
        &self,
        kernels: &K,
        x: &[f32],
        groups: &mut [ActivationGroup],
        y: &mut [f32],
    ) {
        let forms = Forms::new(kernels, [self.weight.format()].into_iter(), x, groups);
        self.product_of(kernels, &forms, y);
    }

    /// The same of a column that several projections read.
    pub(crate) fn product_of<K: KernelSet>(&self, kernels: &K, x: &Forms<'_>, y: &mut [f32]) {
        kernels.matmul(self.weight, x.of(self.weight.format()), &mut [&mut *y]);
        if let Some(bias) = self.bias {
            vector::axpy(1.0, bias, y);
        }
    }
}

/// An FFN in the order of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct DenseFfn<'a> {
    /// `[intermediate_size, hidden_size]`; `None` for an FFN without a gate.
    pub gate_proj: Option<Projection<'a>>,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Projection<'a>,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Projection<'a>,
}

/// The FFN of one block.
#[derive(Clone, Copy, Debug)]
pub enum Ffn<'a> {
    /// In the order of a checkpoint.
    Dense(DenseFfn<'a>),
    /// Neuron by neuron: all of them without a plan. Any `intermediate_size` quantises so.
    Sparse(SparseFfn<'a>, Option<FfnPlan<'a>>),
}

/// A matrix of an attention gate.
#[derive(Clone, Copy, Debug)]
pub enum GateMatrix<'a> {
    /// Floats.
    Float(Matrix<'a>),
    /// Bytes, each row with a scale.
    Int8(Int8Rows<'a>),
}

impl CellMatrix for GateMatrix<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Float(m) => m.shape(),
            Self::Int8(m) => m.shape(),
        }
    }

    fn product(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Float(m) => m.product(x, y),
            Self::Int8(m) => m.product(x, y),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Float(m) => m.bytes(),
            Self::Int8(m) => m.bytes(),
        }
    }
}

/// The gate of one block's attention: how much later tokens will want a token.
pub type AttentionGate<'a> = Salience<GateMatrix<'a>, &'a [f32]>;

/// Weights of one decoder block; shapes as in Hugging Face checkpoints, `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    /// `[hidden_size]`
    pub input_layernorm: &'a [f32],
    /// `[q_dim, hidden_size]`
    pub q_proj: Projection<'a>,
    /// `[kv_dim, hidden_size]`
    pub k_proj: Projection<'a>,
    /// `[kv_dim, hidden_size]`
    pub v_proj: Projection<'a>,
    /// `[hidden_size, q_dim]`
    pub o_proj: Projection<'a>,
    /// `[hidden_size]`
    pub post_attention_layernorm: &'a [f32],
    /// `[kv_heads, hidden_size]`; needed for [`AttentionMode::Gated`](crate::attention::AttentionMode::Gated) only.
    pub gate: Option<AttentionGate<'a>>,
    /// `[kv_heads]`: how many times the budget of [`AttentionMode::Recall`](crate::attention::AttentionMode::Recall) each head has,
    /// at least 0, 1 in the mean over all layers; where there are none every head has the budget itself.
    pub recall_shares: Option<&'a [f32]>,
    /// The FFN.
    pub ffn: Ffn<'a>,
}

/// A whole model; with a tied head `lm_head` is `embed_tokens` again.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: Matrix<'a>,
    /// One per block.
    pub layers: &'a [LayerWeights<'a>],
    /// `[hidden_size]`
    pub norm: &'a [f32],
    /// `[vocab_size, hidden_size]`
    pub lm_head: Matrix<'a>,
}

impl Weights<'_> {
    /// Checks every shape against `config`.
    ///
    /// # Errors
    /// The first tensor whose shape differs, or a bad `config`.
    pub fn validate(&self, c: &Config) -> Result<(), Error> {
        c.validate()?;
        let (expected, got) = (c.num_hidden_layers, self.layers.len());
        if expected != got {
            return Err(Error::Length { what: "layers", expected, got });
        }
        check_matrix("embed_tokens", None, self.embed_tokens, [c.vocab_size, c.hidden_size])?;
        check_matrix("lm_head", None, self.lm_head, [c.vocab_size, c.hidden_size])?;
        check_vector("norm", None, self.norm, c.hidden_size)?;
        self.layers.iter().enumerate().try_for_each(|(i, l)| l.validate(i, c))
    }
}

impl LayerWeights<'_> {
    fn validate(&self, i: usize, c: &Config) -> Result<(), Error> {
        let (hidden, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim());
        check_vector("input_layernorm", Some(i), self.input_layernorm, hidden)?;
        check_vector("post_attention_layernorm", Some(i), self.post_attention_layernorm, hidden)?;
        check_projection("q_proj", i, &self.q_proj, [q, hidden])?;
        check_projection("k_proj", i, &self.k_proj, [kv, hidden])?;
        check_projection("v_proj", i, &self.v_proj, [kv, hidden])?;
        check_projection("o_proj", i, &self.o_proj, [hidden, q])?;
        if let Some(gate) = &self.gate {
            gate.check()?;
            let (expected, got) = ([c.num_key_value_heads, hidden], gate.ridge.shape());
            if got != expected {
                return Err(Error::Shape { what: "gate.ridge", layer: Some(i), expected, got });
            }
        }
        if let Some(shares) = self.recall_shares {
            check_vector("recall_shares", Some(i), shares, c.num_key_value_heads)?;
            check_shares(shares)?;
        }
        match &self.ffn {
            Ffn::Dense(ffn) => {
                check_gate(i, c, ffn.gate_proj.is_some())?;
                if let Some(gate_proj) = &ffn.gate_proj {
                    check_projection("gate_proj", i, gate_proj, [inner, hidden])?;
                }
                check_projection("up_proj", i, &ffn.up_proj, [inner, hidden])?;
                check_projection("down_proj", i, &ffn.down_proj, [hidden, inner])
            }
            Ffn::Sparse(ffn, plan) => {
                ffn.validate(i, [inner, hidden], c.gated_mlp)?;
                plan.as_ref().map_or(Ok(()), |plan| ffn.validate_plan(plan, c.hidden_act))
            }
        }
    }
}

/// Checks that budgets of heads can be made of these [shares](LayerWeights::recall_shares).
///
/// ```
/// use candle_sparse_core::weights::check_shares;
///
/// assert!(check_shares(&[0.0, 2.5, 0.5]).is_ok());
/// assert!(check_shares(&[1.0, -0.5]).is_err());
/// ```
///
/// # Errors
/// One is negative or not finite.
pub fn check_shares(shares: &[f32]) -> Result<(), Error> {
    let usable = |share: &f32| share.is_finite() && *share >= 0.0;
    shares.iter().all(usable).then_some(()).ok_or(Error::OutOfRange("recall_shares"))
}

/// A gate that is missing, or that nobody would take.
fn check_gate(layer: usize, c: &Config, there: bool) -> Result<(), Error> {
    let [expected, got] =
        [c.gated_mlp, there].map(|gated| [if gated { c.intermediate_size } else { 0 }, c.hidden_size]);
    (expected == got).then_some(()).ok_or(Error::Shape {
        what: "gate_proj",
        layer: Some(layer),
        expected,
        got,
    })
}

fn check_matrix(
    what: &'static str,
    layer: Option<usize>,
    m: Matrix<'_>,
    expected: [usize; 2],
) -> Result<(), Error> {
    let got = [m.rows(), m.cols()];
    (expected == got).then_some(()).ok_or(Error::Shape { what, layer, expected, got })
}

fn check_vector(what: &'static str, layer: Option<usize>, v: &[f32], len: usize) -> Result<(), Error> {
    let (expected, got) = ([1, len], [1, v.len()]);
    (expected == got).then_some(()).ok_or(Error::Shape { what, layer, expected, got })
}

fn check_projection(
    what: &'static str,
    layer: usize,
    p: &Projection<'_>,
    shape: [usize; 2],
) -> Result<(), Error> {
    check_matrix(what, Some(layer), p.weight, shape)?;
    // A bias is reported by the name of what it belongs to.
    p.bias.map_or(Ok(()), |bias| check_vector(what, Some(layer), bias, shape[0]))
}
