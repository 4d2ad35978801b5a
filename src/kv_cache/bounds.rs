//! Bounds of what the keys of a page can score, for bringing pages back that nothing else chose.
//!
//! `q · k ≤ Σ_c max(q_c · min_c, q_c · max_c) = q⁻ · min + q⁺ · max` for every key of a page, with `min` and `max` the
//! extremes of its channels (Quest: Tang et al. 2024, <https://arxiv.org/abs/2406.10774>). The bounds of 32 pages lie
//! side by side, `[head][min, max][head_dim][32 pages]`, so that a query scores all of them in one weighted sum of rows.

use super::{
    PAGE_LEN,
    page::{Page, PageShape},
};
use crate::core::{BLOCK_LEN, BlockQ8_0, Matrix, Rows};
use half::f16;

/// Pages of a group.
pub(super) const GROUP: usize = 32;

/// The bounds of a layer of a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Bounds {
    groups: Vec<Group>,
    pages: usize,
}

#[derive(Clone, Debug)]
enum Group {
    /// Not all pages are known.
    Open(Box<[f16]>),
    /// Rounded outwards.
    Full(Box<[BlockQ8_0]>),
}

impl Bounds {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let bytes = |g: &Group| match g {
            Group::Open(g) => size_of_val(&**g),
            Group::Full(g) => size_of_val(&**g),
        };
        self.groups.iter().map(bytes).sum()
    }

    /// Forgets the pages from `pages` on.
    pub(super) fn cut(&mut self, pages: usize) {
        if pages < self.pages {
            self.groups.truncate(pages / GROUP);
            self.pages = pages / GROUP * GROUP;
        }
    }

    /// Reads the keys of the pages up to `full` whose bounds are not known.
    pub(super) fn update(&mut self, shape: PageShape, pages: &[Page], full: usize) {
        let rows = 2 * shape.heads * shape.head_dim;
        while self.pages < full {
            let at = self.pages % GROUP;
            if at == 0 {
                self.groups.push(Group::Open(vec![f16::ZERO; rows * GROUP].into()));
            }
            let Some(Group::Open(group)) = self.groups.last_mut() else {
                unreachable!("the last group is open")
            };
            note(shape, &pages[self.pages], at, group);
            self.pages += 1;
            if self.pages.is_multiple_of(GROUP) {
                let full = Group::Full(close(shape, group));
                self.groups.pop();
                self.groups.push(full);
            }
        }
    }

    /// The bounds of pages `32 · group ..` for a head, `[2 · head_dim, 32]`: minima, then maxima.
    pub(super) fn group(&self, shape: PageShape, group: usize, head: usize) -> Matrix<'_> {
        let rows = 2 * shape.head_dim;
        let data = match &self.groups[group] {
            Group::Open(g) => Rows::F16(&g[head * rows * GROUP..(head + 1) * rows * GROUP]),
            Group::Full(g) => Rows::Q8_0(&g[head * rows..(head + 1) * rows]),
        };
        Matrix::new(rows, GROUP, data).expect("rows of a group were sliced")
    }
}

/// Writes the bounds of a page as column `at` of a group.
fn note(shape: PageShape, page: &Page, at: usize, group: &mut [f16]) {
    let mut row = [0.0; PAGE_LEN];
    for head in 0..shape.heads {
        let keys = page.keys(shape, head);
        for channel in 0..shape.head_dim {
            keys.dequantize_row(channel, &mut row);
            let min = row.iter().fold(f32::INFINITY, |m, v| v.min(m));
            let max = row.iter().fold(f32::NEG_INFINITY, |m, v| v.max(m));
            let first = (2 * head * shape.head_dim + channel) * GROUP + at;
            group[first] = f16::from_f32(min);
            group[first + shape.head_dim * GROUP] = f16::from_f32(max);
        }
    }
}

/// Rounds minima down and maxima up.
fn close(shape: PageShape, group: &[f16]) -> Box<[BlockQ8_0]> {
    let round = |(i, row): (usize, &[f16; GROUP])| {
        let x = row.map(f16::to_f32);
        let mut block = BlockQ8_0::quantize(&x);
        let (d, up) = (block.d.to_f32(), i / shape.head_dim % 2 == 1);
        for (q, v) in block.qs.iter_mut().zip(x) {
            let exact = if d == 0.0 { 0.0 } else { v / d };
            *q = if up { exact.ceil() } else { exact.floor() }.clamp(-127.0, 127.0) as i8;
        }
        block
    };
    group.as_chunks::<BLOCK_LEN>().0.iter().enumerate().map(round).collect()
}
