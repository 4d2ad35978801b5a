//! Says whether there is an operating system, and which image goes into the program.
use std::env;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(bare)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=IMAGE");
    // The target of `xtensa/*.json` names none.
    if matches!(env::var("CARGO_CFG_TARGET_OS").as_deref(), Ok("none" | "unknown" | "") | Err(_)) {
        println!("cargo:rustc-cfg=bare");
    }
    let image = env::var("IMAGE").expect("IMAGE=/path/to/image, a file of `export-embedded`");
    println!("cargo:rerun-if-changed={image}");
    println!("cargo:rustc-env=IMAGE={image}");
}
