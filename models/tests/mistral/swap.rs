//! One program in the shape of candle's own Mistral example, compiled against candle's module and against ours.

use crate::{cases::builder, config, weights};
use candle_core::DType;

macro_rules! program {
    ($name:ident, $model:path) => {
        mod $name {
            use candle_core::{DType, Device, Tensor};
            use candle_nn::VarBuilder;
            use candle_transformers::generation::LogitsProcessor;
            use model::{Config, Model as Mistral};
            use $model as model;

            struct TextGeneration {
                model: Mistral,
                device: Device,
                logits_processor: LogitsProcessor,
                repeat_penalty: f32,
                repeat_last_n: usize,
            }

            impl TextGeneration {
                fn run(&mut self, prompt: &[u32], sample_len: usize) -> candle_core::Result<Vec<u32>> {
                    let mut tokens = prompt.to_vec();
                    for index in 0..sample_len {
                        let context_size = if index > 0 { 1 } else { tokens.len() };
                        let start_pos = tokens.len().saturating_sub(context_size);
                        let ctxt = &tokens[start_pos..];
                        let input = Tensor::new(ctxt, &self.device)?.unsqueeze(0)?;
                        let logits = self.model.forward(&input, start_pos)?;
                        let logits = logits.squeeze(0)?.squeeze(0)?.to_dtype(DType::F32)?;
                        let start_at = tokens.len().saturating_sub(self.repeat_last_n);
                        let logits = candle_transformers::utils::apply_repeat_penalty(
                            &logits,
                            self.repeat_penalty,
                            &tokens[start_at..],
                        )?;
                        tokens.push(self.logits_processor.sample(&logits)?);
                    }
                    Ok(tokens)
                }
            }

            pub(super) fn main(
                json: &str,
                vb: VarBuilder<'_>,
                prompts: &[Vec<u32>],
            ) -> candle_core::Result<Vec<Vec<u32>>> {
                let config: Config = serde_json::from_str(json).unwrap();
                let model = Mistral::new(&config, vb)?;
                let mut all = Vec::new();
                for prompt in prompts {
                    let mut model = model.clone();
                    model.clear_kv_cache();
                    let logits_processor = LogitsProcessor::new(299_792_458, Some(0.6), None);
                    let mut generation = TextGeneration {
                        model,
                        device: Device::Cpu,
                        logits_processor,
                        repeat_penalty: 1.1,
                        repeat_last_n: 64,
                    };
                    all.push(generation.run(prompt, 60)?);
                }
                Ok(all)
            }

            /// The presets, and a configuration written by hand.
            pub(super) fn configs() -> [Config; 4] {
                let by_hand = Config {
                    vocab_size: 32_000,
                    hidden_size: 4096,
                    intermediate_size: 14_336,
                    num_hidden_layers: 32,
                    num_attention_heads: 32,
                    head_dim: None,
                    num_key_value_heads: 8,
                    hidden_act: candle_nn::Activation::Silu,
                    max_position_embeddings: 32_768,
                    rms_norm_eps: 1e-5,
                    rope_theta: 10_000.0,
                    sliding_window: Some(4096),
                    use_flash_attn: false,
                };
                let presets = [Config::config_chat_ml(false), Config::config_amazon_mistral_lite(true)];
                let [a, b] = presets;
                [by_hand, Config::config_7b_v0_1(false), a, b]
            }

            /// What programs that begin with embeddings call, such as candle's Pixtral.
            pub(super) fn by_embeddings(mut model: Mistral, ids: &Tensor) -> candle_core::Result<Tensor> {
                let embeds = candle_core::Module::forward(model.embed_tokens(), ids)?;
                let first = embeds.narrow(1, 0, 1)?;
                model.forward_embeds(&first, None, 0)?;
                model.forward_embeds(&embeds.narrow(1, 1, 1)?, None, 1)
            }

            pub(super) fn load(json: &str, vb: VarBuilder<'_>) -> Mistral {
                Mistral::new(&serde_json::from_str(json).unwrap(), vb).unwrap()
            }
        }
    };
}

program!(with_candle, candle_transformers::models::mistral);
program!(with_candle_sparse, candle_sparse_models::mistral);

const JSON: &str = r#"{"vocab_size": 515, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 6, "head_dim": 24, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 640, "rope_theta": 10000.0, "sliding_window": 100, "model_type": "mistral"}"#;

#[test]
fn only_the_import_differs() {
    let w = weights(&config(Some(100)));
    let prompts = [vec![1, 5, 9], (0..40).collect::<Vec<u32>>()];
    let theirs = with_candle::main(JSON, builder(&w, DType::F32), &prompts).unwrap();
    let ours = with_candle_sparse::main(JSON, builder(&w, DType::F32), &prompts).unwrap();
    assert!(ours.iter().all(|tokens| tokens.len() >= 63));
    assert_eq!(ours, theirs);
    let ids = crate::cases::tokens(1, 2, 3);
    let a = with_candle::by_embeddings(with_candle::load(JSON, builder(&w, DType::F32)), &ids).unwrap();
    let b = with_candle_sparse::by_embeddings(with_candle_sparse::load(JSON, builder(&w, DType::F32)), &ids);
    assert!(crate::cases::worst(&a, &b.unwrap()) <= 1e-4);
    for (a, b) in with_candle::configs().iter().zip(&with_candle_sparse::configs()) {
        assert_eq!(format!("{a:?}"), format!("{b:?}"), "the same fields with the same values");
    }
}
