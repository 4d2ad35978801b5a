//! Reading safetensors tensor by tensor, so that a model in memory is the only copy of its weights.
//!
//! candle's `VarBuilder::from_mmaped_safetensors` maps the files: while a model loads, the touched pages and the
//! loaded tensors are both resident. [`var_builder`] reads each tensor when it is asked for, straight into its place.

use crate::input::{Expected, InputFile, MAX_HEADER, check_json, file_error};
use candle_core::{DType, Device, Error, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{
    Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
};

/// Longest name of a tensor; those of models have some 60 bytes.
const MOST_NAME: usize = 1024;

/// Safetensors files (the shards of one model) that are read on demand.
///
/// ```
/// use candle_core::DType;
/// use candle_sparse::loading::SafetensorsFiles;
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/model.safetensors");
/// let files = SafetensorsFiles::open(&[path])?;
/// let name = "model.layers.0.mlp.down_proj.weight";
/// assert_eq!((files.shape(name), files.dtype(name)), (Some(&[256, 512][..]), Some(DType::F16)));
/// assert!(files.names().all(|name| name.ends_with(".weight")));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct SafetensorsFiles {
    files: Vec<OpenFile>,
    index: HashMap<String, (usize, TensorInfo)>,
}

#[derive(Debug)]
struct OpenFile {
    input: InputFile,
    data_start: u64,
}

impl SafetensorsFiles {
    /// Opens the files and checks their headers against their lengths; reads no tensor.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File): a file cannot be read, is truncated, corrupt or something else, or two files hold
    /// the same tensor.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let (mut files, mut index) = (Vec::new(), HashMap::new());
        for path in paths {
            let input = InputFile::open(path, Expected::Safetensors)?;
            let (data_start, metadata) = read_header(&input)?;
            for (name, info) in metadata.tensors() {
                if index.insert(name.clone(), (files.len(), info.clone())).is_some() {
                    return Err(file_error(path.as_ref(), format!("tensor {name} stands in two files")));
                }
            }
            files.push(OpenFile { input, data_start });
        }
        Ok(Self { files, index })
    }

    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The shape of a tensor, `None` if there is no such tensor.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|(_, info)| info.shape.as_slice())
    }

    /// The dtype in which a tensor is stored, `None` if there is no such tensor or candle has no such dtype.
    #[must_use]
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.index.get(name).and_then(|(_, info)| DType::try_from(info.dtype).ok())
    }

    fn place(&self, name: &str) -> Result<(&OpenFile, &TensorInfo)> {
        let Some((file, info)) = self.index.get(name) else {
            let files: Vec<_> = self.files.iter().map(|f| f.input.path().display().to_string()).collect();
            bail!("tensor {name} is missing from {}", files.join(", "));
        };
        Ok((&self.files[*file], info))
    }

    /// The bytes of a tensor as they are stored.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (file, info) = self.place(name)?;
        file.typed(info)
    }

    fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let (file, info) = self.place(name)?;
        let dtype = DType::try_from(info.dtype)
            .map_err(|_| Error::msg(format!("tensor {name}: candle has no dtype {:?}", info.dtype)))?;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64 | DType::U32) {
            bail!("tensor {name} is stored as {dtype:?}: give a checkpoint in F32, F16 or BF16");
        }
        let shape = info.shape.as_slice();
        match dtype {
            DType::F32 => Tensor::from_vec(file.typed::<f32>(info)?, shape, device),
            DType::F16 => Tensor::from_vec(file.typed::<f16>(info)?, shape, device),
            DType::BF16 => Tensor::from_vec(file.typed::<bf16>(info)?, shape, device),
            _ => Tensor::from_raw_buffer(&file.typed::<u8>(info)?, dtype, shape, device),
        }
    }

    /// A `VarBuilder` that reads each tensor when it is asked for.
    ///
    /// With `dtype` `None` tensors come in the dtype of the first two-dimensional tensor.
    #[must_use]
    pub fn var_builder(self, dtype: Option<DType>, device: &Device) -> VarBuilder<'static> {
        let stored = || {
            let matrices = self.index.iter().filter(|(_, (_, info))| info.shape.len() == 2);
            let first = matrices.min_by_key(|(name, _)| name.as_str())?.0;
            self.dtype(first)
        };
        let dtype = dtype.or_else(stored).unwrap_or(DType::F32);
        VarBuilder::from_backend(Box::new(self), dtype, device.clone())
    }
}

