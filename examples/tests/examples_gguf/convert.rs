//! Writing files.

use crate::{Folder, common::example, number, ok, one_line, testdata};

#[test]
fn json_says_what_was_written() {
    let dir = Folder::new();
    let cases: [(&str, &[&str], [bool; 3]); 4] = [
        ("f16", &[], [true, false, true]),
        ("bare", &["--no-profile", "--dtype", "q8_0"], [false, false, true]),
        ("q8", &["--dtype", "q8_0"], [true, false, true]),
        ("neurons", &["--dtype", "q8_0", "--neuron-major"], [true, true, false]),
    ];
    let bytes = cases.map(|(name, flags, [profile, neuron_major, opens_elsewhere])| {
        let (path, json) = dir.convert(&format!("{name}.gguf"), "tales-silu", flags);
        let expected = serde_json::json!({
            "out": path, "bytes": std::fs::metadata(&path).unwrap().len(), "profile": profile,
            "neuron_major": neuron_major, "opens_elsewhere": opens_elsewhere,
        });
        assert_eq!(json, expected, "{name}");
        number(&json, "bytes")
    });
    let [f16, bare, q8, neurons] = bytes;
    let profile = q8 - bare;
    assert!(profile > 1e5 && bare < 0.6 * (f16 - profile), "{bytes:?}");
    assert!((neurons / q8 - 1.0).abs() < 0.02, "the same weights in another order: {bytes:?}");
}

#[test]
fn without_json_one_line_says_where_the_file_opens() {
    let dir = Folder::new();
    for (model, needle) in
        [("tales-silu", "opens in llama.cpp and candle too"), ("tales-relu", "opens here alone")]
    {
        let path = dir.path("m.gguf");
        let out = ok("convert", &["--model", model, "--out", &path, "--dtype", "q4_0"]);
        assert!(out.stdout.is_empty() && out.stderr.lines().count() == 1, "{out:?}");
        assert!(out.stderr.contains(needle) && out.stderr.contains("with its profile"), "{out:?}");
    }
}

#[test]
fn a_file_is_converted_again_with_all_that_it_holds() {
    let dir = Folder::new();
    let (from, _) = dir.convert("f16.gguf", "tales-silu", &[]);
    let (to, json) = dir.convert("q8.gguf", &from, &["--dtype", "q8_0"]);
    assert_eq!(json["profile"], true);
    let (direct, _) = dir.convert("direct.gguf", "tales-silu", &["--dtype", "q8_0"]);
    let args = ["-n", "30", "--temperature", "0", "--json", "--force-sparse", "--model"];
    let said = |path: &str| ok("llama-sparse", &[&args[..], &[path]].concat()).json();
    let (a, b) = (said(&to), said(&direct));
    assert_eq!(a["token_ids"], b["token_ids"]);
    assert!(number(&a, "active_fraction") < 0.9, "the profile came with it: {a}");
    let (neurons, _) = dir.convert("n.gguf", &from, &["--neuron-major"]);
    let out = example("convert", &["--model", &neurons, "--out", &dir.path("again.gguf")]);
    one_line(&out, "neuron-major already");
}

#[test]
fn what_cannot_be_written_is_one_line_and_leaves_nothing() {
    let dir = Folder::new();
    let bare = dir.path("bare");
    std::fs::create_dir(&bare).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(format!("{}/{file}", testdata("tales-silu")), format!("{bare}/{file}")).unwrap();
    }
    let foreign = format!("{}/sparse.safetensors", testdata("tales-relu"));
    let (out, nowhere) = (dir.path("m.gguf"), dir.path("no/such/m.gguf"));
    let cases: [(&[&str], &str); 8] = [
        (&["--model", &bare, "--neuron-major", "--out", &out], "needs the order of a profile"),
        (&["--model", "no-such-model", "--out", &out], "tales-silu"),
        (&["--model", "./absent.gguf", "--out", &out], "absent.gguf"),
        (&["--model", "tales-silu", "--out", &nowhere], "no/such/m.gguf"),
        (&["--model", "tales-silu", "--profile", "/no/such/file", "--out", &out], "/no/such/file"),
        (&["--model", "tales-silu", "--profile", &foreign, "--out", &out], "another model"),
        (&["--model", &bare, "--profile", &foreign, "--neuron-major", "--out", &out], "another model"),
        (&["--model", "tales-silu", "--revision", "v1", "--out", &out], "revision"),
    ];
    for (args, needle) in cases {
        one_line(&example("convert", args), needle);
    }
    for flags in [&["--dtype", "q3"][..], &["--no-profile", "--neuron-major"], &["--neuron-mayor"]] {
        let args = [&["--model", "tales-silu", "--out", &out], flags].concat();
        let out = example("convert", &args);
        assert!(out.code == Some(2) && out.stderr.starts_with("error: "), "{flags:?}: {out:?}");
    }
    assert_eq!(example("convert", &["--model", "tales-silu"]).code, Some(2), "--out is needed");
    let left: Vec<_> = std::fs::read_dir(dir.0.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left, ["bare"]);
}

/// A node of the file system is never replaced by a file: as root that would break the machine.
#[cfg(unix)]
#[test]
fn links_are_written_through_and_pipes_are_refused() {
    use std::{os::unix::fs::FileTypeExt, process::Command};

    let dir = Folder::new();
    let [link, target, pipe] = ["link", "target", "pipe"].map(|name| dir.path(name));
    std::fs::write(&target, "keep").unwrap();
    std::os::unix::fs::symlink("target", &link).unwrap();
    dir.convert("link", "tales-silu", &["--no-profile", "--dtype", "q4_0"]);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(&std::fs::read(&target).unwrap()[..4], b"GGUF");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    one_line(&example("convert", &["--model", "tales-silu", "--out", &pipe]), "named pipe");
    // Refused before the model is read, let alone hours of calibration.
    one_line(
        &example("calibrate", &["--model", "tales-silu", "--text", "/no/such/text", "--out", &pipe]),
        "named pipe",
    );
    one_line(&example("convert", &["--model", "no-such-model", "--out", "/dev/null"]), "device");
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}
