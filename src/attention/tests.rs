//! What holds for every shape, setting and cut into calls.

use super::*;
use crate::{
    FastGrnnGate, KvConfig, Threads,
    kv_cache::KvDType,
    team::{Outputs, Team},
};
use candle_sparse_core::{Activation, Rope, RopeScaling};
use proptest::prelude::*;
use std::sync::Mutex;

/// Numbers in −1 .. 1 without a pattern.
pub(super) fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 + seed * 104_729) % 10_007).map(|v| v as f32 / 5_003.5 - 1.0).collect()
}

/// A layer's attention with random queries, keys, values and inputs.
#[derive(Clone, Debug)]
struct Case {
    config: Config,
    len: usize,
    select: AttentionConfig,
    kv: KvConfig,
    gates: Vec<FastGrnnGate>,
    /// Of the layer.
    recall_shares: Vec<Vec<f32>>,
    /// `[position][q, k, v]`
    qkv: Vec<Vec<f32>>,
    /// What the gate reads, `[position][hidden_size]`.
    inputs: Vec<Vec<f32>>,
}

impl Case {
    fn new(
        kv_heads: usize,
        group: usize,
        head_dim: usize,
        len: usize,
        select: AttentionConfig,
        sliding_window: Option<usize>,
    ) -> Self {
        let hidden = 8;
        let config = Config {
            hidden_size: hidden,
            intermediate_size: 1,
            vocab_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: kv_heads * group,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: 2048,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window,
        };
        let width = (group + 2) * kv_heads * head_dim;
        let gate =
            FastGrnnGate::new(hidden, noise(kv_heads * hidden, 1), vec![0.0; kv_heads], vec![-0.5; kv_heads]);
        Self {
            len,
            select,
            kv: KvConfig::exact(KvDType::F32),
            gates: vec![gate.unwrap()],
            // Where there is one head it recalls half of the budget; lengths without a remainder of 3 have no head that recalls.
            recall_shares: vec![
                (0..kv_heads)
                    .map(|head| if len.is_multiple_of(3) { 0.0 } else { [0.5, 2.0][head % 2] })
                    .collect(),
            ],
            qkv: (0..len).map(|p| noise(width, p + 2)).collect(),
            inputs: (0..len).map(|p| noise(hidden, 3 * p + 1)).collect(),
            config,
        }
    }

