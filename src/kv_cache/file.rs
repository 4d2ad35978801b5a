//! A cache as a file: continue a conversation without reading it again.
//!
//! A `safetensors` file: per sequence and layer a tensor of bytes `sequences.S.layers.L`, page after page in the form they
//! have in memory, and their tiers; what [`KvConfig`] says and the shape as metadata. What the gate said is not kept: after
//! loading, pages that are already there count as wanted.

use super::{KvCache, KvConfig, KvDType, PAGE_LEN, Tier, page::PageShape};
use crate::{
    loading::{self, SafetensorsFiles},
    save::save,
};
use candle_core::{Error, Result, bail};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io::{BufWriter, Write},
    path::Path,
};

const ABOUT: &str = "candle_sparse_kv_cache";
const FORMAT: u64 = 1;

impl KvCache {
    /// Writes the cache to a file, page by page; one that was there is replaced when the new one is whole.
    ///
    /// # Errors
    /// The cache was [cut back](Self::truncate) to where nothing can follow; those of [`save`](crate::save::save()).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.check_window(self.len)?;
        save(path, |file| self.write_to(&mut BufWriter::new(file)))
    }

    fn write_to(&self, out: &mut impl Write) -> Result<()> {
        let pages = self.len.div_ceil(PAGE_LEN) - self.first;
        let (mut tensors, mut end) = (Vec::new(), 0);
        let mut add = |name: String, bytes: usize| {
            let data_offsets = (end, end + bytes);
            end += bytes;
            tensors.push((name, TensorInfo { dtype: Dtype::U8, shape: vec![bytes], data_offsets }));
        };
        for (s, layers) in self.sequences.iter().enumerate() {
            for (l, all) in layers.iter().enumerate() {
                add(name(s, l), all[..pages].iter().map(|p| p.as_bytes().len()).sum());
                add(format!("{}.tiers", name(s, l)), pages);
            }
        }
        let about = HashMap::from([(ABOUT.to_string(), self.about().to_string())]);
        let header = Metadata::new(Some(about), tensors).map_err(Error::wrap)?;
        let mut header = serde_json::to_vec(&header).map_err(Error::wrap)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for all in self.sequences.iter().flatten() {
            all[..pages].iter().try_for_each(|p| out.write_all(p.as_bytes()))?;
            let tiers: Vec<u8> = all[..pages].iter().map(|p| p.tier() as u8).collect();
            out.write_all(&tiers)?;
        }
        Ok(out.flush()?)
    }

    /// Fills this cache, made for the same model, with what [`Self::save`] wrote; its settings become the file's.
    ///
    /// # Errors
    /// The file is none of these, truncated, or of another shape or sliding window. The cache is unchanged then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let named = |e: Error| Error::msg(format!("kv cache {}: {e}", path.display()));
        let metadata = loading::metadata(path)?;
        let Some(about) = metadata.get(ABOUT) else {
            return Err(named(Error::msg("is no saved cache")));
        };
        let about: Value = serde_json::from_str(about).map_err(|e| named(Error::wrap(e)))?;
        let generation = self.generation + 1;
        *self = Self { generation, ..self.read(path, &about).map_err(named)? };
        Ok(())
    }

    fn about(&self) -> Value {
        let KvConfig { dtype, hot, warm, stochastic, max_bytes } = self.config;
        json!({
            "format": FORMAT, "positions": self.len, "sequences": self.sequences.len(), "layers": self.shape.layers,
            "heads": self.shape.page.heads, "head_dim": self.shape.page.head_dim, "dtype": dtype.name(), "hot": hot,
            "warm": warm, "stochastic": stochastic, "max_bytes": max_bytes, "sliding_window": self.window,
            "first_page": self.first,
        })
    }

    fn read(&self, path: &Path, about: &Value) -> Result<Self> {
        let number = |key: &str| match about[key].as_u64() {
            Some(n) => Ok(n as usize),
            None => bail!("metadata has no number {key}"),
        };
        if number("format")? as u64 != FORMAT {
            bail!("format {} is not known here, only {FORMAT}: update candle-sparse", about["format"]);
        }
        let (PageShape { heads, head_dim }, layers) = (self.shape.page, self.shape.layers);
        let [got_layers, got_heads, got_dim] = [number("layers")?, number("heads")?, number("head_dim")?];
        if [got_layers, got_heads, got_dim] != [layers, heads, head_dim] {
            bail!(
                "made for {got_layers} layers of {got_heads} heads of {got_dim}, the model has {layers} of {heads} of \
                 {head_dim}"
            );
        }
        let window = about["sliding_window"].as_u64().map(|w| w as usize);
        if window != self.window {
            let name = |w: Option<usize>| w.map_or("none".to_string(), |w| w.to_string());
            bail!("made for a sliding window of {}, the model has {}", name(window), name(self.window));
        }
        let len = number("positions")?;
        if len > self.limit {
            bail!("{len} positions are past the model's context of {}", self.limit);
        }
        let Some(dtype) = KvDType::ALL.into_iter().find(|d| about["dtype"] == d.name()) else {
            bail!("dtype {} is not known", about["dtype"]);
        };
        let config = KvConfig {
            dtype,
            hot: number("hot")?,
            warm: number("warm")?,
            stochastic: about["stochastic"].as_u64(),
            max_bytes: about["max_bytes"].as_u64().map(|n| n as usize),
        };
        let mut cache = Self { config, ..Self::empty(self.shape, self.limit, self.window) };
        // Files from before there were sliding windows hold all pages.
        cache.first = about["first_page"].as_u64().unwrap_or(0) as usize;
        if cache.first > cache.first_page(len / PAGE_LEN) {
            bail!("first_page {} is past what {len} positions need", cache.first);
        }
        cache.fill(path, number("sequences")?, len)?;
        Ok(cache)
    }

    fn fill(&mut self, path: &Path, batch: usize, len: usize) -> Result<()> {
        let file = SafetensorsFiles::open(&[path])?;
        let (shape, dtype, pages) = (self.shape.page, self.config.dtype, len.div_ceil(PAGE_LEN) - self.first);
        for s in 0..batch {
            let mut layers = Vec::new();
            for l in 0..self.shape.layers {
                let name = name(s, l);
                let (all, tiers) = (file.bytes(&name)?, file.bytes(&format!("{name}.tiers"))?);
                let tiers: Option<Vec<Tier>> =
                    tiers.iter().map(|t| Tier::ALL.get(*t as usize).copied()).collect();
                let Some(tiers) = tiers.filter(|t| t.len() == pages) else {
                    bail!("{name}.tiers does not name the tiers of {pages} pages");
                };
                let needed: usize = tiers.iter().map(|t| shape.bytes(*t, dtype)).sum();
                if all.len() != needed {
                    bail!("{name} has {} bytes, its pages take {needed}", all.len());
                }
                let mut rest = all.as_slice();
                layers.push(Vec::new());
                for tier in tiers {
                    let mut page = shape.new_page(tier, dtype);
                    let (bytes, behind) = rest.split_at(shape.bytes(tier, dtype));
                    page.as_bytes_mut().copy_from_slice(bytes);
                    layers[l].push(page);
                    rest = behind;
                }
            }
            self.sequences.push(layers);
        }
        self.len = len;
        self.notes = vec![vec![super::Notes::default(); self.shape.layers]; batch];
        self.cooled = self.config.cooled(len);
        Ok(())
    }
}

