//! What a token of an image costs, and how many a second that would be on a board: a projection, nothing was measured there.
//!
//! ```text
//! seconds = multiply-adds · instructions per multiply-add · cycles per instruction / (clock · cores)
//!         + bytes of weights / bandwidth of where they lie
//! ```
//!
//! The two are added: cores without prefetch wait for what they load. Instructions per multiply-add are those that emulators
//! count for our scalar kernels; all else are the makers' numbers and what others have measured, as `docs/microcontrollers.md`
//! says one by one.

use anyhow::{Context, Result};
use candle_sparse_core::{
    KvCache, Scratch,
    ffn::Rule,
    image::{Image, empty_layer},
    weights::{Ffn, LayerWeights},
};
use std::fmt::Write;

/// Multiply-adds and bytes of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Work {
    /// Multiply-adds with weights.
    pub(crate) multiply_adds: f64,
    /// Those of the head among them.
    pub(crate) head: f64,
    /// Multiply-adds with keys and values, where the context is half full.
    pub(crate) past: f64,
    /// Bytes of weights that are read.
    pub(crate) bytes: f64,
}

/// Candidates of a cascade per neuron that becomes active.
const CANDIDATES: f64 = 1.4;

/// What a token costs where blocks that choose their neurons compute the share `active` of them.
pub(crate) fn work(image: &Image<'_>, active: f32) -> Result<Work> {
    let c = image.config();
    let mut layers = vec![empty_layer(); c.num_hidden_layers];
    let model = image.model(&mut layers)?;
    let mut work = Work::default();
    let mut add = |rows: f64, cols: usize, row_bytes: f64| {
        work.multiply_adds += rows * cols as f64;
        work.bytes += rows * row_bytes;
    };
    for layer in model.weights().layers {
        block(layer, f64::from(active), &mut add);
    }
    let head = model.weights().lm_head;
    add(head.rows() as f64, head.cols(), head.format().row_bytes(head.cols()) as f64);
    work.head = (head.rows() * head.cols()) as f64;
    let read = image.settings().positions / 2;
    let read = match model.attention().mode {
        candle_sparse_core::attention::AttentionMode::Dense => read,
        _ => read.min(model.attention().most_pages() * 32),
    };
    work.past = (2 * c.q_dim() * read * c.num_hidden_layers) as f64;
    Ok(work)
}

fn block(l: &LayerWeights<'_>, active: f64, add: &mut impl FnMut(f64, usize, f64)) {
    let mut share = |share: f64, m: candle_sparse_core::Matrix<'_>| {
        add(share * m.rows() as f64, m.cols(), m.format().row_bytes(m.cols()) as f64);
    };
    for p in [l.q_proj, l.k_proj, l.v_proj, l.o_proj] {
        share(1.0, p.weight);
    }
    match &l.ffn {
        Ffn::Dense(ffn) => {
            let all = [ffn.gate_proj, Some(ffn.up_proj), Some(ffn.down_proj)];
            all.into_iter().flatten().for_each(|p| share(1.0, p.weight));
        }
        Ffn::Sparse(ffn, plan) => {
            let rule = plan.map(|p| p.rule);
            let gates = match rule {
                None | Some(Rule::Gate | Rule::ExactZero) => 1.0,
                Some(Rule::LowRank) => active,
                Some(Rule::Cascade) => (CANDIDATES * active).min(1.0),
            };
            share(gates, ffn.gate);
            share(if rule.is_some() { active } else { 1.0 }, ffn.up_down);
            if let Some(p) = ffn.predictor.filter(|_| rule.is_some_and(Rule::predicts)) {
                [p.p, p.q_gate, p.q_up].into_iter().for_each(|m| share(1.0, m));
            }
        }
    }
}

/// Where weights lie on a board.
struct Board {
    name: &'static str,
    /// Hz times cores.
    cycles: f64,
    /// Cycles per multiply-add.
    per_multiply_add: f64,
    /// Bytes a second; infinite for memory that is read as fast as the core computes.
    bandwidth: f64,
    /// Bytes there are for weights.
    room: f64,
}

