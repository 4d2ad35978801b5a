//! Numbers that tell one model from another.
//!
//! Of every tensor that a profile or a saved cache depends on, 64 elements are taken: eight runs of eight, from the first row
//! to the last. So the fingerprint costs next to nothing beside reading the tensors, and whatever changes a whole matrix of any
//! block, as merging a `LoRA` does, changes it too. It cannot see a change of a few elements, nor one that is smaller than the
//! rounding of the formats that are compared.
//!
//! ```text
//! fingerprint = embedding, then per block the nine tensors of NAMES; NaN for a gate that an FFN has not
//! tensor      = how much its format rounds, 64 elements
//! ```
//!
//! Profiles from before this have eight numbers of each norm and of the first block's gate, and are compared by these.

use super::Profile;
use crate::{
    Error,
    weight::{Part, format_of},
};
use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sparse_core::Format;

/// Runs of elements taken of a tensor, and their length.
const RUNS: usize = 8;
const RUN: usize = 8;
/// Numbers of a tensor.
const ENTRY: usize = 1 + RUNS * RUN;
/// Tensors of a block.
const NAMES: [&str; 9] = [
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
const INPUT_NORM: usize = 0;
const POST_NORM: usize = 5;
const GATE: usize = 6;
const UP: usize = 7;
const DOWN: usize = 8;
/// Numbers of a tensor in old profiles.
const OLD_ENTRY: usize = 8;
/// Of two formats that round nothing; sums in F16 are not exact near zero.
const LEAST_DIFFERENCE: f32 = 1e-5;

/// The fingerprint of a model, noted tensor by tensor as they are read: `[tensors, 65]`, see
/// [`fingerprint()`] and [`difference`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sparse::profile::{Fingerprint, difference};
///
/// let mut model = Fingerprint::default();
/// let embedding = Tensor::ones((64, 8), DType::F32, &Device::Cpu)?;
/// model.note("model.embed_tokens", &embedding.into(), None)?;
/// assert_eq!(model.numbers().len(), 65);
///
/// let mut other = model.numbers().to_vec();
/// other[10] = 2.0;
/// let difference = difference(model.numbers(), &other).expect("an element is another");
/// assert!(difference.contains("model.embed_tokens"), "{difference}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fingerprint(Vec<f32>);

impl Fingerprint {
    /// A fingerprint that was noted before, to be completed.
    #[must_use]
    pub fn new(numbers: Vec<f32>) -> Self {
        Self(numbers)
    }

    /// What was noted; NaN where a tensor is still missing.
    #[must_use]
    pub fn numbers(&self) -> &[f32] {
        &self.0
    }

    /// Notes the tensor `name`, without `.weight`; one that does not matter is passed over. With an `order`, neuron i of an FFN
    /// is neuron `order[i]` of the tensor.
    ///
    /// # Errors
    /// The tensor is no vector or matrix, not on the CPU, or of a dtype that is not read.
    pub fn note(&mut self, name: &str, part: &Part, order: Option<&[u32]>) -> Result<()> {
        let moved = |i: usize| order.map_or(i, |order| order[i] as usize);
        let Some((layer, name)) = place(name) else { return Ok(()) };
        let Some(layer) = layer else { return self.take(0, part, false, |at| at) };
        let entry = |i: usize| 1 + layer * NAMES.len() + i;
        if name == "mlp.up_down_proj" {
            // Row after row a neuron's up and down.
            let [rows, cols] = shape(part)?;
            let inner = rows / 2;
            self.sample(entry(UP), part, [inner, cols], false, |[n, c]| [2 * n, c])?;
            return self.sample(entry(DOWN), part, [cols, inner], false, |[r, n]| [2 * n + 1, r]);
        }
        if name == "mlp.down_rows" {
            let [inner, hidden] = shape(part)?;
            return self.sample(entry(DOWN), part, [hidden, inner], false, |[r, n]| [n, r]);
        }
        let Some(i) = NAMES.iter().position(|n| *n == name) else { return Ok(()) };
        // Hugging Face and GGUF order the rows of a head differently, but for the first and the last.
        let ends = matches!(name, "self_attn.q_proj" | "self_attn.k_proj");
        self.take(entry(i), part, ends, |[r, c]| match i {
            GATE | UP => [moved(r), c],
            DOWN => [r, moved(c)],
            _ => [r, c],
        })
    }

    fn take(
        &mut self,
        entry: usize,
        part: &Part,
        ends: bool,
        at: impl Fn([usize; 2]) -> [usize; 2],
    ) -> Result<()> {
        self.sample(entry, part, shape(part)?, ends, at)
    }

    /// Writes an entry from a tensor that means `shape`, whose element `[row, column]` lies at `at`.
    fn sample(
        &mut self,
        entry: usize,
        part: &Part,
        [rows, cols]: [usize; 2],
        ends: bool,
        at: impl Fn([usize; 2]) -> [usize; 2],
    ) -> Result<()> {
        let start = entry * ENTRY;
        if self.0.len() < start + ENTRY {
            self.0.resize(start + ENTRY, f32::NAN);
        }
        let mut reader = Reader { part, row: None };
        let numbers = &mut self.0[start..start + ENTRY];
        numbers.fill(0.0);
        numbers[0] = rounding(part);
        let width = RUN.min(cols);
        for (i, run) in numbers[1..].chunks_exact_mut(RUN).enumerate() {
            let last = |n: usize| n.saturating_sub(1);
            let row = if ends { i % 2 * last(rows) } else { i * last(rows) / last(RUNS) };
            let first = i * (cols - width) / last(RUNS);
            for (j, number) in run.iter_mut().take(width).enumerate() {
                *number = reader.element(at([row, first + j]))?;
            }
        }
        Ok(())
    }
}

/// Which block a tensor belongs to and its name there; `None` of the embedding's block.
fn place(name: &str) -> Option<(Option<usize>, &str)> {
    if name == "model.embed_tokens" {
        return Some((None, name));
    }
    let (layer, name) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((Some(layer.parse().ok()?), name))
}

fn shape(part: &Part) -> Result<[usize; 2]> {
    match part {
        Part::Weight(w) => Ok([w.rows(), w.cols()]),
        Part::Tensor(t) if t.rank() == 1 => Ok([1, t.elem_count()]),
        Part::Tensor(t) => t.dims2().map(|(rows, cols)| [rows, cols]),
    }
}

/// Single elements; a row of a weight is decoded once for those of it that follow each other.
struct Reader<'a> {
    part: &'a Part,
    row: Option<(usize, Vec<f32>)>,
}

