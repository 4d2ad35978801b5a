//! Starting the second core.

use crate::two_cores::{Mailbox, TwoCores};
use esp_hal::{
    peripherals::CPU_CTRL,
    system::{CpuControl, Stack},
};
use static_cell::ConstStaticCell;

static MAILBOX: ConstStaticCell<Mailbox> = ConstStaticCell::new(Mailbox::new());
/// A product needs little: rows are summed in place.
static STACK: ConstStaticCell<Stack<8192>> = ConstStaticCell::new(Stack::new());

/// Calls `f` with kernels that use both cores.
pub(crate) fn with_both<T>(control: CPU_CTRL<'static>, f: impl FnOnce(TwoCores<'static>) -> T) -> T {
    let (kernels, mailbox) = TwoCores::new(MAILBOX.take());
    let serve = move || {
        loop {
            mailbox.serve();
        }
    };
    let started = CpuControl::new(control).start_app_core(STACK.take(), serve);
    // The core is parked when the guard is dropped.
    let _guard = started.expect("nothing else starts the second core");
    f(kernels)
}
