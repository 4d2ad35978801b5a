//! What a profile says about a block, as an image has it: how neurons are chosen, and which positions attention keeps.

use crate::weights::Held;
use anyhow::{Result, bail};
use candle_sparse::{
    FastGrnnGate, FfnMode, Format,
    profile::{LayerProfile, Rule},
    weight::Weight,
};
use candle_sparse_core::{ffn::PANEL, image::Role, kernel::fast_grnn::Cell};

/// The tables of a rule at one of its points.
pub(crate) fn tensors(
    layer: u32,
    mode: FfnMode,
    l: &LayerProfile,
    point: usize,
    format: Format,
) -> Result<Vec<Held>> {
    let Some(rule) = mode.rule() else { bail!("{mode:?} chooses no neurons") };
    let vector = |role, values: Vec<f32>| Held::Vector(role, layer, values);
    let of_rule = &l.rules[rule as usize];
    let (hidden, hot) = (of_rule.bias.len() / of_rule.share.len().max(1), of_rule.hot[point]);
    let squared: Vec<f32> = l.importance.iter().map(|n| n * n).collect();
    let thresholds = |all: &[f32]| -> Vec<f32> {
        let each = |(i, n): (usize, &f32)| if i < hot as usize { -1.0 } else { divided(all[point], *n) };
        squared.iter().enumerate().map(each).collect()
    };
    let plan: Vec<u8> = [rule as u32, 0, hot].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut all = vec![
        Held::Bytes(Role::Plan, layer, plan),
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

/// A neuron of no importance passes nothing but a threshold of 0.
fn divided(threshold: f32, importance_squared: f32) -> f32 {
    let squared = threshold * threshold;
    if importance_squared > 0.0 {
        squared / importance_squared
    } else if squared > 0.0 {
        f32::INFINITY
    } else {
        0.0
    }
}

fn prediction(layer: u32, l: &LayerProfile, hidden: usize, format: Format) -> Result<Vec<Held>> {
    if l.rank == 0 {
        bail!("the profile has no prediction: calibrate with a rank, or choose --ffn gate");
    }
    // A prediction is rough by nature: eight bits add nothing to its error.
    let fitting = |cols: usize| match format {
        Format::F32 => Format::F32,
        _ if cols.is_multiple_of(Format::Q8_0.block_len()) => Format::Q8_0,
        _ => Format::F16,
    };
    let matrix = |role, cols, values: &[f32]| -> Result<Held> {
        Ok(Held::Matrix(role, layer, Weight::from_f32(fitting(cols), cols, values)?))
    };
    Ok(vec![
        matrix(Role::PredictorP, hidden, &l.p)?,
        matrix(Role::PredictorGate, PANEL, &panels(l.rank, &l.q_gate))?,
        matrix(Role::PredictorUp, PANEL, &panels(l.rank, &l.q_up))?,
    ])
}

/// `[intermediate_size, rank]` transposed in panels of neurons, the last one filled up with zeros.
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