impl Reader<'_> {
    fn element(&mut self, [row, col]: [usize; 2]) -> Result<f32> {
        match self.part {
            Part::Tensor(t) => {
                let t = if t.rank() == 1 { t.clone() } else { t.get(row)? };
                t.narrow(0, col, 1)?.to_dtype(DType::F32)?.squeeze(0)?.to_scalar()
            }
            Part::Weight(w) => {
                let (_, values) = match self.row.take_if(|(held, _)| *held == row) {
                    Some(held) => self.row.insert(held),
                    None => {
                        let mut values = vec![0.0; w.cols()];
                        w.matrix().dequantize_row(row, &mut values);
                        self.row.insert((row, values))
                    }
                };
                Ok(values[col])
            }
        }
    }
}

/// How far, relative to the whole, elements of a tensor may be from those that were rounded. Plain formats never round more;
/// of blocks it is some two times what they do on weights of a normal distribution.
fn rounding(part: &Part) -> f32 {
    let format = match part {
        Part::Weight(w) => w.format(),
        Part::Tensor(t) => format_of(t.dtype()).unwrap_or(Format::F32),
    };
    match format {
        Format::F32 => 0.0,
        Format::F16 => 1.0 / 2048.0,
        Format::BF16 => 1.0 / 256.0,
        Format::Q8_0 => 0.02,
        Format::Q6K => 0.05,
        Format::Q5_1 | Format::Q5_0 | Format::Q5K => 0.1,
        Format::Q4_1 | Format::Q4_0 | Format::Q4K => 0.2,
        Format::Q3K => 0.35,
        Format::Q2K => 0.5,
    }
}

/// The fingerprint of a checkpoint with Hugging Face names, as [`Fingerprint::numbers`] gives it.
///
/// Cost: each tensor is read whole, one at a time; where they are read anyway, [`Fingerprint::note`] costs less. The
/// embedding and the matrices of attention are left out where the backend of `vb` gives no tensor without being told its shape.
///
/// ```
/// use candle_core::Device;
/// use candle_sparse::{Profile, loading, profile::fingerprint};
///
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu");
/// let vb = loading::var_builder(&[format!("{folder}/model.safetensors")], None, &Device::Cpu)?;
/// // 4 blocks of 512 neurons, 256 elements wide.
/// let numbers = fingerprint(&vb, 4, 256, 512)?;
/// Profile::load(format!("{folder}/sparse.safetensors"))?.belongs_to(&numbers)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A norm, or up or down of an FFN, is missing.
pub fn fingerprint(
    vb: &VarBuilder<'_>,
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
) -> Result<Vec<f32>> {
    let mut all = Fingerprint::default();
    let mut add = |name: &str, tensor: Tensor| all.note(name, &tensor.into(), None);
    let any = |name: &str| vb.get_unchecked_dtype(&format!("{name}.weight"), vb.dtype()).ok();
    any("model.embed_tokens").map_or(Ok(()), |t| add("model.embed_tokens", t))?;
    let (hidden, inner) = (hidden_size, intermediate_size);
    for layer in 0..num_hidden_layers {
        for (i, name) in NAMES.iter().enumerate() {
            let name = format!("model.layers.{layer}.{name}");
            let weight = format!("{name}.weight");
            let tensor = match i {
                INPUT_NORM | POST_NORM => Some(vb.get(hidden, &weight)?),
                GATE if !vb.contains_tensor(&weight) => None,
                GATE | UP => Some(vb.get((inner, hidden), &weight)?),
                DOWN => Some(vb.get((hidden, inner), &weight)?),
                _ => any(&name),
            };
            tensor.map_or(Ok(()), |t| add(&name, t))?;
        }
    }
    Ok(all.0)
}

