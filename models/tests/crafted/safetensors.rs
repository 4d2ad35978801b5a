//! Headers of safetensors files, profiles and saved caches.

use crate::{memory, refused};
use candle_core::{DType, Device};
use candle_sparse::{KvCache, KvConfig, KvDType, Profile, loading::SafetensorsFiles};
use candle_sparse_models::llama::LlamaConfig;
use std::{fmt::Write, fs, path::PathBuf};

fn file(dir: &tempfile::TempDir, header: &str, data: usize) -> (PathBuf, usize) {
    let path = dir.path().join("m.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat();
    fs::write(&path, &bytes).unwrap();
    (path, bytes.len())
}

fn header_refused(header: &str, data: usize, needle: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (path, len) = file(&dir, header, data);
    refused(&header[..header.len().min(80)], len, needle, || SafetensorsFiles::open(&[&path]));
}

#[test]
fn lengths_of_headers() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    for len in [u64::MAX, 1 << 63, u64::MAX - 7, 100_000_001, 1000] {
        fs::write(&path, [&len.to_le_bytes()[..], b"{}"].concat()).unwrap();
        refused("length", 10, "m.safetensors", || SafetensorsFiles::open(&[&path]));
    }
    // A header of 256 MB that is really there.
    let header = [b"{".as_slice(), &vec![b' '; (256 << 20) - 2], b"}"].concat();
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    refused("256 MB", header.len(), "m.safetensors", || SafetensorsFiles::open(&[&path]));
}

#[test]
fn counts_and_places() {
    let _alone = memory::alone();
    let two = 1_u128 << 63;
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{offsets}]}}}}"#)
    };
    for (shape, offsets) in [
        (format!("{two}"), "0,16".to_string()),
        (format!("{two},2"), "0,0".into()),
        ("4294967296,4294967296".into(), "0,0".into()),
        ("4611686018427387904".into(), "0,0".into()),
        ("4".into(), format!("{two},{}", two + 16)),
        ("4".into(), format!("{},{}", u64::MAX - 15, u64::MAX)),
        ("4".into(), "16,0".into()),
        ("4".into(), "0,17".into()),
        ("4".into(), "0,32".into()),
        ("4".into(), "8,24".into()),
    ] {
        header_refused(&tensor(&shape, &offsets), 16, "m.safetensors");
    }
    // Past the end of the file.
    header_refused(&tensor("8", "0,32"), 16, "truncated");
    // No number of ours, or none at all.
    for (shape, offsets) in [
        ("18446744073709551616", "0,16"),
        ("-4", "0,16"),
        ("4.0", "0,16"),
        ("1e400", "0,16"),
        ("4", "0,99999999999999999999"),
    ] {
        header_refused(&tensor(shape, offsets), 16, "m.safetensors");
    }
    let overlap = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}"#;
    header_refused(overlap, 12, "tensor `b`");
}

/// `n` times what `item` gives, joined by commas.
fn many(n: usize, item: impl Fn(usize) -> String) -> String {
    let mut out = String::new();
    for i in 0..n {
        let _ = write!(out, "{}{}", if i > 0 { "," } else { "" }, item(i));
    }
    out
}

#[test]
fn headers_that_inflate() {
    let _alone = memory::alone();
    let text = many(2_000_000, |i| format!(r#""{i:x}":"""#));
    header_refused(&format!(r#"{{"__metadata__":{{{text}}}}}"#), 0, "parts");
    let numbers = many(20_000_000, |_| "1".into());
    let tensor = format!(r#""a":{{"dtype":"U8","shape":[0,{numbers}],"data_offsets":[0,0]}}"#);
    header_refused(&format!("{{{tensor}}}"), 0, "parts");
    let tensors = many(500_000, |i| format!(r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#));
    header_refused(&format!("{{{tensors}}}"), 0, "parts");
    header_refused(&format!(r#"{{"a":{}}}"#, "[".repeat(10_000_000)), 0, "m.safetensors");
    // Its name would fill the screen, or steer it.
    let name = "x".repeat(1_000_000);
    header_refused(
        &format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,2]}}}}"#),
        2,
        "1024 are possible",
    );
    let name = "\\u001b[2Jgone\\n";
    header_refused(
        &format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,2]}}}}"#),
        2,
        "control characters",
    );
}

