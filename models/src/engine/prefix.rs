//! Keys and values of prompts that were read, for prompts to come that begin alike.
//!
//! A text must not depend on what others asked before, so a prefix is used only where reading on from it gives the very bits that
//! reading everything gives ([`Cuts`]).

mod folder;

use super::EngineOptions;
use crate::{
    AttentionMode,
    decoder::Decoder,
    kv_cache::{KvCache, PAGE_LEN, unique_bytes},
};
use candle_core::Result;
use candle_sparse::Error;
use folder::Folder;
use std::{path::PathBuf, sync::Arc};

/// Shorter prefixes are read as fast as they are found.
const LEAST: usize = PAGE_LEN;

/// Where what was read can be cut so that what is read behind it has the same bits as if all were read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cuts {
    /// Keys and values are exact, and a row's bits do not depend on the rows beside it, of [enough](Decoder::least_part) rows.
    Anywhere,
    /// Pages become colder, or gates see whole texts: only what was read by the same chunks of so many positions is the same, and it
    /// cannot be cut.
    AtChunks(usize),
}

impl Cuts {
    pub(super) fn of(decoder: &Decoder, options: &EngineOptions) -> Self {
        let gated = decoder.attention_config().mode == AttentionMode::Gated;
        match options.kv.is_tiered() || gated {
            true => Self::AtChunks(options.prompt_chunk),
            false => Self::Anywhere,
        }
    }

    /// How much of `len` positions in common can be used.
    fn usable(self, len: usize) -> usize {
        match self {
            Self::Anywhere => len,
            Self::AtChunks(chunk) => len / chunk * chunk,
        }
    }
}

/// A beginning of texts that is held.
#[derive(Debug)]
struct Entry {
    /// The text that it is of: its first [`Self::len`] tokens are held.
    ids: Arc<[u32]>,
    cache: Arc<KvCache>,
    /// When it was used last.
    used: u64,
    /// Whether it is in the folder, or need not be.
    saved: bool,
}

impl Entry {
    fn len(&self) -> usize {
        self.cache.len()
    }

    fn held(&self) -> &[u32] {
        &self.ids[..self.len()]
    }
}

/// Where a prefix is held.
#[derive(Debug)]
pub(super) enum Place {
    /// In memory, ready to be continued.
    Memory(Box<KvCache>),
    /// In a file.
    File(PathBuf),
}

/// The prefixes that are held, in memory and in a folder.
#[derive(Debug)]
pub(super) struct Prefixes {
    cuts: Cuts,
    /// Tokens of a prompt that are read always: the last one, whose logits are wanted, and [as many](Decoder::least_part) as belong to it.
    least_read: usize,
    max_bytes: usize,
    entries: Vec<Entry>,
    clock: u64,
    folder: Option<Folder>,
    pub(super) notices: Vec<String>,
}

impl Prefixes {
    /// None yet but those in the folder of `options`.
    ///
    /// # Errors
    /// The folder cannot be read or made, or what is asked for cannot be kept in files.
    pub(super) fn new(decoder: &Decoder, options: &EngineOptions) -> Result<Self> {
        let cuts = Cuts::of(decoder, options);
        let mut notices = Vec::new();
        let folder = match &options.prefix_folder {
            Some(path) => {
                check_files(decoder, options)?;
                Some(Folder::open(path, decoder, options, cuts, &mut notices)?)
            }
            None => None,
        };
        let least_read = decoder.least_part();
        Ok(Self {
            cuts,
            least_read,
            max_bytes: options.prefix_bytes,
            entries: Vec::new(),
            clock: 0,
            folder,
            notices,
        })
    }

    /// Whether anything is shared.
    pub(super) fn is_off(&self) -> bool {
        self.max_bytes == 0
    }

    /// How much of a prompt the others' `ids`, of which `len` were or will be read, can serve.
    pub(super) fn shared(&self, prompt: &[u32], ids: &[u32], len: usize) -> usize {
        let ids = &ids[..len.min(ids.len())];
        let usable = self.cuts.usable(common(self.sharable(prompt), ids));
        if usable < LEAST { 0 } else { usable }
    }

