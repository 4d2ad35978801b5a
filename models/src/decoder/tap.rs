//! A look into the FFNs of a forward pass.

/// What calibration and quality sweeps see of every FFN, and what they may change.
pub trait FfnTap {
    /// Called once per block and run of at most 512 positions, before the down projection.
    ///
    /// `x` `[rows, hidden_size]` is what the FFN reads, the norm's output; `gate` `[rows, intermediate_size]` is before
    /// shift and activation; `a` `[rows, intermediate_size]` is `act(gate − shift) · up` and may be changed; `y`
    /// `[rows, hidden_size]` is zero on entry and is added to the output. Rows are positions, sequence by sequence;
    /// neurons stand in the order in which the model holds them.
    fn ffn(&mut self, layer: usize, x: &[f32], gate: &[f32], a: &mut [f32], y: &mut [f32]);
}
