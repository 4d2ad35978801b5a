//! Weights that no training gives: zeros, huge and tiny numbers, NaN and infinity. Each is an error that says so or a result, and
//! the same one at every SIMD level.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

#[path = "llama/cases.rs"]
#[allow(dead_code, reason = "shared with the tests of the Llama")]
mod cases;

use candle_core::{DType, Device, Tensor};
use candle_sparse_kernels::Level;
use candle_sparse_models::{
    Format, KvConfig, KvDType,
    llama::{Cache, Llama, LoadOptions},
};
use cases::{CASES, VOCAB, builder, tokens, weights};
use std::{collections::HashMap, env, fs, process::Command};

const CHILD: &str = "CANDLE_SPARSE_NUMBERS_CHILD";

/// A name, what the names of the tensors hold, and what happens to their numbers.
type Change = (&'static str, &'static str, fn(f32) -> f32);

const CHANGES: [Change; 9] = [
    ("zeros", "", |_| 0.0),
    ("negative zeros", "", |_| -0.0),
    ("subnormal", "", |x| x * 1e-40),
    ("tiny", "", |x| x * 1e-30),
    ("huge", "proj", |x| x * 1e18),
    ("too huge", "", |x| x * 1e38),
    ("NaN", "layers.1.mlp.down_proj", |_| f32::NAN),
    ("infinity", "layers.1.self_attn.q_proj", |x| if x > 0.0 { f32::INFINITY } else { x }),
    ("NaN in a norm", "layers.0.input_layernorm", |x| if x > 1.0 { f32::NAN } else { x }),
];

fn changed(all: &HashMap<String, Tensor>, part: &str, change: fn(f32) -> f32) -> HashMap<String, Tensor> {
    let new = |(name, tensor): (&String, &Tensor)| {
        let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        if name.contains(part) {
            values.iter_mut().for_each(|value| *value = change(*value));
        }
        (name.clone(), Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap())
    };
    all.iter().map(new).collect()
}

/// The logits of a prompt and of tokens after it, or the error; what kind of number each NaN is does not matter.
fn said(w: &HashMap<String, Tensor>, format: Option<Format>) -> String {
    let config = CASES[0].config();
    let run = || {
        let options = LoadOptions::default().with_format(format);
        let model = Llama::load_with(builder(w, DType::F32), &config, options)?;
        let mut cache = Cache::of(&model, KvConfig::exact(KvDType::F32));
        let mut all: Vec<f32> = model.forward(&tokens(1, 12, 1), 0, &mut cache)?.flatten_all()?.to_vec1()?;
        let mut logits = vec![0.0; VOCAB];
        for position in 12..15 {
            model.decode(7, position, &mut cache, &mut logits)?;
            all.extend(&logits);
        }
        Ok::<_, candle_core::Error>(all)
    };
    match run() {
        Err(e) => format!("error {}", e.to_string().lines().next().unwrap()),
        Ok(all) => all
            .iter()
            .map(|v| if v.is_nan() { "nan ".into() } else { format!("{:x} ", v.to_bits()) })
            .collect(),
    }
}

/// The other process, which has one SIMD level: writes what each model says, line by line.
#[test]
fn child() {
    let Ok(path) = env::var(CHILD) else { return };
    let all = weights(&CASES[0].config(), DType::F32);
    let mut lines = String::new();
    for (_, part, change) in CHANGES {
        let w = changed(&all, part, change);
        for format in [None, Some(Format::Q8_0), Some(Format::Q4_0)] {
            lines += &said(&w, format);
            lines.push('\n');
        }
    }
    fs::write(path, lines).unwrap();
}

fn at(level: Level) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "child"]).env(CHILD, file.path()).env("CANDLE_SPARSE_LEVEL", level.name());
    assert!(child.output().unwrap().status.success(), "{}", level.name());
    fs::read_to_string(file.path()).unwrap().lines().map(str::to_string).collect()
}

/// Of a logit: NaN, infinite, or near a number.
fn kind(logit: &str) -> Option<f32> {
    let value = f32::from_bits(u32::from_str_radix(logit, 16).ok()?);
    Some(value)
}

fn close(a: &str, b: &str) -> bool {
    match (kind(a), kind(b)) {
        (None, None) => true,
        (Some(a), Some(b)) => a == b || (a - b).abs() <= 1e-3 * a.abs().max(b.abs()).max(1.0),
        _ => false,
    }
}

#[test]
fn results_are_defined_and_the_same_at_every_level() {
    let levels: Vec<_> = Level::ALL.into_iter().filter(|level| level.is_supported()).collect();
    let said: Vec<_> = levels.iter().map(|level| at(*level)).collect();
    let names = CHANGES
        .iter()
        .flat_map(|(name, ..)| ["F32", "Q8_0", "Q4_0"].map(|format| format!("{name} in {format}")));
    for (i, what) in names.enumerate() {
        let scalar = &said[0][i];
        println!("{what}: {}", &scalar[..scalar.len().min(60)]);
        for (level, lines) in levels.iter().zip(&said).skip(1) {
            let name = level.name();
            // Vectors add up in one order, the scalar definition in another.
            assert_eq!(lines[i], said[1][i], "{what}: {name} against {}", levels[1].name());
            let (ours, theirs): (Vec<_>, Vec<_>) =
                (lines[i].split(' ').collect(), scalar.split(' ').collect());
            assert_eq!(ours.len(), theirs.len(), "{what}: {name}");
            let far = ours.iter().zip(&theirs).position(|(a, b)| a != b && !close(a, b));
            assert_eq!(
                far,
                None,
                "{what}: {name} against scalar: {} {}",
                ours[far.unwrap_or(0)],
                theirs[far.unwrap_or(0)]
            );
        }
    }
}
