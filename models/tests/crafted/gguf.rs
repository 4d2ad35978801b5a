//! Headers of GGUF files.

use crate::{memory, refused};
use candle_sparse_models::gguf::GgufFile;
use std::{fs, path::PathBuf};

/// A header by hand, for no program writes such ones.
#[derive(Clone, Default)]
pub(crate) struct Header {
    values: Vec<u8>,
    count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
}

pub(crate) fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    [&(text.as_ref().len() as u64).to_le_bytes(), text.as_ref()].concat()
}

/// An array of `n` values of type `kind`, which `bytes` are.
pub(crate) fn array(kind: u32, n: u64, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &n.to_le_bytes(), bytes].concat()
}

pub(crate) const U8: u32 = 0;
pub(crate) const U32: u32 = 4;
pub(crate) const I32: u32 = 5;
pub(crate) const F32: u32 = 6;
pub(crate) const TEXT: u32 = 8;
pub(crate) const ARRAY: u32 = 9;
pub(crate) const U64: u32 = 10;

impl Header {
    pub(crate) fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.values.extend([&text(key)[..], &kind.to_le_bytes(), bytes].concat());
        self.count += 1;
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.extend([text(name), (dims.len() as u32).to_le_bytes().to_vec()].concat());
        self.tensors.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
        self.tensors.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        self.tensor_count += 1;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensor_count, self.count].map(u64::to_le_bytes).concat();
        let mut bytes = [b"GGUF\x03\0\0\0", counts.as_slice(), &self.values, &self.tensors].concat();
        bytes.resize(bytes.len().next_multiple_of(32) + 64, 0);
        bytes
    }
}

pub(crate) fn write(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

fn refuse(what: &str, bytes: &[u8], needle: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, bytes);
    refused(what, bytes.len(), "m.gguf", || GgufFile::open(&path));
    refused(what, bytes.len(), needle, || GgufFile::open(&path));
}

#[test]
fn counts_of_2_to_the_63() {
    let _alone = memory::alone();
    for count in [1 << 63, u64::MAX, 1 << 40] {
        for counts in [[count, 0], [0, count], [count, count]] {
            let bytes =
                [b"GGUF\x03\0\0\0", counts.map(u64::to_le_bytes).concat().as_slice(), &[0; 64]].concat();
            refuse("counts", &bytes, "");
        }
        let list = |kind: u32| Header::default().value("a", ARRAY, &array(kind, count, &[]));
        for kind in [U8, TEXT, ARRAY, 12] {
            refuse("elements", &list(kind).bytes(), "value a");
        }
        let key =
            [b"GGUF\x03\0\0\0", [0, 1, count].map(u64::to_le_bytes).concat().as_slice(), &[0; 64]].concat();
        refuse("a key", &key, "a key");
        refuse("a text", &Header::default().value("a", TEXT, &count.to_le_bytes()).bytes(), "value a");
        refuse(
            "a name",
            &Header { tensor_count: 1, tensors: count.to_le_bytes().to_vec(), ..Header::default() }.bytes(),
            "name",
        );
    }
}

#[test]
fn places_of_tensors() {
    let _alone = memory::alone();
    let good = || Header::default().tensor("a", &[8], 0, 0);
    let all = good().tensor("b", &[8], 0, 32).bytes();
    GgufFile::open(write(&tempfile::tempdir().unwrap(), &all)).unwrap();
    for (header, needle) in [
        (good().tensor("b", &[8], 0, 0), "overlap"),
        (good().tensor("b", &[8], 0, 1 << 63), "past the end"),
        (good().tensor("b", &[8], 0, !31), "past the end"),
        (good().tensor("b", &[8], 0, 96), "past the end"),
        (good().tensor("b", &[8], 0, 33), "alignment"),
        (good().tensor("b", &[1 << 63], 0, 32), "past the end"),
        (good().tensor("b", &[1 << 32, 1 << 32], 0, 32), "past the end"),
        (good().tensor("b", &[u64::MAX, u64::MAX, u64::MAX, u64::MAX], 0, 32), "past the end"),
        (good().tensor("b", &[0], 0, 32), "no elements"),
        (good().tensor("b", &[8, 0], 0, 32), "no elements"),
        (good().tensor("b", &[], 0, 32), "0 dimensions"),
        (good().tensor("b", &[1; 5], 0, 32), "5 dimensions"),
        (good().tensor("b", &[8], u32::MAX, 32), "type 4294967295"),
        (good().tensor("b", &[33], 2, 32), "multiples of 32"),
        (good().tensor("a", &[8], 0, 32), "twice"),
        (good().value("general.alignment", U32, &0_u32.to_le_bytes()), "power of two"),
        (good().value("general.alignment", U32, &(1_u32 << 31).to_le_bytes()), "past the end"),
        (good().value("a", 99, &[]), "type 99"),
        (good().value("a", 7, &[2]), "neither true nor false"),
    ] {
        refuse(needle, &header.bytes(), needle);
    }
}

