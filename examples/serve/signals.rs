//! What ends the server: Ctrl-C, SIGTERM, or that there is no engine any more.

use crate::{cli::output, engine::Handle};
use futures_util::future::{Either, select};
use std::{future::Future, pin::pin, time::Duration};

/// How often it is looked whether the engine lives.
const LOOK: Duration = Duration::from_millis(500);

/// Waits for the end. From then on another signal ends the program at once.
pub(crate) async fn stop(engine: Handle) {
    let (came, dead) = (pin!(signal()), pin!(dead(engine)));
    if let Either::Left(_) = select(came, dead).await {
        tokio::spawn(async {
            signal().await;
            std::process::exit(i32::from(output::INTERRUPTED));
        });
    }
}

async fn dead(engine: Handle) {
    while engine.is_alive() {
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(unix)]
fn signal() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    async {
        let Ok(mut terminate) = signal(SignalKind::terminate()) else { return interrupt().await };
        let (ctrl_c, terminated) = (pin!(interrupt()), pin!(terminate.recv()));
        select(ctrl_c, terminated).await;
    }
}

#[cfg(not(unix))]
fn signal() -> impl Future<Output = ()> {
    interrupt()
}

async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        // Without that only SIGTERM, or the system, ends the program.
        std::future::pending::<()>().await;
    }
}
