//! Messages of errors.

use candle_core::Error;
use candle_sparse::error::plain;

/// The message of an error without the backtrace that candle appends to it where `RUST_BACKTRACE` is set, and
/// [`plain`].
///
/// ```
/// use candle_sparse_models::pretrained::first_line;
///
/// let error = candle_core::Error::Msg("the file is damaged".into()).bt();
/// assert_eq!(first_line(&error), "the file is damaged");
/// ```
#[must_use]
pub fn first_line(e: &Error) -> String {
    plain(e.to_string().lines().next().unwrap_or_default())
}
