//! Ctrl-C ends what is being written, not the program.

use anyhow::{Context, Result};
use signal_hook::{consts::SIGINT, flag};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Whether Ctrl-C came since [`Self::listen`]; the second one ends the program, and so does any while nobody listens.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C.
    pub(crate) fn new() -> Result<Self> {
        let came = Arc::new(AtomicBool::new(true));
        let code = i32::from(super::cli::output::INTERRUPTED);
        // In this order: the first of them sees what the signals before have set.
        flag::register_conditional_shutdown(SIGINT, code, came.clone()).context("cannot listen to Ctrl-C")?;
        flag::register(SIGINT, came.clone()).context("cannot listen to Ctrl-C")?;
        Ok(Self(came))
    }

    /// From now on Ctrl-C is noted.
    pub(crate) fn listen(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// From now on Ctrl-C ends the program.
    pub(crate) fn let_end(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it came.
    pub(crate) fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
