//! What a killed process or a full disk leaves of the files that are written: the old one or the new one, whole.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use candle_core::quantized::gguf_file::Value;
use candle_sparse::{
    KvCache, KvConfig, KvDType, Profile,
    profile::{LayerProfile, LayerRule},
    save::save,
};
use candle_sparse_models::{
    convert::{GgufModel, Layout},
    files::ModelFiles,
    llama::LlamaConfig,
};
use std::{
    env, fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu");
const KINDS: [&str; 4] = ["profile", "gguf", "cache", "image"];
/// What the test asks of itself in another process: `KIND PATH`.
const CHILD: &str = "CANDLE_SPARSE_FAULT_CHILD";
/// How often each kind is killed; 200 by hand.
const ROUNDS: &str = "CANDLE_SPARSE_FAULT_ROUNDS";

/// Writes a file, in one of two versions.
type Writer = Box<dyn Fn(&Path, u32) -> candle_core::Result<()>>;

fn writer(kind: &str) -> Writer {
    match kind {
        "profile" => Box::new(|path, version| profile(version as f32 + 0.25).save(path)),
        "cache" => {
            let caches = [1.0, 2.0].map(cache);
            Box::new(move |path, version| caches[version as usize].save(path))
        }
        "gguf" => {
            let files = ModelFiles::from_folder(Path::new(MODEL)).unwrap();
            let model = |version| {
                let model = GgufModel::from_files(&files, Layout::default()).unwrap();
                model.with_value("version", Value::U32(version))
            };
            let models = [0, 1].map(model);
            Box::new(move |path, version| models[version as usize].save(path))
        }
        _ => Box::new(|path, version| {
            // As `export-embedded` writes one; what stands behind an image is not looked at.
            let image = include_bytes!("../fuzz/seeds/image/whole");
            let bytes = [image.as_slice(), &vec![version as u8; 1 << 20]].concat();
            save(path, |file| Ok(file.write_all(&bytes)?))
        }),
    }
}

fn profile(value: f32) -> Profile {
    let (hidden, inner) = (64, 4096);
    let rule = LayerRule {
        candidate: vec![value],
        keep: vec![value],
        share: vec![0.5],
        hot: vec![8],
        bias: vec![value; hidden],
    };
    let layer = LayerProfile {
        order: (0..inner as u32).collect(),
        rank: 0,
        p: Vec::new(),
        q_gate: Vec::new(),
        q_up: Vec::new(),
        gate_variance: vec![value; inner],
        up_variance: vec![value; inner],
        up_square: vec![value; inner],
        importance: vec![value; inner],
        rules: [rule.clone(), rule.clone(), rule],
    };
    Profile {
        layers: vec![layer; 8],
        shares: vec![0.5],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: Vec::new(),
        about: serde_json::Value::Null,
    }
}

fn cache(value: f32) -> KvCache {
    let json = fs::read(format!("{MODEL}/config.json")).unwrap();
    let config: LlamaConfig = serde_json::from_slice(&json).unwrap();
    let config = config.into_config(false).to_core().unwrap();
    let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F32));
    cache.begin(1, 0, 500).unwrap();
    for (layer, position) in (0..4).flat_map(|layer| (0..500).map(move |position| (layer, position))) {
        cache.write(0, layer, position, &[value; 64], &[-value; 64]);
    }
    cache.advance(500);
    cache
}

/// The other process: says that it is ready, then writes one version after the other until it is killed, or once.
#[test]
fn child() {
    let Ok(asked) = env::var(CHILD) else { return };
    let (kind, path) = asked.split_once(' ').unwrap();
    let write = writer(kind.trim_end_matches('!'));
    if kind.ends_with('!') {
        let error = write(Path::new(path), 1).unwrap_err().to_string();
        fs::write(format!("{path}.error"), error).unwrap();
        return;
    }
    fs::write(format!("{path}.ready"), "").unwrap();
    for version in (0..2).cycle() {
        write(Path::new(path), version).unwrap();
    }
}

/// This test's program again, as the child of the test above.
fn again(kind: &str, path: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child"]).env(CHILD, format!("{kind} {}", path.display()));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn killed_while_saving_leaves_the_old_or_the_new_file() {
    let rounds = env::var(ROUNDS).map_or(12, |rounds| rounds.parse().unwrap());
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let write = writer(kind);
        let versions = [0, 1].map(|version| {
            write(&path, version).unwrap();
            fs::read(&path).unwrap()
        });
        assert_ne!(versions[0], versions[1], "{kind}");
        let (mut seen, mut parts) = ([0, 0], 0);
        for round in 0..rounds {
            let ready = folder.path().join("file.ready");
            let mut child = again(kind, &path).spawn().unwrap();
            let start = Instant::now();
            while !ready.exists() {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "{kind}: the other process does not begin"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            // Anywhere in one of the next saves.
            std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 40_000_u32)));
            child.kill().unwrap();
            child.wait().unwrap();
            fs::remove_file(ready).unwrap();
            let found = fs::read(&path).unwrap();
            let version = versions.iter().position(|version| *version == found);
            seen[version
                .unwrap_or_else(|| panic!("{kind}, round {round}: {} bytes of neither", found.len()))] += 1;
            parts += parts_in(folder.path());
        }
        // Each save has removed what the killed one before it left.
        assert!(parts_in(folder.path()) < 2, "{kind}");
        write(&path, 0).unwrap();
        assert_eq!(parts_in(folder.path()), 0, "{kind}");
        println!(
            "{kind}: {seen:?} of the two versions after {rounds} kills, {parts} of them in the middle of a save"
        );
    }
}

/// What a killed save has left beside its file.
fn parts_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|e| e == "part")).count()
}

#[test]
fn a_disk_that_is_full_leaves_the_old_file_and_nothing_else() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        writer(kind)(&path, 0).unwrap();
        let old = fs::read(&path).unwrap();
        // A limit of 32 KB for each file, and no signal where it is reached.
        let child = again(&format!("{kind}!"), &path);
        let mut limited = Command::new("bash");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 32; exec \"$@\"", "limited"]);
        limited.arg(child.get_program()).args(child.get_args());
        limited.envs(child.get_envs().filter_map(|(key, value)| Some((key, value?))));
        assert!(limited.stdout(Stdio::null()).status().unwrap().success(), "{kind}");
        let error = fs::read_to_string(folder.path().join("file.error")).unwrap();
        assert!(error.contains("file: cannot be written") && error.contains("unchanged"), "{kind}: {error}");
        assert_eq!(fs::read(&path).unwrap(), old, "{kind}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "{kind}: a temporary is left");
    }
}
