//! An app to copy: load a model, give it a prompt, show its tokens as they come.
//!
//! ```sh
//! cargo run --release -p candle-sparse-programs --example simple -- org/name "The sea"    # or a folder, a .gguf file
//! ```

use candle_core::{Device, Tensor};
use candle_sparse_models::{
    decoder::LoadOptions,
    files::ModelFiles,
    hub::HubSettings,
    llama::Cache,
    pretrained::Pretrained,
    tokenizer::{TextStream, prompt_tokens},
};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use std::io::Write;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned());
    let name = args
        .next()
        .unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/testdata/tales-silu").to_string());
    let prompt = args.next().unwrap_or("Once upon a time".to_string());

    let files = ModelFiles::resolve(&name, None, &HubSettings::from_env())?;
    let loaded = Pretrained::load(&files, LoadOptions::default())?;
    let context = loaded.config.max_position_embeddings;
    let mut cache = Cache::new(true, loaded.default_kv_dtype(), &loaded.config, &Device::Cpu)?;
    let sampling = Sampling::TopKThenTopP { k: 40, p: 0.95, temperature: 0.8 };
    let mut sampler = LogitsProcessor::from_sampling(42, sampling);

    let mut ids = prompt_tokens(&loaded.tokenizer, &prompt)?;
    let mut text = TextStream::new(&loaded.tokenizer);
    let mut fed = 0;
    while ids.len() < context.min(200) {
        let new = Tensor::new(&ids[fed..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = loaded.model.forward(&new, fed, &mut cache)?.squeeze(0)?;
        fed = ids.len();
        let next = sampler.sample(&logits)?;
        if loaded.is_eos(next) {
            break;
        }
        ids.push(next);
        write!(std::io::stdout(), "{}", text.push(next))?;
        std::io::stdout().flush()?;
    }
    Ok(writeln!(std::io::stdout(), "{}", text.finish())?)
}
