//! Prefixes on disk.

use crate::parts::{Case, Draw, Outcome, alone, cases, engine, model, one_thread, run, tiered, written};
use candle_sparse_models::{
    AttentionConfig, AttentionMode, Error, KvConfig, KvDType,
    engine::{Engine, EngineOptions, Request},
    llama::{Llama, LoadOptions},
    sampling::Sampling,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn request(prompt: &[u32]) -> Request {
    Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(12).with_top_logprobs(Some(0))
}

fn options(folder: &Path) -> EngineOptions {
    EngineOptions::default().with_prefix_folder(Some(folder.into()))
}

fn cached(outcome: &Outcome) -> usize {
    outcome.finished.as_ref().unwrap().cached_tokens
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// What an engine of its own makes of a prompt, and its notices.
fn once(model: &Llama, options: EngineOptions, prompt: &[u32]) -> (Outcome, Vec<String>) {
    let mut engine = engine(model, options);
    let came = run(&mut engine, [request(prompt)]).remove(0);
    (came, engine.take_notices())
}

#[test]
fn another_engine_begins_with_what_one_has_read() {
    for case in cases(&one_thread()) {
        let Case { name, model, kv } = &case;
        let (folder, prompt) = (tempfile::tempdir().unwrap(), Draw(2).ids(300));
        let options = options(folder.path()).with_kv(*kv);
        if matches!(&**name, "gated" | "recall, tiered") {
            let error = Engine::new(model, None, options).unwrap_err();
            assert!(
                matches!(Error::of(&error), Some(Error::Setting { name: "prefix_folder", .. })),
                "{error}"
            );
            continue;
        }
        let wanted = alone(&case, &[request(&prompt)]);
        let (first, notices) = once(model, options.clone(), &prompt);
        assert_eq!((cached(&first), notices), (0, Vec::new()), "{name}");
        let (second, notices) = once(model, options.clone(), &prompt);
        let wanted_cached = if kv.is_tiered() { 256 } else { 300 - model.decoder().least_part() };
        assert_eq!(cached(&second), wanted_cached, "{name}");
        assert_eq!(notices, Vec::<String>::new());
        assert_eq!(written(&[first]), written(&wanted), "{name}");
        assert_eq!(written(&[second]), written(&wanted), "{name}");
    }
}

#[test]
fn a_damaged_file_is_skipped_and_the_prompt_is_read() {
    let (folder, prompt, model) = (tempfile::tempdir().unwrap(), Draw(2).ids(300), model());
    let options = options(folder.path());
    let (wanted, _) = once(&model, options.clone(), &prompt);
    let [file] = &files(folder.path())[..] else { panic!("one prefix, one file") };
    let whole = fs::read(file).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (bytes, noticed) in [(&flipped[..], "damaged"), (&whole[..whole.len() / 2], ""), (b"so", "")] {
        fs::write(file, bytes).unwrap();
        let (came, notices) = once(&model, options.clone(), &prompt);
        assert_eq!((cached(&came), &came.ids), (0, &wanted.ids));
        let [notice] = &notices[..] else { panic!("{notices:?}") };
        assert!(
            notice.contains(noticed) && notice.contains(file.file_name().unwrap().to_str().unwrap()),
            "{notice}"
        );
        // It is whole again then.
        assert_eq!(cached(&once(&model, options.clone(), &prompt).0), 299);
    }
    fs::remove_file(file).unwrap();
    assert_eq!(cached(&once(&model, options, &prompt).0), 0);
}

#[test]
fn files_of_other_models_and_settings_are_left_alone() {
    let (folder, prompt, own) = (tempfile::tempdir().unwrap(), Draw(2).ids(300), model());
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let recall = own.with_attention(AttentionConfig::new(AttentionMode::Recall).with_window(64)).unwrap();
    let quantised =
        crate::parts::loaded(LoadOptions::default().with_format(Some(candle_sparse_models::Format::Q8_0)));
    let others = [
        (&quantised.model, KvConfig::exact(KvDType::F16)),
        (&own, KvConfig::exact(KvDType::F32)),
        (&own, tiered()),
        (&recall, KvConfig::exact(KvDType::F16)),
    ];
    for (i, (model, kv)) in others.into_iter().enumerate() {
        let (came, notices) = once(model, options(folder.path()).with_kv(kv), &prompt);
        assert_eq!((cached(&came), notices.len()), (0, usize::from(i > 0)), "{notices:?}");
    }
    let (came, notices) = once(&own, options(folder.path()), &prompt);
    assert_eq!(cached(&came), 0);
    assert!(notices[0].contains("4 prefixes are of other models"), "{notices:?}");
    assert_eq!(files(folder.path()).len(), 6);
}

#[test]
fn files_take_no_more_than_they_may() {
    let (folder, model, mut draw) = (tempfile::tempdir().unwrap(), model(), Draw(2));
    let prompts: Vec<_> = (0..4).map(|_| draw.ids(200)).collect();
    once(&model, options(folder.path()), &prompts[0]);
    let one = fs::metadata(&files(folder.path())[0]).unwrap().len();
    let options = options(folder.path()).with_prefix_folder_bytes(2 * one + one / 2);
    once(&model, options.clone(), &prompts[1]);
    // 0 is used again: 1 is the one to go.
    assert_eq!(cached(&once(&model, options.clone(), &prompts[0]).0), 199);
    once(&model, options.clone(), &prompts[2]);
    assert_eq!(files(folder.path()).len(), 2);
    assert_eq!(cached(&once(&model, options.clone(), &prompts[0]).0), 199);
    // A longer one takes the place of what it contains.
    let longer = [&prompts[0][..], &draw.ids(100)].concat();
    once(&model, options.clone().with_prefix_folder_bytes(1 << 30), &longer);
    assert_eq!(files(folder.path()).len(), 2);
    assert_eq!(cached(&once(&model, options, &longer).0), 299);
}

#[test]
fn a_file_that_has_no_room_in_the_budget_is_left_alone() {
    let (folder, model, prompt) = (tempfile::tempdir().unwrap(), model(), Draw(2).ids(300));
    once(&model, options(folder.path()), &prompt);
    // For 80 positions of the 300.
    let kv = KvConfig::exact(KvDType::F16).with_max_bytes(Some(120_000));
    let (came, notices) = once(&model, options(folder.path()).with_kv(kv), &prompt[..60]);
    assert_eq!((cached(&came), came.ids.len(), notices), (0, 12, Vec::<String>::new()));
}

#[test]
fn a_folder_that_cannot_be_used_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = Engine::new(&model(), None, options(&file)).unwrap_err();
    assert!(matches!(Error::of(&error), Some(Error::File { path, .. }) if *path == file), "{error}");
    let error = Engine::new(&model(), None, options(folder.path()).with_prefix_bytes(0)).unwrap_err();
    assert!(error.to_string().contains("prefix_folder"), "{error}");
}
