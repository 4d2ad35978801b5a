//! The machine that the program is built on.

use crate::generate::{Failure, Machine, Memory, run};
use candle_sparse_core::ActivationGroup;

pub(crate) fn main() {
    let mut memory = vec![ActivationGroup::ZERO; 1 << 14];
    let mut text = String::new();
    let machine = Machine { out: &mut text, memory: Memory { rest: &mut memory }, instructions: || None };
    let result = run(machine, &crate::IMAGE.0);
    print!("{text}");
    if let Err(Failure) = result {
        std::process::exit(1);
    }
}
