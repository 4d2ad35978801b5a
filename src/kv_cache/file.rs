//! A cache as a file: continue a conversation without reading it again.
//!
//! A `safetensors` file: per sequence and layer a tensor of bytes `sequences.S.layers.L`, page after page in the form they
//! have in memory, and their tiers; what [`KvConfig`] says and the shape as metadata; the [`Origin`], `origin.inv_freq` and
//! `origin.fingerprint`, where it is known; the tokens, `token_ids`, where they were given. What the gate said is not kept: after
//! loading, pages that are already there count as wanted. The metadata has a checksum of all that follows them.

use super::{KvCache, KvConfig, KvDType, Notes, Origin, PAGE_LEN, Page, Tier, page::PageShape};
use crate::{
    Error as Reason,
    input::check_json,
    loading::{self, SafetensorsFiles},
    save::save,
};
use candle_core::{DType, Error, Result, bail};
use crc::{CRC_32_ISO_HDLC, Crc, Table};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::Arc,
};

const ABOUT: &str = "candle_sparse_kv_cache";
/// Files of format 1 do not say which model they are of.
const FORMAT: u64 = 2;
const INV_FREQ: &str = "origin.inv_freq";
const FINGERPRINT: &str = "origin.fingerprint";
const TOKEN_IDS: &str = "token_ids";
const CHECKSUM: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC);

