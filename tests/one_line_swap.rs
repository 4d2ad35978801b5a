//! One program, compiled against candle's llama and against ours, says the same.
#![allow(clippy::unwrap_used, reason = "tests")]

mod with_candle {
    use candle_transformers::models::llama as model;
    include!("swap/llama_app.rs");
}

mod with_candle_sparse {
    use candle_sparse_models::llama as model;
    include!("swap/llama_app.rs");
}

#[test]
fn only_the_import_differs() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/testdata/tales-silu");
    for prompt in ["Once upon a time", "KING RICHARD:\nWhat, "] {
        let dtype = candle_core::DType::F32;
        let candle = with_candle::main(&folder, prompt, dtype, 150).unwrap();
        let ours = with_candle_sparse::main(&folder, prompt, dtype, 150).unwrap();
        assert!(ours.len() > 20);
        assert_eq!(ours, candle, "{prompt}");
    }
}
