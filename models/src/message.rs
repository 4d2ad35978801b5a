//! Messages of errors.

use candle_core::Error;

/// An error without the backtrace that `RUST_BACKTRACE` appends to candle's messages.
#[must_use]
pub fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}
