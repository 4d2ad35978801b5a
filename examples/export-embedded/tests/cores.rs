//! The division of rows between two cores, with a thread as the second core.

#[path = "../../esp32s3/src/two_cores.rs"]
mod two_cores;

use candle_sparse::Format;
use candle_sparse::weight::Weight;
use candle_sparse_core::{ActivationGroup, Columns, KernelSet, Scalar};
use std::sync::atomic::{AtomicBool, Ordering};
use two_cores::{Mailbox, TwoCores};

#[test]
fn two_cores_compute_the_bits_of_one() {
    let mut mailbox = Mailbox::new();
    let (kernels, second) = TwoCores::new(&mut mailbox);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                second.serve();
                std::thread::yield_now();
            }
        });
        for (rows, cols) in [(1, 32), (16, 64), (17, 128), (301, 96)] {
            for format in [Format::F32, Format::Q8_0, Format::Q4_0] {
                let noise = |i: usize| (i as f32 * 0.7).sin();
                let values: Vec<f32> = (0..rows * cols).map(noise).collect();
                let w = Weight::from_f32(format, cols, &values).unwrap();
                let x: Vec<f32> = (0..cols).map(|i| noise(i + 9)).collect();
                let mut groups = vec![ActivationGroup::ZERO; ActivationGroup::count(cols)];
                Scalar.quantize(&x, &mut groups);
                let quantized = format.is_quantized();
                let columns = if quantized { Columns::Quantized(&groups) } else { Columns::F32(&x) };
                let (mut one, mut two) = (vec![0.0; rows], vec![0.0; rows]);
                Scalar.matmul(w.matrix(), columns, &mut [&mut one]);
                kernels.matmul(w.matrix(), columns, &mut [&mut two]);
                assert_eq!(one, two, "{rows} x {cols} {format:?}");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
