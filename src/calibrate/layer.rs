//! Fitting one block in closed form: no gradients.
//!
//! ```text
//! E[xxᵀ] of the FFN's inputs (Moments), some of the inputs (Sample)
//! → rank-r regression of gate and up → scores on the sample → thresholds, means of what is skipped, errors
//! ```

use super::{
    block::{Exact, FfnWeights, Settings},
    course::Course,
    order, predictor,
    sample::{Moments, Sample},
    scores::Scores,
    thresholds::{self, GRID, Table},
};
use crate::profile::{LayerProfile, LayerRule};
use candle_core::{Result, bail};

/// What was learned about one block, at every share of [`GRID`].
#[derive(Clone, Debug)]
pub(crate) struct LayerFit {
    /// The prediction; its rules are empty.
    pub layer: LayerProfile,
    /// In the order of [`crate::profile::Rule`].
    pub tables: [Table; 3],
    /// Mean square of what a cascade's output misses at each share.
    pub error: Vec<f32>,
    /// `[intermediate_size, words]`: for each neuron a bit per sampled token, set where it was active.
    activity: Vec<Vec<u64>>,
}

/// Fits one block. Cost: some `20 · sample rows · intermediate_size · hidden_size` multiply-adds and two decompositions
/// of `[hidden_size, hidden_size]`; memory: eight times `[sample rows, intermediate_size]`.
///
/// # Errors
/// Shapes that do not fit, no or too few inputs, or inputs that are not finite.
pub(crate) fn fit_layer(
    w: &FfnWeights,
    moments: &Moments,
    sample: &Sample,
    s: &Settings,
) -> Result<LayerFit> {
    let (inner, hidden) = w.dims()?;
    if s.rank == 0 || s.rank > hidden {
        bail!("calibrate: rank {} must be 1 to hidden_size {hidden}", s.rank);
    }
    if moments.rows() < hidden as u64 || sample.rows() < 32 {
        let (n, m) = (moments.rows(), sample.rows());
        bail!("calibrate: {n} and {m} tokens are too few, hidden_size is {hidden}: give more text");
    }
    let s = &s.for_activation(w.act.act);
    let x = sample.tensor()?;
    let exact = Exact::new(w, &x)?;
    let importance = w.norms()?;
    let predictor = predictor::fit(w, moments, &exact, &importance, s.rank)?;
    let scores = Scores::new(w, &x, exact, &predictor, importance)?;
    let tables = thresholds::tables(&scores, &w.down, s)?;
    let error = thresholds::errors(&scores, &w.down, &tables[2])?;
    let activity = order::activity(&scores, &tables[2], s.reference_share);
    let Scores { gate_variance, up_variance, up_square, importance, .. } = scores;
    let layer = LayerProfile {
        order: (0..inner as u32).collect(),
        rank: s.rank,
        p: predictor.p.flatten_all()?.to_vec1()?,
        q_gate: predictor.q_gate.flatten_all()?.to_vec1()?,
        q_up: predictor.q_up.flatten_all()?.to_vec1()?,
        gate_variance,
        up_variance,
        up_square,
        importance,
        rules: Default::default(),
    };
    Ok(LayerFit { layer, tables, error, activity })
}

impl LayerFit {
    /// Keeps the fit under a name.
    pub(super) fn keep(&self, name: &str, course: &mut Course<'_>) -> Result<()> {
        let l = &self.layer;
        for (part, v) in [
            ("p", &l.p),
            ("q_gate", &l.q_gate),
            ("q_up", &l.q_up),
            ("gate_variance", &l.gate_variance),
            ("up_variance", &l.up_variance),
            ("up_square", &l.up_square),
            ("importance", &l.importance),
            ("error", &self.error),
        ] {
            course.keep(&format!("{name}.{part}"), v)?;
        }
        for (rule, table) in self.tables.iter().enumerate() {
            table.keep(&format!("{name}.{rule}"), course)?;
        }
        let activity: Vec<i64> = self.activity.iter().flatten().map(|bits| bits.cast_signed()).collect();
        course.keep(&format!("{name}.activity"), &activity)
    }

    /// What an earlier run has kept of a block of `[intermediate_size, hidden_size, rank]`.
    pub(super) fn found(
        name: &str,
        course: &Course<'_>,
        [inner, hidden, rank]: [usize; 3],
    ) -> Result<Option<Self>> {
        let activity: Vec<i64> = course.numbers(&format!("{name}.activity"))?;
        if activity.is_empty() {
            return Ok(None);
        }
        let get = |part: &str, len: usize| course.all(&format!("{name}.{part}"), len);
        let table = |rule: usize| Table::found(&format!("{name}.{rule}"), course, [inner, hidden]);
        let words = activity.len().div_ceil(inner);
        Ok(Some(Self {
            layer: LayerProfile {
                order: (0..inner as u32).collect(),
                rank,
                p: get("p", rank * hidden)?,
                q_gate: get("q_gate", inner * rank)?,
                q_up: get("q_up", inner * rank)?,
                gate_variance: get("gate_variance", inner)?,
                up_variance: get("up_variance", inner)?,
                up_square: get("up_square", inner)?,
                importance: get("importance", inner)?,
                rules: Default::default(),
            },
            tables: [table(0)?, table(1)?, table(2)?],
            error: get("error", GRID.len())?,
            activity: activity.chunks(words).map(|w| w.iter().map(|w| w.cast_unsigned()).collect()).collect(),
        }))
    }

    /// The block's part of a profile with a point at each of `shares` (of this block), neurons in the checkpoint's order.
    #[must_use]
    pub(super) fn at(&self, shares: &[f32]) -> LayerProfile {
        LayerProfile { rules: self.tables.each_ref().map(|t| t.at(shares)), ..self.layer.clone() }
    }

    /// The same with hot neurons in front and the rest by co-activation, and the mean lengths of runs of active neurons
    /// before and after.
    #[must_use]
    pub(super) fn ordered(&self, shares: &[f32]) -> (LayerProfile, [f32; 2]) {
        let order = order::order(&self.activity);
        let before: Vec<u32> = (0..order.len() as u32).collect();
        let runs = [&before, &order].map(|o| order::mean_run(&self.activity, o));
        let mut layer = self.at(shares).permuted(&order);
        for (rule, table) in layer.rules.iter_mut().zip(&self.tables) {
            rule.hot = shares.iter().map(|&s| table.hot(s, &order)).collect();
        }
        (layer, runs)
    }
}

impl LayerProfile {
    /// The same neurons in another order: neuron i is then what neuron `order[i]` was.
    #[must_use]
    pub fn permuted(&self, order: &[u32]) -> Self {
        let rows = |v: &[f32], width: usize| -> Vec<f32> {
            order.iter().flat_map(|&i| &v[i as usize * width..(i as usize + 1) * width]).copied().collect()
        };
        Self {
            order: order.iter().map(|&i| self.order[i as usize]).collect(),
            rank: self.rank,
            p: self.p.clone(),
            q_gate: rows(&self.q_gate, self.rank),
            q_up: rows(&self.q_up, self.rank),
            gate_variance: rows(&self.gate_variance, 1),
            up_variance: rows(&self.up_variance, 1),
            up_square: rows(&self.up_square, 1),
            importance: rows(&self.importance, 1),
            rules: self.rules.clone(),
        }
    }
}

impl LayerRule {
    /// No thresholds yet.
    pub(super) fn with_points(points: usize) -> Self {
        Self { hot: vec![0; points], ..Self::default() }
    }
}
