//! Prefixes in files: a prompt that one run has read is not read again by the next.
//!
//! A file holds the keys and values of one prefix ([`KvCache::save_tokens`]: versioned, checksummed, replaced as a whole, tied to its
//! model). Its name is `KEY-TEXT.safetensors`: the key says under which model and settings it was made, the text which tokens it holds.

use super::{Cuts, LEAST, common, serves};
use crate::{
    decoder::{Decoder, Input, Logits, Scratch, Step},
    engine::EngineOptions,
    kv_cache::KvCache,
    pretrained::first_line,
};
use candle_core::Result;
use candle_sparse::Error;
use crc::{CRC_64_XZ, Crc};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::SystemTime,
};

/// Of keys: changes when what stands in files would be understood otherwise.
const VERSION: u32 = 1;
/// Tokens of the text that a key's numbers are computed on: more than the few rows that some sums treat in another way.
const PROBE: usize = 12;
const HASH: Crc<u64> = Crc::<u64>::new(&CRC_64_XZ);

#[derive(Debug)]
struct Saved {
    ids: Arc<[u32]>,
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// A prefix that is being written.
#[derive(Debug)]
struct Writing {
    cache: Arc<KvCache>,
    done: JoinHandle<Result<Saved>>,
}

#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    key: u64,
    cuts: Cuts,
    max_bytes: u64,
    files: Vec<Saved>,
    writing: Option<Writing>,
}

impl Folder {
    /// The files of a folder, which is made where there is none; of files only the tokens are read.
    ///
    /// # Errors
    /// [`Error::File`]: it cannot be made or read.
    pub(super) fn open(
        path: &Path,
        decoder: &Decoder,
        options: &EngineOptions,
        cuts: Cuts,
        notices: &mut Vec<String>,
    ) -> Result<Self> {
        let wrong = |problem: String| Error::File { path: path.into(), problem };
        fs::create_dir_all(path).map_err(|e| wrong(format!("cannot be made a folder of prefixes: {e}")))?;
        let listed = fs::read_dir(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let key = key(decoder, options, cuts)?;
        let max_bytes = options.prefix_folder_bytes;
        let mut folder = Self { path: path.into(), key, cuts, max_bytes, files: Vec::new(), writing: None };
        let mut others = 0;
        for file in listed.filter_map(|entry| Some(entry.ok()?.path())) {
            let Some(of) = key_of(&file) else { continue };
            if of != key {
                others += 1;
                continue;
            }
            match Saved::open(&file) {
                Ok(saved) => folder.files.push(saved),
                Err(error) => notices.push(format!("a prefix was skipped: {}", first_line(&error))),
            }
        }
        if others > 0 {
            let path = path.display();
            notices
                .push(format!("{path}: {others} prefixes are of other models or settings and were skipped"));
        }
        Ok(folder)
    }

    /// The longest prefix of `wanted` in a file whose positions `fits`, and that file.
    pub(super) fn find(
        &self,
        wanted: &[u32],
        cuts: Cuts,
        fits: &dyn Fn(usize) -> bool,
    ) -> Option<(usize, PathBuf)> {
        let usable = |saved: &Saved| match (cuts, common(wanted, &saved.ids)) {
            (Cuts::Anywhere, same) => same,
            (Cuts::AtChunks(_), same) if same == saved.ids.len() => same,
            _ => 0,
        };
        let fitting = self.files.iter().filter(|saved| fits(saved.ids.len()));
        let best = fitting.max_by_key(|saved| usable(saved))?;
        Some((usable(best), best.path.clone())).filter(|(len, _)| *len >= LEAST)
    }

    /// Whether a file serves what these tokens would.
    pub(super) fn holds(&self, ids: &[u32], cuts: Cuts) -> bool {
        self.files.iter().any(|saved| serves(cuts, &saved.ids, ids))
    }

    /// What is being written.
    pub(super) fn writing(&self) -> Option<&KvCache> {
        self.writing.as_ref().map(|writing| &*writing.cache)
    }

    /// Whether another prefix can be written: the last one is.
    pub(super) fn is_ready(&mut self, notices: &mut Vec<String>) -> bool {
        if self.writing.as_ref().is_some_and(|writing| !writing.done.is_finished()) {
            return false;
        }
        self.wait(notices);
        true
    }

    /// Waits until what is being written is.
    pub(super) fn wait(&mut self, notices: &mut Vec<String>) {
        let Some(writing) = self.writing.take() else { return };
        match writing.done.join() {
            Ok(Ok(saved)) => self.add(saved, notices),
            Ok(Err(error)) => notices.push(format!("a prefix was not written: {}", first_line(&error))),
            Err(_) => notices.push("a prefix was not written: its thread panicked".into()),
        }
    }

    /// Writes a prefix on a thread of its own.
    pub(super) fn save(&mut self, ids: Arc<[u32]>, cache: Arc<KvCache>, notices: &mut Vec<String>) {
        let path = self.path.join(format!("{:016x}-{:016x}.safetensors", self.key, hash(&ids)));
        let held = Arc::clone(&cache);
        let write = move || {
            cache.save_tokens(&path, &ids)?;
            Ok(Saved { bytes: fs::metadata(&path)?.len(), ids, path, used: SystemTime::now() })
        };
        match std::thread::Builder::new().name("prefix".into()).spawn(write) {
            Ok(done) => self.writing = Some(Writing { cache: held, done }),
            Err(error) => notices.push(format!("a prefix was not written: no thread: {error}")),
        }
    }

    /// A file more: those that it replaces go, and those that were used longest ago where there is no room.
    fn add(&mut self, saved: Saved, notices: &mut Vec<String>) {
        let cuts = self.cuts;
        self.files.sort_by_key(|file| file.used);
        let mut room = self.max_bytes.saturating_sub(saved.bytes);
        let mut kept = Vec::new();
        for file in std::mem::take(&mut self.files).into_iter().rev() {
            if file.path == saved.path {
                continue;
            }
            if serves(cuts, &saved.ids, &file.ids) || file.bytes > room {
                remove(&file.path, notices);
                continue;
            }
            room -= file.bytes;
            kept.push(file);
        }
        self.files = kept;
        match saved.bytes > self.max_bytes {
            true => remove(&saved.path, notices),
            false => self.files.push(saved),
        }
    }

    /// A file was used now.
    pub(super) fn touch(&mut self, ids: &[u32]) {
        let now = SystemTime::now();
        for saved in self.files.iter_mut().filter(|saved| saved.ids.starts_with(ids)) {
            saved.used = now;
            // Only the order in which files are given up hangs on it.
            let _ = fs::File::options().write(true).open(&saved.path).and_then(|file| file.set_modified(now));
        }
    }

    /// A file is not to be tried again.
    pub(super) fn forget(&mut self, path: &Path) {
        self.files.retain(|saved| saved.path != path);
    }
}

impl Saved {
    fn open(path: &Path) -> Result<Self> {
        let about = fs::metadata(path)?;
        let ids = KvCache::saved_tokens(path)?.into();
        Ok(Self { ids, path: path.into(), bytes: about.len(), used: about.modified()? })
    }
}

fn remove(path: &Path, notices: &mut Vec<String>) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        notices.push(format!("{}: cannot be removed: {error}", path.display()));
    }
}

