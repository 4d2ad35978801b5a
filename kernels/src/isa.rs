//! What a kernel body may ask of an instruction set: vectors of f32, and exact byte products whose lanes belong to blocks.
//!
//! No weight format is known here. Four lanes belong to a block, as in `ActivationGroup`; blocks come in fours.

use bytemuck::must_cast;
use half::{bf16, f16};

/// A kernel body, written once for all instruction sets.
pub(crate) trait Kernel {
    type Output;

    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// A vector instruction set. A value of the type is the proof that the CPU has it.
///
/// Arguments are array references, so bodies need no unsafe code. `i` is the index of a vector: elements
/// `i · LANES .. (i + 1) · LANES` of an array of numbers, bytes `4 · i · LANES ..` of an array of bytes, and of four blocks those
/// whose lanes vector `i` has.
pub(crate) trait Isa: Copy {
    /// `LANES` numbers.
    type V: Copy;
    /// `4 · LANES` bytes: four of each lane.
    type B: Copy;
    /// `LANES` sums of byte products, or factors of such sums.
    type S: Copy;
    /// Numbers per vector: 4, 8 or 16.
    const LANES: usize;
    /// Whether a tile of sixteen rows holds two columns in registers, not one.
    const PAIRS: bool;
    /// Columns whose 32 sums stay in registers (1 to 4, or 8).
    const COLUMNS_T: usize;

