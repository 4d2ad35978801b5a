//! Profiles as tensors: in a file of their own, or among the tensors of a checkpoint.
//!
//! | tensor | shape, dtype |
//! |---|---|
//! | `model.sparse.shares` | `[points]` F32 |
//! | `model.sparse.fitted` | `[3]` U32 |
//! | `model.sparse.held_out` | `[4]` U32: for gate, low-rank and cascade 1 where the target is kept; the number of the best rule, 3 for none |
//! | `model.sparse.fingerprint` | `[n]` F32 |
//! | `model.sparse.recall_shares` | `[blocks, kv_heads]` F32, where recall was calibrated |
//! | `model.layers.N.mlp.predictor.order` | `[intermediate_size]` U32 |
//! | `….predictor.p` | `[rank, hidden_size]` F16, none of rank 0 |
//! | `….predictor.{q_gate,q_up}` | `[intermediate_size, rank]` F16, none of rank 0 |
//! | `….predictor.{gate_variance,up_variance,up_square,importance}` | `[intermediate_size]` F32 |
//! | `….predictor.{gate,low_rank,cascade}.{candidate,keep,share}` | `[points]` F32 |
//! | `….predictor.{gate,low_rank,cascade}.hot` | `[points]` U32 |
//! | `….predictor.{gate,low_rank,cascade}.bias` | `[points, hidden_size]` F32 |
//!
//! A profile of attention alone has the last two of `model.sparse` and nothing of `mlp`.
//!
//! Where gates were fitted, every block has one, and maybe its cell ([`FastGrnnGate`](crate::FastGrnnGate)), F32:
//!
//! | tensor | shape |
//! |---|---|
//! | `model.layers.N.self_attn.gate.ridge` | `[kv_heads, hidden_size]` |
//! | `….gate.{bias,threshold}` | `[kv_heads]` |
//! | `….gate.w1`, `….gate.w2` | `[hidden, rank_w]`, `[rank_w, hidden_size]` |
//! | `….gate.u1`, `….gate.u2` | `[hidden, rank_u]`, `[rank_u, hidden]` |
//! | `….gate.{b_z,b_h}` | `[hidden]` |
//! | `….gate.{w_g,w_u}`, `….gate.{u_g,u_u}` | `[hidden, hidden_size]`, `[hidden, hidden]`: an imported cell, instead of the above |
//! | `….gate.{b_g,b_u}` | `[hidden]`: as well |
//! | `….gate.zeta_nu` | `[2]` |
//! | `….gate.readout` | `[kv_heads, hidden]`; without, a state counts by its norm |

use super::{
    HeldOut, LayerProfile, LayerRule, Profile, Rule, gates,
    tensors::{put, vector},
};
use crate::{Error as Reason, input::check_json, loading, save::save};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use std::{collections::HashMap, io::Write, path::Path};

/// The key of the JSON text in a profile's metadata.
const ABOUT: &str = "candle_sparse_profile";
const SHARES: &str = "model.sparse.shares";
const HELD_OUT: &str = "model.sparse.held_out";
const FITTED: &str = "model.sparse.fitted";
const FINGERPRINT: &str = "model.sparse.fingerprint";
const RECALL_SHARES: &str = "model.sparse.recall_shares";