/// The key in a file's name; `None`: it is no prefix.
fn key_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".safetensors")?;
    let (key, text) = name.split_once('-').filter(|(key, text)| key.len() == 16 && text.len() == 16)?;
    u64::from_str_radix(text, 16).ok()?;
    u64::from_str_radix(key, 16).ok()
}

fn hash(ids: &[u32]) -> u64 {
    let mut digest = HASH.digest();
    ids.iter().for_each(|id| digest.update(&id.to_le_bytes()));
    digest.finalize()
}

/// What must be the same so that a prefix can be continued with the same bits: the settings, and the logits of a short text, which
/// weights, profile and kernels all have a part in.
fn key(decoder: &Decoder, options: &EngineOptions, cuts: Cuts) -> Result<u64> {
    let kv = options.kv.with_max_bytes(None);
    let settings =
        (VERSION, kv, decoder.attention_config(), decoder.sparse_config(), cuts, options.reuse_written);
    let mut digest = HASH.digest();
    digest.update(format!("{settings:?}").as_bytes());
    let vocab_size = decoder.config().vocab_size;
    let length = PROBE.min(decoder.config().max_position_embeddings - 1);
    let ids: Vec<u32> = (0..=length).map(|i| (i * 977 % vocab_size) as u32).collect();
    let mut cache = KvCache::new(decoder.config(), kv);
    let (mut scratch, mut logits) = (Scratch::default(), vec![0.0; vocab_size]);
    for range in [0..length, length..length + 1] {
        let step = Step { batch: 1, seq_len: range.len(), index_pos: range.start };
        let input = Input::Ids(&ids[range]);
        decoder.forward(input, step, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
        logits.iter().for_each(|logit| digest.update(&logit.to_le_bytes()));
    }
    Ok(digest.finalize())
}