/// Instructions per multiply-add of our scalar kernels, `Q8_0` (see `docs/microcontrollers.md`), and cycles per instruction of
/// in-order cores with few stalls.
const SCALAR: f64 = 5.2 * 1.3;
/// The same of Xtensa cores.
const XTENSA: f64 = 11.5 * 1.3;
const MB: f64 = 1e6;

const BOARDS: [Board; 7] = [
    Board {
        name: "ESP32-S3, weights in SRAM",
        cycles: 2.0 * 240e6,
        per_multiply_add: XTENSA,
        bandwidth: f64::INFINITY,
        room: 0.3 * MB,
    },
    Board {
        name: "ESP32-S3, octal PSRAM",
        cycles: 2.0 * 240e6,
        per_multiply_add: XTENSA,
        bandwidth: 84.0 * MB,
        room: 8.0 * MB,
    },
    Board {
        name: "ESP32-S3, quad PSRAM",
        cycles: 2.0 * 240e6,
        per_multiply_add: XTENSA,
        bandwidth: 30.0 * MB,
        room: 2.0 * MB,
    },
    Board {
        name: "ESP32-S3, flash",
        cycles: 2.0 * 240e6,
        per_multiply_add: XTENSA,
        bandwidth: 30.0 * MB,
        room: 16.0 * MB,
    },
    Board {
        name: "ESP32-P4, PSRAM",
        cycles: 2.0 * 400e6,
        per_multiply_add: SCALAR,
        bandwidth: 300.0 * MB,
        room: 32.0 * MB,
    },
    Board {
        name: "RP2350, flash",
        cycles: 2.0 * 150e6,
        per_multiply_add: SCALAR,
        bandwidth: 20.0 * MB,
        room: 16.0 * MB,
    },
    Board {
        name: "Pi Zero 2 W, four cores",
        cycles: 4.0 * 1e9,
        per_multiply_add: 0.5,
        bandwidth: 1200.0 * MB,
        room: 300.0 * MB,
    },
];

impl Board {
    /// Seconds of computing and of waiting for memory.
    fn seconds(&self, work: &Work) -> [f64; 2] {
        let compute = (work.multiply_adds + work.past) * self.per_multiply_add / self.cycles;
        [compute, work.bytes / self.bandwidth]
    }
}

/// The cost of a token, the memory it takes, and the projection for every board that holds the image.
pub(crate) fn report(image: &Image<'_>, active: f32) -> Result<String> {
    let work = work(image, active)?;
    let mut layers = vec![empty_layer(); image.config().num_hidden_layers];
    let model = image.model(&mut layers)?;
    let positions = image.settings().positions;
    let words = KvCache::words(&model, positions) + Scratch::elements(&model, positions);
    let groups = Scratch::groups(model.config()) * 256;
    let memory = 4 * (words + model.config().vocab_size) + groups;
    let mut text = String::new();
    writeln!(
        text,
        "a token: {:.3} M multiply-adds with weights (head {:.3} M), {:.3} M with the past; {:.3} MB of weights read",
        work.multiply_adds / 1e6,
        work.head / 1e6,
        work.past / 1e6,
        work.bytes / MB,
    )?;
    writeln!(text, "memory: {:.1} KB for {positions} positions, logits among them", memory as f64 / 1e3)?;
    writeln!(text, "projections, not measured:")?;
    for board in BOARDS.iter().filter(|b| image.len() as f64 <= b.room) {
        let [compute, wait] = board.seconds(&work);
        let bound = if compute > wait { "computing" } else { "memory" };
        let rate = 1.0 / (compute + wait);
        writeln!(text, "  {:30} {rate:8.1} tokens/s, most of it {bound}", board.name).context("text")?;
    }
    Ok(text.trim_end().to_string())
}
