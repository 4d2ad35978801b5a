//! The gates of sparse attention as tensors of a profile.

use super::tensors::{put, vector};
use crate::gate::{CellWeight, FastGrnnGate};
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::kernel::fast_grnn::Cell;
use std::collections::HashMap;

fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.self_attn.gate")
}

/// The gates of all `layers`, or none.
pub(crate) fn read(vb: &VarBuilder<'_>, layers: usize) -> Result<Vec<FastGrnnGate>> {
    if !(0..layers).any(|i| vb.contains_tensor(&format!("{}.ridge", prefix(i)))) {
        return Ok(Vec::new());
    }
    (0..layers).map(|i| read_gate(&vb.pp(prefix(i)))).collect()
}

fn read_gate(vb: &VarBuilder<'_>) -> Result<FastGrnnGate> {
    let ridge = matrix(vb, "ridge")?;
    let gate = FastGrnnGate {
        hidden_size: ridge.values.len() / ridge.rows.max(1),
        kv_heads: ridge.rows,
        ridge: ridge.values,
        bias: vector(vb, "bias")?,
        threshold: vector(vb, "threshold")?,
        cell: read_cell(vb)?,
        readout: if vb.contains_tensor("readout") { matrix(vb, "readout")?.values } else { Vec::new() },
    };
    gate.check().map_err(|e| Error::msg(format!("{}: {e}", vb.prefix())))?;
    Ok(gate)
}

fn read_cell(vb: &VarBuilder<'_>) -> Result<Option<Cell<CellWeight, Vec<f32>>>> {
    let published = vb.contains_tensor("w1");
    if !published && !vb.contains_tensor("w_g") {
        return Ok(None);
    }
    let Ok([zeta, nu]) = <[f32; 2]>::try_from(vector(vb, "zeta_nu")?) else {
        bail!("{}.zeta_nu has not 2 elements", vb.prefix())
    };
    Ok(Some(if published {
        Cell::FastGrnn {
            w1: matrix(vb, "w1")?,
            w2: matrix(vb, "w2")?,
            u1: matrix(vb, "u1")?,
            u2: matrix(vb, "u2")?,
            b_z: vector(vb, "b_z")?,
            b_h: vector(vb, "b_h")?,
            zeta,
            nu,
        }
    } else {
        Cell::Separate {
            w_g: matrix(vb, "w_g")?,
            u_g: matrix(vb, "u_g")?,
            w_u: matrix(vb, "w_u")?,
            u_u: matrix(vb, "u_u")?,
            b_g: vector(vb, "b_g")?,
            b_u: vector(vb, "b_u")?,
            zeta,
            nu,
        }
    }))
}

fn matrix(vb: &VarBuilder<'_>, name: &str) -> Result<CellWeight> {
    let w = vb.get_unchecked_dtype(name, DType::F32)?;
    let &[rows, _] = w.dims() else {
        bail!("{}.{name} has shape {:?}, expected a matrix", vb.prefix(), w.dims())
    };
    Ok(CellWeight { rows, values: w.flatten_all()?.to_vec1()? })
}

pub(crate) fn write(gates: &[FastGrnnGate], out: &mut HashMap<String, Tensor>) -> Result<()> {
    for (i, gate) in gates.iter().enumerate() {
        gate.check().map_err(|e| Error::msg(format!("{}: {e}", prefix(i))))?;
        let at = |name: &str| format!("{}.{name}", prefix(i));
        put(out, &at("ridge"), &gate.ridge, &[gate.kv_heads, gate.hidden_size])?;
        put(out, &at("bias"), &gate.bias, &[gate.kv_heads])?;
        put(out, &at("threshold"), &gate.threshold, &[gate.kv_heads])?;
        let Some(cell) = &gate.cell else { continue };
        for (name, w) in cell.matrices() {
            put(out, &at(name), &w.values, &[w.rows, w.values.len() / w.rows])?;
        }
        for (name, b) in cell.biases() {
            put(out, &at(name), b, &[b.len()])?;
        }
        put(out, &at("zeta_nu"), &cell.zeta_nu(), &[2])?;
        if !gate.readout.is_empty() {
            put(out, &at("readout"), &gate.readout, &[gate.kv_heads, cell.state_len()])?;
        }
    }
    Ok(())
}
