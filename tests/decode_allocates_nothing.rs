//! A decode step allocates nothing after warm-up, on any thread.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{DType, Device, Tensor};
use candle_sparse::{
    AttentionConfig, AttentionMode, FastGrnnGate, FfnMode, Format, Guard, KvConfig, Profile, Selection,
    SparseConfig,
    profile::{LayerProfile, LayerRule, fingerprint},
};
use candle_sparse_models::{
    decoder::LoadOptions,
    files::ModelFiles,
    llama::{Cache, Config},
    pretrained::{Pretrained, var_builder},
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `GlobalAlloc`'s contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Neurons in their order, a prediction of zeros that knows how much it misses, a guard that looks often.
fn profile(config: &Config, files: &ModelFiles) -> Profile {
    let (hidden, inner, rank) = (config.hidden_size, config.intermediate_size, 32);
    let rule = LayerRule {
        candidate: vec![0.5],
        keep: vec![0.5],
        share: vec![0.5],
        hot: vec![8],
        bias: vec![0.0; hidden],
    };
    let layer = LayerProfile {
        order: (0..inner as u32).collect(),
        rank,
        p: vec![0.0; rank * hidden],
        q_gate: vec![0.0; inner * rank],
        q_up: vec![0.0; inner * rank],
        gate_variance: (0..inner).map(|i| (i % 2) as f32).collect(),
        up_variance: vec![1.0; inner],
        up_square: vec![1.0; inner],
        importance: vec![1.0; inner],
        rules: [rule.clone(), rule.clone(), rule],
    };
    let layers = vec![layer; config.num_hidden_layers];
    let vb = var_builder(files, None).unwrap();
    let fingerprint = fingerprint(&vb, layers.len(), hidden, inner).unwrap();
    Profile {
        layers,
        shares: vec![0.5],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint,
        about: serde_json::Value::Null,
    }
}

fn sparse_decode_allocates_nothing() {
    for format in [None, Some(Format::Q8_0)] {
        let files = built_in();
        let config = Pretrained::load(&files, LoadOptions::default()).unwrap().config;
        let profile = Some(Arc::new(profile(&config, &files)));
        // Whatever is faster for a model of this size.
        let sparse = SparseConfig::default().with_force(true);
        let options = LoadOptions::default().with_format(format).with_profile(profile).with_sparse(sparse);
        let loaded = Pretrained::load(&files, options).unwrap();
        for mode in [FfnMode::Dense, FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
            for selection in [Selection::Fitted, Selection::TopK(100)] {
                let guard = Some(Guard::new(4, 0.5));
                let model = loaded
                    .model
                    .with_sparse(
                        SparseConfig::default()
                            .with_mode(mode)
                            .with_selection(selection)
                            .with_guard(guard)
                            .with_force(true),
                    )
                    .unwrap();
                let mut cache = Cache::new(true, DType::F16, &config, &Device::Cpu).unwrap();
                let mut logits = vec![0.0; config.vocab_size];
                cache.reserve(1, 200).unwrap();
                model.decode(5, 0, &mut cache, &mut logits).unwrap();
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                for position in 1..200 {
                    model.decode(7, position, &mut cache, &mut logits).unwrap();
                }
                let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(allocated, 0, "{format:?} {mode:?} {selection:?}");
                let stats = cache.sparse_stats();
                assert!(stats.layers.iter().all(|l| l.tokens == 200 && l.active_share > 0.0));
                assert_eq!(stats.layers.iter().any(|l| l.looks > 0), mode != FfnMode::Dense);
            }
        }
    }
}

/// One test: the counter belongs to the process.
#[test]
fn decode_allocates_nothing_after_warm_up() {
    sparse_decode_allocates_nothing();
    dense_decode_allocates_nothing();
    long_memory_allocates_nothing();
    sliding_windows_allocate_nothing();
}

fn built_in() -> ModelFiles {
    ModelFiles::from_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu").as_ref())
        .unwrap()
}

/// The built-in model with a sliding window.
fn windowed(window: usize) -> Pretrained {
    let mut files = built_in();
    let json = String::from_utf8(files.config.take().unwrap().to_vec()).unwrap();
    let llama = "\"model_type\": \"llama\"";
    assert!(json.contains(llama), "{json}");
    let with = json.replace(llama, &format!("\"model_type\": \"mistral\", \"sliding_window\": {window}"));
    files.config = Some(with.into_bytes().into());
    Pretrained::load(&files, LoadOptions::default()).unwrap()
}

/// Without any reserve: what the window has passed is used again.
fn sliding_windows_allocate_nothing() {
    for mode in [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Recall, AttentionMode::Sampled] {
        let loaded = windowed(100);
        let select = AttentionConfig::default()
            .with_mode(mode)
            .with_window(32)
            .with_budget(32)
            .with_recall(32)
            .with_sinks(4);
        let model = loaded.model.with_attention(select).unwrap();
        let mut cache = Cache::new(true, DType::F16, &loaded.config, &Device::Cpu).unwrap();
        let mut logits = vec![0.0; loaded.config.vocab_size];
        let (warm, end) = (320, 700);
        (0..warm).for_each(|p| model.decode(5, p, &mut cache, &mut logits).unwrap());
        let (before, bytes) = (ALLOCATIONS.load(Ordering::Relaxed), cache.kv_bytes());
        (warm..end).for_each(|p| model.decode(7, p, &mut cache, &mut logits).unwrap());
        let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!((allocated, cache.kv_bytes()), (0, bytes), "{mode:?}");
        assert!(logits.iter().all(|l| l.is_finite()));
    }
}

fn long_memory_allocates_nothing() {
    let loaded = Pretrained::load(&built_in(), LoadOptions::default()).unwrap();
    let (hidden, heads) = (loaded.config.hidden_size, loaded.config.num_key_value_heads);
    let gate =
        |_| FastGrnnGate::new(hidden, vec![0.1; heads * hidden], vec![0.0; heads], vec![0.0; heads]).unwrap();
    let model = loaded.model.with_gates((0..loaded.config.num_hidden_layers).map(gate).collect()).unwrap();
    for mode in [
        AttentionMode::Dense,
        AttentionMode::Window,
        AttentionMode::Gated,
        AttentionMode::Recall,
        AttentionMode::Sampled,
    ] {
        let select = AttentionConfig::default()
            .with_mode(mode)
            .with_window(64)
            .with_budget(128)
            .with_recall(64)
            .with_sinks(4);
        let model = model.with_attention(select).unwrap();
        let kv = KvConfig::tiered().with_hot(64).with_warm(128);
        let mut cache = Cache::with_config(true, kv, &loaded.config, &Device::Cpu).unwrap();
        let mut logits = vec![0.0; loaded.config.vocab_size];
        cache.reserve(1, 700).unwrap();
        (0..300).for_each(|p| model.decode(5, p, &mut cache, &mut logits).unwrap());
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let mut steps = 0;
        for position in 300..700 {
            model.decode(7, position, &mut cache, &mut logits).unwrap();
            steps += usize::from(ALLOCATIONS.load(Ordering::Relaxed) == before);
        }
        // What is known of pages grows with each of them; nothing else does.
        let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
        let pages = 400 / 32 + 1;
        let per_page = loaded.config.num_hidden_layers * 12;
        assert!(allocated <= pages * per_page, "{mode:?}: {allocated} allocations for {pages} pages");
        assert!(steps > 0, "{mode:?}: the first steps end no page");
    }
}

fn dense_decode_allocates_nothing() {
    for format in [None, Some(Format::F32), Some(Format::Q8_0), Some(Format::Q4_0)] {
        for kv in [DType::F32, DType::F16] {
            let files = built_in();
            let loaded = Pretrained::load(&files, LoadOptions::default().with_format(format)).unwrap();
            let mut cache = Cache::new(true, kv, &loaded.config, &Device::Cpu).unwrap();
            let mut logits = vec![0.0; loaded.config.vocab_size];
            cache.reserve(1, 600).unwrap();
            let prompt = Tensor::from_vec((0..150_u32).collect::<Vec<_>>(), (1, 150), &Device::Cpu).unwrap();
            loaded.model.forward(&prompt, 0, &mut cache).unwrap();
            loaded.model.decode(5, 150, &mut cache, &mut logits).unwrap();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for position in 151..600 {
                loaded.model.decode(7, position, &mut cache, &mut logits).unwrap();
            }
            let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(allocated, 0, "{format:?} kv {kv:?}");
            assert!(logits.iter().all(|l| l.is_finite()));
        }
    }
}