    /// What of a prompt others can have read.
    fn sharable<'a>(&self, prompt: &'a [u32]) -> &'a [u32] {
        &prompt[..prompt.len().saturating_sub(self.least_read)]
    }

    /// How much of a running sequence's prompt, as far as it is read, another one can begin with.
    pub(super) fn shared_now(&self, prompt: &[u32], ids: &[u32], cache: &KvCache) -> usize {
        let len = self.shared(prompt, ids, cache.len());
        if self.cuts == Cuts::Anywhere && continues(cache, len) { len } else { 0 }
    }

    /// The longest prefix of a prompt that is held, and where; of files those alone whose positions `fits`.
    pub(super) fn find(&mut self, prompt: &[u32], fits: &dyn Fn(usize) -> bool) -> Option<(usize, Place)> {
        self.clock += 1;
        let wanted = self.sharable(prompt);
        let best = (0..self.entries.len()).map(|i| (self.of_entry(i, wanted), i)).max();
        let (len, i) = best.unwrap_or_default();
        let file = self
            .folder
            .as_ref()
            .and_then(|f| f.find(wanted, self.cuts, fits))
            .filter(|(of, _)| *of >= len + LEAST);
        if let Some((len, path)) = file {
            return Some((len, Place::File(path)));
        }
        if len < LEAST {
            return None;
        }
        let entry = &mut self.entries[i];
        entry.used = self.clock;
        let mut cache = Box::new(KvCache::clone(&entry.cache));
        cache.truncate(len);
        Some((len, Place::Memory(cache)))
    }

    fn of_entry(&self, i: usize, wanted: &[u32]) -> usize {
        let entry = &self.entries[i];
        let same = common(wanted, entry.held());
        match self.cuts {
            Cuts::Anywhere if continues(&entry.cache, same) => same,
            _ if same == entry.len() => same,
            _ => 0,
        }
    }

    /// Where reading a prompt should leave a prefix behind though others like it end elsewhere: where one that was read before
    /// parted from it.
    pub(super) fn parting(&self, prompt: &[u32]) -> Option<usize> {
        let Cuts::AtChunks(_) = self.cuts else { return None };
        let each = self.entries.iter().map(|e| self.shared(prompt, &e.ids, e.ids.len()));
        each.max().filter(|len| *len > 0)
    }

    /// Keeps what is held of the first tokens of `ids`, within `most` bytes.
    pub(super) fn keep(&mut self, ids: &[u32], cache: KvCache, most: usize) {
        if self.is_off() || cache.len() < LEAST {
            return;
        }
        self.clock += 1;
        let held = &ids[..cache.len()];
        if let Some(entry) = self.entries.iter_mut().find(|e| serves(self.cuts, e.held(), held)) {
            entry.used = self.clock;
            return;
        }
        self.entries.retain(|e| !serves(self.cuts, held, e.held()));
        let saved = self.folder.as_ref().is_none_or(|f| f.holds(held, self.cuts));
        self.entries.push(Entry { ids: ids.into(), cache: Arc::new(cache), used: self.clock, saved });
        self.shrink(most);
    }

    /// Gives up what was used longest ago until the rest takes no more than so many bytes.
    pub(super) fn shrink(&mut self, most: usize) {
        let most = most.min(self.max_bytes);
        while !self.entries.is_empty() && self.bytes() > most {
            let oldest = (0..self.entries.len()).min_by_key(|i| self.entries[*i].used);
            self.entries.swap_remove(oldest.unwrap_or_default());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Everything that is held in memory.
    pub(super) fn caches(&self) -> impl Iterator<Item = &KvCache> {
        let writing = self.folder.iter().filter_map(Folder::writing);
        self.entries.iter().map(|e| &*e.cache).chain(writing)
    }

    /// Bytes of it.
    pub(super) fn bytes(&self) -> usize {
        unique_bytes(self.caches())
    }

    /// A file was read: what it holds is held in memory, too.
    pub(super) fn loaded(&mut self, ids: &[u32], cache: &KvCache, most: usize) {
        self.keep(ids, cache.clone(), most);
        if let Some(folder) = &mut self.folder {
            folder.touch(&ids[..cache.len()]);
        }
    }

    /// A file could not be read.
    pub(super) fn damaged(&mut self, path: &std::path::Path, error: &candle_core::Error) {
        self.notices.push(format!("a prefix was read anew: {}", crate::pretrained::first_line(error)));
        if let Some(folder) = &mut self.folder {
            folder.forget(path);
        }
    }

    /// Takes prefixes to the folder, one at a time, beside the work.
    pub(super) fn save(&mut self) {
        let Some(folder) = &mut self.folder else { return };
        if !folder.is_ready(&mut self.notices) {
            return;
        }
        let unsaved = self.entries.iter_mut().filter(|e| !e.saved);
        if let Some(entry) = unsaved.max_by_key(|e| e.used) {
            entry.saved = true;
            folder.save(entry.ids[..entry.cache.len()].into(), Arc::clone(&entry.cache), &mut self.notices);
        }
    }

    /// Whether nothing is being written, or waits for it.
    pub(super) fn is_saved(&self) -> bool {
        self.folder.as_ref().is_none_or(|f| f.writing().is_none()) && self.entries.iter().all(|e| e.saved)
    }
}

impl Drop for Prefixes {
    /// What was not written yet is written now.
    fn drop(&mut self) {
        while !self.is_saved() {
            if let Some(folder) = &mut self.folder {
                folder.wait(&mut self.notices);
            }
            self.save();
        }
    }
}

/// Whether `cache` can be continued from `len` on.
fn continues(cache: &KvCache, len: usize) -> bool {
    len > 0 && cache.check(cache.batch_size(), len, 0).is_ok()
}

/// Whether what is held of `ids` serves every text that what is held of `other` does.
fn serves(cuts: Cuts, ids: &[u32], other: &[u32]) -> bool {
    match cuts {
        Cuts::Anywhere => ids.starts_with(other),
        Cuts::AtChunks(_) => ids == other,
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// # Errors
/// [`Error::Setting`]: what is noted for choosing pages is not in files, and here it cannot be found again.
fn check_files(decoder: &Decoder, options: &EngineOptions) -> Result<()> {
    let mode = decoder.attention_config().mode;
    let by_token = matches!(mode, AttentionMode::Recall | AttentionMode::Sampled);
    if mode == AttentionMode::Gated || by_token && options.kv.is_tiered() {
        let problem = format!(
            "files do not hold what {mode:?} attention notes of pages while it reads them: give no folder, or another attention \
             (recall with exact keys and values can be kept)"
        );
        return Err(Error::Setting { name: "prefix_folder", problem }.into());
    }
    Ok(())
}
