//! The profile that a model is loaded with.

use crate::decoder::{Extras, LoadOptions};
use crate::{FfnMode, Profile, Selection, SparseConfig};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::Config;
use std::sync::Arc;

/// The profile to load with, checked; `None` also where the environment says so.
pub(super) fn profile(
    vb: &VarBuilder<'_>,
    options: &mut LoadOptions,
    c: &Config,
    extras: Extras,
    notices: &mut Vec<String>,
) -> Result<Option<Arc<Profile>>> {
    options.sparse.check()?;
    match wanted(std::env::var("CANDLE_SPARSE").ok().as_deref())? {
        Wanted::Off => {
            if options.profile.is_some() {
                notices.push("CANDLE_SPARSE=off: the profile is ignored".to_string());
            }
            options.sparse.mode = FfnMode::Dense;
            return Ok(None);
        }
        Wanted::Always => options.sparse.force = true,
        Wanted::On => {}
    }
    let profile = match &options.profile {
        Some(profile) => Arc::clone(profile),
        None => match Profile::from_tensors(vb)? {
            Some(profile) => Arc::new(profile),
            None => {
                let problem =
                    "settings without a profile: give LoadOptions one, or calibrate the model first";
                check_without(&options.sparse, problem, c, extras)?;
                return Ok(None);
            }
        },
    };
    if profile.is_of_attention_alone() {
        let problem = "these settings need what a profile knows of the FFN, this one is of attention alone: calibrate the FFN too";
        check_without(&options.sparse, problem, c, extras)?;
        profile.check_model(c)?;
        return Ok(Some(profile));
    }
    if extras.mlp_bias {
        bail!("profile: it serves FFNs without biases, the model has mlp_bias: load it without the profile");
    }
    profile.check_model(c)?;
    if options.sparse.mode == FfnMode::ExactZero {
        check_zeros(c, extras)?;
    }
    Ok(Some(profile))
}

/// Settings that nothing was learned for.
fn check_without(sparse: &SparseConfig, problem: &str, c: &Config, extras: Extras) -> Result<()> {
    match sparse {
        SparseConfig { mode: FfnMode::ExactZero, .. } => check_zeros(c, extras),
        SparseConfig { mode: FfnMode::Dense, .. }
        | SparseConfig { mode: FfnMode::Auto, selection: Selection::Fitted, guard: None, .. } => Ok(()),
        _ => bail!("sparse: {problem}"),
    }
}

/// Exact zeros, where they were asked for.
fn check_zeros(c: &Config, extras: Extras) -> Result<()> {
    if !c.hidden_act.has_exact_zeros() {
        bail!(
            "sparse: exact-zero needs an activation that shuts neurons (relu, relu2, fatrelu, drelu), the model has {:?}: \
             calibrate it and use a rule of its profile",
            c.hidden_act
        );
    }
    if extras.mlp_bias {
        bail!("sparse: exact-zero serves FFNs without biases, the model has mlp_bias: it runs dense only");
    }
    Ok(())
}

/// What `CANDLE_SPARSE` says.
#[derive(Debug, PartialEq)]
enum Wanted {
    Off,
    On,
    Always,
}

fn wanted(value: Option<&str>) -> Result<Wanted> {
    match value {
        None | Some("on") => Ok(Wanted::On),
        Some("off") => Ok(Wanted::Off),
        Some("always") => Ok(Wanted::Always),
        Some(other) => bail!("CANDLE_SPARSE={other}: say on, off or always, or leave it unset"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Wanted, wanted};

    #[test]
    fn the_environment_says_on_off_or_always() {
        assert_eq!(wanted(None).unwrap(), Wanted::On);
        assert_eq!(
            ["on", "off", "always"].map(|v| wanted(Some(v)).unwrap()),
            [Wanted::On, Wanted::Off, Wanted::Always]
        );
        let err = wanted(Some("0")).unwrap_err().to_string();
        assert!(err.contains("CANDLE_SPARSE=0") && err.contains("on, off or always"), "{err}");
    }
}
