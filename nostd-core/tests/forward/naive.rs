//! The same model computed plainly: everything is kept, sums are taken in f64, rules are filters over whole lists.

use crate::built::{Built, FfnOf, Layer, Linear, Sparse};
use candle_sparse_core::{
    Format, KvConfig, Matrix,
    attention::{AttentionMode, plan::sample_seed},
    ffn::{CROSSOVER, DENSE_TOKENS, PANEL, Rule},
    kernel::activation,
};

const PAGE: usize = 32;

/// What was computed of the tokens so far.
pub(crate) struct Naive<'a> {
    m: &'a Built,
    /// Pages that a token sees beside the first.
    visible: usize,
    len: usize,
    past: Vec<Past>,
}

#[derive(Default)]
struct Past {
    /// `[position, kv_dim]`, as stored now.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    /// `[page]`: how often rounded.
    tier: Vec<usize>,
    /// `[position, head]`
    scores: Vec<Vec<f32>>,
    /// `[page]`: least and largest of each channel.
    bounds: Vec<[Vec<f32>; 2]>,
    state: Vec<f32>,
    dense_left: u32,
    /// Neurons of the last token.
    active: u32,
}

impl<'a> Naive<'a> {
    pub(crate) fn new(m: &'a Built, visible: usize) -> Self {
        let past = m.layers.iter().map(|l| {
            let n = l.gate(&m.config).state_len();
            Past { state: vec![0.0; n], ..Past::default() }
        });
        Self { m, visible, len: 0, past: past.collect() }
    }

    /// The logits of the next token, and the active neurons of each block.
    pub(crate) fn step(&mut self, token: usize) -> (Vec<f64>, Vec<u32>) {
        let (m, c) = (self.m, &self.m.config);
        let mut x = row(m.embed.matrix(), token);
        for (i, layer) in m.layers.iter().enumerate() {
            let normed = self.normed(&x, &layer.norms[0], true);
            let y = self.attention(i, layer, &normed);
            x.iter_mut().zip(&y).for_each(|(x, y)| *x += y);
            let normed = self.normed(&x, &layer.norms[1], true);
            let y = self.ffn(i, layer, &normed);
            x.iter_mut().zip(&y).for_each(|(x, y)| *x += y);
        }
        self.len += 1;
        (0..m.layers.len()).for_each(|layer| self.age(layer));
        let normed = self.normed(&x, &m.norm, false);
        let logits = product(m.head.matrix(), &normed).iter().map(|v| f64::from(*v)).collect();
        assert_eq!(c.vocab_size, m.head.matrix().rows());
        (logits, self.past.iter().map(|p| p.active).collect())
    }

