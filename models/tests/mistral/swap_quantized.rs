//! One program in the shape of candle's Mistral example, with and without `--quantized`, against candle's modules and ours.

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use std::{collections::HashMap, fs::File, path::Path};

macro_rules! program {
    ($name:ident, $mistral:path, $quantized:path) => {
        mod $name {
            use candle_core::{DType, Device, Result, Tensor};
            use candle_nn::VarBuilder;
            use candle_transformers::generation::LogitsProcessor;
            use mistral::{Config, Model as Mistral};
            use quantized_mistral::Model as QMistral;
            use std::path::{Path, PathBuf};
            use tokenizers::Tokenizer;
            use {$mistral as mistral, $quantized as quantized_mistral};

            enum Model {
                Mistral(Mistral),
                Quantized(QMistral),
            }

            struct TextGeneration {
                model: Model,
                device: Device,
                tokenizer: Tokenizer,
                logits_processor: LogitsProcessor,
                repeat_penalty: f32,
                repeat_last_n: usize,
            }

            impl TextGeneration {
                fn run(&mut self, prompt: &str, sample_len: usize) -> Result<String> {
                    let mut tokens = self.tokenizer.encode(prompt, true).unwrap().get_ids().to_vec();
                    let eos_token = self.tokenizer.token_to_id("</s>").unwrap();
                    for index in 0..sample_len {
                        let context_size = if index > 0 { 1 } else { tokens.len() };
                        let start_pos = tokens.len().saturating_sub(context_size);
                        let ctxt = &tokens[start_pos..];
                        let input = Tensor::new(ctxt, &self.device)?.unsqueeze(0)?;
                        let logits = match &mut self.model {
                            Model::Mistral(m) => m.forward(&input, start_pos)?,
                            Model::Quantized(m) => m.forward(&input, start_pos)?,
                        };
                        let logits = logits.squeeze(0)?.squeeze(0)?.to_dtype(DType::F32)?;
                        let logits = if self.repeat_penalty == 1. {
                            logits
                        } else {
                            let start_at = tokens.len().saturating_sub(self.repeat_last_n);
                            candle_transformers::utils::apply_repeat_penalty(
                                &logits,
                                self.repeat_penalty,
                                &tokens[start_at..],
                            )?
                        };
                        let next_token = self.logits_processor.sample(&logits)?;
                        tokens.push(next_token);
                        if next_token == eos_token {
                            break;
                        }
                    }
                    Ok(self.tokenizer.decode(&tokens, true).unwrap())
                }
            }

            pub(super) fn main(
                folder: &Path,
                filenames: &[PathBuf],
                quantized: bool,
                (repeat_penalty, temperature): (f32, Option<f64>),
                prompt: &str,
            ) -> Result<String> {
                let device = Device::Cpu;
                let config: Config =
                    serde_json::from_slice(&std::fs::read(folder.join("config.json"))?).unwrap();
                let model = if quantized {
                    let filename = &filenames[0];
                    let vb =
                        candle_transformers::quantized_var_builder::VarBuilder::from_gguf(filename, &device)?;
                    Model::Quantized(QMistral::new(&config, vb)?)
                } else {
                    let weights = std::fs::read(&filenames[0])?;
                    let vb = VarBuilder::from_buffered_safetensors(weights, DType::F32, &device)?;
                    Model::Mistral(Mistral::new(&config, vb)?)
                };
                let mut pipeline = TextGeneration {
                    model,
                    device,
                    tokenizer: Tokenizer::from_file(folder.join("tokenizer.json")).unwrap(),
                    logits_processor: LogitsProcessor::new(299_792_458, temperature, None),
                    repeat_penalty,
                    repeat_last_n: 64,
                };
                pipeline.run(prompt, 120)
            }
        }
    };
}

program!(with_candle, candle_transformers::models::mistral, candle_transformers::models::quantized_mistral);
program!(with_candle_sparse, candle_sparse_models::mistral, candle_sparse_models::quantized_mistral);

/// The built-in Llama with a head of its own is a Mistral without a window.
fn tensors() -> HashMap<String, Tensor> {
    let mut all = candle_core::safetensors::load(testdata().join("model.safetensors"), &Device::Cpu).unwrap();
    assert!(all.values().all(|t| t.dtype() == DType::F16), "a file in F16 holds them exactly");
    all.insert("lm_head.weight".into(), all["model.embed_tokens.weight"].clone());
    all
}

fn testdata() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tales-silu")
}

/// Configuration and tokenizer.
fn describe(folder: &Path) {
    let json = std::fs::read_to_string(testdata().join("config.json")).unwrap();
    std::fs::write(folder.join("config.json"), json.replace("\"llama\"", "\"mistral\"")).unwrap();
    std::fs::copy(testdata().join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
}

fn gguf(tensors: &HashMap<String, Tensor>, dtype: GgmlDType, path: &Path) {
    let quantized = |(name, t): (&String, &Tensor)| {
        let dtype = if t.rank() == 2 { dtype } else { GgmlDType::F32 };
        (name.clone(), QTensor::quantize(t, dtype).unwrap())
    };
    let tensors: Vec<_> = tensors.iter().map(quantized).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &[], &tensors).unwrap();
}

#[test]
fn only_the_imports_differ() {
    let (dir, tensors) = (tempfile::tempdir().unwrap(), tensors());
    let folder = dir.path();
    describe(folder);
    let [plain, f32, f16] = ["m.safetensors", "f32.gguf", "f16.gguf"].map(|f| folder.join(f));
    candle_core::safetensors::save(&tensors, &plain).unwrap();
    for (path, dtype) in [(&f32, GgmlDType::F32), (&f16, GgmlDType::F16)] {
        gguf(&tensors, dtype, path);
    }
    let prompt = "Once upon a time there was a king who ";
    for (file, quantized) in [(plain, false), (f32, true), (f16, true)] {
        for sampling in [(1.1, None), (1.0, None), (1.1, Some(0.6))] {
            let files = [file.clone()];
            let theirs = with_candle::main(folder, &files, quantized, sampling, prompt).unwrap();
            let ours = with_candle_sparse::main(folder, &files, quantized, sampling, prompt).unwrap();
            assert!(ours.starts_with("Once upon a time") && ours.split_whitespace().count() > 40, "{ours}");
            assert_eq!(ours, theirs, "{file:?} {sampling:?}");
        }
    }
}
