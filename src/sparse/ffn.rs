//! The weights of one FFN, held so that a neuron can be left out.

use crate::{
    profile::{LayerProfile, LayerRule},
    weight::{Part, Weight},
};
use candle_core::{Result, bail};
pub(crate) use candle_sparse_core::ffn::PANEL;
use candle_sparse_core::{Format, Matrix, Neurons, ffn};
use std::sync::Arc;

/// One FFN: gates apart, up and down row of a neuron side by side; neurons in the order of the profile, if there is one.
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct SparseFfn {
    /// `[intermediate_size, hidden_size]`; without a gate the rows of `up_proj`, which decide as gates do.
    pub gate: Weight,
    /// `[2 · intermediate_size, hidden_size]`: up row, then column of `down_proj`, neuron by neuron; without a gate
    /// `[intermediate_size, hidden_size]`, the columns alone.
    pub up_down: Weight,
    /// `None`: there is no profile, or it has rank 0.
    pub predictor: Option<Predictor>,
    pub(super) learned: Arc<Learned>,
}

/// `ĝ = Q_g·P·x`, `û = Q_u·P·x`.
///
/// The rows of Q are short: as rows they would cost more in sums across a vector than in multiply-adds. So Q is held
/// transposed, in panels of [`PANEL`] neurons: row `i · rank + k` is column k of panel i.
#[derive(Clone, Debug)]
pub(crate) struct Predictor {
    /// `[rank, hidden_size]`
    pub p: Weight,
    /// `[panels · rank, PANEL]`
    pub q_gate: Weight,
    /// `[panels · rank, PANEL]`
    pub q_up: Weight,
}

/// What is kept of a [`LayerProfile`] beside the matrices.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Standard deviation of a gate from its prediction.
    pub(super) gate_deviation: Vec<f32>,
    pub(super) up_variance: Vec<f32>,
    pub(super) up_square: Vec<f32>,
    /// Squared.
    pub(super) importance: Vec<f32>,
    pub(super) rules: [LayerRule; 3],
}

impl SparseFfn {
    /// Whether a product rounds the input to 8 bits.
    pub(crate) fn rounds_input(&self) -> bool {
        let p = self.predictor.as_ref().map(|p| p.p.format());
        self.gate.format().is_quantized() || p.is_some_and(Format::is_quantized)
    }

    /// The FFN `[intermediate_size, hidden_size]` of a checked `profile`, or in its own order; `tensor` gives `gate_proj` of
    /// one that is `gated`, `up_proj` `[intermediate_size, hidden_size]` and `down_proj` `[hidden_size, intermediate_size]` by
    /// name, one at a time.
    ///
    /// All are quantised along `hidden_size`, so that a neuron's rows are whole blocks.
    ///
    /// # Errors
    /// A tensor fails to load or has another shape or dtype.
    pub(crate) fn load<P: Into<Part>>(
        format: Format,
        [inner, hidden_size]: [usize; 2],
        gated: bool,
        profile: Option<&LayerProfile>,
        mut tensor: impl FnMut(&str) -> Result<P>,
    ) -> Result<Self> {
        let own = || (0..inner as u32).collect();
        let order: &[u32] = &profile.map_or_else(own, |p| p.order.clone());
        let mut tensor = |name: &str| tensor(name).map(Into::into);
        let (first, parts) = if gated { ("gate_proj", 2) } else { ("up_proj", 1) };
        let up_down = Weight::interleaved(format, hidden_size, parts, order, |part| {
            if part + 1 < parts { tensor("up_proj") } else { transposed(tensor("down_proj")?) }
        })?;
        let gate = Weight::interleaved(format, hidden_size, 1, order, |_| tensor(first))?;
        Self::new(gate, up_down, profile)
    }

    /// The FFN of weights that stand in the order of a checked `profile` already: `gate` `[intermediate_size, hidden_size]` and
    /// `up_down`, as [`Self::gate`] and [`Self::up_down`] are.
    ///
    /// # Errors
    /// Their shapes are others, or their formats differ.
    pub(crate) fn new(gate: Weight, up_down: Weight, profile: Option<&LayerProfile>) -> Result<Self> {
        let (inner, hidden, format) = (gate.rows(), gate.cols(), gate.format());
        let shapes = [[inner, hidden], [up_down.rows(), up_down.cols()]];
        let neurons = profile.map_or(inner, |p| p.order.len());
        let fits = shapes[1] == [2 * inner, hidden] || shapes[1] == shapes[0];
        if !fits || neurons != inner || up_down.format() != format {
            bail!(
                "sparse FFN: gate {:?} in {} and up with down {:?} in {} do not belong together",
                shapes[0],
                format.name(),
                shapes[1],
                up_down.format().name()
            );
        }
        let Some(profile) = profile else {
            // Of the guard's recall all neurons are worth the same.
            let learned = Learned { importance: vec![1.0; inner], ..Learned::default() };
            return Ok(Self { gate, up_down, predictor: None, learned: Arc::new(learned) });
        };
        let learned = Learned {
            gate_deviation: profile.gate_variance.iter().map(|v| v.sqrt()).collect(),
            up_variance: profile.up_variance.clone(),
            up_square: profile.up_square.clone(),
            importance: profile.importance.iter().map(|n| n * n).collect(),
            rules: profile.rules.clone(),
        };
        let predictor = profile.prediction(format, hidden)?;
        let predictor = predictor.map(|[p, q_gate, q_up]| Predictor { p, q_gate, q_up });
        Ok(Self { gate, up_down, predictor, learned: Arc::new(learned) })
    }