impl Profile {
    /// Reads a profile file.
    ///
    /// # Errors
    /// The file is no profile, of a later format, truncated or corrupt, or its tensors do not fit together.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let read = || {
            let vb = loading::var_builder(&[path], Some(DType::F32), &Device::Cpu)?;
            let Some(mut profile) = Self::from_tensors(&vb)? else {
                bail!(
                    "this is no profile, it has no tensor {SHARES} or {RECALL_SHARES}: make one with `calibrate`"
                )
            };
            if let Some(about) = loading::metadata(path)?.get(ABOUT) {
                profile.set_about(about)?;
            }
            Ok(profile)
        };
        read().map_err(|e| match Reason::of(&e) {
            Some(Reason::File { .. }) => e,
            _ => {
                let problem = e.to_string().lines().next().unwrap_or_default().to_string();
                Reason::File { path: path.into(), problem }.into()
            }
        })
    }

    /// Reads a profile that is part of the program.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let len = bytes.first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
        let header = usize::try_from(len).ok().and_then(|len| bytes.get(8..8_usize.checked_add(len)?));
        check_json(header.unwrap_or_default())?;
        let vb = VarBuilder::from_slice_safetensors(bytes, DType::F32, &Device::Cpu)?;
        let Some(mut profile) = Self::from_tensors(&vb)? else {
            bail!("profile: has no tensor {SHARES} or {RECALL_SHARES}")
        };
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(Error::wrap)?;
        if let Some(about) = header.metadata().as_ref().and_then(|m| m.get(ABOUT)) {
            profile.set_about(about)?;
        }
        Ok(profile)
    }

    /// The profile among the tensors of a checkpoint; `None` where there is none.
    ///
    /// # Errors
    /// Its tensors do not fit together.
    pub fn from_tensors(vb: &VarBuilder<'_>) -> Result<Option<Self>> {
        // A backend that makes its tensors, such as candle's zeros, says that it has whatever it is asked for.
        let there = [SHARES, RECALL_SHARES].map(|name| vb.contains_tensor(name));
        if there == [false; 2] || vb.contains_tensor("candle_sparse.no_such_tensor") {
            return Ok(None);
        }
        // What it is where nothing else follows.
        let mut profile = Self::of_attention_alone(read_recall_shares(vb)?, Vec::new());
        if there[0] {
            profile.shares = vector(vb, SHARES)?;
            let fitted: Vec<u32> = vector(vb, FITTED)?;
            let Ok(fitted) = <[u32; 3]>::try_from(fitted) else { bail!("{FITTED} has not 3 elements") };
            profile.fitted = fitted.map(|f| f as usize);
            while vb.contains_tensor(&format!("{}.order", prefix(profile.layers.len()))) {
                profile.layers.push(read_layer(vb, profile.layers.len())?);
            }
            profile.held_out = read_held_out(vb)?;
        }
        profile.fingerprint = vector(vb, FINGERPRINT)?;
        profile.gates = gates::read(vb, profile.blocks())?;
        profile.check()?;
        Ok(Some(profile))
    }

    /// Writes a profile file; one that was there is replaced when the new one is whole.
    ///
    /// # Errors
    /// Those of [`Self::to_bytes`] and of [`save`](crate::save::save()).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let bytes = self.to_bytes()?;
        save(path, |file| Ok(file.write_all(&bytes)?))
    }

    /// The content of a profile file.
    ///
    /// # Errors
    /// Those of [`Self::check`]: what would not be read is not written.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut tensors = HashMap::new();
        self.write(&mut tensors)?;
        let about = HashMap::from([(ABOUT.to_string(), self.about.to_string())]);
        safetensors::serialize(&tensors, Some(about)).map_err(Error::wrap)
    }

    fn set_about(&mut self, text: &str) -> Result<()> {
        check_json(text.as_bytes()).map_err(|e| Error::msg(format!("metadata {ABOUT} {e}")))?;
        self.about = serde_json::from_str(text).map_err(|e| Error::msg(format!("metadata {ABOUT}: {e}")))?;
        self.check()
    }

    fn write(&self, out: &mut HashMap<String, Tensor>) -> Result<()> {
        put(out, FINGERPRINT, &self.fingerprint, &[self.fingerprint.len()])?;
        gates::write(&self.gates, out)?;
        if let Some(heads) = self.recall_shares.first().map(Vec::len) {
            put(out, RECALL_SHARES, &self.recall_shares.concat(), &[self.blocks(), heads])?;
        }
        if self.is_of_attention_alone() {
            return Ok(());
        }
        let points = self.shares.len();
        put(out, SHARES, &self.shares, &[points])?;
        put(out, FITTED, &self.fitted.map(|f| f as u32), &[3])?;
        let HeldOut { kept, best } = self.held_out;
        let [gate, low_rank, cascade] = kept.map(u32::from);
        put(out, HELD_OUT, &[gate, low_rank, cascade, best.map_or(3, |rule| rule as u32)], &[4])?;
        for (i, l) in self.layers.iter().enumerate() {
            let (at, inner) = (prefix(i), l.order.len());
            let [hidden, _] = self.shape(i);
            put(out, &format!("{at}.order"), &l.order, &[inner])?;
            // Without a prediction there are no tensors of it.
            for (name, v, dims) in [
                ("p", &l.p, [l.rank, hidden]),
                ("q_gate", &l.q_gate, [inner, l.rank]),
                ("q_up", &l.q_up, [inner, l.rank]),
            ] {
                if l.rank == 0 {
                    continue;
                }
                let t = Tensor::from_slice(v, &dims, &Device::Cpu)?.to_dtype(DType::F16)?;
                out.insert(format!("{at}.{name}"), t);
            }
            for (name, v) in l.vectors() {
                put(out, &format!("{at}.{name}"), v, &[inner])?;
            }
            for (rule, r) in Rule::ALL.iter().zip(&l.rules) {
                let at = format!("{at}.{}", rule.name());
                for (name, v) in [("candidate", &r.candidate), ("keep", &r.keep), ("share", &r.share)] {
                    put(out, &format!("{at}.{name}"), v, &[points])?;
                }
                put(out, &format!("{at}.hot"), &r.hot, &[points])?;
                put(out, &format!("{at}.bias"), &r.bias, &[points, hidden])?;
            }
        }
        Ok(())
    }
}

