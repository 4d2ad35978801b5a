//! Reading the header of a GGUF file.
//!
//! This reader alone decides: candle's own takes `general.alignment` of any kind, divides by it when it is 0, stops at the
//! first tensor type that it does not know without its name, and takes the last of two values of one key. What it gives is
//! candle's [`Content`], so that code for candle's files reads these.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use super::types::{by_number, ggml_type, name_of_unknown};
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};
use std::{collections::HashMap, io::Read};

/// Longest header that is read: those of the largest vocabularies take some 20 MB.
const MOST_BYTES: u64 = 256 << 20;
/// What is read may take three times its bytes in the file, and this: the largest vocabularies take some 70 MB.
const FREE_BYTES: u64 = 64_000_000;
/// What an element of an array takes in memory.
const ELEMENT_BYTES: u64 = size_of::<Value>() as u64;
/// What a value with its key takes beside their texts, and what a tensor takes beside its name.
const VALUE_BYTES: u64 = 160;
const TENSOR_BYTES: u64 = 320;
/// Texts in files are not always UTF-8; a longer one is no text.
const MOST_MENDED: usize = 1 << 16;
/// Longest key, as the format says.
const MOST_KEY: u64 = (1 << 16) - 1;
/// Longest name of a tensor: the format says 64.
const MOST_NAME: u64 = 1024;
const MOST_NESTED: usize = 4;
const MOST_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

type Result<T> = core::result::Result<T, String>;

/// The header of a file of `len` bytes, read from its start.
pub(super) fn read(input: impl Read, len: u64) -> Result<Content> {
    let mut r = Reader { input, at: 0, len, wide: true, held: 0 };
    if r.array("the first bytes")? != *b"GGUF" {
        return Err("it does not begin as a GGUF file does".into());
    }
    let magic = r.version()?;
    let (tensors, values) = (r.length("the number of tensors")?, r.length("the number of values")?);
    let mut metadata = HashMap::new();
    for _ in 0..values {
        let key = r.name("a key", MOST_KEY)?;
        let what = format!("value {key}");
        r.hold(VALUE_BYTES, &what)?;
        let kind = r.u32(&what)?;
        let value = r.value(kind, &what, 0)?;
        if metadata.insert(key, value).is_some() {
            return Err(format!("{what} is there twice"));
        }
    }
    let alignment = alignment(&metadata)?;
    let (mut places, mut tensor_infos) = (Vec::new(), HashMap::new());
    for _ in 0..tensors {
        let (name, info, bytes) = r.tensor(alignment)?;
        places.push(((info.offset, bytes), name.clone()));
        if tensor_infos.insert(name.clone(), info).is_some() {
            return Err(format!("tensor {name} is there twice"));
        }
    }
    let tensor_data_offset = r.at.next_multiple_of(alignment);
    check_places(places, tensor_data_offset, len)?;
    Ok(Content { magic, metadata, tensor_infos, tensor_data_offset })
}

/// The format says that it is a U32. Another kind is refused: readers differ in what they make of it, and so in where they
/// look for the weights.
fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() => Ok(u64::from(*n)),
        Some(Value::U32(n)) => Err(format!("general.alignment is {n}, which is no power of two")),
        Some(other) => {
            Err(format!("general.alignment is a {:?}, the format asks for a U32", other.value_type()))
        }
    }
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

struct Reader<R> {
    input: R,
    at: u64,
    /// Bytes of the file.
    len: u64,
    /// Lengths have 64 bits, in version 1 32.
    wide: bool,
    /// What all that was read so far takes in memory.
    held: u64,
}

impl<R: Read> Reader<R> {
    /// Moves on by `len` bytes, if there are so many.
    fn advance(&mut self, len: u64, what: &str) -> Result<()> {
        let Some(end) = self.at.checked_add(len).filter(|end| *end <= self.len) else {
            return Err(format!("{what} takes {len} bytes, the file ends before (truncated download?)"));
        };
        if end > MOST_BYTES {
            return Err(format!("{what} ends past the first {} MB: that is no header", MOST_BYTES >> 20));
        }
        self.at = end;
        Ok(())
    }

