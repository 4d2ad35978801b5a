//! The measured model as GGUF, which llama.cpp and candle's quantised llama open.

use super::source::Source;
use anyhow::Result;
use candle_sparse::Format;
use candle_sparse_models::convert::{GgufModel, Layout};

/// The weights that our engine loads, in `format`.
pub(crate) fn gguf(source: &Source, format: Format, name: &str) -> Result<GgufModel> {
    let layout = Layout::default().with_format(Some(format)).with_neuron_major(None);
    Ok(GgufModel::new(&source.var_builder()?, &source.config()?, layout, name)?)
}

#[cfg(test)]
mod tests {
    use super::super::engines::{CandleQuantized, Ours};
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, gguf_file::Content};
    use candle_sparse::{Threads, Weight};
    use candle_sparse_models::gguf::ggml_type;
    use std::path::Path;

    fn source(format: Format, tied: bool) -> Source {
        // 288 is a multiple of 32 and not of 256.
        let config = serde_json::json!({
            "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64
        });
        Source::random(config.to_string(), format)
    }

    #[test]
    fn the_file_holds_what_our_engine_holds() {
        let dir = tempfile::tempdir().unwrap();
        for (format, tied) in Format::ALL.into_iter().flat_map(|f| [(f, false), (f, true)]) {
            let (source, path) = (source(format, tied), dir.path().join("m.gguf"));
            gguf(&source, format, "m").unwrap().save(&path).unwrap();
            let mut file = std::fs::File::open(&path).unwrap();
            let content = Content::read(&mut file).unwrap();
            assert_eq!(content.tensor_infos.len(), 2 * 9 + if tied { 2 } else { 3 });
            assert_eq!(content.metadata["llama.attention.head_count_kv"].to_u32().unwrap(), 2);
            assert_eq!(content.tensor_infos["output_norm.weight"].ggml_dtype, GgmlDType::F32);
            let vb = source.var_builder().unwrap();
            for (name, rows, cols) in [("ffn_down", 256, 288), ("attn_v", 128, 256)] {
                let t = content.tensor(&mut file, &format!("blk.1.{name}.weight"), &Device::Cpu).unwrap();
                let ours = Weight::from_tensor(&vb.get((rows, cols), name).unwrap(), format).unwrap();
                assert_eq!(t.dtype(), ggml_type(ours.format()), "{name} {format:?}");
                let theirs: Vec<Vec<f32>> = t.dequantize(&Device::Cpu).unwrap().to_vec2().unwrap();
                let mut row = vec![0.0; cols];
                for (i, theirs) in theirs.iter().enumerate() {
                    ours.matrix().dequantize_row(i, &mut row);
                    assert_eq!(&row, theirs, "{name} {format:?} row {i}");
                }
            }
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a temporary file stayed");
    }

    #[test]
    fn candle_says_the_same_with_the_file() {
        for (format, tied, tolerance) in
            [(Format::F32, true, 1e-4), (Format::F32, false, 1e-4), (Format::Q8_0, true, 0.02)]
        {
            let source = source(format, tied);
            let mut ours = Ours::load(&source, Threads::default(), None, 12).unwrap();
            let mut theirs = CandleQuantized::load(&source, Threads::default(), 12).unwrap();
            let (a, b) = (ours.logits(12).unwrap(), theirs.logits(12).unwrap());
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let size = a.iter().fold(0.0_f32, |m, a| m.max(a.abs()));
            assert!(worst < tolerance * size, "{format:?} tied {tied}: {worst} of {size}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let file = gguf(&source(Format::Q4_0, true), Format::Q4_0, "m").unwrap();
        let err = format!("{:#}", file.save(Path::new("/no/such/folder/m.gguf")).unwrap_err());
        assert!(err.contains("/no/such/folder/m.gguf"), "{err}");
    }
}