    fn normed(&self, x: &[f32], weight: &[f32], shifted: bool) -> Vec<f32> {
        let c = &self.m.config;
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(c.rms_norm_eps)).sqrt();
        let shift = c.norm_shift.filter(|_| shifted);
        let shift = |v: f32| shift.map_or(v, |s| (v - s).max(0.0));
        x.iter().zip(weight).map(|(x, w)| shift((f64::from(*x) * scale * f64::from(*w)) as f32)).collect()
    }

    fn rotate(&self, x: &mut [f32]) {
        let c = &self.m.config;
        for head in x.chunks_exact_mut(c.head_dim) {
            let before = head.to_vec();
            for i in 0..c.head_dim / 2 {
                let angle = self.len as f32 * c.rope.inv_freq(i, c.head_dim);
                let (a, b) = if c.rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + c.head_dim / 2) };
                let (sin, cos) = f64::from(angle).sin_cos();
                let [sin, cos] = [sin, cos].map(|v| v * f64::from(c.rope.attention_factor()));
                let (p, q) = (f64::from(before[a]), f64::from(before[b]));
                (head[a], head[b]) = ((p * cos - q * sin) as f32, (p * sin + q * cos) as f32);
            }
        }
    }

    fn attention(&mut self, i: usize, layer: &Layer, x: &[f32]) -> Vec<f32> {
        let c = self.m.config;
        let [mut q, mut k, v] = [0, 1, 2].map(|n| linear(&layer.attention[n], x));
        self.rotate(&mut q);
        self.rotate(&mut k);
        let gate = layer.gate(&c);
        let (mut room, mut scores) = (vec![0.0; gate.scratch_len()], vec![0.0; c.num_key_value_heads]);
        gate.score(x, &mut self.past[i].state, &mut room, &mut scores);
        let past = &mut self.past[i];
        past.scores.push(scores);
        let stored = |x: Vec<f32>| rounded(self.m.kv.dtype, &x);
        past.k.push(stored(k));
        past.v.push(stored(v));
        let mut out = vec![0.0; c.q_dim()];
        for (head, (query, out)) in
            q.chunks_exact(c.head_dim).zip(out.chunks_exact_mut(c.head_dim)).enumerate()
        {
            let kv_head = head / c.group_size();
            let (positions, drawn, weight) = self.positions(i, kv_head, &q);
            let past = &self.past[i];
            let part = |x: &[f32]| x[kv_head * c.head_dim..(kv_head + 1) * c.head_dim].to_vec();
            let counted = |p: usize| if drawn.contains(&(p / PAGE)) { weight } else { 0.0 };
            let dots = positions
                .iter()
                .map(|&p| dot(query, &part(&past.k[p])) / (c.head_dim as f64).sqrt() + counted(p));
            let dots: Vec<f64> = dots.collect();
            let max = dots.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = dots.iter().map(|d| (d - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (d, out) in out.iter_mut().enumerate() {
                let sum: f64 =
                    positions.iter().zip(&weights).map(|(&p, w)| w * f64::from(part(&past.v[p])[d])).sum();
                *out = (sum / total) as f32;
            }
        }
        linear(&layer.attention[3], &out)
    }

    /// The positions that the next token sees, its own last; the pages that stand for others, and the logarithm of how many.
    fn positions(&self, i: usize, head: usize, q: &[f32]) -> (Vec<usize>, Vec<usize>, f64) {
        let (p, mut drawn, mut weight) = (self.len, Vec::new(), 0.0);
        let pages = self.pages(i, head, q, &mut drawn, &mut weight);
        let seen = |j: usize| self.m.config.sliding_window.is_none_or(|w| j + w > p);
        let all = (0..p).filter(|&j| (pages.contains(&(j / PAGE)) || drawn.contains(&(j / PAGE))) && seen(j));
        (all.chain([p]).collect(), drawn, weight)
    }

    fn pages(
        &self,
        i: usize,
        head: usize,
        q: &[f32],
        drawn: &mut Vec<usize>,
        weight: &mut f64,
    ) -> Vec<usize> {
        let (a, c, past) = (&self.m.attention, &self.m.config, &self.past[i]);
        let page = self.len / PAGE;
        let ring = (page + 1).saturating_sub(self.visible).max(1);
        let held: Vec<usize> = [0].into_iter().chain(ring..page + 1).collect();
        if a.mode == AttentionMode::Dense {
            return held;
        }
        let seen = c.sliding_window.map_or(0, |w| (page * PAGE + 1).saturating_sub(w) / PAGE);
        let first = if ring > 1 { ring.max(seen) } else { seen };
        let (sinks, window, budget) =
            (a.sinks.div_ceil(PAGE), a.window.div_ceil(PAGE).max(1), a.budget.div_ceil(PAGE));
        let (between, mut chosen): (Vec<usize>, Vec<usize>) =
            held.iter().filter(|&&p| p >= first).partition(|&&p| p >= sinks && p + window < page);
        if ring > 1 && sinks > 0 {
            chosen.push(0);
        }
        if a.mode != AttentionMode::Window && between.len() <= budget {
            return [chosen, between].concat();
        }
        let recalled = match a.mode {
            AttentionMode::Gated => {
                let salience = |p: usize| {
                    past.scores[p * PAGE..(p + 1) * PAGE]
                        .iter()
                        .map(|s| s[head])
                        .fold(f32::NEG_INFINITY, f32::max)
                };
                let mut wanted = between.clone();
                wanted.retain(|&p| salience(p) >= self.m.layers[i].gate[2][head]);
                wanted.sort_by(|a, b| salience(*b).total_cmp(&salience(*a)).then(b.cmp(a)));
                chosen.extend(wanted.into_iter().take(budget));
                a.recall.div_ceil(PAGE)
            }
            AttentionMode::Recall => {
                let share = self.m.layers[i].recall_shares.as_ref().map_or(1.0, |shares| shares[head]);
                (budget as f32 * share).round() as usize
            }
            AttentionMode::Sampled => a.recall.div_ceil(PAGE),
            _ => 0,
        };
        let visible = c.sliding_window.map_or(0, |w| (self.len + 1).saturating_sub(w) / PAGE);
        let mut rest = between;
        rest.retain(|p| !chosen.contains(p) && *p >= visible);
        let bound = |p: usize| self.bound(i, head, q, p);
        rest.sort_by(|a, b| bound(*b).total_cmp(&bound(*a)).then(b.cmp(a)));
        if a.mode == AttentionMode::Sampled {
            let mut others = rest.split_off(recalled.min(rest.len()));
            others.sort_unstable();
            let (n, m) = (others.len(), budget.min(others.len()));
            if m > 0 {
                let start = sample_seed(self.len, i, head) as usize % n;
                *drawn = (0..m).map(|j| others[(j * n + start) / m]).collect();
                *weight = (n as f64 / m as f64).ln();
            }
        }
        chosen.extend(rest.into_iter().take(recalled));
        chosen
    }

    /// The most that a query of a head's group can score on a page.
    fn bound(&self, i: usize, head: usize, q: &[f32], page: usize) -> f64 {
        let c = &self.m.config;
        let (n, group) = (c.head_dim, c.group_size());
        let [min, max] = &self.past[i].bounds[page];
        let own = head * n..(head + 1) * n;
        let of = |q: &[f32]| {
            let ends = min[own.clone()].iter().zip(&max[own.clone()]);
            let each = q.iter().zip(ends).map(|(q, (a, b))| f64::from(*q * a).max(f64::from(*q * b)));
            each.sum::<f64>()
        };
        q[head * group * n..(head + 1) * group * n].chunks_exact(n).map(of).fold(f64::NEG_INFINITY, f64::max)
    }

    /// Rounds pages that have become old, and notes the bounds of one that is full.
    fn age(&mut self, layer: usize) {
        let (KvConfig { ageing, .. }, len) = (self.m.kv, self.len);
        let late = PAGE * layer / self.m.layers.len();
        let past = &mut self.past[layer];
        past.tier.resize(len.div_ceil(PAGE), 0);
        let old = |page: usize, kept: usize| {
            (PAGE * (page + 1)).checked_add(late).and_then(|n| n.checked_add(kept)).is_some_and(|n| len >= n)
        };
        for page in 1..past.tier.len() {
            if past.tier[page] == 0 && ageing.warm > ageing.hot && old(page, ageing.hot) {
                past.round(page, Format::Q8_0);
                past.tier[page] = 1;
            }
            if past.tier[page] < 2 && old(page, ageing.hot.max(ageing.warm)) {
                past.round(page, Format::Q4_1);
                past.tier[page] = 2;
            }
        }
        if len.is_multiple_of(PAGE) {
            let page = &past.k[len - PAGE..];
            let fold = |start: f32, f: fn(f32, f32) -> f32| {
                let all: Vec<f32> =
                    (0..page[0].len()).map(|c| page.iter().map(|k| k[c]).fold(start, f)).collect();
                rounded(Format::F16, &all)
            };
            past.bounds.push([fold(f32::INFINITY, f32::min), fold(f32::NEG_INFINITY, f32::max)]);
        }
    }

    fn ffn(&mut self, i: usize, layer: &Layer, x: &[f32]) -> Vec<f32> {
        let c = &self.m.config;
        let act = |g: f32, u: f32| activation::apply(c.hidden_act, g - c.gate_shift, u);
        let inner = c.intermediate_size;
        let past = &mut self.past[i];
        past.active = inner as u32;
        let sparse = match &layer.ffn {
            FfnOf::Dense(all) => {
                let [gate, up, down] = &**all;
                let up = linear(up, x);
                let (gate, up) = if c.gated_mlp { (linear(gate, x), up) } else { (up, vec![1.0; inner]) };
                return linear(down, &gate.iter().zip(&up).map(|(g, u)| act(*g, *u)).collect::<Vec<_>>());
            }
            FfnOf::Sparse(sparse) => sparse,
        };
        let (gate, rows) = (product(sparse.gate.matrix(), x), sparse.up_down.matrix());
        // Of each neuron its up row, if there is one, and its down column.
        let per = if c.gated_mlp { 2 } else { 1 };
        let up = product(rows, x);
        let dense = sparse.rule.is_none() || past.dense_left > 0;
        let active: Vec<usize> = if dense { (0..inner).collect() } else { chosen(sparse, x, &gate, &act) };
        past.active = active.len() as u32;
        if !dense && active.len() as f32 > CROSSOVER * inner as f32 {
            past.dense_left = DENSE_TOKENS;
        } else if sparse.rule.is_some() {
            past.dense_left = past.dense_left.saturating_sub(1);
        }
        let bias = |k: usize| if dense { 0.0 } else { sparse.bias.get(k).map_or(0.0, |b| f64::from(*b)) };
        let mut y: Vec<f64> = (0..c.hidden_size).map(bias).collect();
        for n in active {
            let a = f64::from(act(gate[n], if c.gated_mlp { up[2 * n] } else { 1.0 }));
            y.iter_mut().zip(row(rows, per * n + per - 1)).for_each(|(y, w)| *y += a * f64::from(w));
        }
        y.into_iter().map(|v| v as f32).collect()
    }
}

impl Past {
    /// Keys per channel over a page's positions, values per position over 32 channels.
    fn round(&mut self, page: usize, format: Format) {
        let positions = page * PAGE..(page + 1) * PAGE;
        for channel in 0..self.k[0].len() {
            let lane: Vec<f32> = positions.clone().map(|p| self.k[p][channel]).collect();
            for (p, v) in positions.clone().zip(rounded(format, &lane)) {
                self.k[p][channel] = v;
            }
        }
        for p in positions {
            let mut row = self.v[p].clone();
            row.resize(row.len().next_multiple_of(PAGE), 0.0);
            self.v[p] = rounded(format, &row)[..self.v[p].len()].to_vec();
        }
    }
}

/// The neurons that a rule leaves active.
fn chosen(s: &Sparse, x: &[f32], gate: &[f32], act: &dyn Fn(f32, f32) -> f32) -> Vec<usize> {
    let [deviation, up_variance, up_square, importance, candidate, keep] = &s.vectors;
    let z = product(s.p.matrix(), x);
    let predicted = |q: Matrix<'_>| -> Vec<f32> {
        let rows: Vec<_> = (0..q.rows()).map(|r| row(q, r)).collect();
        let sum = |n: usize| {
            let column = rows[n / PANEL * z.len()..].iter().map(|row| f64::from(row[n % PANEL]));
            column.zip(&z).map(|(q, z)| q * f64::from(*z)).sum::<f64>()
        };
        (0..gate.len()).map(|n| sum(n) as f32).collect()
    };
    let (gates, ups) = (predicted(s.q_gate.matrix()), predicted(s.q_up.matrix()));
    let expected = |n: usize| {
        let g = gates[n];
        let (low, high) = (act(g - deviation[n], 1.0), act(g + deviation[n], 1.0));
        0.5 * (low * low + high * high)
    };
    let up = |n: usize| ups[n].powi(2) + up_variance[n];
    let exact = |n: usize| act(gate[n], 1.0).powi(2);
    let named = |n: usize| n < s.hot || expected(n) * up(n) >= candidate[n];
    let all = 0..gate.len();
    let rule = s.rule.unwrap();
    let Some(k) = s.top else {
        return match rule {
            Rule::Gate => all.filter(|&n| exact(n) * up_square[n] >= keep[n]).collect(),
            Rule::LowRank => all.filter(|&n| named(n)).collect(),
            Rule::Cascade => all.filter(|&n| n < s.hot || named(n) && exact(n) * up(n) >= keep[n]).collect(),
            Rule::ExactZero => all.filter(|&n| act(gate[n], 1.0) != 0.0).collect(),
        };
    };
    let score = |n: usize| {
        importance[n]
            * match rule {
                Rule::Gate => exact(n) * up_square[n],
                Rule::LowRank => expected(n) * up(n),
                Rule::Cascade => {
                    if named(n) {
                        exact(n) * up(n)
                    } else {
                        0.0
                    }
                }
                Rule::ExactZero => unreachable!("it has no top-k"),
            }
    };
    let mut best: Vec<usize> = all.filter(|&n| score(n) > 0.0).collect();
    best.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    best.truncate(k);
    best.sort_unstable();
    best
}

