//! One program in the shape of candle's `quantized` example, compiled against candle's module and against ours.

use crate::convert::Built;
use candle_core::quantized::GgmlDType;
use candle_sparse::Format;
use candle_sparse_models::convert::Layout;
use std::path::Path;

#[derive(Clone, Copy)]
struct Args {
    sample_len: usize,
    split_prompt: bool,
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
    repeat_penalty: f32,
    /// What was said before belongs to the next prompt.
    chat: bool,
}

const ARGS: Args = Args {
    sample_len: 60,
    split_prompt: false,
    temperature: 0.0,
    top_k: None,
    top_p: None,
    repeat_penalty: 1.1,
    chat: false,
};

macro_rules! program {
    ($name:ident, $model:path) => {
        mod $name {
            use super::Args;
            use candle_core::{
                Device, Result, Tensor,
                quantized::{ggml_file, gguf_file},
            };
            use candle_transformers::generation::{LogitsProcessor, Sampling};
            use model::ModelWeights;
            use std::{fs::File, path::Path};
            use tokenizers::Tokenizer;
            use $model as model;

            fn load(model_path: &Path, device: &Device) -> Result<ModelWeights> {
                let mut file = File::open(model_path)?;
                match model_path.extension().and_then(|v| v.to_str()) {
                    Some("gguf") => {
                        let model =
                            gguf_file::Content::read(&mut file).map_err(|e| e.with_path(model_path))?;
                        let mut total_size_in_bytes = 0;
                        for (_, tensor) in model.tensor_infos.iter() {
                            let elem_count = tensor.shape.elem_count();
                            total_size_in_bytes +=
                                elem_count * tensor.ggml_dtype.type_size() / tensor.ggml_dtype.block_size();
                        }
                        assert!(total_size_in_bytes > 0);
                        ModelWeights::from_gguf(model, &mut file, device)
                    }
                    _ => {
                        let model = ggml_file::Content::read(&mut file, device)
                            .map_err(|e| e.with_path(model_path))?;
                        ModelWeights::from_ggml(model, 1)
                    }
                }
            }

            fn sampling(args: &Args) -> Sampling {
                let temperature = args.temperature;
                if temperature <= 0. {
                    return Sampling::ArgMax;
                }
                match (args.top_k, args.top_p) {
                    (None, None) => Sampling::All { temperature },
                    (Some(k), None) => Sampling::TopK { k, temperature },
                    (None, Some(p)) => Sampling::TopP { p, temperature },
                    (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
                }
            }

            pub(super) fn main(
                model_path: &Path,
                tokenizer: &Tokenizer,
                prompts: &[&str],
                args: &Args,
            ) -> Result<Vec<String>> {
                let device = Device::Cpu;
                let mut model = load(model_path, &device)?;
                let mut said = Vec::new();
                let mut pre_prompt_tokens = vec![];
                for prompt_str in prompts {
                    let tokens = tokenizer.encode(*prompt_str, true).unwrap();
                    let prompt_tokens = [&pre_prompt_tokens, tokens.get_ids()].concat();
                    let to_sample = args.sample_len.saturating_sub(1);
                    let prompt_tokens = if prompt_tokens.len() + to_sample > model::MAX_SEQ_LEN - 10 {
                        let to_remove = prompt_tokens.len() + to_sample + 10 - model::MAX_SEQ_LEN;
                        prompt_tokens[prompt_tokens.len().saturating_sub(to_remove)..].to_vec()
                    } else {
                        prompt_tokens
                    };
                    let mut all_tokens = vec![];
                    let mut logits_processor = LogitsProcessor::from_sampling(299_792_458, sampling(args));
                    let mut next_token = if !args.split_prompt {
                        let input = Tensor::new(prompt_tokens.as_slice(), &device)?.unsqueeze(0)?;
                        let logits = model.forward(&input, 0)?;
                        logits_processor.sample(&logits.squeeze(0)?)?
                    } else {
                        let mut next_token = 0;
                        for (pos, token) in prompt_tokens.iter().enumerate() {
                            let input = Tensor::new(&[*token], &device)?.unsqueeze(0)?;
                            let logits = model.forward(&input, pos)?;
                            next_token = logits_processor.sample(&logits.squeeze(0)?)?;
                        }
                        next_token
                    };
                    all_tokens.push(next_token);
                    let eos_token = *tokenizer.get_vocab(true).get("</s>").unwrap();
                    for index in 0..to_sample {
                        let input = Tensor::new(&[next_token], &device)?.unsqueeze(0)?;
                        let logits = model.forward(&input, prompt_tokens.len() + index)?;
                        let logits = logits.squeeze(0)?;
                        let logits = if args.repeat_penalty == 1. {
                            logits
                        } else {
                            let start_at = all_tokens.len().saturating_sub(64);
                            candle_transformers::utils::apply_repeat_penalty(
                                &logits,
                                args.repeat_penalty,
                                &all_tokens[start_at..],
                            )?
                        };
                        next_token = logits_processor.sample(&logits)?;
                        all_tokens.push(next_token);
                        if next_token == eos_token {
                            break;
                        };
                    }
                    said.push(tokenizer.decode(&all_tokens, true).unwrap());
                    if args.chat {
                        pre_prompt_tokens = [prompt_tokens.as_slice(), all_tokens.as_slice()].concat();
                    }
                }
                Ok(said)
            }
        }
    };
}

program!(with_candle, candle_transformers::models::quantized_llama);
program!(with_candle_sparse, candle_sparse_models::quantized_llama);

const PROMPTS: [&str; 3] = ["Once upon a time there was a king who ", "The wolf said: ", "And then "];

fn both(path: &Path, args: &Args) -> [Vec<String>; 2] {
    let tokenizer = Built::new("tales-silu").files.load_tokenizer().unwrap();
    let theirs = with_candle::main(path, &tokenizer, &PROMPTS, args).unwrap();
    let ours = with_candle_sparse::main(path, &tokenizer, &PROMPTS, args).unwrap();
    assert!(ours.iter().all(|text| text.split_whitespace().count() > 15), "{ours:?}");
    [ours, theirs]
}

/// The profile is left out: candle computes all neurons.
fn write(format: Format, path: &Path) {
    let built = Built::new("tales-silu");
    let layout = Layout::default().with_format(Some(format)).with_neuron_major(None);
    built.model(layout).save(path).unwrap();
}

#[test]
fn only_the_import_differs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for format in [Format::F32, Format::F16] {
        write(format, &path);
        for (what, args) in [
            ("greedy", ARGS),
            ("split prompt", Args { split_prompt: true, ..ARGS }),
            ("no penalty", Args { repeat_penalty: 1.0, ..ARGS }),
            ("chat", Args { chat: true, ..ARGS }),
            ("sampled", Args { temperature: 0.8, ..ARGS }),
            ("top-k and top-p", Args { temperature: 0.8, top_k: Some(40), top_p: Some(0.9), ..ARGS }),
        ] {
            let [ours, theirs] = both(&path, &args);
            assert_eq!(ours, theirs, "{format:?}, {what}");
        }
    }
}

/// Both round activations to 8 bits, in groups of their own: texts agree until two words are nearly as likely.
#[test]
fn with_blocks_texts_begin_alike() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    write(Format::Q8_0, &path);
    let [ours, theirs] = both(&path, &ARGS);
    for (a, b) in ours.iter().zip(&theirs) {
        let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
        assert!(same > 10, "{a}\n{b}");
    }
}

#[test]
fn files_before_gguf_go_through_the_same_program() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.bin");
    std::fs::write(&path, crate::ggml::file((GgmlDType::F32, 0))).unwrap();
    // Tokens of this model are no words: the tokenizer's first ones stand for them.
    let tokenizer = Built::new("tales-silu").files.load_tokenizer().unwrap();
    let prompts = ["a b", "!"];
    let args = Args { sample_len: 30, ..ARGS };
    let theirs = with_candle::main(&path, &tokenizer, &prompts, &args).unwrap();
    let ours = with_candle_sparse::main(&path, &tokenizer, &prompts, &args).unwrap();
    assert!(ours.iter().all(|text| !text.is_empty()));
    assert_eq!(ours, theirs);
}
