//! A head that computes few rows exactly: those that a first look at all rows finds likely.
//!
//! ```text
//! first look at all rows            phase
//! rows of likely tokens             each thread for itself
//! their logits, exact               phase
//! certified: rows that a first look may have missed      each thread for itself
//!            their logits, exact                         phase
//! ```

use super::Local;
use crate::{
    decoder::{Decoder, HeadMode},
    team::{Member, Outcome},
    weight::{Halved, JOINED, ROW_STEP},
};
use candle_sparse_core::{ActivationGroup, BlockQ8_0, Columns, Format, KernelSet, UpperColumn};
use candle_sparse_kernels::Kernels;

/// Tokens at least this likely after a first look get their exact logit.
pub(crate) const LIKELY: f32 = 1.0 / 65536.0;

/// A thread's own vectors for a head in halves.
#[derive(Default)]
pub(super) struct ShortlistLocal {
    wide: Vec<f32>,
    groups: Vec<ActivationGroup>,
    column: Vec<UpperColumn>,
    /// Logits, on threads that are not asked for them.
    logits: Vec<f32>,
    list: Vec<u32>,
    exact: Vec<f32>,
    joined: Vec<BlockQ8_0>,
    /// Rows that this token computed.
    pub(super) rows: usize,
}

impl ShortlistLocal {
    pub(super) fn resize(&mut self, head: &Halved) {
        let vocab = head.rows();
        self.wide.resize(head.wide(), 0.0);
        self.groups.resize(ActivationGroup::count(head.wide()), ActivationGroup::ZERO);
        self.column.resize(self.groups.len(), UpperColumn::ZERO);
        self.logits.resize(vocab, 0.0);
        self.list.reserve(vocab.saturating_sub(self.list.len()));
        self.exact.resize(vocab, 0.0);
    }
}

impl Decoder {
    /// The logits, which the calling thread alone wants: exact ones of likely tokens, of the others those of a first look.
    pub(super) fn shortlist_token(
        &self,
        member: &mut Member<'_>,
        head: &Halved,
        local: &mut Local,
        logits: Option<&mut [f32]>,
    ) -> Outcome {
        let kernels = self.kernels;
        let Local { normed, groups, shortlist: s, .. } = local;
        let Columns::Quantized(x) = self.on().columns(Format::Q8_0, normed.len(), normed, groups) else {
            unreachable!("columns for Q8_0 are quantised")
        };
        head.widen(normed, &mut s.wide);
        kernels.quantize(&s.wide, &mut s.groups);
        s.column.iter_mut().zip(&s.groups).for_each(|(column, group)| *column = group.into());
        let y = logits.unwrap_or(&mut s.logits);
        let piece = member.piece(head.rows(), head.first_look_bytes(), ROW_STEP);
        member.phase(y, piece, |i, y| {
            head.look(kernels, i * piece..i * piece + y.len(), &s.column, y);
        })?;
        list_likely(kernels, y, &mut s.list);
        let best = exact(member, kernels, head, x, (&s.list, &mut s.exact, &mut s.joined))?;
        s.rows = s.list.len();
        if self.head == HeadMode::Certified && s.list.len() < y.len() {
            // Listed ones are done; afterwards they are written, whether or not others are added.
            s.list.iter().for_each(|&r| y[r as usize] = f32::NEG_INFINITY);
            let limit = head.limit(x, &s.groups);
            let listed = s.list.len();
            extend_by_runs(y, &mut s.list, |row, v| v + head.error(limit, row) >= best);
            let (added, room) = (&s.list[listed..], &mut s.exact[listed..]);
            if !added.is_empty() {
                exact(member, kernels, head, x, (added, room, &mut s.joined))?;
            }
            s.rows = s.list.len();
        }
        s.list.iter().zip(&s.exact).for_each(|(&r, v)| y[r as usize] = *v);
        Ok(())
    }
}

/// Computes the logits of some rows; returns the largest.
fn exact(
    member: &mut Member<'_>,
    kernels: &Kernels,
    head: &Halved,
    x: &[ActivationGroup],
    (rows, y, joined): (&[u32], &mut [f32], &mut Vec<BlockQ8_0>),
) -> Result<f32, crate::team::Cancelled> {
    let y = &mut y[..rows.len()];
    let piece = member.piece(rows.len(), rows.len() * head.row_bytes(), JOINED);
    member.phase(y, piece, |i, y| {
        head.multiply(kernels, &rows[i * piece..i * piece + y.len()], x, joined, &mut [y]);
    })?;
    Ok(y.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// Lists the rows whose softmax is at least [`LIKELY`], and the largest; all rows where a logit is not finite.
fn list_likely(kernels: &Kernels, logits: &[f32], list: &mut Vec<u32>) {
    const TOGETHER: usize = 1024;
    let mut room = [0.0; TOGETHER];
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0_f32);
    for part in logits.chunks(TOGETHER) {
        let room = &mut room[..part.len()];
        room.copy_from_slice(part);
        let (larger, added) = kernels.exp_sum(room, max);
        sum = sum * (max - larger).exp() + added;
        max = larger;
    }
    let least = (max + (LIKELY * sum).ln()).min(max);
    list.clear();
    if least.is_finite() {
        extend_by_runs(logits, list, |_, v| v >= least);
    } else {
        list.extend(0..logits.len() as u32);
    }
}

/// Adds the rows that `passes` lets through: few, so that runs without one are passed over together.
fn extend_by_runs(logits: &[f32], list: &mut Vec<u32>, passes: impl Fn(usize, f32) -> bool) {
    const RUN: usize = 32;
    for (first, run) in (0..).step_by(RUN).zip(logits.chunks(RUN)) {
        let any = run.iter().enumerate().fold(false, |any, (i, v)| any | passes(first + i, *v));
        if any {
            list.extend((first..).zip(run).filter(|(r, v)| passes(*r, **v)).map(|(r, _)| r as u32));
        }
    }
}