/// How two fingerprints of models of one shape differ, in words; `None` where they do not, beyond what their formats round.
///
/// Tensors that one of them has not noted yet (NaN) are left out.
///
/// ```
/// use candle_sparse::profile::difference;
///
/// // One tensor: how much its format rounds, and 64 elements.
/// let mut a = [1.0; 65];
/// a[0] = 0.001;
/// let mut b = a;
/// b[1] = 1.001;
/// assert_eq!(difference(&a, &b), None);
/// b[1] = 2.0;
/// assert!(difference(&a, &b).is_some());
/// ```
#[must_use]
pub fn difference(a: &[f32], b: &[f32]) -> Option<String> {
    for (i, (a, b)) in a.chunks(ENTRY).zip(b.chunks(ENTRY)).enumerate() {
        let (Some((rounds_a, a)), Some((rounds_b, b))) = (a.split_first(), b.split_first()) else { continue };
        if rounds_a.is_nan() || rounds_b.is_nan() {
            continue;
        }
        // What is not finite must be the same.
        let apart = |(a, b): (&f32, &f32)| if a.to_bits() == b.to_bits() { 0.0 } else { (a - b) * (a - b) };
        let size = |v: &[f32]| v.iter().filter(|v| v.is_finite()).map(|v| v * v).sum::<f32>().sqrt();
        let apart = a.iter().zip(b).map(apart).sum::<f32>().sqrt();
        // A file may say what it wants, but not that everything is rounding.
        let rounds = [rounds_a, rounds_b].map(|r| r.clamp(0.0, 0.5));
        let (size, rounded) = (size(a).max(size(b)), rounds[0] + rounds[1] + LEAST_DIFFERENCE);
        if apart.is_nan() || apart > rounded * size {
            let (percent, rounded) = (100.0 * apart / size, 100.0 * rounded);
            return Some(format!(
                "{} differs by {percent:.2} % in the elements that were compared, rounding explains {rounded:.2} %",
                entry_name(i)
            ));
        }
    }
    None
}

fn entry_name(i: usize) -> String {
    match i.checked_sub(1) {
        None => "model.embed_tokens".into(),
        Some(i) => format!("model.layers.{}.{}", i / NAMES.len(), NAMES[i % NAMES.len()]),
    }
}

impl Profile {
    /// Refuses a model, by the numbers of its [`Fingerprint`], that the profile was not made for; tensors that are not noted there
    /// yet (NaN) are left out.
    ///
    /// # Errors
    /// [`Error::WrongModel`]: the fingerprints differ by more than rounding. A profile with a fingerprint of the first kind is
    /// compared by norms and one row only.
    pub fn belongs_to(&self, model: &[f32]) -> Result<()> {
        let layers = self.blocks();
        let expected = ENTRY * (1 + NAMES.len() * layers);
        let problem = match self.fingerprint.len() {
            n if n == OLD_ENTRY * (1 + 2 * layers) => self.old_difference(model),
            n if n == expected && model.len() <= expected => difference(&self.fingerprint, model),
            n => Some(format!("its fingerprint has {n} numbers, that of this model {}", model.len())),
        };
        let Some(problem) = problem else { return Ok(()) };
        let problem = format!(
            "{problem}: take the one that belongs to this checkpoint, or make it with `calibrate`; CANDLE_SPARSE=off runs dense"
        );
        Err(Error::WrongModel { what: "the profile", problem }.into())
    }

    /// Rounding is forgiven: norms to BF16, the row of a gate to any of ggml's formats.
    fn old_difference(&self, model: &[f32]) -> Option<String> {
        let norms = (0..self.layers.len()).flat_map(|l| [INPUT_NORM, POST_NORM].map(|i| (l, i)));
        let entries = std::iter::once((0, GATE)).chain(norms).map(|(l, i)| 1 + l * NAMES.len() + i);
        for (n, (entry, a)) in entries.zip(self.fingerprint.chunks(OLD_ENTRY)).enumerate() {
            let Some((rounds, b)) = model.get(entry * ENTRY..).and_then(<[f32]>::split_first) else {
                continue;
            };
            if rounds.is_nan() {
                continue;
            }
            let largest = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let tolerance = if n == 0 { largest / 2.0 } else { largest / 128.0 };
            if !a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance) {
                return Some(format!("{} differs", entry_name(entry)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
