//! Files that we write: they are what they were made from, here and elsewhere.

use crate::files::{Gguf, ids, rms, worst};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, gguf_file},
};
use candle_sparse::{FfnMode, Format, KvConfig, KvDType, Profile, SparseConfig};
use candle_sparse_models::{
    convert::{GgufModel, Layout},
    decoder::LoadOptions,
    files::ModelFiles,
    gguf::GgufFile,
    llama::{Cache, Llama},
    pretrained::{self, Pretrained},
    quantized_llama::ModelWeights,
};
use candle_transformers::models::quantized_llama as theirs;
use std::{fs::File, path::Path, sync::Arc};

pub(crate) struct Built {
    pub(crate) files: ModelFiles,
    profile: Profile,
}

impl Built {
    pub(crate) fn new(name: &str) -> Self {
        let mut files =
            ModelFiles::local(&format!("{}/testdata/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap().unwrap();
        let profile = files.sparse_profile.take().unwrap().load().unwrap();
        Self { files, profile }
    }

    /// Without its profile, unless it is neuron-major.
    pub(crate) fn model(&self, layout: Layout<'_>) -> GgufModel {
        let config = pretrained::config(&self.files).unwrap();
        let vb = pretrained::var_builder(&self.files, None).unwrap();
        let tokenizer = self.files.load_tokenizer().unwrap();
        let model = GgufModel::new(&vb, &config, layout, "built in").unwrap();
        model.with_tokenizer(&tokenizer, &config).unwrap()
    }

    pub(crate) fn write(&self, layout: Layout<'_>, path: &Path) -> GgufModel {
        let model = self.model(layout).with_profile(&self.profile).unwrap();
        model.save(path).unwrap();
        model
    }

    fn load(&self, options: LoadOptions) -> Llama {
        Pretrained::load(&self.files, options).unwrap().model
    }
}

/// A prompt and tokens after it, each decoded alone.
fn logits(model: &Llama) -> Tensor {
    let mut cache = Cache::of(model, KvConfig::exact(KvDType::F32));
    let mut all = vec![model.forward(&ids(20, 3), 0, &mut cache).unwrap()];
    for i in 0..12 {
        all.push(model.forward(&ids(1, 60 + i), 20 + i as usize, &mut cache).unwrap());
    }
    Tensor::cat(&all, 0).unwrap()
}

fn gguf(path: &Path, options: LoadOptions) -> Llama {
    Llama::from_gguf(&GgufFile::open(path).unwrap(), options).unwrap()
}

/// Whatever is faster for models of this size.
fn forced() -> SparseConfig {
    SparseConfig::default().with_force(true)
}

fn sparse(mode: FfnMode) -> LoadOptions {
    LoadOptions::default().with_sparse(forced().with_mode(mode))
}

#[test]
fn an_ordinary_file_is_the_model_here_and_in_candle() {
    let (built, dir) = (Built::new("tales-silu"), tempfile::tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    assert!(built.write(Layout::default(), &path).is_ordinary());
    let mut file = File::open(&path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut theirs = theirs::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let dense = built.load(LoadOptions::default());
    let mut cache = Cache::of(&dense, KvConfig::exact(KvDType::F32));
    let expected = dense.forward(&ids(40, 1), 0, &mut cache).unwrap();
    assert!(worst(&theirs.forward(&ids(40, 1), 0).unwrap(), &expected) < 1e-4, "candle");
    // RoPE turns other pairs, so sums have another order.
    assert!(worst(&logits(&gguf(&path, sparse(FfnMode::Dense))), &logits(&dense)) < 1e-4, "here");
    let profile = Some(Arc::new(built.profile.clone()));
    let options = LoadOptions::default().with_profile(profile).with_sparse(forced());
    let cascade = logits(&built.load(options));
    let inside = logits(&gguf(&path, sparse(FfnMode::Auto)));
    assert!(worst(&inside, &cascade) < 1e-3, "the profile in the file is used: {}", worst(&inside, &cascade));
    assert!(worst(&cascade, &logits(&dense)) > 1e-2, "it leaves neurons out");
    let mut reader = File::open(&path).unwrap();
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let read =
        ModelWeights::from_gguf_with(content, &mut reader, &Device::Cpu, sparse(FfnMode::Auto)).unwrap();
    assert_eq!(worst(&logits(read.llama()), &inside), 0.0, "from a reader");
}

#[test]
fn the_tokenizer_in_the_file_gives_the_same_tokens() {
    let (built, dir) = (Built::new("tales-silu"), tempfile::tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    built.write(Layout::default(), &path);
    let loaded = Pretrained::load(&ModelFiles::from_gguf(&path).unwrap(), LoadOptions::default()).unwrap();
    let expected = built.files.load_tokenizer().unwrap();
    for text in [
        "Once upon a time",
        " two  blanks\n\nand lines",
        "it's 1812, isn't it?",
        "Müller — «süß» 🐉",
        "",
        "</s>x",
    ] {
        let [a, b] = [&loaded.tokenizer, &expected].map(|t| t.encode(text, true).unwrap());
        assert_eq!(a.get_ids(), b.get_ids(), "{text:?}");
        let [a, b] = [&loaded.tokenizer, &expected].map(|t| t.decode(b.get_ids(), true).unwrap());
        assert_eq!(a, b, "{text:?}");
    }
    assert_eq!(loaded.config.bos_token_id, Some(0));
    assert!(loaded.is_eos(1));
}

#[test]
fn a_neuron_major_file_is_used_in_place_and_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (name, format) in
        [("tales-silu", Format::Q8_0), ("tales-relu", Format::F16), ("tales-relu", Format::Q4K)]
    {
        let built = Built::new(name);
        let layout = Layout::default().with_format(Some(format)).with_neuron_major(Some(&built.profile));
        assert!(!built.write(layout, &path).is_ordinary());
        let options = LoadOptions::default()
            .with_format(Some(format))
            .with_profile(Some(Arc::new(built.profile.clone())))
            .with_sparse(forced());
        let floats = built.load(options);
        for mode in [FfnMode::Cascade, FfnMode::Gate, FfnMode::Dense] {
            let config = SparseConfig::default().with_mode(mode);
            let [a, b] = [&floats, &gguf(&path, sparse(FfnMode::Auto))]
                .map(|m| logits(&m.with_sparse(config).unwrap()));
            let difference = rms(&b, &a);
            // The same bytes, but sums of attention in another order: a score near its threshold may fall to the other side.
            assert!(difference < 0.03, "{name} {format:?} {mode:?}: {difference}");
        }
        let mut file = File::open(&path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        assert!(
            theirs::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).is_err(),
            "others refuse it"
        );
        let e = Llama::from_gguf(
            &GgufFile::open(&path).unwrap(),
            LoadOptions::default().with_profile(Some(Arc::new(built.profile.clone()))),
        )
        .unwrap_err();
        assert!(e.to_string().contains("profile"), "{e}");
        let e = GgufModel::from_gguf(&GgufFile::open(&path).unwrap(), Layout::default()).unwrap_err();
        assert!(e.to_string().contains("neuron-major already"), "{e}");
    }
}

#[test]
fn activations_that_llama_cpp_lacks_are_kept_and_not_given_to_it() {
    let (built, dir) = (Built::new("tales-relu"), tempfile::tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    assert!(!built.write(Layout::default(), &path).is_ordinary());
    let dense = built.load(LoadOptions::default());
    assert!(worst(&logits(&gguf(&path, sparse(FfnMode::Dense))), &logits(&dense)) < 1e-4);
}

#[test]
fn converting_a_file_keeps_bytes_and_metadata_or_changes_the_type() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["a.gguf", "b.gguf"].map(|f| dir.path().join(f));
    let mut file = Gguf::llama(|n| if n == "attn_v" { GgmlDType::Q6K } else { GgmlDType::Q4_0 }, false);
    file.set("tokenizer.chat_template", gguf_file::Value::String("{{ messages }}".into()));
    let factors = Tensor::from_vec(vec![1.5_f32; 32], 32, &Device::Cpu).unwrap();
    file.add("rope_freqs.weight", &factors, GgmlDType::F32);
    file.save(&from);
    let opened = GgufFile::open(&from).unwrap();
    GgufModel::from_gguf(&opened, Layout::default()).unwrap().save(&to).unwrap();
    let [a, b] = [&from, &to].map(|p| logits(&gguf(p, sparse(FfnMode::Auto))));
    assert_eq!(worst(&a, &b), 0.0, "the same bytes");
    let copy = GgufFile::open(&to).unwrap();
    assert!(copy.content().metadata.contains_key("tokenizer.chat_template"));
    assert_eq!(copy.content().tensor_infos.len(), opened.content().tensor_infos.len());
    let layout = Layout::default().with_format(Some(Format::Q8_0)).with_neuron_major(None);
    GgufModel::from_gguf(&opened, layout).unwrap().save(&to).unwrap();
    let wider = logits(&gguf(&to, sparse(FfnMode::Auto)));
    let difference = rms(&wider, &a);
    // Two roundings of activations, and one of weights.
    assert!(difference > 0.0 && difference < 0.05, "{difference}");
    let e = GgufModel::from_gguf(&opened, Layout::default())
        .unwrap()
        .save(Path::new("/no/such/m.gguf"))
        .unwrap_err();
    assert!(e.to_string().contains("/no/such/m.gguf"), "{e}");
}

#[test]
fn a_profile_that_is_cut_off_is_an_error() {
    let (built, dir) = (Built::new("tales-silu"), tempfile::tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    built.write(Layout::default(), &path);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let e =
        Llama::from_gguf(&GgufFile::open(&path).unwrap(), LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("m.gguf") && e.contains("profile"), "{e}");
}

#[test]
fn a_profile_of_another_model_is_not_written() {
    let (silu, relu) = (Built::new("tales-silu"), Built::new("tales-relu"));
    let config = pretrained::config(&silu.files).unwrap();
    let vb = pretrained::var_builder(&silu.files, None).unwrap();
    // Of another shape, and of the same shape with other weights.
    let mut other = silu.profile.clone();
    other.fingerprint.iter_mut().for_each(|v| *v += 1.0);
    for (profile, needle) in [(&relu.profile, "profile"), (&other, "another model")] {
        let e = silu.model(Layout::default()).with_profile(profile).unwrap_err().to_string();
        assert!(e.contains(needle), "{e}");
        let layout = Layout::default().with_format(None).with_neuron_major(Some(profile));
        let e = GgufModel::new(&vb, &config, layout, "m").unwrap_err().to_string();
        assert!(e.contains(needle), "{e}");
    }
}