    fn selector(&self) -> Selector<'_> {
        Selector::new(self.select, &self.gates, 1).unwrap().with_recall_shares(&self.recall_shares)
    }

    fn cache(&self) -> KvCache {
        KvCache::new(&self.config, self.kv)
    }

    /// Reads `n` positions as a prompt's part; their results.
    fn prefill(&self, cache: &mut KvCache, n: usize) -> Vec<Vec<f32>> {
        let (start, c, kernels) = (cache.len(), &self.config, Kernels::get().unwrap());
        cache.begin(1, start, n).unwrap();
        let rows: Vec<f32> = self.qkv[start..start + n].concat();
        for p in start..start + n {
            let (k, v) = self.qkv[p][c.q_dim()..].split_at(c.kv_dim());
            cache.write(0, 0, p, k, v);
        }
        self.observe(cache, start, n);
        cache.update_bounds(0, (start + n) / PAGE_LEN);
        let q = Queries { rows: &rows, width: self.qkv[0].len(), seq_len: n, index_pos: start };
        let mut out = vec![0.0; n * c.q_dim()];
        let on = Compute { kernels, threads: Threads::default() };
        attention(on, c, cache, 0, &self.selector(), q, &mut out);
        cache.advance(n);
        out.chunks(c.q_dim()).map(<[f32]>::to_vec).collect()
    }

    fn observe(&self, cache: &mut KvCache, start: usize, n: usize) {
        if let Some(gate) = self.selector().gate(0) {
            cache.observe(
                0,
                0,
                gate,
                Kernels::get().unwrap(),
                start,
                &self.inputs[start..start + n].concat(),
            );
        }
    }

    /// Decodes the next position on `threads` threads.
    fn decode(&self, cache: &mut KvCache, threads: usize) -> Vec<f32> {
        let (position, c, kernels, select) =
            (cache.len(), &self.config, Kernels::get().unwrap(), self.selector());
        cache.update_bounds(0, position / PAGE_LEN);
        let mut plan = PagePlan::default();
        plan.update(&select, cache, [1, c.num_key_value_heads], position);
        let (queries, kv) = self.qkv[position].split_at(c.q_dim());
        let mut kv = kv.to_vec();
        cache.round(&mut kv);
        let (keys, values) = kv.split_at(c.kv_dim());
        let token = Token { cache, select, plan: &plan, layer: 0, position, queries, keys, values };
        let own: Vec<_> =
            (0..threads).map(|_| Mutex::new((LoneScratch::default(), vec![0.0; c.q_dim()]))).collect();
        let mut outputs = Outputs::of(threads);
        declare(c, &select, 0, cache, &mut outputs);
        let team = Threads::new(threads).unwrap();
        let outcome = team.team(&mut Team::default(), &outputs, &own, |member, (scratch, out)| {
            lone_token(member, kernels, c, token, scratch, out)
        });
        assert_eq!(outcome, Ok(()));
        let out = own.into_iter().next().unwrap().into_inner().unwrap().1;
        cache.begin(1, position, 1).unwrap();
        cache.write(0, 0, position, keys, values);
        self.observe(cache, position, 1);
        cache.advance(1);
        out
    }

    /// Everything as prompt parts of these lengths, the last one repeated.
    fn in_parts(&self, parts: &[usize]) -> Vec<Vec<f32>> {
        let (mut cache, mut out) = (self.cache(), Vec::new());
        let lengths = parts.iter().chain(std::iter::repeat(&parts[parts.len() - 1]));
        for &n in lengths {
            if cache.len() == self.len {
                break;
            }
            let left = self.len - cache.len();
            out.extend(self.prefill(&mut cache, n.min(left)));
        }
        out
    }

    /// The definition, in f64, over all positions up to each that the model's sliding window leaves.
    fn reference(&self) -> Vec<Vec<f32>> {
        let window = self.config.sliding_window.unwrap_or(usize::MAX);
        self.masked(|t, p| t - p < window)
    }

    /// The definition, in f64, where token `t` sees the earlier positions `p` that `seen(t, p)` says.
    fn masked(&self, seen: impl Fn(usize, usize) -> bool) -> Vec<Vec<f32>> {
        let c = &self.config;
        let [q_dim, kv_dim, d] = [c.q_dim(), c.kv_dim(), c.head_dim];
        let at = |p: usize, start: usize| &self.qkv[p][start..start + d];
        let head = |t: usize, h: usize| {
            let kv = q_dim + h / c.group_size() * d;
            let dot =
                |p: usize| at(t, h * d).iter().zip(at(p, kv)).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let weights: Vec<f64> = (0..=t).map(|p| if seen(t, p) { dot(p).exp() } else { 0.0 }).collect();
            let total: f64 = weights.iter().sum();
            let value =
                |i| (0..=t).map(|p| weights[p] * f64::from(at(p, kv + kv_dim)[i])).sum::<f64>() / total;
            (0..d).map(|i| value(i) as f32).collect::<Vec<_>>()
        };
        (0..self.len).map(|t| (0..c.num_attention_heads).flat_map(|h| head(t, h)).collect()).collect()
    }
}

fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let off = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs());
    // `f32::max` would pass over a NaN.
    off.fold(0.0, |most, off| if off <= most { most } else { off })
}

/// Each of some hundred additions rounds by 6e-8 of sums of up to 64.
const ROUNDING: f32 = 3e-5;

