#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| candle_sparse_fuzz::prefixes(data));
