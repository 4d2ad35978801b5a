// A program in the shape of candle's own llama example. It is compiled twice (see ../one_line_swap.rs): `model` is
// candle's module once and ours once, and nothing else differs.
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use model::{Llama, LlamaConfig};

const EOS_TOKEN: &str = "</s>";

pub(crate) struct Args<'a> {
    pub(crate) prompt: &'a str,
    pub(crate) dtype: DType,
    pub(crate) sample_len: usize,
    pub(crate) no_kv_cache: bool,
    pub(crate) sampling: Sampling,
    pub(crate) repeat_penalty: f32,
}

pub(crate) fn main(folder: &std::path::Path, args: &Args<'_>) -> anyhow::Result<Vec<u32>> {
    let (prompt, dtype) = (args.prompt, args.dtype);
    let device = Device::Cpu;
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let config = config.into_config(false);
    let mut cache = model::Cache::new(!args.no_kv_cache, dtype, &config, &device)?;
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let vb = VarBuilder::from_buffered_safetensors(weights, dtype, &device)?;
    let llama = Llama::load(vb, &config)?;

    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).map_err(anyhow::Error::msg)?;
    let eos_token_id = config
        .eos_token_id
        .clone()
        .or_else(|| tokenizer.token_to_id(EOS_TOKEN).map(model::LlamaEosToks::Single));
    let mut tokens = tokenizer.encode(prompt, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    let mut logits_processor = LogitsProcessor::from_sampling(299_792_458, args.sampling.clone());
    let mut index_pos = 0;
    for index in 0..args.sample_len {
        let (context_size, context_index) =
            if cache.use_kv_cache && index > 0 { (1, index_pos) } else { (tokens.len(), 0) };
        let ctxt = &tokens[tokens.len().saturating_sub(context_size)..];
        let input = Tensor::new(ctxt, &device)?.unsqueeze(0)?;
        let logits = llama.forward(&input, context_index, &mut cache)?;
        let logits = logits.squeeze(0)?;
        let logits = if args.repeat_penalty == 1. {
            logits
        } else {
            let start_at = tokens.len().saturating_sub(128);
            candle_transformers::utils::apply_repeat_penalty(&logits, args.repeat_penalty, &tokens[start_at..])?
        };
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

/// What else programs ask of a configuration.
pub(crate) fn configs(folder: &std::path::Path) -> Vec<String> {
    let mut config: LlamaConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let heads = config.num_key_value_heads();
    config.num_key_value_heads = None;
    let all = [config.into_config(true), model::Config::config_7b_v1(false), model::Config::config_7b_v2(true)];
    let shape = |c: model::Config| {
        let (kv, theta, eps) = (c.num_key_value_heads, c.rope_theta, c.rms_norm_eps);
        let sizes = [c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers, c.num_attention_heads, kv];
        let (context, tied, flash) = (c.max_position_embeddings, c.tie_word_embeddings, c.use_flash_attn);
        let tokens = (c.bos_token_id, c.eos_token_id, c.rope_scaling);
        format!("{heads} {sizes:?} {theta} {eps} {context} {tied} {flash} {tokens:?} {}", model::DEFAULT_MAX_SEQ_LEN)
    };
    all.map(shape).to_vec()
}

/// Programs that begin with embeddings, such as those that see images.
pub(crate) fn by_embeddings(folder: &std::path::Path, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
    let (device, dtype) = (Device::Cpu, DType::F32);
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let config = config.into_config(false);
    let mut cache = model::Cache::new(true, dtype, &config, &device)?;
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let llama = Llama::load(VarBuilder::from_buffered_safetensors(weights, dtype, &device)?, &config)?;
    let embeds = llama.embed(&Tensor::new(ids, &device)?.unsqueeze(0)?)?;
    let logits = llama.forward_input_embed(&embeds, 0, &mut cache)?;
    Ok(logits.squeeze(0)?.to_vec1()?)
}
