//! Memory for weights: page-aligned, in huge pages where the system grants them.

use candle_core::{Error, Result};
use memmap2::MmapMut;

/// Bytes of zero-initialised, page-aligned memory.
///
/// Decode reads every weight once per token; with 4 KiB pages the page walks alone cost up to 40 % of the bandwidth, so
/// large buffers ask for 2 MiB pages.
///
/// ```
/// use candle_sparse::buffer::Buffer;
///
/// let mut buffer = Buffer::zeroed(4096)?;
/// buffer.bytes_mut()[..4].copy_from_slice(&1_f32.to_le_bytes());
/// assert_eq!(buffer.bytes()[..5], [0, 0, 128, 63, 0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Buffer(MmapMut);

#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

impl Buffer {
    /// `len` zero bytes.
    ///
    /// # Errors
    /// The system has not that much memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        // An empty mapping is refused by the system.
        let map =
            MmapMut::map_anon(len.max(1)).map_err(|e| Error::msg(format!("{len} bytes for weights: {e}")))?;
        #[cfg(target_os = "linux")]
        if len >= HUGE_PAGE {
            // A hint: a kernel without huge pages refuses it and the buffer is only slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self(map))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to write.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