#[test]
fn a_token_recalls_no_page_that_its_window_has_passed() {
    // Of page 8, the last token is the one that sees nothing of page 3, which the others may recall. It recalls one page, in a
    // share of its own behind the four that are read anyway.
    let select = AttentionConfig::new(AttentionMode::Recall)
        .with_sinks(0)
        .with_window(96)
        .with_budget(32)
        .with_recall(0);
    let mut case = Case::new(1, 2, 16, 9 * PAGE_LEN, select, Some(5 * PAGE_LEN));
    case.recall_shares.clear();
    let (q_dim, d) = (case.config.q_dim(), case.config.head_dim);
    // Queries and the keys of page 3 are such that its bound is the highest.
    case.qkv.iter_mut().for_each(|row| row[..q_dim].fill(1.0));
    case.qkv[3 * PAGE_LEN..4 * PAGE_LEN].iter_mut().for_each(|row| row[q_dim..q_dim + d].fill(2.0));
    let mut cache = case.cache();
    case.prefill(&mut cache, case.len - 1);
    let decoded = case.decode(&mut cache, 1);
    let prefilled = case.in_parts(&[case.len]).pop().unwrap();
    assert!(distance(std::slice::from_ref(&decoded), &[prefilled]) <= ROUNDING);
    // The other candidate is page 4: with it everything that the token sees is read.
    assert!(distance(&[decoded], &[case.reference().pop().unwrap()]) <= ROUNDING);
}

fn mode() -> impl Strategy<Value = AttentionMode> {
    use AttentionMode::{Gated, Recall, Sampled, Window};
    prop_oneof![Just(Window), Just(Gated), Just(Recall), Just(Sampled)]
}