impl OpenFile {
    /// The elements of a tensor; the header check made sure that they are there.
    fn typed<T: bytemuck::Pod>(&self, info: &TensorInfo) -> Result<Vec<T>> {
        let (start, end) = info.data_offsets;
        let mut data = vec![T::zeroed(); (end - start) / size_of::<T>()];
        self.input.read_at(self.data_start + start as u64, bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }
}

/// The entries of free text in the header of a safetensors file; no tensor is read.
///
/// ```
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/sparse.safetensors");
/// let metadata = candle_sparse::loading::metadata(path.as_ref())?;
/// assert!(metadata["candle_sparse_profile"].contains("\"rank\": 64"));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`SafetensorsFiles::open`].
pub fn metadata(path: &Path) -> Result<HashMap<String, String>> {
    let input = InputFile::open(path, Expected::Safetensors)?;
    Ok(read_header(&input)?.1.metadata().clone().unwrap_or_default())
}

fn read_header(input: &InputFile) -> Result<(u64, Metadata)> {
    let bad = |what: String| file_error(input.path(), format!("is no safetensors file: {what}"));
    let mut length = [0; 8];
    if input.len() < length.len() as u64 {
        return Err(bad(format!("it has {} bytes (truncated download?)", input.len())));
    }
    input.read_at(0, &mut length)?;
    let header_len = u64::from_le_bytes(length);
    if header_len > MAX_HEADER || 8 + header_len > input.len() {
        return Err(bad(format!(
            "its header claims {header_len} bytes, the file has {} (truncated download?)",
            input.len()
        )));
    }
    let mut header = vec![0; header_len as usize];
    input.read_at(8, &mut header)?;
    check_json(&header).map_err(|e| file_error(input.path(), format!("its header {e}")))?;
    check_names(&header).map_err(|e| bad(e.to_string()))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| bad(e.to_string()))?;
    let data_len = check_layout(&metadata).map_err(bad)?;
    let expected = data_len.saturating_add(8 + header_len);
    if expected != input.len() {
        return Err(bad(format!(
            "its tensors end at byte {expected}, the file at {} (truncated download?)",
            input.len()
        )));
    }
    Ok((8 + header_len, metadata))
}

/// No tensor may be described twice: the parser below would take the last one without a word.
fn check_names(header: &[u8]) -> serde_json::Result<()> {
    struct Names;

    impl<'de> Visitor<'de> for Names {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                check_name(&name).map_err(de::Error::custom)?;
                if let Some(name) = seen.replace(name) {
                    return Err(de::Error::custom(format!("{name} is there twice")));
                }
            }
            Ok(())
        }
    }

    serde_json::Deserializer::from_slice(header).deserialize_map(Names)
}

/// Names stand in messages and in the names of other tensors.
fn check_name(name: &str) -> std::result::Result<(), String> {
    match name.len() {
        len if len > MOST_NAME => {
            Err(format!("the name of a tensor has {len} bytes, {MOST_NAME} are possible"))
        }
        _ if name.contains(char::is_control) => {
            Err(format!("the name of a tensor has control characters: {}", name.escape_debug()))
        }
        _ => Ok(()),
    }
}

/// Bytes of the data part: tensors must follow one another without gap or overlap, each as long as its shape says.
///
/// `SafeTensors::read_metadata` checks the same, but wants the whole file in memory.
fn check_layout(metadata: &Metadata) -> std::result::Result<u64, String> {
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in tensors {
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let (start, stop) = info.data_offsets;
        if start != end
            || bits.is_none_or(|b| stop.checked_sub(start).is_none_or(|len| len.checked_mul(8) != Some(b)))
        {
            return Err(format!("tensor {name} {:?} does not fit its place {start}..{stop}", info.shape));
        }
        end = stop;
    }
    Ok(end as u64)
}

