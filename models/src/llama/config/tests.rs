use super::*;

fn parse(extra: &str) -> std::result::Result<Config, String> {
    let json = format!(
        r#"{{"hidden_size": 64, "intermediate_size": 172, "vocab_size": 512, "num_hidden_layers": 5,
            "num_attention_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512 {extra}}}"#
    );
    serde_json::from_str::<LlamaConfig>(&json).map(|c| c.into_config(false)).map_err(|e| e.to_string())
}

#[test]
fn defaults_are_those_of_llama() {
    let c =
        parse(r#", "attention_bias": null, "head_dim": null, "rope_scaling": null, "eos_token_id": [1, 2]"#);
    let c = c.unwrap();
    assert_eq!(c.eos_token_id, Some(LlamaEosToks::Multiple(vec![1, 2])));
    assert_eq!((c.num_key_value_heads, c.rope_theta, c.hidden_act), (8, 10_000.0, Activation::Silu));
    assert_eq!(c.to_core().unwrap().head_dim, 8);
}

#[test]
fn both_rope_spellings_mean_the_same() {
    let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192"#;
    let old = format!(r#", "rope_theta": 5e5, "rope_scaling": {{"rope_type": "llama3", {scaling}}}"#);
    let new = format!(r#", "rope_parameters": {{"rope_type": "llama3", "rope_theta": 5e5, {scaling}}}"#);
    assert_eq!(parse(&old).unwrap(), parse(&new).unwrap());
    assert_eq!(parse(&old).unwrap().rope_theta, 5e5);
    let both = format!(
        r#", "rope_theta": 5e5, "rope_scaling": {{"rope_type": "llama3", "type": "llama3", {scaling}}}"#
    );
    assert_eq!(parse(&old).unwrap(), parse(&both).unwrap());
    let linear = parse(r#", "rope_scaling": {"type": "linear", "factor": 2.0}"#).unwrap().to_core().unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn activations_and_shifts_are_read() {
    let c = parse(r#", "hidden_act": "relu", "gate_shift": 0.25, "norm_shift": 1.0"#).unwrap();
    assert_eq!((c.hidden_act, c.gate_shift, c.norm_shift), (Activation::Relu, 0.25, Some(1.0)));
    let c = parse(r#", "hidden_act": "fatrelu", "hidden_act_param": 0.01"#).unwrap();
    assert_eq!(c.hidden_act, Activation::FatRelu { threshold: 0.01 });
}

#[test]
fn a_mistrals_sliding_window_that_the_context_reaches_is_applied() {
    let core = |model_type: &str, window: &str| {
        let extra = format!(r#"{model_type}, "sliding_window": {window}"#);
        parse(&extra).unwrap().to_core().unwrap().sliding_window
    };
    let windows = ["128", "511", "512", "null"];
    let mistral = windows.map(|w| core(r#", "model_type": "mistral""#, w));
    assert_eq!(mistral, [Some(128), Some(511), None, None]);
    for model_type in [r#", "model_type": "llama""#, ""] {
        assert_eq!(windows.map(|w| core(model_type, w)), [None; 4]);
    }
    let qwen = r#", "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 128"#;
    assert!(parse(qwen).unwrap_err().contains("'qwen2'"));
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    for (extra, needle) in [
        (r#", "hidden_act": "swiglu9""#, "hidden_act 'swiglu9'"),
        (r#", "hidden_act": "fatrelu""#, "hidden_act_param"),
        (r#", "rope_scaling": {"rope_type": "longrope", "factor": 4.0}"#, "rope type 'longrope'"),
        (r#", "model_type": "bamboo", "hidden_act": "silu""#, "bamboo with hidden_act 'silu'"),
        (r#", "architectures": ["MiniCPMForCausalLM"]"#, "'MiniCPMForCausalLM'"),
        (r#", "rope_scaling": {"rope_type": "llama3", "factor": 4.0}"#, "low_freq_factor"),
        (r#", "model_type": "mixtral""#, "'mixtral'"),
        (r#", "partial_rotary_factor": 0.5"#, "partial_rotary_factor"),
        (r#", "quantization_config": {"quant_method": "gptq"}"#, "gptq"),
    ] {
        let err = parse(extra).unwrap_err();
        assert!(err.contains(needle), "{extra}: {err}");
    }
    let err = parse(r#", "model_type": "mistral", "sliding_window": 0"#)
        .unwrap()
        .to_core()
        .unwrap_err()
        .to_string();
    assert!(err.contains("sliding_window"), "{err}");
    let err = parse(r#", "num_key_value_heads": 3"#).unwrap().to_core().unwrap_err().to_string();
    assert!(err.contains("num_key_value_heads 3"), "{err}");
    let err = parse(r#", "head_dim": 7"#).unwrap().to_core().unwrap_err().to_string();
    assert!(err.contains("head_dim 7"), "{err}");
}
