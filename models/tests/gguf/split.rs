//! Models in several files.

use crate::files::{Gguf, LAYERS, ids, worst};
use candle_core::{
    Tensor,
    quantized::{
        GgmlDType,
        gguf_file::{self, Value},
    },
};
use candle_sparse::Error;
use candle_sparse_models::{
    decoder::LoadOptions,
    files::{ModelFiles, Weights},
    gguf::GgufFile,
    quantized_llama::ModelWeights,
};
use std::path::{Path, PathBuf};

/// Writes the parts of a file; tensor `i` goes where `part` says.
fn split(file: &Gguf, dir: &Path, count: usize, part: impl Fn(usize) -> usize) -> Vec<PathBuf> {
    let write = |no: usize| {
        let about = [
            ("split.no", Value::U16(no as u16)),
            ("split.count", Value::U16(count as u16)),
            ("split.tensors.count", Value::I32(file.tensors.len() as i32)),
        ];
        let mut metadata: Vec<(&str, &Value)> = about.iter().map(|(k, v)| (*k, v)).collect();
        if no == 0 {
            metadata.extend(file.metadata.iter().map(|(k, v)| (k.as_str(), v)));
        }
        let tensors = file.tensors.iter().enumerate().filter(|(i, _)| part(*i) == no);
        let tensors: Vec<_> = tensors.map(|(_, (name, t))| (name.as_str(), t)).collect();
        let path = dir.join(format!("m-{:05}-of-{count:05}.gguf", no + 1));
        let mut out = std::fs::File::create(&path).unwrap();
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        path
    };
    (0..count).map(write).collect()
}

fn logits(file: &GgufFile) -> Tensor {
    let mut model = ModelWeights::from_gguf_file(file, LoadOptions::default()).unwrap();
    model.forward(&ids(20, 5), 0).unwrap()
}

fn error(path: &Path) -> String {
    let e = GgufFile::open(path).unwrap_err();
    assert!(matches!(Error::of(&e), Some(Error::File { .. })), "{e}");
    e.to_string()
}

#[test]
fn any_part_opens_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = Gguf::llama(|_| GgmlDType::Q4_0, false);
    let whole = dir.path().join("whole.gguf");
    file.save(&whole);
    let whole = logits(&GgufFile::open(&whole).unwrap());
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    };
    let even = split(&file, &folder("even"), 3, |i| i % 3);
    // As `gguf-split --no-tensor-first-split` does.
    let bare = split(&file, &folder("bare"), 2, |_| 1);
    for path in even.iter().chain(&bare) {
        let opened = GgufFile::open(path).unwrap();
        assert!(
            opened
                .path()
                .ends_with(format!("m-00001-of-0000{}.gguf", if even.contains(path) { 3 } else { 2 }))
        );
        assert_eq!(worst(&logits(&opened), &whole), 0.0, "{}", path.display());
        // SAFETY: nobody writes to the files of this test.
        let mapped = unsafe { GgufFile::map(path) }.unwrap();
        assert_eq!(worst(&logits(&mapped), &whole), 0.0, "{}", path.display());
    }
    // A folder that holds nothing else is the model.
    let files = ModelFiles::from_folder(&dir.path().join("even")).unwrap();
    assert!(matches!(&files.weights, Weights::Gguf(path) if *path == even[0]));
}

#[test]
fn parts_that_are_missing_or_wrong_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = Gguf::llama(|_| GgmlDType::Q4_0, true);
    let parts = split(&file, dir.path(), 3, |i| i % 3);
    let content = parts.iter().map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>();
    std::fs::remove_file(&parts[1]).unwrap();
    for path in [&parts[0], &parts[2]] {
        let e = error(path);
        assert!(
            e.contains("missing") && e.contains("m-00002-of-00003.gguf") && e.contains("of 3 of a split"),
            "{e}"
        );
    }
    // One part in the place of another.
    std::fs::write(&parts[1], &content[2]).unwrap();
    let e = error(&parts[0]);
    assert!(e.contains("m-00002-of-00003.gguf") && e.contains("not part 2 of 3"), "{e}");
    // Its name is how the others are found.
    let renamed = dir.path().join("model.gguf");
    std::fs::write(&renamed, &content[1]).unwrap();
    let e = error(&renamed);
    assert!(e.contains("part 2 of 3") && e.contains("-00002-of-00003.gguf"), "{e}");
    // A part of another model with the same number of parts.
    let other = tempfile::tempdir().unwrap();
    let mut fewer = Gguf::llama(|_| GgmlDType::Q4_0, true);
    fewer.tensors.truncate(2 * LAYERS);
    let others = split(&fewer, other.path(), 3, |i| i % 3);
    std::fs::copy(&others[1], &parts[1]).unwrap();
    let e = error(&parts[0]);
    assert!(e.contains("tensors") && e.contains("announced"), "{e}");
    std::fs::copy(&parts[0], other.path().join("m-00001-of-00002.gguf")).unwrap();
    let e = error(&other.path().join("m-00001-of-00002.gguf"));
    assert!(e.contains("part 1 of 3"), "{e}");
}

#[test]
fn one_part_alone_is_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = Gguf::llama(|_| GgmlDType::Q4_0, true);
    file.set("split.no", Value::U16(0));
    file.set("split.count", Value::U16(1));
    let path = dir.path().join("any-name.gguf");
    file.save(&path);
    GgufFile::open(&path).unwrap();
    for (key, value, needle) in [
        ("split.no", Value::U16(5), "split.no is 5"),
        ("split.no", Value::String("one".into()), "split.no is a String"),
        ("split.count", Value::I32(-2), "split.count is a I32"),
    ] {
        let mut file = Gguf::llama(|_| GgmlDType::Q4_0, true);
        file.set("split.no", Value::U16(0));
        file.set("split.count", Value::U16(2));
        file.set(key, value);
        file.save(&path);
        let e = error(&path);
        assert!(e.contains(needle), "{needle}: {e}");
    }
}