fn name(sequence: usize, layer: usize) -> String {
    format!("sequences.{sequence}.layers.{layer}")
}

#[cfg(test)]
mod tests {
    use crate::{
        Error,
        kv_cache::tests::{config, fill, read},
        kv_cache::{KvCache, KvConfig, KvDType},
    };

    #[test]
    fn two_threads_save_beside_each_other() {
        let (c, dir) = (config(2, 32), tempfile::tempdir().unwrap());
        std::thread::scope(|scope| {
            for (who, positions) in [("alice", 40), ("bob", 70)] {
                let (c, path) = (&c, dir.path().join(format!("session.{who}")));
                scope.spawn(move || {
                    let new = || KvCache::new(c, KvConfig::exact(KvDType::F16));
                    let mut cache = new();
                    fill(&mut cache, c, 0..positions);
                    for _ in 0..20 {
                        cache.save(&path).unwrap();
                        let mut back = new();
                        back.load(&path).unwrap();
                        assert_eq!(back.len(), positions);
                        assert_eq!(read(&back, c, 1, positions - 1), read(&cache, c, 1, positions - 1));
                    }
                });
            }
        });
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "something else stayed");
    }

    #[test]
    fn a_folder_or_a_pointer_is_no_cache() {
        let (c, dir) = (config(2, 32), tempfile::tempdir().unwrap());
        let mut cache = KvCache::new(&c, KvConfig::exact(KvDType::F16));
        assert!(matches!(Error::of(&cache.save(dir.path()).unwrap_err()), Some(Error::File { .. })));
        let path = dir.path().join("pointer");
        std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
        let e = cache.load(&path).unwrap_err();
        assert!(matches!(Error::of(&e), Some(Error::File { path: p, .. }) if *p == path), "{e}");
        assert!(e.to_string().contains("Git LFS"), "{e}");
    }
}