    /// The same as the rule that chooses sees it.
    pub(crate) fn view(&self) -> ffn::SparseFfn<'_> {
        let l = &self.learned;
        ffn::SparseFfn {
            gate: self.gate.matrix(),
            up_down: self.up_down.matrix(),
            predictor: self.predictor.as_ref().map(|p| ffn::Predictor {
                p: p.p.matrix(),
                q_gate: p.q_gate.matrix(),
                q_up: p.q_up.matrix(),
            }),
            learned: ffn::Learned {
                gate_deviation: &l.gate_deviation,
                up_variance: &l.up_variance,
                up_square: &l.up_square,
                importance_squared: &l.importance,
            },
        }
    }

    /// What is read of an active neuron, beside its gate.
    #[must_use]
    pub(crate) fn neurons(&self) -> Neurons<'_> {
        let rows = self.up_down.matrix();
        if rows.rows() == self.gate.rows() { Neurons::Down(rows) } else { Neurons::UpDown(rows) }
    }

    /// The columns of `down_proj`, `[intermediate_size, hidden_size]`.
    #[must_use]
    pub(crate) fn down(&self) -> Matrix<'_> {
        let neurons = self.neurons();
        let per = neurons.rows_per_neuron();
        neurons.matrix().every(per - 1, per)
    }

    /// Neurons.
    #[must_use]
    pub(crate) fn intermediate_size(&self) -> usize {
        self.gate.rows()
    }

    /// The importance of each neuron, squared.
    #[must_use]
    pub(crate) fn importance_squared(&self) -> &[f32] {
        &self.learned.importance
    }

    /// Bytes of all matrices.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        self.dense_bytes() + self.predictor.as_ref().map_or(0, Predictor::bytes)
    }

    /// Bytes that the FFN of all neurons reads.
    #[must_use]
    pub(crate) fn dense_bytes(&self) -> usize {
        self.gate.bytes() + self.up_down.bytes()
    }

    /// Bytes of a row of gate, up or down.
    #[must_use]
    pub(crate) fn row_bytes(&self) -> usize {
        self.gate.format().row_bytes(self.gate.cols())
    }
}

/// Columns of blocks are no blocks: what is quantised goes back to floats.
fn transposed(part: Part) -> Result<Part> {
    Ok(match part {
        Part::Tensor(t) => t.t()?,
        Part::Weight(w) => {
            let t = w.dequantize()?.t()?;
            w.release();
            t
        }
    }
    .into())
}

impl Predictor {
    /// Bytes of a row of both Q.
    #[must_use]
    pub(crate) fn bytes_per_neuron(&self) -> usize {
        let panels = self.q_gate.rows() / self.p.rows();
        (self.q_gate.bytes() + self.q_up.bytes()) / (panels * PANEL)
    }

    fn bytes(&self) -> usize {
        self.p.bytes() + self.q_gate.bytes() + self.q_up.bytes()
    }
}

impl LayerProfile {
    /// P `[rank, hidden_size]`, and both Q transposed in [panels](candle_sparse_core::ffn::PANEL) of neurons
    /// `[panels · rank, 128]`, the last one filled up with zeros, for weights held in `weights`: floats beside F32, else
    /// `Q8_0` where rows are whole blocks, else F16. `None` without a prediction.
    ///
    /// # Errors
    /// P is no whole number of rows of `hidden_size`.
    ///
    /// ```
    /// # use candle_sparse::Format;
    /// # use candle_sparse_models::files::ModelFiles;
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
    /// # let files = ModelFiles::from_folder(folder)?;
    /// # let profile = files.sparse_profile.ok_or_else(|| candle_core::Error::msg("no profile"))?.load()?;
    /// let layer = &profile.layers[0];
    /// let hidden_size = layer.p.len() / layer.rank;
    /// let prediction = layer.prediction(Format::Q4_0, hidden_size)?;
    /// assert!(prediction.is_some_and(|[p, q_gate, _]| p.rows() == layer.rank && q_gate.cols() == 128));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn prediction(&self, weights: Format, hidden_size: usize) -> Result<Option<[Weight; 3]>> {
        if self.rank == 0 {
            return Ok(None);
        }
        let (p, q) = (format(weights, hidden_size), format(weights, PANEL));
        let panels = |values: &[f32]| Weight::from_f32(q, PANEL, &panels(self.rank, values));
        let p = Weight::from_f32(p, hidden_size, &self.p)?;
        Ok(Some([p, panels(&self.q_gate)?, panels(&self.q_up)?]))
    }
}

/// `[intermediate_size, rank]` as panels, the last one filled up with zeros.
fn panels(rank: usize, q: &[f32]) -> Vec<f32> {
    let panel = |rows: &[f32]| {
        let mut panel = vec![0.0; rank * PANEL];
        for (n, row) in rows.chunks_exact(rank).enumerate() {
            row.iter().enumerate().for_each(|(k, v)| panel[k * PANEL + n] = *v);
        }
        panel
    };
    q.chunks(rank * PANEL).flat_map(panel).collect()
}

/// A prediction is rough by nature: eight bits add nothing to its error.
fn format(model: Format, cols: usize) -> Format {
    match model {
        Format::F32 => Format::F32,
        _ if cols.is_multiple_of(Format::Q8_0.block_len()) => Format::Q8_0,
        _ => Format::F16,
    }
}
