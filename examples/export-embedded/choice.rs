//! What a profile says about a block, as an image has it: how neurons are chosen, and which positions attention keeps.

use crate::weights::Held;
use anyhow::{Result, bail};
use candle_sparse::{
    FastGrnnGate, FfnMode, Format,
    profile::{LayerProfile, Rule},
    weight::Weight,
};
use candle_sparse_core::{image::Role, kernel::fast_grnn::Cell};

/// The rule that needs no tables.
pub(crate) fn exact_zeros(layer: u32) -> Held {
    Held::Bytes(Role::Plan, layer, plan(Rule::ExactZero, 0))
}

fn plan(rule: Rule, hot: u32) -> Vec<u8> {
    [rule as u32, 0, hot].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The tables of a rule at one of its points.
pub(crate) fn tensors(
    layer: u32,
    mode: FfnMode,
    l: &LayerProfile,
    point: usize,
    format: Format,
) -> Result<Vec<Held>> {
    let Some(rule) = mode.rule().filter(|&r| r != Rule::ExactZero) else {
        bail!("{mode:?} has no thresholds in a profile")
    };
    let vector = |role, values: Vec<f32>| Held::Vector(role, layer, values);
    let of_rule = &l.rules[rule as usize];
    let (hidden, hot) = (of_rule.bias.len() / of_rule.share.len().max(1), of_rule.hot[point]);
    let thresholds = |all: &[f32]| l.thresholds(all[point], hot as usize);
    let mut all = vec![
        Held::Bytes(Role::Plan, layer, plan(rule, hot)),
        vector(Role::Skipped, of_rule.bias[point * hidden..(point + 1) * hidden].to_vec()),
    ];
    if rule != Rule::LowRank {
        all.push(vector(Role::Keep, thresholds(&of_rule.keep)));
    }
    if rule == Rule::Gate {
        all.push(vector(Role::UpSquare, l.up_square.clone()));
        return Ok(all);
    }
    all.push(vector(Role::Candidate, thresholds(&of_rule.candidate)));
    all.push(vector(Role::GateDeviation, l.gate_variance.iter().map(|v| v.sqrt()).collect()));
    all.push(vector(Role::UpVariance, l.up_variance.clone()));
    all.extend(prediction(layer, l, hidden, format)?);
    Ok(all)
}

fn prediction(layer: u32, l: &LayerProfile, hidden: usize, format: Format) -> Result<Vec<Held>> {
    let Some(matrices) = l.prediction(format, hidden)? else {
        bail!("the profile has no prediction: calibrate with a rank, or choose --ffn gate");
    };
    let roles = [Role::PredictorP, Role::PredictorGate, Role::PredictorUp];
    Ok(roles.into_iter().zip(matrices).map(|(role, w)| Held::Matrix(role, layer, w)).collect())
}

/// An attention gate in F16; its vectors in F32.
pub(crate) fn gate(layer: u32, g: &FastGrnnGate) -> Result<Vec<Held>> {
    let matrix = |role, cols, values: &[f32]| -> Result<Held> {
        Ok(Held::Matrix(role, layer, Weight::from_f32(Format::F16, cols, values)?))
    };
    let vector = |role, values: &[f32]| Held::Vector(role, layer, values.to_vec());
    let mut all = vec![
        matrix(Role::Ridge, g.hidden_size, &g.ridge)?,
        vector(Role::RidgeBias, &g.bias),
        vector(Role::Threshold, &g.threshold),
    ];
    match &g.cell {
        None => {}
        Some(Cell::FastGrnn { w1, w2, u1, u2, b_z, b_h, zeta, nu }) => {
            let parts = [(Role::CellW1, w1), (Role::CellW2, w2), (Role::CellU1, u1), (Role::CellU2, u2)];
            for (role, m) in parts {
                all.push(matrix(role, m.values.len() / m.rows.max(1), &m.values)?);
            }
            all.extend([vector(Role::CellBz, b_z), vector(Role::CellBh, b_h)]);
            all.push(vector(Role::CellZetaNu, &[*zeta, *nu]));
            if !g.readout.is_empty() {
                all.push(matrix(Role::Readout, b_z.len(), &g.readout)?);
            }
        }
        Some(Cell::Separate { .. }) => {
            bail!("block {layer}: an image holds FastGRNN cells of shared low-rank matrices only")
        }
    }
    Ok(all)
}
