use super::super::tests::{config, fill, read, tiered};
use super::*;

#[test]
fn a_file_brings_everything_back() {
    let (c, folder) = (config(2, 48), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    for kv in [KvConfig::exact(KvDType::BF16), tiered(32, 96)] {
        let mut cache = KvCache::new(&c, kv);
        fill(&mut cache, &c, 0..250);
        cache.save(&path).unwrap();
        let mut other = KvCache::new(&c, KvConfig::exact(KvDType::F32));
        other.load(&path).unwrap();
        assert_eq!((other.len(), other.config()), (250, cache.config()));
        fill(&mut cache, &c, 250..300);
        fill(&mut other, &c, 250..300);
        assert!((0..300).all(|p| read(&cache, &c, 1, p) == read(&other, &c, 1, p)), "{kv:?}");
    }
    let mut wrong = KvCache::new(&config(2, 64), KvConfig::exact(KvDType::F32));
    let error = wrong.load(&path).unwrap_err().to_string();
    assert!(error.contains("heads of 48") && wrong.is_empty(), "{error}");
    let bytes = std::fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let mut cache = KvCache::new(&c, KvConfig::exact(KvDType::F32));
        assert!(cache.load(&path).is_err() && cache.is_empty(), "{cut} bytes of {}", bytes.len());
    }
}

#[test]
fn every_damaged_byte_is_found() {
    let (c, folder) = (config(1, 16), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    let mut cache = KvCache::new(&c, tiered(32, 64));
    fill(&mut cache, &c, 0..130);
    cache.save_tokens(&path, &(0..130).collect::<Vec<_>>()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    assert_eq!(KvCache::saved_tokens(&path).unwrap(), (0..130).collect::<Vec<_>>());
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for at in (header..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let mut other = KvCache::new(&c, KvConfig::exact(KvDType::F32));
        let error = other.load(&path).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains("chat.safetensors"), "{at}: {error}");
    }
    std::fs::write(&path, "no cache").unwrap();
    assert!(KvCache::saved_tokens(&path).unwrap_err().to_string().contains("chat.safetensors"));
}

fn origin(interleaved: bool, theta: f32, weight: f32) -> Arc<Origin> {
    let mut fingerprint = vec![weight; 65 * 19];
    fingerprint.iter_mut().step_by(65).for_each(|rounds| *rounds = 0.0);
    let inv_freq = [1.0, 1.0 / theta].into();
    Arc::new(Origin { interleaved, inv_freq, fingerprint: fingerprint.into() })
}

#[test]
fn a_file_of_another_model_is_refused() {
    let (c, folder) = (config(2, 16), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    let own = origin(false, 1e4, 1.0);
    let mut cache = KvCache::new(&c, tiered(32, 64));
    cache.set_origin(&own);
    fill(&mut cache, &c, 0..130);
    cache.save(&path).unwrap();
    let others = [
        (origin(true, 1e4, 1.0), "GGUF"),
        (origin(false, 5e5, 1.0), "RoPE"),
        (origin(false, 1e4, 1.1), "differs"),
    ];
    for (other, needle) in others {
        let mut tied = KvCache::new(&c, KvConfig::q4());
        tied.set_origin(&other);
        let error = tied.load(&path).unwrap_err();
        assert!(matches!(Reason::of(&error), Some(Reason::WrongModel { .. })), "{error}");
        assert!(error.to_string().contains(needle) && tied.is_empty(), "{error}");
        // A cache that does not know its model yet hears it from the model.
        let mut free = KvCache::new(&c, KvConfig::q4());
        free.load(&path).unwrap();
        assert!(free.check_origin(&own).is_ok());
        let error = free.check_origin(&other).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
        free.truncate(0);
        assert!(free.check_origin(&other).is_ok(), "nothing of the other model is left");
    }
    let mut same = KvCache::new(&c, KvConfig { max_bytes: Some(1 << 30), ..KvConfig::q4() });
    same.set_origin(&Arc::new((*own).clone()));
    same.load(&path).unwrap();
    assert_eq!(
        (same.config().max_bytes, same.config().hot),
        (Some(1 << 30), 32),
        "the budget is the caller's"
    );
    let mut small = KvCache::new(&c, KvConfig { max_bytes: Some(1000), ..KvConfig::q4() });
    assert!(
        matches!(Reason::of(&small.load(&path).unwrap_err()), Some(Reason::Full { .. })) && small.is_empty()
    );
    // One that does not say.
    let mut silent = KvCache::new(&c, KvConfig::q4());
    fill(&mut silent, &c, 0..40);
    silent.save(&path).unwrap();
    assert!(same.load(&path).unwrap_err().to_string().contains("does not say"));
    assert!(KvCache::new(&c, KvConfig::q4()).load(&path).is_ok());
}

#[test]
fn files_that_no_cache_would_write_are_refused() {
    let (c, folder) = (config(1, 16), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    let mut cache = KvCache::new(&c, tiered(32, 64));
    fill(&mut cache, &c, 0..200);
    cache.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes[8..]).to_string();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from) && from.len() == to.len(), "{from}");
        let at = text.find(from).unwrap() + 8;
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, changed).unwrap();
        let mut cache = KvCache::new(&c, KvConfig::q4());
        let error = cache.load(&path).unwrap_err();
        assert!(
            Reason::of(&error).is_some() && cache.is_empty() && !error.to_string().contains('\n'),
            "{error}"
        );
        error.to_string()
    };
    assert!(change("format\\\":2", "format\\\":1").contains("read the text again"));
    assert!(change("format\\\":2", "format\\\":3").contains("update"));
    assert!(change("positions\\\":200", "positions\\\":900").contains("tiers"));
    assert!(change("sequences\\\":1", "sequences\\\":9").contains("sequences.1"));
    // A page that is colder than the one before it.
    let mut changed = bytes.clone();
    let tiers: Vec<u8> = cache.sequences[0][0].iter().map(|p| p.tier() as u8).collect();
    let at = bytes.windows(tiers.len()).position(|w| w == tiers).unwrap();
    changed[at..at + 3].copy_from_slice(&[0, 1, 2]);
    std::fs::write(&path, changed).unwrap();
    assert!(KvCache::new(&c, KvConfig::q4()).load(&path).is_err());
}