    /// Runs a body as a function of its own, compiled for this instruction set.
    fn leaf<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::V;
    fn splat_f16(self, x: f16) -> Self::V;
    /// Each number in the four lanes of a block.
    fn splat_four(self, x: [f16; 4], i: usize) -> Self::V;
    fn load<const N: usize>(self, x: &[f32; N], i: usize) -> Self::V;
    fn load_f16(self, x: &[f16; 32], i: usize) -> Self::V;
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> Self::V;
    /// Two numbers in a lane, as [`Self::round_pairs`] makes them.
    #[inline(always)]
    fn load_pairs(self, x: &[bf16; 64], i: usize) -> Self::V {
        self.load(&must_cast::<_, [f32; 32]>(*x), i)
    }
    fn load_i8(self, x: &[i8; 32], i: usize) -> Self::V;
    /// `16 · (q − 8)` for the nibbles q of `x`: the low one of byte `j` is element `j`, the high one `j + 16`.
    fn load_nibbles(self, x: &[u8; 16], i: usize) -> Self::V;
    fn store<const N: usize>(self, v: Self::V, x: &mut [f32; N], i: usize);
    /// Rounds `x · scale` (in −127..=127, halves to even) into `out`.
    fn store_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The numbers of `a`, then those of `b`, rounded to BF16: two in a lane.
    #[inline(always)]
    fn round_pairs(self, a: Self::V, b: Self::V) -> Self::V {
        pairs::round(self, a, b)
    }
    /// `acc + Σ w · x` over the two BF16s of a lane, the second first.
    #[inline(always)]
    fn add_pairs(self, w: Self::V, x: Self::V, acc: Self::V) -> Self::V {
        pairs::add(self, w, x, acc)
    }
    /// The larger; a NaN in `b` stays NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; a NaN in `b` stays NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, v: Self::V) -> Self::V;
    /// To the nearest integer, halves to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `x · 2^n` for integral `n` in −252..=254, rounded once where `x` is near 1.
    fn scale2(self, x: Self::V, n: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y` (also where a or b is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `x` in the lanes of vector `i` of 32 elements whose bit is set, else `y`.
    fn select_bits(self, bits: u32, i: usize, x: Self::V, y: Self::V) -> Self::V;
    fn reduce_add(self, v: Self::V) -> f32;
    fn reduce_max(self, v: Self::V) -> f32;

    fn load_bytes(self, x: &[i8; 64], i: usize) -> Self::B;
    fn store_bytes(self, v: Self::B, x: &mut [i8; 64], i: usize);
    /// The first and the second half of each block.
    fn load_halves(self, blocks: [&[i8; 32]; 4], i: usize) -> [Self::B; 2];
    /// Of 16 bytes per block a field of each byte, moved up by `up` bits (down if negative) to where `mask` has ones.
    fn fields(self, blocks: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> Self::B;
    /// `byte` where a block's word has a one, else 0.
    fn bits(self, words: [u16; 4], byte: u8, i: usize) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Lane `t` of each block, in all its four lanes.
    fn spread(self, x: Self::B) -> [Self::B; 4];
    /// Lane `t` of each block of four rows: lane `r` of each block of result `t`.
    fn turn(self, rows: [Self::B; 4]) -> [Self::B; 4];

    /// Signed bytes as [`Self::dot`] wants them with 8 bits, maybe 128 larger.
    fn biased(self, w: Self::B) -> Self::B;
    /// What products with [`Self::biased`] bytes have too little, from `−Σ x`.
    fn bias(self, neg_sums: Self::S) -> Self::S;
    /// `Σ w · x` over the four bytes of a lane of one or two pairs, exact; `w` is biased (8 bits) or 0..=63, `x` free of −128.
    fn dot<const N: usize>(self, bits: u32, w: [Self::B; N], x: [Self::B; N]) -> Self::S;
    /// `sums + Σ w · x` over four pairs, as [`Self::dot`]; `w` has at most `bits` bits.
    fn dot_four(self, bits: u32, sums: Self::S, w: [Self::B; 4], x: [Self::B; 4]) -> Self::S;
    fn zero_sums(self) -> Self::S;
    fn load_sums(self, x: &[i32; 16], i: usize) -> Self::S;
    fn add_sums(self, a: Self::S, b: Self::S) -> Self::S;
    /// `sums · 2^SHIFT`.
    fn shift_sums<const SHIFT: u32>(self, sums: Self::S) -> Self::S;
    /// The four lanes of each block of four vectors added up: one lane per block, in the blocks' order.
    fn sum_blocks(self, sums: [Self::S; 4]) -> Self::S;
    fn sums_to_f32(self, sums: Self::S) -> Self::V;

    // Numbers of blocks, one lane each: lane `l` of vector `q` has number `(q · LANES + l) % 4` of four `(q · LANES + l) / 4`.
    fn load_fours(self, x: [&[f32; 4]; 4], q: usize) -> Self::V;
    fn load_four_sums(self, x: [&[i32; 4]; 4], q: usize) -> Self::S;
    fn widen_fours(self, x: [[f16; 4]; 4], q: usize) -> Self::V;
    /// [`Self::widen_fours`] of f16s that are word `AT` of blocks of `N` words.
    #[inline(always)]
    fn widen_words<const N: usize, const AT: usize>(self, x: [&[[u16; N]; 4]; 4], q: usize) -> Self::V {
        self.widen_fours(fours::<N, AT>(x), q)
    }
    fn bytes_to_f32(self, x: [[u8; 4]; 4], q: usize) -> Self::V;
    fn signed_to_f32(self, x: [[u8; 4]; 4], q: usize) -> Self::V;
    /// `16 / LANES` such vectors, with fours and numbers exchanged; others stay.
    fn turn_fours(self, v: [Self::V; 4]) -> [Self::V; 4];
    /// A number per block, in its four lanes of vector `i`.
    fn spread_four(self, x: &[f32; 4], i: usize) -> Self::V;
    fn spread_four_sums(self, x: &[i32; 4], i: usize) -> Self::S;
    /// `Σ_b v[b, r]` of `16 / LANES` vectors whose lane `4b + r` it is: (b₀ + b₂) + (b₁ + b₃).
    fn sum_fours(self, v: [Self::V; 4]) -> [f32; 4];
}

/// Pairs of BF16s on any instruction set, number by number: what an instruction for them is compared with.
pub(crate) mod pairs {
    use super::Isa;
    use bytemuck::must_cast;
    use half::bf16;

    pub(crate) fn round<I: Isa>(isa: I, a: I::V, b: I::V) -> I::V {
        let (mut numbers, mut rounded) = ([0.0_f32; 32], [bf16::ZERO; 32]);
        isa.store(a, &mut numbers, 0);
        isa.store(b, &mut numbers, 1);
        for (r, x) in rounded.iter_mut().zip(numbers) {
            *r = bf16::from_f32(x);
        }
        isa.load(&must_cast::<_, [f32; 16]>(rounded), 0)
    }

    pub(crate) fn add<I: Isa>(isa: I, w: I::V, x: I::V, acc: I::V) -> I::V {
        let [mut ws, mut xs, mut sums] = [[0.0; 16]; 3];
        isa.store(w, &mut ws, 0);
        isa.store(x, &mut xs, 0);
        isa.store(acc, &mut sums, 0);
        let (ws, xs): ([[bf16; 2]; 16], [[bf16; 2]; 16]) = (must_cast(ws), must_cast(xs));
        for (sum, (w, x)) in sums.iter_mut().zip(ws.into_iter().zip(xs)) {
            *sum = w[1].to_f32().mul_add(x[1].to_f32(), *sum);
            *sum = w[0].to_f32().mul_add(x[0].to_f32(), *sum);
        }
        isa.load(&sums, 0)
    }
}

/// Word `AT` of each of four times four blocks.
#[inline(always)]
pub(crate) fn fours<const N: usize, const AT: usize>(x: [&[[u16; N]; 4]; 4]) -> [[f16; 4]; 4] {
    let mut fours = [[f16::ZERO; 4]; 4];
    for (four, x) in fours.iter_mut().zip(x) {
        for (number, block) in four.iter_mut().zip(x) {
            *number = f16::from_bits(block[AT]);
        }
    }
    fours
}
