//! The operations of [`candle_sparse_core`] at the speed of the CPU they run on.
//!
//! | level | needs | file |
//! |---|---|---|
//! | `scalar` | nothing | `candle_sparse_core::kernel` |
//! | `avx2` | AVX2, FMA, F16C | `arch/avx2.rs` |
//! | `avx_vnni` | also AVX-VNNI | `arch/avx_vnni.rs` |
//! | `avx512` | AVX2's, and AVX-512 F, BW, DQ, VL, VNNI | `arch/avx512.rs` |
//! | `avx512_bf16` | also AVX-512 BF16, and `CANDLE_SPARSE_LEVEL`: columns of BF16 matrices are rounded to BF16 | `arch/avx512_bf16.rs` |
//! | `neon` | aarch64 | `arch/neon.rs` |
//! | `neon_dotprod` | also `FEAT_DotProd` | `arch/neon.rs` |
//!
//! A body of `kernel/` is written once, generic over a format of `format/` and an instruction set of `arch/`, which are types.
//! Each combination is compiled into a function of its own (a leaf, `Isa::leaf`), behind `#[target_feature]`. [`Kernels::get`] picks the best level at run time; `CANDLE_SPARSE_LEVEL` forces
//! one. Kernels never log or spawn, and allocate only for many columns of floats (`packing.rs`, `format/packed.rs`) and where columns are
//! rounded.
//!
//! What is added where:
//!
//! - an operation: a scalar function and a method in `candle_sparse_core::KernelSet`, a body in `kernel/`, its method in
//!   `kernels.rs`; and a suite in `tests/`;
//! - a format: `Block` and `Element` of its block in `format/`, its name in `Token::run_rows`, and
//!   where it is floats in `Token::packed_len` and `Token::matmul_packed`;
//! - an instruction set: a token and its `Isa` in `arch/`, its lines in `arch/mod.rs` and `level.rs`.
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
mod packing;

pub use candle_sparse_core::KernelSet;
pub use kernels::Kernels;
pub use level::{Level, LevelError};
pub use packing::{PackedColumns, Packing};
