//! A machine without an operating system: memory, a panic handler, and per architecture (`bare/`) the start-up code, a way to
//! print, a way to end the emulator with an exit code, and a count of instructions.

#[cfg(target_arch = "arm")]
#[path = "bare/arm.rs"]
mod arch;
#[cfg(target_arch = "riscv32")]
#[path = "bare/riscv32.rs"]
mod arch;
#[cfg(target_arch = "xtensa")]
#[path = "bare/xtensa.rs"]
mod arch;

use crate::generate::{Failure, Machine, Memory, run};
use candle_sparse_core::ActivationGroup;
use core::{
    cell::UnsafeCell,
    fmt::{self, Write},
    panic::PanicInfo,
    sync::atomic::{AtomicBool, Ordering},
};

/// What a program has beside its stack, in units of 256 bytes.
const UNITS: usize = 6 * 1024;
/// What the start-up code fills the stack with.
const PAINT: u32 = 0xA5A5_A5A5;

struct Out;

impl Write for Out {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        arch::write(s.as_bytes());
        Ok(())
    }
}

struct Static(UnsafeCell<[ActivationGroup; UNITS]>);

// SAFETY: `rust_main` alone takes a reference to the cell, and only the first time it is called.
unsafe impl Sync for Static {}

static MEMORY: Static = Static(UnsafeCell::new([ActivationGroup::ZERO; UNITS]));
static TAKEN: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    // Symbols of the linker, whose addresses are what they say; both are aligned to 4.
    static _stack_bottom: u32;
    static _stack_top: u32;
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Out, "PANIC {info}");
    arch::exit(101)
}

/// The exit code of the program.
///
/// # Safety
/// Only the start-up code calls it, once.
#[unsafe(no_mangle)]
unsafe extern "C" fn rust_main() -> i32 {
    if TAKEN.load(Ordering::Relaxed) {
        return 2;
    }
    TAKEN.store(true, Ordering::Relaxed);
    // SAFETY: no other reference to the memory exists or will exist: the flag above lets one call through, and there is one
    // thread and no interrupt.
    let rest = unsafe { &mut *MEMORY.0.get() };
    let machine = Machine { out: Out, memory: Memory { rest }, instructions: arch::instructions };
    let result = run(machine, &crate::IMAGE.0);
    let written = writeln!(Out, "# {} bytes of stack at most", stack_peak());
    match (result, written) {
        (Ok(()), Ok(())) => 0,
        (Err(Failure), _) | (_, Err(_)) => 1,
    }
}

/// Bytes of the stack that were written to: the paint below them is untouched.
fn stack_peak() -> usize {
    let (bottom, top) = (&raw const _stack_bottom, &raw const _stack_top);
    let words = (top.addr() - bottom.addr()) / size_of::<u32>();
    // SAFETY: all words between the two symbols are memory of the stack, which the start-up code has filled.
    let untouched = (0..words).take_while(|&i| unsafe { bottom.add(i).read_volatile() } == PAINT).count();
    (words - untouched) * size_of::<u32>()
}
