//! Writes 64 greedy tokens of the image that is a part of the program, and a checksum of all their logits.
//!
//! The same source runs on the host and in emulators of three architectures: the lines that do not begin with `#` must be
//! equal byte for byte.
#![cfg_attr(bare, no_std, no_main)]

#[cfg(bare)]
mod bare;
mod generate;
#[cfg(not(bare))]
mod host;

/// The image, where a linker puts constants: in flash.
static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("IMAGE")));

/// At a multiple of 16 bytes, as images want it.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

#[cfg(not(bare))]
fn main() {
    host::main();
}
