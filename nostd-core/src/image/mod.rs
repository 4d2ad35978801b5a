//! A whole model in one file that is used where it lies: in flash, in a mapped file, in a program.
//!
//! | bytes | content |
//! |---|---|
//! | 32 | [`Header`]: magic, version, checksum of all that follows, total length, number of tensors |
//! | 32 each | [`Entry`]: role, block, format, shape, place; increasing by block, then role |
//! | rest | the tensors, each at a multiple of 16 bytes, in the formats of [`crate::format`]; configuration and tokenizer among them |
//!
//! Everything is little endian. [`Image::open`] checks all of it once, so that nothing later can fail on account of the file.

mod config;
mod error;
mod role;
mod settings;
mod weights;
mod write;

pub use error::Error;
pub use role::Role;
pub use settings::{Settings, settings_bytes};
pub use weights::empty_layer;
pub use write::{Tensor, config_bytes, write};

use crate::{config::Config, format::Format, matrix::Matrix, tokenizer::Tokenizer};
use bytemuck::{Pod, Zeroable};
use crc::{CRC_32_ISO_HDLC, Crc};

/// The first bytes of an image.
pub const MAGIC: [u8; 8] = *b"CSPARSE\0";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Every tensor begins at a multiple of this, and so must the image in memory: vector loads of microcontrollers ask for it.
pub const ALIGNMENT: usize = 16;

/// The head of an image.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`]
    pub magic: [u8; 8],
    /// [`VERSION`]
    pub version: u32,
    /// CRC-32, as in zip files, of all bytes behind this field.
    pub checksum: u32,
    /// Bytes of the image.
    pub bytes: u32,
    /// Entries of the table.
    pub tensors: u32,
    /// 0
    pub reserved: [u32; 2],
}

/// Where the bytes that the checksum counts begin.
const CHECKED_FROM: usize = 16;

/// What stands in the table about one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// The number of a [`Role`].
    pub role: u32,
    /// The decoder block; 0 for what belongs to none.
    pub layer: u32,
    /// The number of its format, as in GGUF files; [`BYTES`] for what has none.
    pub format: u32,
    /// Rows.
    pub rows: u32,
    /// Columns; bytes where it has no format.
    pub cols: u32,
    /// Where it begins, counted from the beginning of the image.
    pub offset: u32,
    /// 0
    pub reserved: [u32; 2],
}

/// In place of a format: bytes that have their own structure.
pub const BYTES: u32 = 0xff;

/// The number of a format in GGUF files, which images use too.
#[must_use]
pub const fn format_number(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q5_0 => 6,
        Format::Q5_1 => 7,
        Format::Q8_0 => 8,
        Format::Q2K => 10,
        Format::Q3K => 11,
        Format::Q4K => 12,
        Format::Q5K => 13,
        Format::Q6K => 14,
        Format::BF16 => 30,
    }
}

fn format_of(number: u32) -> Option<Format> {
    Format::ALL.into_iter().find(|f| format_number(*f) == number)
}

/// The CRC-32 of zip, which sees every change of up to 32 neighbouring bits.
static CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// An image that was checked from its first byte to its last.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    bytes: &'a [u8],
    entries: &'a [Entry],
    config: Config,
    settings: Settings,
}

impl<'a> Image<'a> {
    /// Checks and opens an image. Cost: each byte once (about ten operations), and the tables of the tokenizer.
    ///
    /// # Errors
    /// Bytes that are no image, are damaged or misaligned, or hold a model that cannot be run; see [`Error`].
    pub fn open(bytes: &'a [u8]) -> Result<Self, Error> {
        let (entries, bytes) = entries(bytes)?;
        let (config, settings) = (config::PLACEHOLDER, Settings::default());
        let mut image = Self { bytes, entries, config, settings };
        image.config = config::read(image.section(Role::Config)?)?;
        image.settings = settings::read(image.section(Role::Settings)?)?;
        image.config.validate()?;
        let tokenizer = image.tokenizer()?;
        if tokenizer.len() > image.config.vocab_size {
            let (tokens, vocab_size) = (tokenizer.len(), image.config.vocab_size);
            return Err(Error::Tokens { tokens, vocab_size });
        }
        image.check_weights()?;
        Ok(image)
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How the model is meant to be run.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All tensors.
    #[must_use]
    pub fn entries(&self) -> &'a [Entry] {
        self.entries
    }