impl KvCache {
    /// Writes the cache to a file, page by page; one that was there is replaced when the new one is whole.
    ///
    /// # Errors
    /// The cache was [cut back](Self::truncate) to where nothing can follow; those of [`save`](crate::save::save()).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_tokens(path, &[])
    }

    /// As [`Self::save`], with the tokens whose keys and values these are: sequence after sequence, one id per position.
    ///
    /// # Errors
    /// Those of [`Self::save`]; another number of ids.
    pub fn save_tokens(&self, path: impl AsRef<Path>, token_ids: &[u32]) -> Result<()> {
        self.check_window(self.len)?;
        self.check_tokens(token_ids.len())?;
        save(path, |file| self.write_to(token_ids, &mut BufWriter::new(file)))
    }

    /// Whether so many tokens are those of all positions, or none are known.
    fn check_tokens(&self, ids: usize) -> Result<()> {
        let positions = self.sequences.len() * self.len;
        if ids != 0 && ids != positions {
            bail!("kv cache: {ids} token ids for {positions} positions");
        }
        Ok(())
    }

    fn write_to(&self, token_ids: &[u32], out: &mut impl Write) -> Result<()> {
        let pages = self.len.div_ceil(PAGE_LEN) - self.first;
        let (mut tensors, mut end) = (Vec::new(), 0);
        let mut add = |name: String, dtype: Dtype, elements: usize| {
            let bytes = if dtype == Dtype::U8 { elements } else { 4 * elements };
            let data_offsets = (end, end + bytes);
            end += bytes;
            tensors.push((name, TensorInfo { dtype, shape: vec![elements], data_offsets }));
        };
        let origin = self.origin.as_deref();
        let numbers = origin.map(|o| [(INV_FREQ, &o.inv_freq), (FINGERPRINT, &o.fingerprint)]);
        for (name, numbers) in numbers.iter().flatten() {
            add((*name).into(), Dtype::F32, numbers.len());
        }
        if !token_ids.is_empty() {
            add(TOKEN_IDS.into(), Dtype::U32, token_ids.len());
        }
        for (s, layers) in self.sequences.iter().enumerate() {
            for (l, all) in layers.iter().enumerate() {
                add(name(s, l), Dtype::U8, all[..pages].iter().map(|p| p.as_bytes().len()).sum());
                add(format!("{}.tiers", name(s, l)), Dtype::U8, pages);
            }
        }
        let mut sum = Checksum(CHECKSUM.digest());
        self.write_data(token_ids, &mut sum)?;
        let mut about = self.about();
        about["crc32"] = sum.0.finalize().into();
        let about = HashMap::from([(ABOUT.to_string(), about.to_string())]);
        let header = Metadata::new(Some(about), tensors).map_err(Error::wrap)?;
        let mut header = serde_json::to_vec(&header).map_err(Error::wrap)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        self.write_data(token_ids, out)?;
        Ok(out.flush()?)
    }

    /// Writes what the tensors hold, in their order.
    fn write_data(&self, token_ids: &[u32], out: &mut impl Write) -> Result<()> {
        let pages = self.len.div_ceil(PAGE_LEN) - self.first;
        let numbers = self.origin.iter().flat_map(|o| o.inv_freq.iter().chain(o.fingerprint.iter()));
        for number in numbers {
            out.write_all(&number.to_le_bytes())?;
        }
        for id in token_ids {
            out.write_all(&id.to_le_bytes())?;
        }
        for all in self.sequences.iter().flatten() {
            all[..pages].iter().try_for_each(|p| out.write_all(p.as_bytes()))?;
            let tiers: Vec<u8> = all[..pages].iter().map(|p| p.tier() as u8).collect();
            out.write_all(&tiers)?;
        }
        Ok(())
    }

    /// Fills this cache, made for the same model, with what [`Self::save`] wrote. How positions are kept is then as the file says;
    /// the budget stays this cache's.
    ///
    /// Which model the file is of is compared here where this cache is tied to one (made for a loaded model, or used), else by
    /// the first step that continues it.
    ///
    /// ```
    /// use candle_sparse::{KvCache, KvConfig, KvDType};
    ///
    /// # use candle_sparse_models::llama::LlamaConfig;
    /// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
    /// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
    /// # let config = config.into_config(false).to_core()?;
    /// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
    /// # let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("chat.safetensors");
    /// let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F32));
    /// cache.begin(1, 0, 1)?;
    /// (0..4).for_each(|layer| cache.write(0, layer, 0, &[0.5; 64], &[1.0; 64]));
    /// cache.advance(1);
    /// cache.save(&path)?;
    ///
    /// let mut later = KvCache::new(&config, KvConfig::exact(KvDType::F32));
    /// later.load(&path)?;
    /// assert_eq!(later.len(), 1);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::File`](Reason::File): it is none of these, or damaged. [`Error::WrongModel`](Reason::WrongModel): it is of another
    /// model, shape or sliding window. [`Error::Full`](Reason::Full): it holds more than the context or the budget. The cache is
    /// unchanged then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.load_tokens(path).map(|_| ())
    }

    /// As [`Self::load`]; returns the tokens that [`Self::save_tokens`] was given, none for a file of [`Self::save`].
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn load_tokens(&mut self, path: impl AsRef<Path>) -> Result<Vec<u32>> {
        let path = path.as_ref();
        let generation = self.generation + 1;
        let (read, token_ids) = self.read(path).map_err(|e| with_path(path, e))?;
        *self = Self { generation, ..read };
        Ok(token_ids)
    }

    /// The tokens that [`Self::save_tokens`] was given, none for a file of [`Self::save`]; keys and values are not read.
    ///
    /// # Errors
    /// [`Error::File`](Reason::File): it is no saved cache, or its beginning is damaged.
    pub fn saved_tokens(path: impl AsRef<Path>) -> Result<Vec<u32>> {
        let path = path.as_ref();
        let read = || {
            if !loading::metadata(path)?.contains_key(ABOUT) {
                bail!("is no saved kv cache");
            }
            read_tokens(&SafetensorsFiles::open(&[path])?)
        };
        read().map_err(|e| with_path(path, e))
    }

    fn about(&self) -> Value {
        let KvConfig { dtype, hot, warm, max_bytes: _ } = self.config;
        json!({
            "format": FORMAT, "positions": self.len, "sequences": self.sequences.len(), "layers": self.shape.layers,
            "heads": self.shape.page.heads, "head_dim": self.shape.page.head_dim, "dtype": dtype.name(), "hot": hot,
            "warm": warm, "sliding_window": self.window, "first_page": self.first,
            "interleaved": self.origin.as_ref().map(|o| o.interleaved),
        })
    }

    fn read(&self, path: &Path) -> Result<(Self, Vec<u32>)> {
        let metadata = loading::metadata(path)?;
        let Some(about) = metadata.get(ABOUT) else { bail!("is no saved kv cache") };
        check_json(about.as_bytes())?;
        let about: Value = serde_json::from_str(about).map_err(Error::wrap)?;
        let number = |key: &str| match about[key].as_u64() {
            Some(n) => Ok(n as usize),
            None => bail!("is a damaged kv cache: its metadata has no number {key}"),
        };
        match number("format")? as u64 {
            FORMAT => {}
            1 => bail!("was saved before caches said which model they are of: read the text again"),
            other => {
                bail!("has format {other}, which is not known here, only {FORMAT}: update candle-sparse")
            }
        }
        self.check_shape(
            [number("layers")?, number("heads")?, number("head_dim")?],
            &about["sliding_window"],
        )?;
        let len = number("positions")?;
        if len > self.limit {
            let problem =
                format!("{}: {len} positions are past the model's context of {}", path.display(), self.limit);
            return Err(Reason::Full { problem }.into());
        }
        let Some(dtype) = KvDType::ALL.into_iter().find(|d| about["dtype"] == d.name()) else {
            bail!("dtype {} is not known", about["dtype"]);
        };
        let config =
            KvConfig { dtype, hot: number("hot")?, warm: number("warm")?, max_bytes: self.config.max_bytes };
        let mut cache = Self::empty(self.shape, config, self.limit, self.window);
        cache.first = number("first_page")?;
        if cache.first > cache.first_page(len / PAGE_LEN) {
            bail!("first_page {} is past what {len} positions need", cache.first);
        }
        let file = SafetensorsFiles::open(&[path])?;
        if let Some(sum) = about["crc32"].as_u64() {
            check_sum(path, sum)?;
        }
        cache.origin = self.read_origin(&file, about["interleaved"].as_bool())?;
        cache.fill(&file, number("sequences")?, len)?;
        let token_ids = read_tokens(&file)?;
        cache.check_tokens(token_ids.len())?;
        Ok((cache, token_ids))
    }

    /// Whether a file of another shape or window is asked for.
    fn check_shape(&self, got: [usize; 3], window: &Value) -> Result<()> {
        let (PageShape { heads, head_dim }, layers) = (self.shape.page, self.shape.layers);
        let wrong = |problem: String| Err(Reason::WrongModel { what: "the saved kv cache", problem }.into());
        if got != [layers, heads, head_dim] {
            let [got_layers, got_heads, got_dim] = got;
            return wrong(format!(
                "it has {got_layers} layers of {got_heads} heads of {got_dim}, the model {layers} of {heads} of {head_dim}"
            ));
        }
        let window = window.as_u64().map(|w| w as usize);
        if window != self.window {
            let name = |w: Option<usize>| w.map_or("none".to_string(), |w| w.to_string());
            return wrong(format!(
                "it has a sliding window of {}, the model {}",
                name(window),
                name(self.window)
            ));
        }
        Ok(())
    }

    /// The model that a file is of, where that is this cache's.
    fn read_origin(&self, file: &SafetensorsFiles, interleaved: Option<bool>) -> Result<Option<Arc<Origin>>> {
        let numbers = |name: &str| -> Result<Arc<[f32]>> {
            if file.dtype(name) != Some(DType::F32) {
                bail!("{name} is missing, or not in F32");
            }
            Ok(file.bytes(name)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let read = match interleaved {
            Some(interleaved) => {
                Some(Origin { interleaved, inv_freq: numbers(INV_FREQ)?, fingerprint: numbers(FINGERPRINT)? })
            }
            None => None,
        };
        let problem = match (&read, &self.origin) {
            (Some(read), Some(own)) => read.difference(own),
            (None, Some(_)) => Some("it does not say which it is of".into()),
            (_, None) => None,
        };
        match problem {
            Some(problem) => Err(Reason::WrongModel { what: "the saved kv cache", problem }.into()),
            None => Ok(read.map(Arc::new)),
        }
    }

    fn fill(&mut self, file: &SafetensorsFiles, batch: usize, len: usize) -> Result<()> {
        let layers = self.shape.layers;
        for s in 0..batch {
            let pages = (0..layers).map(|l| self.read_layer(file, &name(s, l), len.div_ceil(PAGE_LEN)));
            self.sequences.push(pages.collect::<Result<_>>()?);
        }
        let cooled =
            |layers: &Vec<Vec<Page>>| layers.iter().map(|p| self.cooled_of(p)).collect::<Option<Vec<_>>>();
        let mut each = self.sequences.iter().map(cooled);
        // The page that is written next may be cold still, all others are as cold as those before them or hotter.
        match each.next() {
            Some(Some(cooled)) if each.all(|c| c.as_ref() == Some(&cooled)) => self.cooled = cooled,
            None => {}
            _ => bail!(
                "its pages do not grow warmer from the first to the last, or not in all sequences alike"
            ),
        }
        self.len = len;
        self.notes = vec![vec![Notes::default(); layers]; batch];
        self.adopt(batch);
        if self.pool.bytes() > self.config.max_bytes.unwrap_or(usize::MAX) {
            let problem =
                format!("the saved kv cache takes {} bytes, more than the budget", self.pool.bytes());
            return Err(Reason::Full { problem }.into());
        }
        Ok(())
    }

    /// The pages of a layer up to page `end`.
    fn read_layer(&self, file: &SafetensorsFiles, name: &str, end: usize) -> Result<Vec<Page>> {
        let (shape, dtype, pages) = (self.shape.page, self.config.dtype, end - self.first);
        let (all, tiers) = (file.bytes(name)?, file.bytes(&format!("{name}.tiers"))?);
        let mut rest = all.as_slice();
        let tiers: Option<Vec<Tier>> = tiers.iter().map(|t| Tier::ALL.get(*t as usize).copied()).collect();
        let Some(tiers) = tiers.filter(|t| t.len() == pages) else {
            bail!("{name}.tiers does not name the tiers of {pages} pages");
        };
        let needed: usize = tiers.iter().map(|t| shape.bytes(*t, dtype)).sum();
        if rest.len() != needed {
            bail!("{name} has {} bytes, its pages take {needed}", rest.len());
        }
        let read = |tier: Tier| {
            let mut page = shape.new_page(tier, dtype);
            let (bytes, behind) = rest.split_at(shape.bytes(tier, dtype));
            page.as_bytes_mut().copy_from_slice(bytes);
            rest = behind;
            page
        };
        Ok(tiers.into_iter().map(read).collect())
    }

    /// Pages at the front of a layer that are warm or cold, and cold; `None`: one is colder than one before it.
    fn cooled_of(&self, pages: &[Page]) -> Option<[usize; 2]> {
        let sinks = usize::from(self.first == 0);
        let (first, rest) = pages.split_at(sinks.min(pages.len()));
        let count = |least: Tier| rest.iter().take_while(|p| p.tier() >= least).count();
        let (cooled, cold) = (count(Tier::Warm), count(Tier::Cold));
        let sorted =
            first.iter().all(|p| p.tier() == Tier::Hot) && rest.is_sorted_by(|a, b| a.tier() >= b.tier());
        sorted.then_some([self.first + sinks + cooled, self.first + sinks + cold])
    }
}

/// Adds up what is written.
struct Checksum(crc::Digest<'static, u32, Table<16>>);

impl Write for Checksum {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Whether what follows the header of a file is what was written.
fn check_sum(path: &Path, wanted: u64) -> Result<()> {
    let (mut file, mut length) = (File::open(path)?, [0; 8]);
    file.read_exact(&mut length)?;
    file.seek(SeekFrom::Current(i64::from_le_bytes(length)))?;
    let mut sum = Checksum(CHECKSUM.digest());
    std::io::copy(&mut file, &mut sum)?;
    if u64::from(sum.0.finalize()) != wanted {
        bail!("is damaged: its checksum is another one than when it was written");
    }
    Ok(())
}

fn read_tokens(file: &SafetensorsFiles) -> Result<Vec<u32>> {
    match file.dtype(TOKEN_IDS) {
        None => Ok(Vec::new()),
        Some(DType::U32) => {
            Ok(file.bytes(TOKEN_IDS)?.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
        }
        Some(other) => bail!("{TOKEN_IDS} is in {other:?}, not in U32"),
    }
}

/// An error that names the file.
fn with_path(path: &Path, error: Error) -> Error {
    if Reason::of(&error).is_some() {
        return error;
    }
    let problem = error.to_string().lines().next().unwrap_or_default().to_string();
    Reason::File { path: path.into(), problem }.into()
}

fn name(sequence: usize, layer: usize) -> String {
    format!("sequences.{sequence}.layers.{layer}")
}

#[cfg(test)]
mod tests;
