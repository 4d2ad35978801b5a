use super::*;
use crate::{
    Threads,
    ops::testing::{dequantized, gated, noise, relative_error},
};
use candle_core::Device;
use candle_sparse_core::Activation;

const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0];
const ACTS: [Activation; 7] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluPytorchTanh,
    Activation::Relu,
    Activation::Relu2,
    Activation::FatRelu { threshold: 0.3 },
    Activation::DRelu,
];

fn gate(act: Activation) -> GluActivation {
    GluActivation { act, shift: 0.1 }
}

/// Tensors of an FFN in the shapes of a checkpoint, outputs of a size near 1.
struct Tensors {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    b1: Tensor,
    b2: Tensor,
}

impl Tensors {
    fn new(inner: usize, hidden: usize) -> Self {
        let scaled = |t: Tensor| (t / (hidden as f64).sqrt()).unwrap();
        // Another shape, other numbers.
        let up = noise(&[inner + 1, hidden]).narrow(0, 1, inner).unwrap();
        Self {
            gate: scaled(noise(&[inner, hidden])),
            up: scaled(up),
            down: scaled(noise(&[hidden, inner, 1]).squeeze(2).unwrap()),
            b1: noise(&[inner]),
            b2: noise(&[hidden]),
        }
    }

    fn gated(&self, format: Format, act: GluActivation) -> NeuronWeights {
        NeuronWeights::gated(format, act, &self.gate, &self.up, &self.down).unwrap()
    }

    fn two_matrix(&self, format: Format, act: GluActivation) -> NeuronWeights {
        let (w1, w2) = ((&self.gate, Some(&self.b1)), (&self.down, Some(&self.b2)));
        NeuronWeights::two_matrix(format, act, w1, w2).unwrap()
    }

    fn permuted(&self, order: &[u32]) -> Self {
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        let rows = |t: &Tensor, dim| t.index_select(&order, dim).unwrap();
        Self {
            gate: rows(&self.gate, 0),
            up: rows(&self.up, 0),
            down: rows(&self.down, 1),
            b1: rows(&self.b1, 0),
            b2: self.b2.clone(),
        }
    }
}

/// The same in plain tensor ops, on the weights the format really holds.
fn sparse_ffn_slow(x: &Tensor, w: &NeuronWeights, active: &[u32]) -> Result<Tensor> {
    let x = x.flatten_all()?;
    let active = Tensor::new(active, &Device::Cpu)?;
    let pairs = dequantized(w.pairs()).reshape((w.intermediate_size(), 2, w.hidden_size()))?;
    let pairs = pairs.index_select(&active, 0)?;
    let row = |i| pairs.narrow(1, i, 1)?.squeeze(1)?.contiguous();
    let first = row(0)?.matmul(&x.unsqueeze(1)?)?.squeeze(1)?;
    let shift = f64::from(w.act.shift);
    let (a, b2) = match &w.form {
        Form::Gated { gate, .. } => {
            let rows = dequantized(gate).index_select(&active, 0)?;
            let g = (rows.matmul(&x.unsqueeze(1)?)?.squeeze(1)? - shift)?;
            (gated(w.act.act, &g, &first)?, Tensor::zeros(x.dims(), DType::F32, &Device::Cpu)?)
        }
        Form::Plain { b1, b2, .. } => {
            let tensor = |v: &Option<Arc<[f32]>>| Tensor::new(v.as_deref().unwrap(), &Device::Cpu);
            let g = ((first + tensor(b1)?.index_select(&active, 0)?)? - shift)?;
            (gated(w.act.act, &g, &g.ones_like()?)?, tensor(b2)?)
        }
    };
    a.unsqueeze(0)?.matmul(&row(1)?)?.squeeze(0)? + b2
}

#[test]
fn equals_its_slow_twin() {
    for (inner, hidden) in [(7, 32), (300, 96), (1100, 512)] {
        let tensors = Tensors::new(inner, hidden);
        let x = noise(&[hidden]);
        let some: Vec<u32> = (0..inner as u32).filter(|i| i % 3 == 1 || i / 64 == 2).collect();
        let all: Vec<u32> = (0..inner as u32).collect();
        for format in FORMATS {
            for act in ACTS {
                let forms = [tensors.gated(format, gate(act)), tensors.two_matrix(format, gate(act))];
                for (w, active) in forms.iter().flat_map(|w| [(w, &some), (w, &all)]) {
                    let got = sparse_ffn(&x, w, active).unwrap();
                    let error = relative_error(&got, &sparse_ffn_slow(&x, w, active).unwrap());
                    // Quantised formats round x to steps of max|x| / 127.
                    let bound = if format.is_quantized() { 0.04 } else { 1e-5 };
                    assert!(error <= bound, "{format:?} {act:?} {inner}x{hidden}: {error}");
                }
            }
        }
    }
}

#[test]
fn rows_and_vectors_give_the_same_bits_in_their_own_shape() {
    let w = Tensors::new(40, 64).gated(Format::Q8_0, gate(Activation::Silu));
    let x = noise(&[64]);
    let y = sparse_ffn(&x, &w, &[1, 5, 39]).unwrap();
    let row = sparse_ffn(&x.unsqueeze(0).unwrap(), &w, &[1, 5, 39]).unwrap();
    assert_eq!((y.dims(), row.dims()), (&[64][..], &[1, 64][..]));
    assert_eq!(y.to_vec1::<f32>().unwrap(), row.squeeze(0).unwrap().to_vec1::<f32>().unwrap());
}

