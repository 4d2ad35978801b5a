//! One-line errors, formats by name, memory of the process.

use anyhow::{Context, Result};
use candle_sparse::core::Format;
use std::process::ExitCode;

/// Runs a program: errors are one line on standard error and exit code 2.
pub(crate) fn exit(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // candle appends a backtrace to its messages where RUST_BACKTRACE is set; the user wants the first line.
            let texts: Vec<_> = e.chain().map(ToString::to_string).collect();
            let causes: Vec<_> = texts.iter().filter_map(|t| t.lines().next()).collect();
            eprintln!("error: {}", causes.join(": "));
            ExitCode::from(2)
        }
    }
}

/// The format a flag names.
pub(crate) fn format(name: &str) -> Result<Format, String> {
    let names = Format::ALL.map(Format::name).join(", ");
    Format::from_name(name).ok_or_else(|| format!("'{name}' is none of {names}"))
}

/// A line of `/proc/self/status` in bytes, such as `VmRSS` (resident now) or `VmHWM` (at most so far).
pub(crate) fn process_bytes(field: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("memory use is read from /proc")?;
    let line = status.lines().find(|l| l.starts_with(field)).context("memory use is not in /proc")?;
    let kib: u64 = line.split_whitespace().nth(1).context("memory use")?.parse()?;
    Ok(kib * 1024)
}
