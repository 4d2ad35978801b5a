// A program in the shape of candle's own llama example. It is compiled twice (see ../one_line_swap.rs): `model` is
// candle's module once and ours once, and nothing else differs.
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use model::{Llama, LlamaConfig};

const EOS_TOKEN: &str = "</s>";

pub(crate) fn main(folder: &std::path::Path, prompt: &str, dtype: DType, sample_len: usize) -> anyhow::Result<Vec<u32>> {
    let device = Device::Cpu;
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let config = config.into_config(false);
    let mut cache = model::Cache::new(true, dtype, &config, &device)?;
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let vb = VarBuilder::from_buffered_safetensors(weights, dtype, &device)?;
    let llama = Llama::load(vb, &config)?;

    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).map_err(anyhow::Error::msg)?;
    let eos_token_id = config
        .eos_token_id
        .clone()
        .or_else(|| tokenizer.token_to_id(EOS_TOKEN).map(model::LlamaEosToks::Single));
    let mut tokens = tokenizer.encode(prompt, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    let mut logits_processor = LogitsProcessor::from_sampling(1, Sampling::ArgMax);
    let mut index_pos = 0;
    for index in 0..sample_len {
        let (context_size, context_index) =
            if cache.use_kv_cache && index > 0 { (1, index_pos) } else { (tokens.len(), 0) };
        let ctxt = &tokens[tokens.len().saturating_sub(context_size)..];
        let input = Tensor::new(ctxt, &device)?.unsqueeze(0)?;
        let logits = llama.forward(&input, context_index, &mut cache)?;
        let logits = logits.squeeze(0)?;
        let start_at = tokens.len().saturating_sub(64);
        let logits = candle_transformers::utils::apply_repeat_penalty(&logits, 1.1, &tokens[start_at..])?;
        index_pos += ctxt.len();
        let next_token = logits_processor.sample(&logits)?;
        tokens.push(next_token);
        match eos_token_id {
            Some(model::LlamaEosToks::Single(eos_tok_id)) if next_token == eos_tok_id => break,
            Some(model::LlamaEosToks::Multiple(ref eos_ids)) if eos_ids.contains(&next_token) => break,
            _ => (),
        }
    }
    Ok(tokens)
}
