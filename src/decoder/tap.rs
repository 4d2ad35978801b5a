//! A look into the blocks of a forward pass.

/// What calibration and quality sweeps see of every block, and what they may change.
pub trait LayerTap {
    /// Called once per block and run of at most 512 positions, before its attention.
    ///
    /// `x` `[rows, hidden_size]` is what attention reads, the norm's output; `qkv` `[rows, q_dim + 2 · kv_dim]` holds queries,
    /// rotated and scaled by `1/√head_dim`, rotated keys, and values. Rows as in [`Self::ffn`].
    fn attention(&mut self, layer: usize, x: &[f32], qkv: &[f32]) {
        let _ = (layer, x, qkv);
    }

    /// Called once per block and run of at most 512 positions, before the down projection.
    ///
    /// `x` `[rows, hidden_size]` is what the FFN reads, the norm's output; `gate` `[rows, intermediate_size]` is before
    /// shift and activation; `a` `[rows, intermediate_size]` is `act(gate − shift) · up` and may be changed; `y`
    /// `[rows, hidden_size]` is zero on entry and is added to the output. Rows are positions, sequence by sequence;
    /// neurons stand in the order in which the model holds them.
    fn ffn(&mut self, layer: usize, x: &[f32], gate: &[f32], a: &mut [f32], y: &mut [f32]);
}
