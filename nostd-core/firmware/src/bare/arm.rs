//! `qemu-system-arm -M mps2-an386` (a Cortex-M4F) with semihosting.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

core::arch::global_asm!(
    r#"
    .syntax unified
    .section .vectors, "a"
    .long _stack_top
    .long _start
    .rept 14
    .long _fault
    .endr
    .text
    .thumb_func
    .type _fault, %function
    .global _fault
_fault:
    movs r0, #97
    b    _exit
    .thumb_func
    .type _start, %function
    .global _start
_start:
    ldr  r0, =0xE000ED88        // switch the FPU on
    ldr  r1, [r0]
    orr  r1, r1, #0xF00000
    str  r1, [r0]
    dsb
    isb
    ldr  r0, =_data_start
    ldr  r1, =_data_end
    ldr  r2, =_data_load
1:  cmp  r0, r1
    bhs  2f
    ldr  r3, [r2], #4
    str  r3, [r0], #4
    b    1b
2:  ldr  r0, =_bss_start
    ldr  r1, =_bss_end
    movs r2, #0
3:  cmp  r0, r1
    bhs  4f
    str  r2, [r0], #4
    b    3b
4:  ldr  r0, =_stack_bottom
    mov  r1, sp
    ldr  r2, =0xA5A5A5A5
5:  cmp  r0, r1
    bhs  6f
    str  r2, [r0], #4
    b    5b
6:  bl   rust_main
    .thumb_func
    .type _exit, %function
    .global _exit
_exit:
    ldr  r1, =0x20026
    push {{r0}}
    push {{r1}}
    mov  r1, sp
    movs r0, #0x20
    bkpt 0xAB
7:  b    7b
"#
);

unsafe extern "C" {
    safe fn _exit(code: i32) -> !;
}

/// A semihosting call; `block` has what the call reads.
fn call(operation: usize, block: &[usize; 3]) -> usize {
    let result: usize;
    // SAFETY: the emulator reads the block and what it points to, which live through the call; the two calls used here write
    // no memory of the program.
    unsafe {
        core::arch::asm!("bkpt 0xAB", inout("r0") operation => result, in("r1") block.as_ptr(), options(nostack));
    }
    result
}

pub(super) fn write(bytes: &[u8]) {
    const OPEN: usize = 1;
    const WRITE: usize = 5;
    static CONSOLE: AtomicUsize = AtomicUsize::new(0);
    if CONSOLE.load(Ordering::Relaxed) == 0 {
        // For writing: mode 4. There is no handle that is open from the beginning.
        CONSOLE.store(call(OPEN, &[b":tt\0".as_ptr().addr(), 4, 3]), Ordering::Relaxed);
    }
    call(WRITE, &[CONSOLE.load(Ordering::Relaxed), bytes.as_ptr().expose_provenance(), bytes.len()]);
}

pub(super) fn exit(code: i32) -> ! {
    _exit(code)
}

/// With `-icount shift=0` an instruction takes a nanosecond, and SysTick counts the 25 MHz of this machine down.
pub(super) fn instructions() -> Option<u64> {
    const NS_PER_TICK: u64 = 40;
    const MASK: u32 = 0x00ff_ffff;
    // Ticks so far and the counter when they were read, which is often enough for 24 bits: once per token.
    static TICKS: AtomicU32 = AtomicU32::new(0);
    static LAST: AtomicU32 = AtomicU32::new(0);
    let [control, reload, value] =
        [0xE000_E010, 0xE000_E014, 0xE000_E018].map(core::ptr::without_provenance_mut::<u32>);
    // SAFETY: these are the registers of the core's own timer, which nothing else uses.
    let now = unsafe {
        if control.read_volatile() & 1 == 0 {
            reload.write_volatile(MASK);
            value.write_volatile(0);
            control.write_volatile(5);
            LAST.store(MASK, Ordering::Relaxed);
        }
        value.read_volatile()
    };
    let passed = LAST.load(Ordering::Relaxed).wrapping_sub(now) & MASK;
    LAST.store(now, Ordering::Relaxed);
    TICKS.store(TICKS.load(Ordering::Relaxed).wrapping_add(passed), Ordering::Relaxed);
    Some(u64::from(TICKS.load(Ordering::Relaxed)) * NS_PER_TICK)
}