#[test]
fn metadata_that_inflate() {
    let _alone = memory::alone();
    let n = 8_000_000;
    refuse(
        "bytes",
        &Header::default().value("a", ARRAY, &array(U8, n, &vec![1; n as usize])).bytes(),
        "value a",
    );
    let one = text("x").repeat(n as usize);
    refuse("texts", &Header::default().value("a", ARRAY, &array(TEXT, n, &one)).bytes(), "value a");
    let none = array(U8, 0, &[]).repeat(n as usize);
    refuse("arrays", &Header::default().value("a", ARRAY, &array(ARRAY, n, &none)).bytes(), "value a");
    let mut deep = array(U8, 0, &[]);
    for _ in 0..100_000 {
        deep = array(ARRAY, 1, &deep);
        if deep.len() > 100_000 {
            break;
        }
    }
    refuse("nested", &Header::default().value("a", ARRAY, &deep).bytes(), "nested");
    let mut many = Header::default();
    for i in 0..3_000_000 {
        many.values.extend([&text(format!("{i:x}"))[..], &U8.to_le_bytes(), &[0]].concat());
        many.count += 1;
    }
    refuse("values", &many.bytes(), "value");
    let mut many = Header::default();
    for i in 0..1_000_000 {
        many = many.tensor(&format!("{i:x}"), &[1], 0, 0);
    }
    refuse("tensors", &many.bytes(), "tensor");
}

#[test]
fn a_text_of_100_mb() {
    let _alone = memory::alone();
    // Every byte that is no UTF-8 is three when it is replaced.
    let long = vec![0xff; 100_000_000];
    refuse("no UTF-8", &Header::default().value("a", TEXT, &text(&long)).bytes(), "value a");
    let long = vec![b'x'; 100_000_000];
    let key = String::from_utf8(long).unwrap();
    refuse("a long key", &Header::default().value(&key, 99, &[]).bytes(), "65535 are possible");
    refuse("a long name", &Header::default().tensor(&key, &[0], 0, 0).bytes(), "1024 are possible");
    refuse(
        "a key that steers a screen",
        &Header::default().value("a\x1b[2J\nb", 99, &[]).bytes(),
        "control characters",
    );
    // Past where any header ends.
    let past = vec![b'x'; 260 << 20];
    refuse("260 MB", &Header::default().value("a", TEXT, &text(&past)).bytes(), "no header");
}

#[test]
fn parts_and_profiles_that_are_not_there() {
    let _alone = memory::alone();
    let number = |n: u64| n.to_le_bytes();
    let part = |no: u64, count: u64| {
        Header::default().value("split.no", U64, &number(no)).value("split.count", U64, &number(count))
    };
    for (no, count) in [(0, u64::MAX), (0, 1 << 40), (u64::MAX, 2), (5, 2), (1, 2)] {
        refuse("split", &part(no, count).bytes(), "");
    }
    let dir = tempfile::tempdir().unwrap();
    // Both parts are the first: a model that holds itself.
    let bytes = part(0, 2).bytes();
    for name in ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"] {
        fs::write(dir.path().join(name), &bytes).unwrap();
    }
    refused("cyclic", bytes.len(), "is not part 2 of 2", || {
        GgufFile::open(dir.path().join("m-00001-of-00002.gguf"))
    });
    for length in [u64::MAX, 1 << 63, 1 << 62, 1 << 40, 10_000] {
        let bytes = Header::default().value("candle_sparse.profile.length", U64, &number(length)).bytes();
        let path = write(&dir, &bytes);
        refused("profile", bytes.len(), "", || GgufFile::open(&path)?.profile());
    }
}
