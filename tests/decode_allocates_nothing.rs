//! A decode step allocates nothing after warm-up, on any thread.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{DType, Device, Tensor};
use candle_sparse::core::Format;
use candle_sparse_models::{
    decoder::LoadOptions,
    files::{EMBEDDED, ModelFiles},
    llama::Cache,
    pretrained::Pretrained,
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
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

#[test]
fn decode_allocates_nothing_after_warm_up() {
    for format in [None, Some(Format::F32), Some(Format::Q8_0), Some(Format::Q4_0)] {
        for kv in [DType::F32, DType::F16] {
            let files = ModelFiles::from_embedded(&EMBEDDED[0]);
            let loaded = Pretrained::load(&files, LoadOptions { format, threads: None }).unwrap();
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
