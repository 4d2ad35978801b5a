//! What goes wrong in a step, kept to the sequences that it concerns.

use candle_core::Result;
use candle_sparse::error::plain;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a step was not done.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// An error: caches are as they were.
    Error(String),
    /// A mistake of ours: what the step was to change is in no state to go on with.
    Panic(String),
}

impl Failure {
    pub(super) fn text(self) -> String {
        match self {
            Self::Error(text) => text,
            Self::Panic(text) => format!("the step panicked: {}: please report this", plain(&text)),
        }
    }
}

/// What `step` gives, or how it failed.
///
/// A panic ends the sequences that the step worked on, which are given up with all that the step has touched.
pub(super) fn caught<T>(step: impl FnOnce() -> Result<T>) -> core::result::Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(done) => done.map_err(|error| Failure::Error(crate::pretrained::first_line(&error))),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(Failure::Panic(text.unwrap_or_else(|| "for no reason that was given".into())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_panics_are_told_apart() {
        assert_eq!(caught(|| Ok(7)).unwrap(), 7);
        let error = caught(|| -> Result<()> { candle_core::bail!("no room") }).unwrap_err();
        assert!(matches!(&error, Failure::Error(text) if text == "no room"), "{error:?}");
        let panic = caught(|| -> Result<()> { panic!("at {}", 3) }).unwrap_err();
        assert!(matches!(panic, Failure::Panic(_)));
        assert_eq!(panic.text(), "the step panicked: at 3: please report this");
    }
}
