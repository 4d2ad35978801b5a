//! Configurations as they are published.

use candle_sparse_core::{Activation, RopeScaling};
use candle_sparse_models::llama::{Config, LlamaConfig};

fn parse(json: &str) -> Result<Config, String> {
    serde_json::from_str::<LlamaConfig>(json).map(|c| c.into_config(false)).map_err(|e| e.to_string())
}

#[test]
fn afm_has_no_gate_and_yarn() {
    let c = parse(include_str!("../../testdata/configs/afm-4.5b.json")).unwrap().to_core().unwrap();
    assert_eq!((c.hidden_act, c.gated_mlp, c.head_dim, c.kv_dim()), (Activation::Relu2, false, 128, 512));
    let RopeScaling::Yarn { factor, original_max_position_embeddings, truncate, attention_factor, .. } =
        c.rope.scaling
    else {
        panic!("{:?}", c.rope)
    };
    assert_eq!((factor, original_max_position_embeddings, truncate), (20.0, 4096, true));
    // One mscale alone changes nothing, as in transformers.
    assert!((attention_factor - 1.299_573_2).abs() < 1e-6, "{attention_factor}");
}

#[test]
fn prosparse_is_a_llama_with_a_threshold() {
    let c =
        parse(include_str!("../../testdata/configs/prosparse-llama-2-7b.json")).unwrap().to_core().unwrap();
    assert_eq!((c.hidden_act, c.gated_mlp), (Activation::FatRelu { threshold: 0.01 }, true));
}

#[test]
fn minicpm_runs_in_llama_format_alone() {
    let c = parse(include_str!("../../testdata/configs/minicpm-s-1b-llama-format.json")).unwrap();
    assert_eq!((c.hidden_act, c.num_hidden_layers), (Activation::Relu, 52));
    let error = parse(include_str!("../../testdata/configs/minicpm-s-1b.json")).unwrap_err();
    assert!(error.contains("'MiniCPMForCausalLM'") && error.contains("Llama format"), "{error}");
}

#[test]
fn bamboo_takes_relu_of_gate_and_up() {
    let mistral = r#"{"model_type": "bamboo", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096, "hidden_act": "relu"}"#;
    let c = parse(mistral).unwrap().to_core().unwrap();
    assert_eq!((c.hidden_act, c.sliding_window), (Activation::DRelu, Some(4096)));
    let silu = parse(&mistral.replace("relu", "silu")).unwrap_err();
    assert!(silu.contains("bamboo with hidden_act 'silu'"), "{silu}");
}
