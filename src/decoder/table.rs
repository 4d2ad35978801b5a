//! The matrices of a row per token: the embedding and the head.

use crate::weight::{Compute, Halved, Weight};
use candle_core::{Result, bail};
use candle_sparse_core::{ActivationGroup, Format, Matrix};
use std::sync::Arc;

/// A matrix `[vocab_size, hidden_size]`.
#[derive(Clone, Debug)]
pub(super) enum Table {
    Whole(Weight),
    /// For a [shortlist](super::HeadMode::Shortlist).
    Halved(Arc<Halved>),
}

impl Table {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Whole(w) => w.bytes(),
            Self::Halved(w) => w.bytes(),
        }
    }

    /// Bytes that the head of a decoded token reads of all rows.
    pub(super) fn bytes_per_token(&self) -> usize {
        match self {
            Self::Whole(w) => w.bytes(),
            Self::Halved(w) => w.first_look_bytes(),
        }
    }

    pub(super) fn format(&self) -> Format {
        match self {
            Self::Whole(w) => w.format(),
            Self::Halved(_) => Format::Q8_0,
        }
    }

    pub(super) fn shares_memory(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Whole(a), Self::Whole(b)) => a.shares_memory(b),
            (Self::Halved(a), Self::Halved(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The matrix as it is in a file.
    ///
    /// # Errors
    /// It is held in halves.
    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        match self {
            Self::Whole(w) => Ok(w.matrix()),
            Self::Halved(_) => bail!("the head is held in halves: load the model with HeadMode::Exact"),
        }
    }

    /// Writes a row as f32.
    pub(super) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Whole(w) => w.matrix().dequantize_row(row, out),
            Self::Halved(w) => w.dequantize_row(row, out),
        }
    }

    pub(super) fn to_f32(&self) -> Result<Self> {
        Ok(Self::Whole(match self {
            Self::Whole(w) => w.to_f32()?,
            Self::Halved(w) => w.to_f32()?,
        }))
    }

    /// As [`Weight::matmul`].
    pub(super) fn matmul(&self, on: Compute<'_>, x: &[f32], groups: &mut [ActivationGroup], y: &mut [f32]) {
        match self {
            Self::Whole(w) => w.matmul(on, x, groups, y),
            Self::Halved(w) => w.matmul(on, x, groups, y),
        }
    }
}
