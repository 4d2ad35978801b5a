//! Small integers in fields of bytes: every layout of ggml is one of these.

/// Adds `q` to `bytes`: byte `i` of each `STRIDE` bytes gets elements `i + k·STRIDE` of theirs in its bits `k·BITS..`.
///
/// Only the lowest `BITS` bits of a number are stored; higher ones go to another plane.
#[inline]
pub(super) fn pack<const BITS: usize, const STRIDE: usize>(q: &[u8], bytes: &mut [u8]) {
    let mask = u8::MAX >> (8 - BITS);
    for (bytes, q) in bytes.chunks_exact_mut(STRIDE).zip(q.chunks_exact(STRIDE * 8 / BITS)) {
        for (k, q) in q.chunks_exact(STRIDE).enumerate() {
            bytes.iter_mut().zip(q).for_each(|(byte, q)| *byte |= (q & mask) << (k * BITS));
        }
    }
}

/// The inverse of [`pack`]: adds the fields to `q`, each shifted left by `shift`.
#[inline]
pub(super) fn unpack<const BITS: usize, const STRIDE: usize>(bytes: &[u8], shift: usize, q: &mut [u8]) {
    let mask = u8::MAX >> (8 - BITS);
    for (bytes, q) in bytes.chunks_exact(STRIDE).zip(q.chunks_exact_mut(STRIDE * 8 / BITS)) {
        for (k, q) in q.chunks_exact_mut(STRIDE).enumerate() {
            q.iter_mut().zip(bytes).for_each(|(q, byte)| *q |= ((byte >> (k * BITS)) & mask) << shift);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_ggml_has_them() {
        let q = core::array::from_fn::<u8, 256, _>(|e| (e * 7 % 64) as u8);
        let (mut low, mut high) = ([0; 128], [0; 64]);
        pack::<4, 64>(&q, &mut low);
        pack::<2, 32>(&q.map(|q| q >> 4), &mut high);
        for e in 0..256 {
            let (half, e) = (e / 128, e % 128);
            let want = q[half * 128 + e];
            assert_eq!(low[half * 64 + e % 64] >> (e / 64 * 4) & 0x0f, want & 0x0f);
            assert_eq!(high[half * 32 + e % 32] >> (e / 32 * 2) & 3, want >> 4);
        }
        let mut back = [0; 256];
        unpack::<4, 64>(&low, 0, &mut back);
        unpack::<2, 32>(&high, 4, &mut back);
        assert_eq!(back, q);
    }
}