prop_compose! {
    fn case()(
        mode in mode(),
        kv_heads in 1_usize..3,
        group in 1_usize..4,
        head_dim in prop_oneof![Just(16_usize), Just(48), Just(64)],
        len in 1_usize..400,
        sinks in 0_usize..40,
        window in 0_usize..100,
        budget in 0_usize..160,
        recall in 0_usize..70,
        sliding_window in prop_oneof![Just(None), (1_usize..300).prop_map(Some)],
    ) -> Case {
        let select = AttentionConfig::new(mode).with_sinks(sinks).with_window(window).with_budget(budget).with_recall(recall);
        Case::new(kv_heads, group, head_dim, len, select, sliding_window)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn prefill_in_any_parts_equals_decode(case in case(), a in 1_usize..200, b in 1_usize..90) {
        let parts = case.in_parts(&[a, b]);
        let mut cache = case.cache();
        let decoded: Vec<_> = (0..case.len).map(|_| case.decode(&mut cache, 1)).collect();
        prop_assert!(distance(&parts, &decoded) <= ROUNDING);
    }

    #[test]
    fn more_threads_change_nothing(case in case()) {
        let threads = crate::threads::testing::several().count();
        let mut cache = case.cache();
        case.prefill(&mut cache, case.len.div_ceil(2));
        let mut other = cache.clone();
        for _ in cache.len()..case.len {
            prop_assert_eq!(case.decode(&mut cache, 1), case.decode(&mut other, threads));
        }
    }

    #[test]
    fn later_tokens_change_nothing(case in case(), cut in 0.0..1.0) {
        let keep = (case.len as f64 * cut) as usize;
        let mut other = case.clone();
        for p in keep..case.len {
            other.qkv[p] = noise(case.qkv[p].len(), 5_000 + p);
            other.inputs[p] = noise(8, 9_000 + p);
        }
        let (a, b) = (case.in_parts(&[case.len]), other.in_parts(&[case.len]));
        prop_assert_eq!(&a[..keep], &b[..keep]);
        prop_assert!(keep == case.len || a[keep..] != b[keep..]);
    }

    #[test]
    fn what_reads_everything_is_dense(case in case()) {
        let dense = Case { select: AttentionConfig::default(), ..case.clone() };
        let all = dense.in_parts(&[case.len]);
        prop_assert!(distance(&all, &dense.reference()) <= ROUNDING);
        for (window, budget) in [(case.len, 0), (32, 400)] {
            let select = case.select.with_window(window).with_budget(budget);
            if case.select.mode != AttentionMode::Window || window == case.len {
                let wide = Case { select, ..case.clone() };
                prop_assert!(distance(&wide.in_parts(&[77]), &all) <= ROUNDING);
            }
        }
    }

    #[test]
    fn equal_scores_give_the_mean(mut case in case()) {
        let q_dim = case.config.q_dim();
        case.qkv.iter_mut().for_each(|row| row[..q_dim].fill(0.0));
        case.select.mode = AttentionMode::Dense;
        prop_assert!(distance(&case.in_parts(&[50]), &case.reference()) <= ROUNDING);
    }

    #[test]
    fn pages_are_those_that_must_be(case in case(), smaller in 0_usize..160) {
        let mut cache = case.cache();
        case.prefill(&mut cache, case.len);
        let (page, end) = (case.len / PAGE_LEN, case.len.div_ceil(PAGE_LEN));
        let pages = |budget: usize| {
            let select = case.select.with_budget(budget);
            let (selector, mut pages) = (Selector::new(select, &case.gates, 1).unwrap(), Vec::new());
            selector.choose(&cache, [0; 3], page, end, &mut pages);
            pages
        };
        let (all, fewer) = (pages(case.select.budget), pages(smaller.min(case.select.budget)));
        prop_assert!(all.is_sorted_by(|a, b| a < b) && fewer.iter().all(|p| all.contains(p)));
        let first = cache.first_visible(page * PAGE_LEN);
        prop_assert!(all.iter().all(|p| *p as usize >= first / PAGE_LEN), "{:?} before position {}", all, first);
        let wanted = |p: &usize| *p < case.select.sinks || p + case.select.window >= case.len;
        for position in (first..case.len).filter(wanted) {
            prop_assert!(fewer.contains(&((position / PAGE_LEN) as u32)), "position {} of {}", position, case.len);
        }
        let window = case.select.window.div_ceil(PAGE_LEN).max(1) + 1;
        let most = case.select.sinks.div_ceil(PAGE_LEN) + case.select.budget.div_ceil(PAGE_LEN) + window;
        prop_assert!(all.len() <= most, "{} pages, at most {}", all.len(), most);
    }

    #[test]
    fn chunks_and_threads_change_no_bit_of_what_a_sliding_window_leaves(case in case(), a in 1_usize..200, b in 1_usize..90) {
        prop_assert_eq!(case.in_parts(&[a, b]), case.in_parts(&[case.len]));
    }

    #[test]
    fn a_window_mode_is_its_mask(mut case in case()) {
        case.select.mode = AttentionMode::Window;
        let (s, model) = (case.select, case.config.sliding_window.unwrap_or(usize::MAX));
        let pages = |n: usize| n.div_ceil(PAGE_LEN);
        let want = case.masked(|t, p| {
            let (token, page) = (t / PAGE_LEN, p / PAGE_LEN);
            let kept = page < pages(s.sinks) || page + pages(s.window).max(1) >= token;
            t - p < model && kept
        });
        prop_assert!(distance(&case.in_parts(&[70]), &want) <= ROUNDING);
    }

    #[test]
    fn truncated_and_read_again_is_as_never_read(case in case(), cut in 0.0..1.0, more in 0.0..1.0) {
        let (keep, first) = ((case.len as f64 * cut) as usize, (case.len as f64 * more) as usize);
        let mut cache = case.cache();
        let mut other = case.clone();
        for p in keep..case.len {
            other.qkv[p] = noise(case.qkv[p].len(), 5_000 + p);
        }
        if first > keep {
            other.prefill(&mut cache, first);
            cache.truncate(keep);
            if cache.check(1, keep, 1).is_err() {
                // What the sliding window dropped is gone: only the beginning can follow.
                prop_assert!(case.config.sliding_window.is_some() && first - keep > PAGE_LEN);
                cache.clear();
                case.prefill(&mut cache, keep);
            }
        } else if keep > 0 {
            case.prefill(&mut cache, keep);
        }
        let mut fresh = case.cache();
        if keep > 0 {
            case.prefill(&mut fresh, keep);
        }
        for _ in keep..case.len {
            let (a, b) = (case.decode(&mut cache, 1), case.decode(&mut fresh, 1));
            // Where the gate lost a page's inputs it keeps the page, so that only those without a gate are equal.
            if case.select.mode != AttentionMode::Gated {
                prop_assert_eq!(a, b);
            }
        }
    }
}