#[test]
fn no_neurons_give_zeros_or_the_bias() {
    let tensors = Tensors::new(40, 64);
    for format in FORMATS {
        let y = sparse_ffn(&noise(&[64]), &tensors.gated(format, gate(Activation::Relu)), &[]).unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), [0.0; 64]);
        let y = sparse_ffn(&noise(&[64]), &tensors.two_matrix(format, gate(Activation::Relu)), &[]).unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), tensors.b2.to_vec1::<f32>().unwrap());
    }
}

#[test]
fn the_order_of_neurons_does_not_matter() {
    let (inner, hidden) = (96, 64);
    let tensors = Tensors::new(inner, hidden);
    let order: Vec<u32> = (0..inner as u32).map(|i| i * 37 % inner as u32).collect();
    let permuted = tensors.permuted(&order);
    let active: Vec<u32> = (0..inner as u32).filter(|i| i % 5 < 2).collect();
    let moved: Vec<u32> = (0..inner as u32).filter(|&i| active.contains(&order[i as usize])).collect();
    let x = noise(&[hidden]);
    for format in FORMATS {
        let act = gate(Activation::Silu);
        let forms = |t: &Tensors| [t.gated(format, act), t.two_matrix(format, act)];
        for (w, p) in forms(&tensors).iter().zip(&forms(&permuted)) {
            let (a, b) = (sparse_ffn(&x, w, &active).unwrap(), sparse_ffn(&x, p, &moved).unwrap());
            let error = relative_error(&a, &b);
            assert!(error < 1e-5, "{format:?}: {error}");
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let w = Tensors::new(1100, 512).gated(Format::F32, gate(Activation::Silu));
    let active: Vec<u32> = (0..1100).filter(|i| i % 4 != 2).collect();
    let x = noise(&[512]).to_vec1::<f32>().unwrap();
    let kernels = Kernels::get().unwrap();
    let on = |threads| Compute { kernels, threads };
    let alone = w.forward(on(Threads::new(1).unwrap()), &active, &x);
    let all = crate::threads::testing::several();
    let together = all.schedule(&mut crate::threads::Policy::new(), 1, || w.forward(on(all), &active, &x));
    assert_eq!(alone, together);
}

#[test]
fn rows_and_dtypes_are_those_of_the_input() {
    let tensors = Tensors::new(40, 64);
    let w = tensors.gated(Format::F16, gate(Activation::Silu));
    let (x, active) = (noise(&[2, 3, 64]), [1, 5, 17, 39]);
    let y = sparse_ffn(&x, &w, &active).unwrap();
    assert_eq!(y.dims(), x.dims());
    for i in 0..6 {
        let row = |t: &Tensor| t.reshape((6, 64)).unwrap().get(i).unwrap();
        let alone = sparse_ffn(&row(&x), &w, &active).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(row(&y).to_vec1::<f32>().unwrap(), alone);
    }
    for dtype in [DType::F16, DType::BF16] {
        let x = x.to_dtype(dtype).unwrap();
        let want = sparse_ffn(&x.to_dtype(DType::F32).unwrap(), &w, &active).unwrap();
        let got = sparse_ffn(&x, &w, &active).unwrap();
        assert_eq!(got.dtype(), dtype);
        let bits =
            |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&got), bits(&want.to_dtype(dtype).unwrap()));
    }
}

#[test]
fn wrong_input_is_named() {
    let tensors = Tensors::new(40, 64);
    let w = tensors.gated(Format::F16, gate(Activation::Silu));
    let error = |x: &Tensor, active: &[u32]| sparse_ffn(x, &w, active).unwrap_err().to_string();
    let x = noise(&[64]);
    for (active, word) in
        [(&[3, 3][..], "follows 3"), (&[4, 2], "follows 4"), (&[0, 40], "past the last of 40")]
    {
        let e = error(&x, active);
        assert!(e.contains(word), "{e}");
    }
    let e = error(&noise(&[63]), &[0]);
    assert!(e.contains("BF16 [.., 64]"), "{e}");
    let e = error(&noise(&[64]).to_dtype(DType::F64).unwrap(), &[0]);
    assert!(e.contains("F64"), "{e}");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = x.to_vec1::<f32>().unwrap();
        values[17] = bad;
        let e = error(&Tensor::new(values, &Device::Cpu).unwrap(), &[0]);
        assert!(e.contains("x[17]"), "{e}");
    }
    let act = gate(Activation::Silu);
    let e = NeuronWeights::gated(Format::F16, act, &tensors.gate, &tensors.up, &tensors.up).unwrap_err();
    assert!(e.to_string().contains("[h, n]"), "{e}");
    let (w1, w2) = ((&tensors.gate, Some(&tensors.b2)), (&tensors.down, None));
    let e = NeuronWeights::two_matrix(Format::F16, act, w1, w2).unwrap_err().to_string();
    assert!(e.contains("b1") && e.contains("[40]"), "{e}");
}