    /// Counts what is about to be held in memory.
    fn hold(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.held = self.held.saturating_add(bytes);
        if self.held > 3 * self.at + FREE_BYTES {
            let (held, at) = (self.held / 1_000_000, self.at / 1_000_000);
            return Err(format!(
                "{what} and what is before it take {held} MB of memory for {at} MB: that is absurd"
            ));
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.advance(N as u64, what)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|e| format!("{what} cannot be read: {e}"))?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn length(&mut self, what: &str) -> Result<u64> {
        if self.wide { self.u64(what) } else { self.u32(what).map(u64::from) }
    }

    fn version(&mut self) -> Result<VersionedMagic> {
        let version = self.u32("the version")?;
        self.wide = version != 1;
        match version {
            1 => Ok(VersionedMagic::GgufV1),
            2 => Ok(VersionedMagic::GgufV2),
            3 => Ok(VersionedMagic::GgufV3),
            // No version is so large: the bytes of a small one in the other order.
            n if n & 0xffff == 0 && n > 0 => {
                Err("it is a big-endian GGUF file, for machines such as s390x: take the little-endian one"
                    .into())
            }
            n => Err(format!("it has GGUF version {n}, 1 to 3 are known")),
        }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.length(what)?;
        self.advance(len, what)?;
        self.hold(len, what)?;
        let mut bytes = vec![0; len as usize];
        self.input.read_exact(&mut bytes).map_err(|e| format!("{what} cannot be read: {e}"))?;
        // As in candle: some files end their strings with zeros, and some are not quite UTF-8.
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(e) if e.as_bytes().len() <= MOST_MENDED => {
                Ok(String::from_utf8_lossy(e.as_bytes()).into_owned())
            }
            Err(e) => Err(format!("{what} has {} bytes that are no UTF-8", e.as_bytes().len())),
        }
    }

    /// A text that stands in messages.
    fn name(&mut self, what: &str, most: u64) -> Result<String> {
        let start = self.at;
        let name = self.string(what)?;
        match self.at - start {
            len if len > most + 8 => Err(format!("{what} has {} bytes, {most} are possible", len - 8)),
            _ if name.contains(char::is_control) => {
                Err(format!("{what} has control characters: {}", name.escape_debug()))
            }
            _ => Ok(name),
        }
    }

    fn value(&mut self, kind: u32, what: &str, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => match self.array(what)? {
                [n @ (0 | 1)] => Value::Bool(n == 1),
                [n] => return Err(format!("{what} is {n}, which is neither true nor false")),
            },
            8 => Value::String(self.string(what)?),
            9 => self.values(what, depth + 1)?,
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            other => return Err(format!("{what} has type {other}, which GGUF does not know")),
        })
    }

    fn values(&mut self, what: &str, depth: usize) -> Result<Value> {
        let (kind, n) = (self.u32(what)?, self.length(what)?);
        if depth > MOST_NESTED {
            return Err(format!("{what} is an array nested {depth} deep: that is absurd"));
        }
        self.hold(n.saturating_mul(ELEMENT_BYTES), what)?;
        // No element takes less than a byte.
        if n > self.len - self.at {
            return Err(format!(
                "{what} is an array of {n} elements, the file ends before (truncated download?)"
            ));
        }
        let mut values = Vec::with_capacity(n as usize);
        for _ in 0..n {
            values.push(self.value(kind, what, depth)?);
        }
        Ok(Value::Array(values))
    }

    /// A tensor's name, what is said of it, and its bytes.
    fn tensor(&mut self, alignment: u64) -> Result<(String, TensorInfo, u64)> {
        let name = self.name("a tensor's name", MOST_NAME)?;
        let what = format!("tensor {name}");
        self.hold(TENSOR_BYTES + 2 * name.len() as u64, &what)?;
        let dims = self.u32(&what)?;
        if dims == 0 || dims > MOST_DIMS {
            return Err(format!("{what} has {dims} dimensions, 1 to {MOST_DIMS} are possible"));
        }
        // The first dimension is that of a row.
        let sizes = (0..dims).map(|_| self.length(&what)).collect::<Result<Vec<_>>>()?;
        if sizes.contains(&0) {
            return Err(format!("{what} has no elements"));
        }
        let kind = self.u32(&what)?;
        let Some(format) = by_number(kind) else {
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
        let dims =
            sizes.iter().rev().map(|n| usize::try_from(*n)).collect::<core::result::Result<Vec<_>, _>>();
        let shape = dims.map_err(|_| format!("{what} is too large for this machine"))?.into();
        let info = TensorInfo { ggml_dtype: ggml_type(format), shape, offset };
        // More than any file holds: the check of places names the tensor.
        Ok((name, info, len.unwrap_or(u64::MAX)))
    }
}
