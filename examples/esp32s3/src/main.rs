//! Tells a story on the USB serial line, again and again, and how many tokens a second it took.
#![no_std]
#![no_main]

#[cfg(all(feature = "two-cores", feature = "esp32s3"))]
mod cores;
mod story;
#[cfg(all(feature = "two-cores", feature = "esp32s3"))]
mod two_cores;

use candle_sparse_core::ActivationGroup;
use esp_backtrace as _;
use esp_hal::{clock::CpuClock, main};
use esp_println::println;
use static_cell::ConstStaticCell;

esp_bootloader_esp_idf::esp_app_desc!();

/// At a multiple of 16 bytes, as images want it.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

/// The image, in the flash that the chip maps into its memory.
static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("IMAGE")));

/// Keys, values and working memory: 200 KB of the chip's own memory, in units of 256 bytes.
static MEMORY: ConstStaticCell<[ActivationGroup; 1067]> = ConstStaticCell::new([ActivationGroup::ZERO; 1067]);

#[main]
fn main() -> ! {
    let peripherals = esp_hal::init(esp_hal::Config::default().with_cpu_clock(CpuClock::max()));
    #[cfg(all(feature = "psram", feature = "esp32s3"))]
    let image = in_psram(peripherals.PSRAM, &IMAGE.0);
    #[cfg(not(all(feature = "psram", feature = "esp32s3")))]
    let image = &IMAGE.0;
    let memory = MEMORY.take();

    #[cfg(all(feature = "two-cores", feature = "esp32s3"))]
    let result = cores::with_both(peripherals.CPU_CTRL, |kernels| story::tell(&kernels, image, memory));
    #[cfg(not(all(feature = "two-cores", feature = "esp32s3")))]
    let result = {
        let _ = peripherals;
        story::tell(&candle_sparse_core::Scalar, image, memory)
    };

    if let Err(e) = result {
        println!("error: {e}");
    }
    loop {
        core::hint::spin_loop();
    }
}

/// Copies the image to PSRAM, which is read faster than flash.
#[cfg(all(feature = "psram", feature = "esp32s3"))]
fn in_psram(psram: esp_hal::peripherals::PSRAM<'static>, image: &'static [u8]) -> &'static [u8] {
    use esp_hal::psram::{Psram, PsramConfig, SpiRamFreq};
    let config = PsramConfig { ram_frequency: SpiRamFreq::Freq80m, ..PsramConfig::default() };
    let (start, len) = Psram::new(psram, config).raw_parts();
    if len < image.len() {
        println!("{len} bytes of PSRAM, the image has {}: it stays in flash", image.len());
        return image;
    }
    // SAFETY: the driver has mapped `len` bytes at `start`, aligned to pages of 64 KB; nothing else uses them, and the driver
    // is taken for good, so nobody can ask for them again. They are written before a slice of them exists.
    unsafe {
        core::ptr::copy_nonoverlapping(image.as_ptr(), start, image.len());
        core::slice::from_raw_parts(start, image.len())
    }
}
