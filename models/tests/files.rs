//! Models found without the Hub: built in, in a folder, as one file.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use core::fmt::Debug;
use std::fs;
use std::path::Path;

use candle_core::Result;
use candle_sparse_models::files::{EmbeddedModel, ModelFiles, SparseProfile, Weights};
use tempfile::TempDir;

/// A folder of files with the given contents.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

const BASE: [(&str, &str); 2] = [("config.json", "{}"), ("tokenizer.json", "{}")];

fn with(more: &[(&str, &str)]) -> TempDir {
    folder(&[&BASE, more].concat())
}

fn local(path: &Path) -> Result<ModelFiles> {
    ModelFiles::local(path.to_str().unwrap()).map(Option::unwrap)
}

fn weight_names(files: &ModelFiles) -> Vec<String> {
    let Weights::Files(paths) = &files.weights else {
        panic!("not on disk");
    };
    paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_string()).collect()
}

/// Checks that the message is one line and holds every needle.
fn assert_says<T: Debug>(result: Result<T>, needles: &[&str]) {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains('\n'), "more than a line: {text}");
    for needle in needles {
        assert!(text.contains(needle), "no {needle:?} in: {text}");
    }
}

#[test]
fn folder_with_one_weights_file() {
    let folder = with(&[
        ("model.safetensors", "w"),
        ("model.safetensors.index.json", "not looked at"),
        ("generation_config.json", "g"),
        ("tokenizer_config.json", "t"),
        ("sparse.safetensors", "s"),
    ]);
    let files = local(folder.path()).unwrap();
    assert_eq!(files.folder.as_deref(), Some(folder.path()));
    assert_eq!(files.name, folder.path().file_name().unwrap().to_str().unwrap());
    assert_eq!(files.config.as_deref(), Some(&b"{}"[..]));
    assert_eq!(weight_names(&files), ["model.safetensors"]);
    assert_eq!(files.generation_config.as_deref(), Some(&b"g"[..]));
    assert_eq!(files.tokenizer_config.as_deref(), Some(&b"t"[..]));
    let profile = SparseProfile::File(folder.path().join("sparse.safetensors"));
    assert_eq!(files.sparse_profile, Some(profile));
}

#[test]
fn folder_with_shards() {
    let index = r#"{"metadata":{"total_size":2},"weight_map":{"a":"m-2.safetensors",
        "b":"m-1.safetensors","c":"m-2.safetensors"}}"#;
    let folder =
        with(&[("model.safetensors.index.json", index), ("m-1.safetensors", "1"), ("m-2.safetensors", "2")]);
    let files = local(folder.path()).unwrap();
    assert_eq!(weight_names(&files), ["m-1.safetensors", "m-2.safetensors"]);
    assert_eq!((files.generation_config, files.sparse_profile), (None, None));

    fs::remove_file(folder.path().join("m-1.safetensors")).unwrap();
    let place = folder.path().to_str().unwrap();
    assert_says(local(folder.path()), &["`m-1.safetensors` is missing", place]);
}

