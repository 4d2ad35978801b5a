//! The inputs that fuzzing began with and those that it found something with: each is read again, without a fuzzer.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
#![allow(
    unreachable_pub,
    dead_code,
    clippy::print_stdout,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "also a crate of its own"
)]

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::{fs, path::Path};

/// What is in a folder, in the order of names.
fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut inputs: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

#[test]
fn kept_inputs_come_back() {
    let fuzz = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz"));
    for (name, target) in targets::TARGETS {
        let seeds = inputs(&fuzz.join("seeds").join(name));
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for (path, bytes) in seeds.into_iter().chain(inputs(&fuzz.join("regressions").join(name))) {
            // Shown only where it fails.
            println!("{path}");
            target(&bytes);
        }
    }
    let prefix = fs::read(fuzz.join("seeds/prefixes/one")).unwrap();
    assert!(
        targets::begun_with(&prefix) > 0,
        "the engine reads the prompt anew: what is behind is not reached"
    );
}