impl LayerProfile {
    pub(super) fn vectors(&self) -> [(&'static str, &Vec<f32>); 4] {
        [
            ("gate_variance", &self.gate_variance),
            ("up_variance", &self.up_variance),
            ("up_square", &self.up_square),
            ("importance", &self.importance),
        ]
    }
}

fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.predictor")
}

/// `[blocks][kv_heads]`; none where recall was not calibrated.
fn read_recall_shares(vb: &VarBuilder<'_>) -> Result<Vec<Vec<f32>>> {
    if !vb.contains_tensor(RECALL_SHARES) {
        return Ok(Vec::new());
    }
    let shares = vb.get_unchecked_dtype(RECALL_SHARES, DType::F32)?;
    match shares.dims() {
        [_, heads] if *heads > 0 => shares.to_vec2(),
        dims => bail!("{RECALL_SHARES} has shape {dims:?}, expected [blocks, kv_heads]"),
    }
}

/// Profiles made before this tensor have none.
fn read_held_out(vb: &VarBuilder<'_>) -> Result<HeldOut> {
    if !vb.contains_tensor(HELD_OUT) {
        return Ok(HeldOut::default());
    }
    let numbers: Vec<u32> = vector(vb, HELD_OUT)?;
    let [gate, low_rank, cascade, best] = numbers[..] else {
        bail!("{HELD_OUT} has {} elements, expected 4", numbers.len())
    };
    let kept = [gate, low_rank, cascade].map(|k| k != 0);
    match (Rule::ALL.get(best as usize), best) {
        (Some(&rule), _) if kept[rule as usize] => Ok(HeldOut { kept, best: Some(rule) }),
        (None, 3) => Ok(HeldOut { kept, best: None }),
        _ => bail!("{HELD_OUT} is {numbers:?}: the best rule is none of those that keep the target"),
    }
}

fn read_layer(vb: &VarBuilder<'_>, layer: usize) -> Result<LayerProfile> {
    let at = prefix(layer);
    let f32s = |name: &str| vector::<f32>(vb, &format!("{at}.{name}"));
    let or_none = |name: &str| {
        let there = vb.contains_tensor(&format!("{at}.{name}"));
        if there { f32s(name) } else { Ok(Vec::new()) }
    };
    let p = format!("{at}.p");
    let rank = if vb.contains_tensor(&p) { vb.get_unchecked_dtype(&p, DType::F32)?.dims2()?.0 } else { 0 };
    let rule = |rule: Rule| -> Result<LayerRule> {
        let name = rule.name();
        Ok(LayerRule {
            candidate: f32s(&format!("{name}.candidate"))?,
            keep: f32s(&format!("{name}.keep"))?,
            share: f32s(&format!("{name}.share"))?,
            hot: vector(vb, &format!("{at}.{name}.hot"))?,
            bias: f32s(&format!("{name}.bias"))?,
        })
    };
    Ok(LayerProfile {
        order: vector(vb, &format!("{at}.order"))?,
        rank,
        p: or_none("p")?,
        q_gate: or_none("q_gate")?,
        q_up: or_none("q_up")?,
        gate_variance: f32s("gate_variance")?,
        up_variance: f32s("up_variance")?,
        up_square: f32s("up_square")?,
        importance: f32s("importance")?,
        rules: [rule(Rule::Gate)?, rule(Rule::LowRank)?, rule(Rule::Cascade)?],
    })
}
