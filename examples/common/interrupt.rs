//! Ctrl-C ends what is being written, not the program; SIGTERM ends the program. Either leaves the terminal as it was.

use anyhow::{Context, Result};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Whether Ctrl-C came since [`Self::listen`]; the second one ends the program, and so does any while nobody listens.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C and SIGTERM.
    pub(crate) fn new() -> Result<Self> {
        let came = Arc::new(AtomicBool::new(true));
        watch(&came).context("cannot listen to Ctrl-C")?;
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

#[cfg(unix)]
#[allow(unused_imports, reason = "not every program edits lines")]
pub(crate) use unix::keep_terminal;
#[cfg(unix)]
use unix::watch;

/// Editing lines does not outlive the program there.
#[cfg(not(unix))]
#[allow(dead_code, reason = "not every program edits lines")]
pub(crate) fn keep_terminal() {}

#[cfg(not(unix))]
fn watch(came: &Arc<AtomicBool>) -> std::io::Result<()> {
    use signal_hook::{consts::SIGINT, flag};
    let code = i32::from(super::cli::output::INTERRUPTED);
    // In this order: the first of them sees what the signals before have set.
    flag::register_conditional_shutdown(SIGINT, code, came.clone())?;
    flag::register(SIGINT, came.clone()).map(drop)
}

#[cfg(unix)]
mod unix {
    use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
        low_level,
    };
    use std::{
        io,
        sync::{
            Arc, Mutex, PoisonError,
            atomic::{AtomicBool, Ordering},
        },
    };

    static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

    /// Remembers how the terminal is set: while a line is edited it is set otherwise.
    #[allow(dead_code, reason = "not every program edits lines")]
    pub(crate) fn keep_terminal() {
        *TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = tcgetattr(io::stdin()).ok();
    }

    /// A thread that waits for signals; what a handler itself may do would not be enough.
    pub(super) fn watch(came: &Arc<AtomicBool>) -> io::Result<()> {
        let (mut signals, came) = (Signals::new([SIGINT, SIGTERM])?, came.clone());
        let wait = move || {
            for signal in signals.forever() {
                if signal == SIGINT && !came.swap(true, Ordering::Relaxed) {
                    continue;
                }
                if let Some(terminal) = &*TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) {
                    // There is nothing else to try.
                    let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, terminal);
                }
                low_level::exit(128 + signal);
            }
        };
        std::thread::Builder::new().name("signals".to_string()).spawn(wait).map(drop)
    }
}
