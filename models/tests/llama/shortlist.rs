//! Heads with a shortlist beside exact ones: listed rows have the same bits, the rest is near, the largest logit is proven.

use candle_core::{Device, Tensor};
use candle_sparse::{Format, KvConfig, KvDType, SparseConfig, Threads};
use candle_sparse_models::{
    files::ModelFiles,
    llama::{Cache, HeadMode, Llama, LoadOptions},
    pretrained::Pretrained,
};
use std::path::Path;

const TOKENS: usize = 40;
const VOCAB: usize = 2048;

fn load(head: HeadMode, format: Format, threads: usize) -> Llama {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tales-silu");
    let options = LoadOptions::default()
        .with_format(Some(format))
        .with_threads(Threads::new(threads).ok())
        // Also where this machine gains nothing by it.
        .with_sparse(SparseConfig::default().with_force(true).with_mode(candle_sparse::FfnMode::Dense))
        .with_head(head);
    Pretrained::load(&ModelFiles::from_folder(&folder).unwrap(), options).unwrap().model
}

/// Logits of tokens one after the other, each the greedy choice of `guide`, and how many rows were exact.
fn decode(guide: &Llama, model: &Llama) -> Vec<([Vec<f32>; 2], f64)> {
    let kv = KvConfig::exact(KvDType::F32);
    let (mut a, mut b) = (Cache::of(guide, kv), Cache::of(model, kv));
    let mut token = 17;
    let step = |i| {
        let mut logits = [vec![0.0; VOCAB], vec![0.0; VOCAB]];
        guide.decode(token, i, &mut a, &mut logits[0]).unwrap();
        b.reset_sparse_stats();
        model.decode(token, i, &mut b, &mut logits[1]).unwrap();
        token = largest(&logits[0]) as u32;
        (logits, b.head_rows_per_token().unwrap_or(VOCAB as f64))
    };
    (0..TOKENS).map(step).collect()
}

fn largest(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

fn kld(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| x.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

#[test]
fn listed_rows_are_exact_and_the_rest_is_near() {
    let exact = load(HeadMode::Exact, Format::Q8_0, 1);
    for (mode, threads) in [(HeadMode::Shortlist, 1), (HeadMode::Certified, 1), (HeadMode::Certified, 2)] {
        let model = load(mode, Format::Q8_0, threads);
        assert_eq!((model.decoder().head_mode(), model.decoder().notices()), (mode, &[][..]));
        let (mut divergence, mut listed) = (0.0, 0.0);
        for (i, ([want, got], rows)) in decode(&exact, &model).into_iter().enumerate() {
            let same = want.iter().zip(&got).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
            assert!(same as f64 >= rows, "{mode:?} token {i}: {same} of {rows} rows are exact");
            assert_eq!(largest(&want), largest(&got), "{mode:?} token {i}");
            divergence += kld(&want, &got) / TOKENS as f64;
            listed += rows / TOKENS as f64;
        }
        println!("{mode:?}: {listed:.0} rows, kld {divergence:.6}");
        assert!(listed < 0.7 * VOCAB as f64, "{mode:?}: {listed} rows make no shortlist");
        assert!((0.0..1e-3).contains(&divergence), "{mode:?}: {divergence}");
    }
}

#[test]
fn prompts_embeddings_and_conversions_are_those_of_the_whole_matrix() {
    let [exact, halved] = [HeadMode::Exact, HeadMode::Shortlist].map(|mode| load(mode, Format::Q8_0, 2));
    let ids: Vec<u32> = (0..20).map(|i| i * 97 % VOCAB as u32).collect();
    let all = |model: &Llama| {
        let x = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let mut cache = Cache::of(model, KvConfig::exact(KvDType::F32));
        let logits = model.forward_all(&x, 0, &mut cache).unwrap();
        let last = model.forward(&x, 0, &mut cache).unwrap();
        [logits, last].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    assert_eq!(all(&exact), all(&halved));
    let embedded = |model: &Llama| {
        let mut out = vec![0.0; ids.len() * model.decoder().config().hidden_size];
        model.decoder().embed(&ids, &mut out).unwrap();
        out
    };
    assert_eq!(embedded(&exact), embedded(&halved));
    assert_eq!(all(&exact.in_f32().unwrap()), all(&halved.in_f32().unwrap()));
    // One matrix, held once; the kept rests come on top.
    let [bytes, more] = [&exact, &halved].map(|m| m.decoder().weight_bytes());
    assert!(more > bytes && more < bytes + bytes / 10, "{more} {bytes}");
    assert!(halved.decoder().weight_bytes_per_token() < exact.decoder().weight_bytes_per_token());
    assert_eq!(exact.decoder().parameters(), halved.decoder().parameters());
}

#[test]
fn where_a_shortlist_is_not_possible_it_is_said() {
    let model = load(HeadMode::Certified, Format::Q4_0, 1);
    let notices = model.decoder().notices();
    assert!(notices.iter().any(|n| n.contains("needs a head in q8_0") && n.contains("q4_0")), "{notices:?}");
    assert_eq!(model.decoder().head_mode(), HeadMode::Exact);
    let model = load(HeadMode::Certified, Format::Q8_0, 1);
    let layers = model.decoder().core_layers().unwrap();
    let error = model.decoder().core_model(&layers, KvConfig::exact(KvDType::F32)).unwrap_err();
    assert!(error.to_string().contains("HeadMode::Exact"), "{error}");
}
