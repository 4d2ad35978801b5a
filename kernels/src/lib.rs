//! The operations of [`candle_sparse_core`] at the speed of the CPU they run on.
//!
//! | level | needs | file |
//! |---|---|---|
//! | `scalar` | nothing | `candle_sparse_core::kernel` |
//! | `avx2` | AVX2, FMA, F16C | `arch/avx2.rs` |
//! | `avx512` | also AVX-512 F, BW, DQ, VL, VNNI | `arch/avx512.rs` |
//! | `neon` | aarch64 | `arch/neon.rs` |
//! | `neon_dotprod` | also `FEAT_DotProd` | `arch/neon.rs` |
//!
//! Each kernel body stands once in `kernel/`, generic over the narrow trait `Isa`; `arch/` implements that trait per
//! instruction set, and `table.rs` compiles every body once per level behind `#[target_feature]`. [`Kernels::get`]
//! picks the best level at run time; `CANDLE_SPARSE_LEVEL` forces one.
//!
//! To add a kernel: a scalar function and a method in `candle_sparse_core::KernelSet`, a body in `kernel/`, a line in
//! `table.rs`, a suite in `tests/`. Kernels never allocate, log or spawn.
//!
//! What to look for in the assembly of a hot kernel (`cargo asm`, or `objdump -d` of a bench): no `call` inside the
//! loop (a body that failed to inline runs without its instruction set), and no load that merges into an accumulator
//! register (a false dependency across iterations).

mod arch;
mod format;
mod isa;
mod kernel;
mod kernels;
mod level;

pub use candle_sparse_core::KernelSet;
pub use kernels::Kernels;
pub use level::{Level, LevelError};