fn row(m: Matrix<'_>, r: usize) -> Vec<f32> {
    let mut out = vec![0.0; m.cols()];
    m.dequantize_row(r, &mut out);
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// What is read of numbers that were stored.
fn rounded(format: Format, x: &[f32]) -> Vec<f32> {
    let mut words = vec![0_u32; format.row_bytes(x.len()).div_ceil(4)];
    let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..format.row_bytes(x.len())];
    format.quantize(x, bytes);
    row(Matrix::from_bytes(1, x.len(), format, bytes).unwrap(), 0)
}

/// `w · x`, with `x` in bytes where `w` is quantised.
fn product(w: Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    if w.format().is_quantized() {
        for block in x.chunks_mut(32) {
            let d = block.iter().fold(0.0_f32, |m, v| m.max(v.abs())) / 127.0;
            let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
            block.iter_mut().for_each(|v| *v = d * (*v * inverse).round_ties_even());
        }
    }
    (0..w.rows()).map(|r| dot(&row(w, r), &x) as f32).collect()
}

fn linear(l: &Linear, x: &[f32]) -> Vec<f32> {
    let y = product(l.0.matrix(), x);
    match &l.1 {
        Some(bias) => y.iter().zip(bias).map(|(y, b)| y + b).collect(),
        None => y,
    }
}
