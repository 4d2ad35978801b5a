//! `qemu-system-riscv32 -M virt -bios none`: one hart starts at 0x8000_0000; a UART at 0x1000_0000; a device at 0x10_0000 that
//! ends the emulator.

core::arch::global_asm!(
    r#"
    .section .text.start, "ax"
    .global _start
_start:
    la   sp, _stack_top
    la   t0, _bss_start
    la   t1, _bss_end
1:  bgeu t0, t1, 2f
    sw   zero, 0(t0)
    addi t0, t0, 4
    j    1b
2:  la   t0, _stack_bottom
    li   t1, 0xA5A5A5A5
3:  bgeu t0, sp, 4f
    sw   t1, 0(t0)
    addi t0, t0, 4
    j    3b
4:  la   t0, _trap
    csrw mtvec, t0
    call rust_main
    j    _exit
    .p2align 2
_trap:
    li   a0, 97
    .global _exit
_exit:
    li   t0, 0x100000
    li   t1, 0x5555
    beqz a0, 5f
    slli t1, a0, 16
    li   t2, 0x3333
    or   t1, t1, t2
5:  sw   t1, 0(t0)
6:  j    6b
"#
);

unsafe extern "C" {
    safe fn _exit(code: i32) -> !;
}

pub(super) fn write(bytes: &[u8]) {
    let uart = core::ptr::without_provenance_mut::<u8>(0x1000_0000);
    for &byte in bytes {
        // SAFETY: on this machine a store to the address is a byte sent, and touches no memory.
        unsafe { uart.write_volatile(byte) }
    }
}

pub(super) fn exit(code: i32) -> ! {
    _exit(code)
}

/// With `-icount` the emulator counts what it executes.
pub(super) fn instructions() -> Option<u64> {
    let (mut low, mut high, mut again): (u32, u32, u32);
    loop {
        // SAFETY: reads counters, nothing else.
        unsafe {
            core::arch::asm!("csrr {0}, minstreth", "csrr {1}, minstret", "csrr {2}, minstreth",
                out(reg) high, out(reg) low, out(reg) again, options(nomem, nostack));
        }
        if high == again {
            return Some(u64::from(high) << 32 | u64::from(low));
        }
    }
}
