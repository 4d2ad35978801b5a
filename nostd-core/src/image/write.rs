//! How an image is written.

use super::{
    ALIGNMENT, BYTES, CHECKED_FROM, CHECKSUM, Entry, Error, Header, MAGIC, Role, VERSION, format_number,
};
use crate::{config::Config, matrix::Matrix};

/// What is put into an image.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// What it is for.
    pub role: Role,
    /// The decoder block it belongs to, 0 for none.
    pub layer: u32,
    /// Its place in the table, without the offset.
    entry: Entry,
    bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// A matrix whose rows follow one another.
    ///
    /// # Errors
    /// A matrix with more rows or columns than 32 bits count.
    pub fn matrix(role: Role, layer: u32, m: Matrix<'a>) -> Result<Self, Error> {
        let size = |n: usize| u32::try_from(n).map_err(|_| Error::Model(crate::Error::TooLarge("matrix")));
        let (rows, cols, format) = (size(m.rows())?, size(m.cols())?, format_number(m.format()));
        Ok(Self::new(role, layer, format, [rows, cols], m.data().bytes()))
    }

    /// One row of F32.
    #[must_use]
    pub fn vector(role: Role, layer: u32, x: &'a [f32]) -> Self {
        let f32s = format_number(crate::Format::F32);
        Self::new(role, layer, f32s, [1, x.len() as u32], bytemuck::cast_slice(x))
    }

    /// Bytes with their own structure.
    #[must_use]
    pub fn bytes(role: Role, layer: u32, bytes: &'a [u8]) -> Self {
        Self::new(role, layer, BYTES, [1, bytes.len() as u32], bytes)
    }

    fn new(role: Role, layer: u32, format: u32, [rows, cols]: [u32; 2], bytes: &'a [u8]) -> Self {
        let entry = Entry { role: role as u32, layer, format, rows, cols, offset: 0, reserved: [0; 2] };
        Self { role, layer, entry, bytes }
    }
}

/// The image of these tensors, handed to `put` piece by piece; they are sorted on the way. [`super::Image::open`] says
/// whether they make a model.
///
/// # Errors
/// Two tensors of one role and block, or more than 4 GB.
pub fn write(tensors: &mut [Tensor<'_>], mut put: impl FnMut(&[u8])) -> Result<(), Error> {
    tensors.sort_unstable_by_key(|t| (t.layer, t.role as u32));
    if !tensors.is_sorted_by(|a, b| (a.layer, a.role as u32) < (b.layer, b.role as u32)) {
        return Err(Error::Table);
    }
    let too_large = |_| Error::Model(crate::Error::TooLarge("image"));
    let mut end = size_of::<Header>() + tensors.len() * size_of::<Entry>();
    for t in tensors.iter_mut() {
        let offset = end.next_multiple_of(ALIGNMENT);
        t.entry.offset = u32::try_from(offset).map_err(too_large)?;
        end = offset + t.bytes.len();
    }
    let bytes = u32::try_from(end).map_err(too_large)?;
    let tensor_count = tensors.len() as u32;
    let mut header = Header {
        magic: MAGIC,
        version: VERSION,
        checksum: 0,
        bytes,
        tensors: tensor_count,
        reserved: [0; 2],
    };
    let mut digest = CHECKSUM.digest();
    digest.update(&bytemuck::bytes_of(&header)[CHECKED_FROM..]);
    content(tensors, &mut |bytes| digest.update(bytes));
    header.checksum = digest.finalize();
    put(bytemuck::bytes_of(&header));
    content(tensors, &mut put);
    Ok(())
}

/// What stands behind the header.
fn content(tensors: &[Tensor<'_>], put: &mut dyn FnMut(&[u8])) {
    let mut at = size_of::<Header>() + tensors.len() * size_of::<Entry>();
    tensors.iter().for_each(|t| put(bytemuck::bytes_of(&t.entry)));
    for t in tensors {
        let offset = t.entry.offset as usize;
        put(&[0; ALIGNMENT][..offset - at]);
        put(t.bytes);
        at = offset + t.bytes.len();
    }
}

/// The bytes of a configuration, for [`Tensor::bytes`].
///
/// # Errors
/// A size that does not fit 32 bits.
pub fn config_bytes(c: &Config) -> Result<[u8; 4 * super::config::WORDS], Error> {
    Ok(bytemuck::cast(super::config::words(c)?))
}
