//! The course of a calibration: what it tells while it runs, and the file that an interrupted one goes on from.
//!
//! Everything found so far stands in that file, as tensors. It is written whole: at the end of a stage, and within one every
//! [`EVERY`]. What is found again from the same texts is the same, bit for bit.

use super::{Calibrator, Progress};
use crate::{decoder::Decoder, input::file_error, loading, save::save};
use candle_core::{Device, Error, Result, Tensor, WithDType};
use crc::{CRC_64_XZ, Crc};
use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How much work within a stage an interruption may cost.
const EVERY: Duration = Duration::from_secs(20);
/// The key of the text in the file's metadata that says what it belongs to.
const ABOUT: &str = "candle_sparse_calibration";

pub(super) struct Course<'a> {
    tell: &'a mut dyn FnMut(Progress),
    file: Option<File>,
}

struct File {
    path: PathBuf,
    about: String,
    found: HashMap<String, Tensor>,
    changed: bool,
    written: Instant,
}

impl<'a> Course<'a> {
    /// Keeps nothing.
    pub(super) fn new(tell: &'a mut dyn FnMut(Progress)) -> Self {
        Self { tell, file: None }
    }

    /// Goes on from the file at `path`, if there is one, and keeps there what is found.
    ///
    /// # Errors
    /// The file is of something else than `about` says, or no such file.
    pub(super) fn kept(path: &Path, about: String, tell: &'a mut dyn FnMut(Progress)) -> Result<Self> {
        let mut found = HashMap::new();
        if path.exists() {
            if loading::metadata(path)?.get(ABOUT) != Some(&about) {
                let problem = "holds what a calibration of another model, text, setting or version has found: give those \
                     again to go on with it, or delete it to begin anew";
                return Err(file_error(path, problem));
            }
            found = candle_core::safetensors::load(path, &Device::Cpu)?;
            tell(Progress { stage: "going on from a checkpoint", done: 0, steps: 1 });
        }
        let path = path.to_path_buf();
        let file = File { path, about, found, changed: false, written: Instant::now() };
        Ok(Self { tell, file: Some(file) })
    }

    /// Tells where the calibration is, and writes what was found where that is due.
    pub(super) fn step(&mut self, stage: &'static str, done: usize, steps: usize) -> Result<()> {
        (self.tell)(Progress { stage, done, steps });
        match &mut self.file {
            Some(file) if file.changed && file.written.elapsed() >= EVERY => file.write(),
            _ => Ok(()),
        }
    }

    /// Writes what was found, if there is something new.
    pub(super) fn stage_ends(&mut self) -> Result<()> {
        match &mut self.file {
            Some(file) if file.changed => file.write(),
            _ => Ok(()),
        }
    }

    /// Notes numbers that were found.
    pub(super) fn keep<T: WithDType>(&mut self, name: &str, numbers: &[T]) -> Result<()> {
        self.keep_all(|found| {
            found.insert(name.to_string(), Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)?);
            Ok(())
        })
    }

    /// Notes what `put` adds to the tensors that were found.
    pub(super) fn keep_all(
        &mut self,
        put: impl FnOnce(&mut HashMap<String, Tensor>) -> Result<()>,
    ) -> Result<()> {
        match &mut self.file {
            None => Ok(()),
            Some(file) => {
                file.changed = true;
                put(&mut file.found)
            }
        }
    }

    /// What was found, tensor by tensor.
    pub(super) fn found(&self) -> Option<&HashMap<String, Tensor>> {
        self.file.as_ref().map(|file| &file.found)
    }

    /// Numbers that an earlier run has found; none where it did not come so far.
    pub(super) fn numbers<T: WithDType>(&self, name: &str) -> Result<Vec<T>> {
        match self.found().and_then(|found| found.get(name)) {
            Some(numbers) => numbers.to_vec1(),
            None => Ok(Vec::new()),
        }
    }

    /// The same, of which there must be so many.
    pub(super) fn all<T: WithDType>(&self, name: &str, len: usize) -> Result<Vec<T>> {
        let numbers = self.numbers(name)?;
        match &self.file {
            Some(file) if numbers.len() != len => Err(file_error(
                &file.path,
                format!("has {} numbers of {name} in place of {len}: delete it to begin anew", numbers.len()),
            )),
            _ => Ok(numbers),
        }
    }
}

impl File {
    fn write(&mut self) -> Result<()> {
        let about = HashMap::from([(ABOUT.to_string(), self.about.clone())]);
        let bytes = safetensors::serialize(&self.found, Some(about)).map_err(Error::wrap)?;
        save(&self.path, |file| Ok(file.write_all(&bytes)?))?;
        (self.changed, self.written) = (false, Instant::now());
        Ok(())
    }
}

/// What a calibration depends on, as a text.
pub(super) fn about(calibrator: &Calibrator, model: &Decoder, texts: [&[Vec<u32>]; 3]) -> String {
    let crc = Crc::<u64>::new(&CRC_64_XZ);
    let text = |windows: &[Vec<u32>]| {
        let mut digest = crc.digest();
        for window in windows {
            digest.update(&(window.len() as u64).to_le_bytes());
            digest.update(bytemuck::cast_slice(window));
        }
        digest.finalize()
    };
    let about = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"), "settings": format!("{calibrator:?}"),
        "model": crc.checksum(bytemuck::cast_slice(&model.origin().fingerprint)), "texts": texts.map(text),
    });
    about.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_found_and_nothing_else() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("checkpoint");
        let mut told = Vec::new();
        {
            let mut tell = |p: Progress| told.push(p.stage);
            let mut course = Course::kept(&path, "one".into(), &mut tell)?;
            assert!(course.numbers::<f32>("shares")?.is_empty());
            course.keep("shares", &[0.1_f32, f32::MIN_POSITIVE])?;
            course.step("early", 0, 1)?;
            assert!(!path.exists(), "it is not due yet");
            course.stage_ends()?;
            course.keep("reports", &[1.0_f64])?;
        }
        let mut tell = |p: Progress| told.push(p.stage);
        let course = Course::kept(&path, "one".into(), &mut tell)?;
        assert_eq!(course.numbers::<f32>("shares")?, [0.1, f32::MIN_POSITIVE]);
        assert_eq!(course.numbers::<f64>("reports")?, [0.0; 0], "its stage did not end");
        assert!(course.all::<f32>("shares", 2).is_ok());
        let error = course.all::<f32>("shares", 3).unwrap_err().to_string();
        assert!(error.contains("2 numbers of shares in place of 3"), "{error}");
        drop(course);
        assert_eq!(told, ["early", "going on from a checkpoint"]);
        for (about, content) in [("two", None), ("one", Some("not a checkpoint"))] {
            if let Some(content) = content {
                std::fs::write(&path, content)?;
            }
            let error = Course::kept(&path, about.into(), &mut |_| {}).err().expect("an error").to_string();
            assert!(error.contains("checkpoint"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn nothing_is_kept_without_a_file() -> Result<()> {
        let mut tell = |_| {};
        let mut course = Course::new(&mut tell);
        course.keep("shares", &[0.1_f32])?;
        course.stage_ends()?;
        assert!(course.numbers::<f32>("shares")?.is_empty());
        Ok(())
    }
}