    /// Bytes of the image.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never: an image has a header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The vocabulary.
    ///
    /// # Errors
    /// None for an image that was opened.
    pub fn tokenizer(&self) -> Result<Tokenizer<'a>, Error> {
        Ok(Tokenizer::from_bytes(self.section(Role::Tokenizer)?)?)
    }

    /// The matrix of a role; `None` where the model has none.
    ///
    /// # Errors
    /// It is no matrix, or its shape does not fit its bytes; none for an image that was opened.
    pub fn matrix(&self, role: Role, layer: usize) -> Result<Option<Matrix<'a>>, Error> {
        let Some(entry) = self.find(role, layer) else { return Ok(None) };
        let format = format_of(entry.format).ok_or(Error::Format { role, layer, format: entry.format })?;
        let bytes = self.data(entry).ok_or(Error::Place { role, layer })?;
        Ok(Some(Matrix::from_bytes(entry.rows as usize, entry.cols as usize, format, bytes)?))
    }

    /// The numbers of a role, one row of F32; `None` where the model has none.
    ///
    /// # Errors
    /// They are in another format; none for an image that was opened.
    pub fn vector(&self, role: Role, layer: usize) -> Result<Option<&'a [f32]>, Error> {
        let Some(entry) = self.find(role, layer) else { return Ok(None) };
        let bytes = self.data(entry).ok_or(Error::Place { role, layer })?;
        let wrong = Error::Format { role, layer, format: entry.format };
        if entry.format != format_number(Format::F32) {
            return Err(wrong);
        }
        bytemuck::try_cast_slice(bytes).map(Some).map_err(|_| wrong)
    }

    /// The bytes of a role that has its own structure; `None` where the model has none.
    ///
    /// # Errors
    /// It is something else; none for an image that was opened.
    pub fn bytes(&self, role: Role, layer: usize) -> Result<Option<&'a [u8]>, Error> {
        let Some(entry) = self.find(role, layer) else { return Ok(None) };
        if entry.format != BYTES {
            return Err(Error::Format { role, layer, format: entry.format });
        }
        self.data(entry).map(Some).ok_or(Error::Place { role, layer })
    }

    fn section(&self, role: Role) -> Result<&'a [u8], Error> {
        self.bytes(role, 0)?.ok_or(Error::Missing { role, layer: 0 })
    }

    fn find(&self, role: Role, layer: usize) -> Option<&'a Entry> {
        let key = (layer as u64, role as u32);
        let at = self.entries.binary_search_by_key(&key, |e| (u64::from(e.layer), e.role)).ok()?;
        Some(&self.entries[at])
    }

    /// `None`: the table says more bytes than there are.
    fn data(&self, entry: &Entry) -> Option<&'a [u8]> {
        let start = entry.offset as usize;
        self.bytes.get(start..start.checked_add(entry.byte_len()?)?)
    }
}

impl Entry {
    /// Bytes of the tensor; `None` where its format is not known or they are too many.
    #[must_use]
    pub fn byte_len(&self) -> Option<usize> {
        let (rows, cols) = (self.rows as usize, self.cols as usize);
        if self.format == BYTES {
            return Some(cols);
        }
        let format = format_of(self.format)?;
        let blocks = rows.checked_mul(cols / format.block_len())?;
        cols.is_multiple_of(format.block_len()).then_some(())?;
        blocks.checked_mul(format.row_bytes(format.block_len()))
    }
}

/// The table of an image, and the image without what may stand behind it.
fn entries(bytes: &[u8]) -> Result<(&[Entry], &[u8]), Error> {
    if !bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
        return Err(Error::Misaligned);
    }
    let (head, _) = bytes.split_first_chunk::<{ size_of::<Header>() }>().ok_or(Error::NotAnImage)?;
    let header: Header = bytemuck::pod_read_unaligned(head);
    if header.magic != MAGIC {
        return Err(Error::NotAnImage);
    }
    if header.version != VERSION {
        return Err(Error::Version(header.version));
    }
    let bytes = bytes
        .get(..header.bytes as usize)
        .ok_or(Error::Truncated { expected: header.bytes, got: bytes.len() })?;
    let checked = bytes.get(CHECKED_FROM..).ok_or(Error::Table)?;
    let found = CHECKSUM.checksum(checked);
    if found != header.checksum {
        return Err(Error::Checksum { expected: header.checksum, found });
    }
    let end = (header.tensors as usize)
        .checked_mul(size_of::<Entry>())
        .and_then(|table| table.checked_add(size_of::<Header>()));
    let table = end.and_then(|end| bytes.get(size_of::<Header>()..end)).ok_or(Error::Table)?;
    let entries: &[Entry] = bytemuck::try_cast_slice(table).map_err(|_| Error::Table)?;
    let placed = |e: &Entry| {
        let start = e.offset as usize;
        let end = e.byte_len().and_then(|len| start.checked_add(len));
        start.is_multiple_of(ALIGNMENT) && end.is_some_and(|end| end <= bytes.len())
    };
    let sorted = entries.is_sorted_by(|a, b| (a.layer, a.role) < (b.layer, b.role));
    if !sorted || !entries.iter().all(placed) {
        return Err(Error::Table);
    }
    Ok((entries, bytes))
}