impl SimpleBackend for SafetensorsFiles {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some((_, info)) = self.index.get(name)
            && info.shape != shape.dims()
        {
            bail!("tensor {name} has shape {:?}, the config asks for {:?}", info.shape, shape.dims());
        }
        self.read(name, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }
}

/// A `VarBuilder` over safetensors files that reads each tensor when it is asked for.
///
/// With `dtype` `None` tensors come in the dtype of the first two-dimensional tensor.
///
/// ```
/// use candle_core::{DType, Device};
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/model.safetensors");
/// let vb = candle_sparse::loading::var_builder(&[path], None, &Device::Cpu)?;
/// let norm = vb.pp("model.norm").get(256, "weight")?;
/// assert_eq!((norm.dims(), norm.dtype()), (&[256][..], DType::F16));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`SafetensorsFiles::open`].
pub fn var_builder<P: AsRef<Path>>(
    paths: &[P],
    dtype: Option<DType>,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    Ok(SafetensorsFiles::open(paths)?.var_builder(dtype, device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn write(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        let a = Tensor::arange(0_f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let b = a.to_dtype(DType::BF16).unwrap();
        candle_core::safetensors::save(&HashMap::from([("a".to_string(), a), ("b".to_string(), b)]), &path)
            .unwrap();
        path
    }

    #[test]
    fn reads_what_was_written_and_names_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "m.safetensors");
        let vb = var_builder(&[&path], None, &Device::Cpu).unwrap();
        assert_eq!(vb.dtype(), DType::F32);
        for name in ["a", "b"] {
            let t = vb.get((2, 3), name).unwrap();
            assert_eq!(t.to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        }
        let err = vb.get((3, 2), "a").unwrap_err().to_string();
        assert!(err.contains("tensor a") && err.contains("[2, 3]") && err.contains("[3, 2]"), "{err}");
        let err = vb.get((3, 2), "c").unwrap_err().to_string();
        assert!(err.contains("tensor c is missing"), "{err}");
        let err = SafetensorsFiles::open(&[&path, &path]).unwrap_err().to_string();
        assert!(err.contains("two files"), "{err}");
    }

    #[test]
    fn every_truncation_and_absurd_header_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(write(dir.path(), "m.safetensors")).unwrap();
        let path = dir.path().join("cut.safetensors");
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let err = SafetensorsFiles::open(&[&path]).unwrap_err().to_string();
            assert!(err.contains("cut.safetensors"), "{len}: {err}");
        }
        for (at, byte) in [(7, 0xff), (0, 0xff), (9, b'}')] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            std::fs::write(&path, &bytes).unwrap();
            assert!(SafetensorsFiles::open(&[&path]).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_tensor_that_is_described_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let about = |from: usize| {
            format!(r#""a":{{"dtype":"F32","shape":[1],"data_offsets":[{from},{}]}}"#, from + 4)
        };
        let header = format!("{{{},{}}}", about(0), about(4));
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat();
        std::fs::write(&path, bytes).unwrap();
        let err = SafetensorsFiles::open(&[&path]).unwrap_err();
        assert!(matches!(crate::Error::of(&err), Some(crate::Error::File { .. })), "{err}");
        assert!(err.to_string().contains("a is there twice"), "{err}");
    }

    #[test]
    fn no_changed_byte_is_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(write(dir.path(), "m.safetensors")).unwrap();
        let path = dir.path().join("changed.safetensors");
        let mut refused = 0;
        for at in 0..whole.len() {
            for byte in [0, b'"', b'9', b'}', 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                std::fs::write(&path, &bytes).unwrap();
                let read = SafetensorsFiles::open(&[&path]).and_then(|files| {
                    let vb = files.var_builder(None, &Device::Cpu);
                    vb.get((2, 3), "a").and_then(|_| vb.get((2, 3), "b"))
                });
                refused += usize::from(read.is_err());
            }
        }
        assert!(refused > whole.len(), "{refused} of {}", whole.len());
    }
}
