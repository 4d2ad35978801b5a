//! A GGUF header looked over before anything is made of it.
//!
//! candle's reader stops at the first tensor type that it does not know, without its name, and turns a byte of an array
//! into a value of 32 bytes. Here nothing is allocated but a list of the tensors' places, and what is wrong has a name.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use candle_sparse::core::Format;
use std::collections::HashSet;

/// Longest header that is read: those of the largest vocabularies take some 20 MB.
const MOST_BYTES: usize = 256 << 20;
/// Most elements of an array, and values nested in one another.
const MOST_ELEMENTS: u64 = 1 << 24;
const MOST_NESTED: usize = 4;
const MOST_DIMS: u32 = 4;

type Result<T> = core::result::Result<T, String>;

/// The format of a ggml type, by its number in a file.
pub(super) fn format(ggml_type: u32) -> Option<Format> {
    Some(match ggml_type {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        10 => Format::Q2K,
        11 => Format::Q3K,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        30 => Format::BF16,
        _ => return None,
    })
}

/// Names of types that files in the wild have and we do not read.
fn name_of_unknown(ggml_type: u32) -> &'static str {
    match ggml_type {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown here",
    }
}

/// What is wrong with the file whose content is `bytes`.
pub(super) fn check(bytes: &[u8]) -> Result<()> {
    if bytes.get(..4) != Some(b"GGUF") {
        return Err("it does not begin as a GGUF file does".into());
    }
    let mut r = Reader { bytes, at: 4, wide: true };
    let version = r.u32("the version")?;
    if !(1..=3).contains(&version) {
        return Err(format!("it has GGUF version {version}, 1 to 3 are known"));
    }
    r.wide = version > 1;
    let (tensors, values) = (r.length("the number of tensors")?, r.length("the number of values")?);
    let mut alignment = 32;
    for _ in 0..values {
        let key = r.string("a key")?;
        let what = format!("value {key}");
        let kind = r.u32(&what)?;
        let start = r.at;
        r.skip(kind, &what, 0)?;
        if key == "general.alignment" && kind == 4 {
            alignment =
                u64::from(u32::from_le_bytes(r.bytes[start..start + 4].try_into().unwrap_or_default()));
        }
    }
    if !alignment.is_power_of_two() {
        return Err(format!("general.alignment is {alignment}, which is no power of two"));
    }
    let mut places = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let (name, place) = r.tensor(alignment)?;
        if !names.insert(name.clone()) {
            return Err(format!("tensor {name} is there twice"));
        }
        places.push((place, name));
    }
    check_places(places, (r.at as u64).next_multiple_of(alignment), bytes.len() as u64)
}

/// Tensors must lie apart from one another and within the file.
fn check_places(mut places: Vec<((u64, u64), String)>, data: u64, file: u64) -> Result<()> {
    places.sort();
    let mut end = (0, String::new());
    for ((start, len), name) in places {
        if start < end.0 {
            return Err(format!("tensors {} and {name} overlap", end.1));
        }
        let stop = start.checked_add(len).filter(|e| e.checked_add(data).is_some_and(|e| e <= file));
        let Some(stop) = stop else {
            return Err(format!(
                "tensor {name} takes {len} bytes from {start} of the data, past the end of the file (truncated download?)"
            ));
        };
        end = (stop, name);
    }
    Ok(())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Lengths have 64 bits, in version 1 32.
    wide: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|n| self.at.checked_add(n));
        let Some(end) = end.filter(|end| *end <= self.bytes.len()) else {
            return Err(format!("{what} takes {len} bytes, the file ends before (truncated download?)"));
        };
        if end > MOST_BYTES {
            return Err(format!("{what} ends past the first {} MB: that is no header", MOST_BYTES >> 20));
        }
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4, what)?.try_into().unwrap_or_default()))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8, what)?.try_into().unwrap_or_default()))
    }

    fn length(&mut self, what: &str) -> Result<u64> {
        if self.wide { self.u64(what) } else { self.u32(what).map(u64::from) }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.length(what)?;
        Ok(String::from_utf8_lossy(self.take(len, what)?).into_owned())
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u32, what: &str, depth: usize) -> Result<()> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => self.length(what)?,
            9 => return self.skip_array(what, depth + 1),
            other => return Err(format!("{what} has type {other}, which GGUF does not know")),
        };
        self.take(size, what).map(|_| ())
    }

    fn skip_array(&mut self, what: &str, depth: usize) -> Result<()> {
        let (kind, n) = (self.u32(what)?, self.length(what)?);
        if n > MOST_ELEMENTS || depth > MOST_NESTED {
            return Err(format!("{what} is an array of {n} elements, nested {depth} deep: that is absurd"));
        }
        for _ in 0..n {
            self.skip(kind, what, depth)?;
        }
        Ok(())
    }

    /// A tensor's name, where its data begins, and its bytes.
    fn tensor(&mut self, alignment: u64) -> Result<(String, (u64, u64))> {
        let name = self.string("a tensor's name")?;
        let what = format!("tensor {name}");
        let dims = self.u32(&what)?;
        if dims == 0 || dims > MOST_DIMS {
            return Err(format!("{what} has {dims} dimensions, 1 to {MOST_DIMS} are possible"));
        }
        // The first dimension is that of a row.
        let mut sizes = [1_u64; MOST_DIMS as usize];
        for size in &mut sizes[..dims as usize] {
            *size = self.length(&what)?;
        }
        let kind = self.u32(&what)?;
        let Some(format) = format(kind) else {
            return Err(format!(
                "{what} has ggml type {kind} ({}), which is not supported: F32, F16, BF16, Q8_0, Q4_0 to Q5_1 and Q2_K \
                 to Q6_K are",
                name_of_unknown(kind)
            ));
        };
        let offset = self.u64(&what)?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "{what} begins at {offset}, which is no multiple of the alignment {alignment}"
            ));
        }
        let block = format.block_len();
        if !sizes[0].is_multiple_of(block as u64) {
            let name = format.name();
            return Err(format!(
                "{what} has rows of {} elements, {name} needs multiples of {block}",
                sizes[0]
            ));
        }
        let row_bytes = (sizes[0] / block as u64).checked_mul(format.row_bytes(block) as u64);
        let len = sizes[1..].iter().try_fold(row_bytes.unwrap_or(u64::MAX), |n, d| n.checked_mul(*d));
        // More than any file holds: the check of places names the tensor.
        Ok((name, (offset, len.unwrap_or(u64::MAX))))
    }
}
