//! One checkpoint of random weights in all the models that are behind the interface.

use crate::cases::{builder, noise, weights};
use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_sparse_models::{
    causal_lm::{CandleLlama, CandleMistral, CandleQuantizedLlama, CausalLm, LlamaSession},
    convert::{GgufModel, Layout},
    llama::{self, Cache, Llama},
    mistral, quantized_llama, quantized_mistral,
};
use candle_transformers::models as theirs;
use std::{collections::HashMap, fs::File, path::PathBuf};

type Named = (&'static str, Box<dyn CausalLm>);

/// Positions of the models.
pub(crate) const CONTEXT: usize = 640;

/// The shape is in JSON, for candle's configurations are types of their own.
fn json(sliding_window: Option<usize>) -> String {
    let window = sliding_window.map_or("null".to_string(), |w| w.to_string());
    format!(
        r#"{{"hidden_size": 96, "intermediate_size": 160, "vocab_size": 515, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": {CONTEXT}, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "sliding_window": {window}, "model_type": "mistral"}}"#
    )
}

pub(crate) struct Checkpoint {
    json: String,
    dtype: DType,
    weights: HashMap<String, Tensor>,
    /// With the names of llama.cpp and of Hugging Face.
    files: [PathBuf; 2],
    /// Removes them in the end.
    _folder: tempfile::TempDir,
}

impl Checkpoint {
    pub(crate) fn new(sliding_window: Option<usize>) -> Self {
        Self::in_dtype(sliding_window, DType::F32)
    }

    pub(crate) fn in_dtype(sliding_window: Option<usize>, dtype: DType) -> Self {
        let json = json(sliding_window);
        let config: mistral::Config = serde_json::from_str(&json).unwrap();
        let config = config.to_llama().unwrap();
        let mut weights = weights(&config, dtype);
        // Small embeddings: what a token says is then more than itself.
        let table = noise("embedding", &[config.vocab_size, config.hidden_size], 0.0, 0.3);
        weights.insert("model.embed_tokens.weight".into(), table.to_dtype(dtype).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let files = ["llama.gguf", "mistral.gguf"].map(|f| folder.path().join(f));
        let vb = builder(&weights, dtype);
        GgufModel::new(&vb, &config, Layout::default(), "m").unwrap().save(&files[0]).unwrap();
        let tensors: Vec<_> = weights
            .iter()
            .map(|(name, t)| (name.as_str(), QTensor::quantize(t, GgmlDType::F32).unwrap()))
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, t)| (*name, t)).collect();
        gguf_file::write(&mut File::create(&files[1]).unwrap(), &[], &tensors).unwrap();
        Self { json, dtype, weights, files, _folder: folder }
    }

    fn vb(&self) -> candle_nn::VarBuilder<'static> {
        builder(&self.weights, self.dtype)
    }

    pub(crate) fn llama_session(&self) -> LlamaSession {
        let config: llama::LlamaConfig = serde_json::from_str(&self.json).unwrap();
        let config = config.into_config(false);
        let cache = Cache::new(true, self.dtype, &config, &Device::Cpu).unwrap();
        LlamaSession { model: Llama::load(self.vb(), &config).unwrap(), cache }
    }

    fn mistral(&self) -> mistral::Model {
        mistral::Model::new(&serde_json::from_str(&self.json).unwrap(), self.vb()).unwrap()
    }

    fn gguf(&self) -> (gguf_file::Content, File) {
        let mut file = File::open(&self.files[0]).unwrap();
        (gguf_file::Content::read(&mut file).unwrap(), file)
    }

    fn quantized_mistral(&self) -> quantized_mistral::Model {
        let vb = quantized_mistral::VarBuilder::from_gguf(&self.files[1], &Device::Cpu).unwrap();
        quantized_mistral::Model::new(&serde_json::from_str(&self.json).unwrap(), vb).unwrap()
    }

    fn candle_llama(&self) -> CandleLlama {
        let config: theirs::llama::LlamaConfig = serde_json::from_str(&self.json).unwrap();
        let config = config.into_config(false);
        let model = theirs::llama::Llama::load(self.vb(), &config).unwrap();
        CandleLlama::new(model, config, self.dtype).unwrap()
    }

    fn candle_mistral(&self) -> CandleMistral {
        let config = serde_json::from_str(&self.json).unwrap();
        CandleMistral::new(theirs::mistral::Model::new(&config, self.vb()).unwrap())
    }

    /// Those that know sliding windows come last.
    pub(crate) fn ours(&self) -> Vec<Named> {
        let (content, mut file) = self.gguf();
        let weights = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
        vec![
            ("LlamaSession", Box::new(self.llama_session())),
            ("ModelWeights", Box::new(weights)),
            ("mistral::Model", Box::new(self.mistral())),
            ("quantized_mistral::Model", Box::new(self.quantized_mistral())),
        ]
    }

    pub(crate) fn candles(&self) -> Vec<Named> {
        let (content, mut file) = self.gguf();
        let weights =
            theirs::quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
        vec![
            ("CandleLlama", Box::new(self.candle_llama())),
            ("CandleQuantizedLlama", Box::new(CandleQuantizedLlama::new(weights))),
            ("CandleMistral", Box::new(self.candle_mistral())),
        ]
    }

    pub(crate) fn all(&self) -> Vec<Named> {
        self.ours().into_iter().chain(self.candles()).collect()
    }

    /// Those that hold the weights in the dtype of a `VarBuilder`.
    pub(crate) fn in_memory(&self) -> Vec<Named> {
        vec![
            ("LlamaSession", Box::new(self.llama_session())),
            ("mistral::Model", Box::new(self.mistral())),
            ("CandleLlama", Box::new(self.candle_llama())),
            ("CandleMistral", Box::new(self.candle_mistral())),
        ]
    }
}
