//! The input: its lines, those of other shards passed over.

use crate::{cli::input, shard::Shard};
use anyhow::{Context, Result};
use std::{
    fs::File,
    io::{BufRead, BufReader, stdin},
    path::Path,
};

/// A line of the input.
#[derive(Debug)]
pub(crate) struct Line {
    /// From 1 on, as editors count.
    pub(crate) number: usize,
    pub(crate) bytes: Vec<u8>,
}

/// The lines of a shard that are not blank.
pub(crate) struct Lines {
    input: Box<dyn BufRead>,
    shard: Shard,
    next: usize,
    len: Option<usize>,
}

impl Lines {
    pub(crate) fn open(path: &Path, shard: Shard) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self { input: Box::new(BufReader::new(stdin())), shard, next: 0, len: None });
        }
        let open = || File::open(path).with_context(|| format!("cannot read {}", path.display()));
        let count =
            Self { input: Box::new(BufReader::new(open()?)), shard, next: 0, len: None }.count(path)?;
        Ok(Self { input: Box::new(BufReader::new(open()?)), shard, next: 0, len: Some(count) })
    }

    fn count(mut self, path: &Path) -> Result<usize> {
        let mut count = 0;
        while self.next_line().with_context(|| format!("cannot read {}", path.display()))?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    /// How many there are, if that can be known before.
    pub(crate) fn len(&self) -> Option<usize> {
        self.len
    }

    pub(crate) fn next_line(&mut self) -> Result<Option<Line>> {
        loop {
            let Some(bytes) = input::line(&mut self.input)? else { return Ok(None) };
            let index = self.next;
            self.next += 1;
            if self.shard.has(index) && !bytes.trim_ascii().is_empty() {
                return Ok(Some(Line { number: index + 1, bytes }));
            }
        }
    }
}
