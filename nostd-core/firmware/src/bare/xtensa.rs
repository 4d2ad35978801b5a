//! `qemu-system-xtensa -M sim` with its host calls; the start-up code is `xtensa/start.S`.

unsafe extern "C" {
    fn sys_write(fd: i32, bytes: *const u8, len: usize) -> i32;
    safe fn sys_exit(code: i32) -> !;
    safe fn cycles() -> u32;
    safe fn cycle_ns() -> u32;
}

pub(super) fn write(bytes: &[u8]) {
    // SAFETY: the emulator reads `len` bytes, which the slice has.
    unsafe { sys_write(1, bytes.as_ptr(), bytes.len()) };
}

pub(super) fn exit(code: i32) -> ! {
    sys_exit(code)
}

/// With `-icount shift=0` an instruction takes a nanosecond, and these machines count cycles of 100 or 25.
pub(super) fn instructions() -> Option<u64> {
    Some(u64::from(cycles()) * u64::from(cycle_ns()))
}
