//! Values inside the blocks of a forward pass, for whoever measures them.

/// Sees the values inside every block of a forward pass, and may change the activations of its FFN: for calibration and
/// measurements.
///
/// ```
/// use candle_sparse::decoder::{Input, LayerTap, Logits, Scratch, Step};
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// /// How many gates are open, of how many.
/// #[derive(Default)]
/// struct OpenGates(usize, usize);
///
/// impl LayerTap for OpenGates {
///     fn ffn(&mut self, _layer: usize, _x: &[f32], gate: &[f32], _a: &mut [f32], _y: &mut [f32]) {
///         self.0 += gate.iter().filter(|g| **g > 0.0).count();
///         self.1 += gate.len();
///     }
/// }
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
/// # let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let decoder = loaded.model.decoder(); // of a Llama
/// let config = decoder.config();
/// let mut cache = KvCache::new(config, KvConfig::exact(KvDType::F16));
/// let (mut tap, mut logits) = (OpenGates::default(), vec![0.0; config.vocab_size]);
/// let (ids, step, mut scratch) = (Input::Ids(&[5, 6]), Step { batch: 1, seq_len: 2, index_pos: 0 }, Scratch::default());
/// decoder.forward_tapped(ids, step, &mut cache, &mut scratch, &mut tap, Logits::Last, &mut logits)?;
/// assert_eq!(tap.1, 2 * config.num_hidden_layers * config.intermediate_size);
/// assert!(tap.0 > 0 && tap.0 < tap.1);
/// # Ok::<(), candle_core::Error>(())
/// ```
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
