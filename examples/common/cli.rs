//! The command line of all programs: texts that begin with a dash, one-line errors, formats by name, memory of the process.

#[path = "input.rs"]
pub(crate) mod input;
#[path = "output.rs"]
pub(crate) mod output;

use anyhow::{Context, Result, bail};
use candle_sparse::{Format, Threads};
use clap::{
    Args, Command, Parser,
    builder::{OsStringValueParser, TypedValueParser},
};
use output::ended;
use std::{
    ffi::{OsStr, OsString},
    process::ExitCode,
};

/// What is said beside the work.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Print one JSON object on standard output; all else goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing on standard error but errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Reads the command line. A value may begin with a dash, for texts and file names do.
pub(crate) fn parse<T: Parser>() -> T {
    let command = T::command().mut_args(|arg| {
        let takes_one = arg.get_num_args().is_none_or(|n| n.max_values() == 1);
        if arg.get_action().takes_values() && takes_one { arg.allow_hyphen_values(true) } else { arg }
    });
    let args = attach_lists(&command, std::env::args_os());
    T::from_arg_matches(&command.get_matches_from(args)).unwrap_or_else(|error| error.exit())
}

/// Puts the flag before each of the values of a flag that takes several: clap would take a flag for the next value, or a value
/// that begins with a dash for a flag.
fn attach_lists(command: &Command, args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let flags = command.get_arguments();
    let lists = flags.filter(|a| a.get_num_args().is_some_and(|n| n.max_values() > 1));
    let lists: Vec<String> = lists.filter_map(|a| Some(format!("--{}", a.get_long()?))).collect();
    let (mut all, mut args) = (Vec::new(), args.peekable());
    while let Some(arg) = args.next() {
        let (list, before) = (lists.iter().find(|name| arg == name.as_str()), all.len());
        while let Some(name) = list
            && let Some(value) = args.next_if(|arg| !is_flag(command, arg))
        {
            all.push(joined(name, &value));
        }
        if all.len() == before {
            all.push(arg);
        }
    }
    all
}

fn joined(name: &str, value: &OsStr) -> OsString {
    let mut all = OsString::from(format!("{name}="));
    all.push(value);
    all
}

fn is_flag(command: &Command, arg: &OsStr) -> bool {
    let Some(text) = arg.to_str() else { return false };
    let name = text.split('=').next().unwrap_or_default();
    matches!(text, "--help" | "--version" | "-h" | "-V" | "--")
        || command.get_arguments().any(|a| {
            a.get_long().is_some_and(|long| name == format!("--{long}"))
                || a.get_short().is_some_and(|short| text == format!("-{short}"))
        })
}

/// A parser of free text: what is no UTF-8 is read with U+FFFD.
pub(crate) fn text() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(|value| match value.into_string() {
        Ok(text) => text,
        Err(value) => {
            let text = value.to_string_lossy().into_owned();
            output::note(format_args!("this text is no UTF-8 and is read with U+FFFD: {text}"));
            text
        }
    })
}

/// Runs a program: errors are one line on standard error and exit code 2.
pub(crate) fn exit(result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if let Some(ended) = ended(&error) {
        return ExitCode::from(ended.0);
    }
    output::error(output::one_line(&error));
    ExitCode::from(output::FAILED)
}

/// More are no machine's cores; to start them takes longer than anybody waits.
const MOST_THREADS: usize = 1024;

/// The threads of a flag, else those of the environment, whose variables candle and rayon pass over in silence where they are
/// no numbers.
pub(crate) fn threads(asked: Option<usize>) -> Result<Option<Threads>> {
    for (name, least) in [("CANDLE_NUM_THREADS", 1), ("RAYON_NUM_THREADS", 0)] {
        let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else { continue };
        let number = value.to_str().and_then(|text| text.parse::<usize>().ok());
        if number.is_none_or(|n| !(least..=MOST_THREADS).contains(&n)) {
            let value = value.display();
            bail!("{name}={value}: give a number of threads, {least} to {MOST_THREADS}, or leave it unset");
        }
    }
    let threads = asked.map(Threads::new).transpose()?;
    let count = threads.unwrap_or_default().count();
    if let Some(cores) = std::thread::available_parallelism().ok().filter(|cores| count > cores.get()) {
        output::note(format_args!("{count} threads on {cores} cores wait for each other: fewer are faster"));
    }
    Ok(threads)
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