#[test]
fn profiles() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let refuse = |header: &str, data: usize, needle: &str| {
        let (path, len) = file(&dir, header, data);
        refused(&header[..header.len().min(80)], len, needle, || Profile::load(&path));
    };
    refuse("{}", 0, "no profile");
    let shares = r#""model.sparse.shares":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    refuse(&format!("{{{shares}}}"), 8, "model.sparse.fitted");
    let none = |name: &str, dtype: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[0],"data_offsets":[0,0]}}"#)
    };
    let all = [
        none("model.sparse.shares", "F32"),
        none("model.sparse.fitted", "U32"),
        none("model.sparse.fingerprint", "F32"),
    ];
    refuse(&format!("{{{}}}", all.join(",")), 0, "model.sparse.fitted");
    let strange = shares.replace("F32", "F4").replace("0,8", "0,1");
    refuse(&format!("{{{strange}}}"), 1, "model.sparse.shares");
    let all = all.join(",").replacen(
        r#""shape":[0],"data_offsets":[0,0]"#,
        r#""shape":[1],"data_offsets":[0,4]"#,
        1,
    );
    let all = all.replacen(
        r#"U32","shape":[0],"data_offsets":[0,0]"#,
        r#"U32","shape":[3],"data_offsets":[4,16]"#,
        1,
    );
    let all = all.replacen("[0,0]", "[16,16]", 1);
    refuse(&format!("{{{all}}}"), 16, "no blocks");
    let alone = |shape: &str| {
        let none = none("model.sparse.fingerprint", "F32").replace("[0,0]", "[4,4]");
        format!(
            r#""model.sparse.recall_shares":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}},{none}"#
        )
    };
    refuse(&format!("{{{}}}", alone("[1]")), 4, "expected [blocks, kv_heads]");
    // A text within a text has no parts where the outer one is looked at.
    let about = format!("[{}0]", "0,".repeat(20_000_000));
    let metadata = format!(r#""__metadata__":{{"candle_sparse_profile":"{about}"}}"#);
    refuse(&format!("{{{metadata},{}}}", alone("[1,1]")), 4, "parts");
    // What it says of itself nests without end.
    let about = "[".repeat(200_000);
    let metadata = format!(r#""__metadata__":{{"candle_sparse_profile":"{about}"}}"#);
    refuse(&format!("{{{metadata},{shares}}}"), 8, "m.safetensors");
}

#[test]
fn saved_caches() {
    let _alone = memory::alone();
    let json = include_bytes!("../../testdata/tales-silu/config.json");
    let config: LlamaConfig = serde_json::from_slice(json).unwrap();
    let config = config.into_config(false).to_core().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let big = u64::MAX;
    let numbers = "0,".repeat(20_000_000);
    for (changes, needle) in [
        (format!(r#""more":[{numbers}0]"#), "parts"),
        (format!(r#""positions":{big}"#), "past the model's context"),
        (format!(r#""sequences":{big}"#), "missing"),
        (format!(r#""first_page":{big}"#), "first_page"),
        (format!(r#""format":{big}"#), "format"),
        (format!(r#""layers":{big}"#), "layers"),
        (r#""positions":-1"#.into(), "no number positions"),
        (r#""positions":1e300"#.into(), "no number positions"),
        (format!(r#""sliding_window":{big}"#), "sliding window"),
        (r#""dtype":"Q99""#.into(), "dtype"),
    ] {
        let about = r#""format":2,"positions":0,"sequences":1,"layers":4,"heads":2,"head_dim":32,"dtype":"f32","hot":64,"warm":64,"sliding_window":null,"first_page":0"#;
        // Of two values of one key the last counts.
        let about = format!("{{{about},{changes}}}").replace('"', "\\\"");
        let (path, len) =
            file(&dir, &format!(r#"{{"__metadata__":{{"candle_sparse_kv_cache":"{about}"}}}}"#), 0);
        let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F32));
        refused(&changes[..changes.len().min(40)], len, needle, || cache.load(&path));
        assert!(cache.is_empty(), "{needle}");
    }
}

#[test]
fn a_dtype_that_we_do_not_compute_in() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let (path, len) = file(&dir, r#"{"a":{"dtype":"I64","shape":[1,2],"data_offsets":[0,16]}}"#, 16);
    let vb = SafetensorsFiles::open(&[&path]).unwrap().var_builder(Some(DType::F32), &Device::Cpu);
    refused("I64", len, "tensor a is stored as I64", || vb.get((1, 2), "a"));
}