#[test]
fn bad_indices_are_refused() {
    let name = "model.safetensors.index.json";
    for bad in ["{", "[]", "{}", r#"{"weight_map":{"a":1}}"#] {
        assert_says(local(with(&[(name, bad)]).path()), &[name, "not an index of shards"]);
    }
    assert_says(local(with(&[(name, r#"{"weight_map":{}}"#)]).path()), &[name, "empty"]);
    for shard in ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "", "x.bin"] {
        let index = format!(r#"{{"weight_map":{{"a":"{shard}"}}}}"#);
        let needle = format!("`{shard}` is not the name");
        assert_says(local(with(&[(name, &index)]).path()), &[name, &needle]);
    }
    let windows = r#"{"weight_map":{"a":"C:\\x.safetensors"}}"#;
    assert_says(local(with(&[(name, windows)]).path()), &["is not the name"]);
}

#[test]
fn incomplete_folders_say_what_is_missing() {
    let empty = folder(&[]);
    assert_says(local(empty.path()), &["`config.json`", empty.path().to_str().unwrap()]);
    let bare = folder(&[BASE[0]]);
    assert_says(local(bare.path()), &["`tokenizer.json` is missing"]);
    let none = with(&[]);
    assert_says(local(none.path()), &["`model.safetensors`", "`model.safetensors.index.json`"]);
}

#[test]
fn one_file_with_its_neighbours() {
    let folder = with(&[("other.safetensors", "w"), ("model.safetensors", "v")]);
    let files = local(&folder.path().join("other.safetensors")).unwrap();
    assert_eq!(weight_names(&files), ["other.safetensors"]);
    assert_eq!(files.name, "other.safetensors");
    assert_says(local(&folder.path().join("config.json")), &["a .safetensors or .gguf file is expected"]);

    let lone = TempDir::new().unwrap();
    fs::write(lone.path().join("x.safetensors"), "w").unwrap();
    assert_says(local(&lone.path().join("x.safetensors")), &["`config.json` is missing"]);
}

#[test]
fn a_gguf_file_brings_its_own_and_may_have_a_profile_beside_it() {
    let folder = folder(&[("x-1.1b.GGUF", "GGUF"), ("y.gguf", ""), ("x-1.1b.sparse.safetensors", "")]);
    let path = folder.path().join("x-1.1b.GGUF");
    let files = local(&path).unwrap();
    assert!(matches!(&files.weights, Weights::Gguf(p) if *p == path));
    assert_eq!((files.config.clone(), files.tokenizer.clone()), (None, None));
    assert_eq!(files.name, "x-1.1b.GGUF");
    let profile = SparseProfile::File(folder.path().join("x-1.1b.sparse.safetensors"));
    assert_eq!(files.sparse_profile, Some(profile));
    assert_says(files.load_tokenizer(), &["x-1.1b.GGUF", "truncated"]);
    assert_eq!(local(&folder.path().join("y.gguf")).unwrap().sparse_profile, None);
    assert_says(ModelFiles::local("absent.gguf"), &["there is no file or folder `absent.gguf`"]);
    assert_says(ModelFiles::local("./a/b/absent.gguf"), &["there is no file"]);
}

#[test]
fn a_path_that_does_not_exist_is_not_a_hub_id() {
    for path in ["./absent", "../absent", "~/absent", "a\\b", "/absent/x", "x.safetensors", "x/"] {
        assert_says(ModelFiles::local(path), &["no file or folder", path]);
    }
    // Tests run in the folder of the package, which has `src`.
    assert_says(ModelFiles::local("src/absent"), &["`src`", "`absent`", "Hub id"]);
    assert!(ModelFiles::local("org/name").unwrap().is_none());
    assert!(ModelFiles::local("name").unwrap().is_none());
}

#[test]
fn a_corrupt_tokenizer_is_named() {
    let folder = with(&[("model.safetensors", "w")]);
    let path = folder.path().join("tokenizer.json");
    for (bad, what) in [("", "is empty"), ("{", "not a tok"), ("[1]", "not a tok"), ("\u{0}", "not a tok")] {
        fs::write(&path, bad).unwrap();
        let result = local(folder.path()).and_then(|files| files.load_tokenizer());
        assert_says(result, &[path.to_str().unwrap(), what]);
    }
}

#[test]
fn a_model_that_is_part_of_the_program() {
    let model = EmbeddedModel {
        name: "mine",
        config: include_bytes!("../testdata/tales-silu/config.json"),
        tokenizer: include_bytes!("../testdata/tales-silu/tokenizer.json"),
        weights: include_bytes!("../testdata/tales-silu/model.safetensors"),
        sparse_profile: include_bytes!("../testdata/tales-silu/sparse.safetensors"),
    };
    let files = ModelFiles::from_embedded(&model);
    assert_eq!(files.name, "mine");
    assert!(files.folder.is_none() && files.sparse_profile.is_some());
    assert_eq!(files.config.as_deref(), Some(model.config));
    assert!(matches!(files.weights, Weights::Embedded(bytes) if bytes == model.weights));
    files.load_tokenizer().unwrap();
    assert!(!format!("{files:?} {model:?}").contains("123, "), "no contents in debug output");
}

#[cfg(feature = "hub")]
#[test]
fn a_revision_needs_the_hub() {
    use candle_sparse_models::hub::HubSettings;

    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu");
    let result = ModelFiles::resolve(folder, Some("v1"), &HubSettings::default());
    assert_says(result, &[folder, "revision `v1` does not apply"]);
}

/// What stands in place of a file, and a word by which the message names it.
const IMPOSTORS: [(&[u8], &str); 8] = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n", "git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "web page"),
    (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "markup"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\x03abcdefgh", "gzip"),
    (b"PK\x03\x04\0\0\x08\x08archive/data.pkl", "PyTorch"),
    (&[0; 64], "zeros"),
    (b"", "empty"),
    (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "GGUF"),
];

const CONFIG: &str = r#"{"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}"#;

#[test]
fn whatever_stands_in_place_of_a_file_is_named() {
    use candle_sparse::Error;
    use candle_sparse_models::pretrained;

    for (content, word) in IMPOSTORS {
        for name in [
            "config.json",
            "tokenizer.json",
            "generation_config.json",
            "tokenizer_config.json",
            "model.safetensors.index.json",
            "chat_template.jinja",
            "model.safetensors",
            "sparse.safetensors",
        ] {
            // Markup and nothing at all are templates.
            if name.ends_with("jinja") && ["markup", "empty"].contains(&word) {
                continue;
            }
            let folder = folder(&[("config.json", CONFIG), ("tokenizer.json", "{}")]);
            let path = folder.path().join(name);
            if !name.ends_with("index.json") {
                fs::write(folder.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
            }
            fs::write(&path, content).unwrap();
            let result = local(folder.path()).and_then(|files| {
                if let Some(profile) = &files.sparse_profile {
                    profile.load()?;
                }
                pretrained::var_builder(&files, None).map(|_| ())
            });
            let e = result.unwrap_err();
            let typed = matches!(Error::of(&e), Some(Error::File { path: p, .. }) if *p == path);
            let text = e.to_string();
            assert!(typed && text.contains(word) && !text.contains('\n'), "{name}, {word}: {text}");
        }
    }
}

#[test]
fn a_gguf_file_that_is_none_says_what_it_is() {
    use candle_sparse_models::gguf::GgufFile;

    let folder = folder(&[]);
    let json = (b"{\"error\": \"Repository not found\"}".as_slice(), "Repository not found");
    let text = (b"Entry not found".as_slice(), "Entry not found");
    let old = (b"tjgg\x03\0\0\0 and so on".as_slice(), "before GGUF");
    for (content, word) in IMPOSTORS[..7].iter().chain(&[json, text, old]) {
        let path = folder.path().join("m.gguf");
        fs::write(&path, content).unwrap();
        assert_says(local(&path).and_then(|files| files.load_tokenizer()), &["m.gguf", word]);
        // SAFETY: nobody writes to the file while it is open.
        assert_says(unsafe { GgufFile::map(&path) }, &["m.gguf", word]);
    }
    fs::create_dir(folder.path().join("d.gguf")).unwrap();
    assert_says(GgufFile::open(folder.path().join("d.gguf")), &["d.gguf", "is a folder"]);
}

#[test]
fn content_decides_what_a_model_is() {
    let tiny = b"\x02\0\0\0\0\0\0\0{}".as_slice();
    let folder = with(&[]);
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    // A blob of the Hub's cache has no extension; a browser may have changed it.
    for name in ["sha256-0123", "x.safetensors", "x.gguf", "x.bin"] {
        assert!(
            matches!(local(&write(name, b"GGUF\x03\0\0\0")).unwrap().weights, Weights::Gguf(_)),
            "{name}"
        );
        assert_eq!(weight_names(&local(&write(name, tiny)).unwrap()), [name]);
    }
    assert_says(
        local(&write("pytorch_model.bin", IMPOSTORS[4].0)),
        &["pytorch_model.bin", "PyTorch", "convert"],
    );
    assert_says(local(&write("notes.txt", b"hello")), &["a .safetensors or .gguf file is expected"]);
}

#[test]
fn a_folder_without_a_model_says_what_it_holds() {
    let one = folder(&[("README.md", ""), ("x.gguf", "GGUF"), ("tokenizer.json", "{}")]);
    assert!(matches!(local(one.path()).unwrap().weights, Weights::Gguf(path) if path.ends_with("x.gguf")));
    let two = folder(&[("x-q4.gguf", "GGUF"), ("x-q8.gguf", "GGUF")]);
    assert_says(local(two.path()), &["2 GGUF files", "x-q4.gguf"]);
    assert_says(
        local(with(&[("pytorch_model.bin", "")]).path()),
        &["no weights", "pytorch_model.bin", "safetensors"],
    );
    let folders = folder(&[]);
    fs::create_dir(folders.path().join("config.json")).unwrap();
    assert_says(local(folders.path()), &["config.json", "is a folder"]);
}

#[test]
fn a_mark_of_utf_8_is_no_part_of_a_text() {
    let folder = folder(&[BASE[1], ("config.json", "\u{feff}{}"), ("chat_template.jinja", "\u{feff}a")]);
    fs::write(folder.path().join("model.safetensors"), "w").unwrap();
    let files = local(folder.path()).unwrap();
    assert_eq!(files.config.as_deref(), Some(&b"{}"[..]));
    assert_eq!(files.chat_template.as_deref(), Some(&b"a"[..]));
    fs::write(folder.path().join("config.json"), b"\xff\xfe{\0}\0").unwrap();
    assert_says(local(folder.path()), &["config.json", "UTF-16"]);
}
