//! Links as esp-hal wants it, and says which image goes into the program.
use std::{env, path::Path};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=IMAGE");
    println!("cargo:rustc-link-arg=-Tlinkall.x");
    let image = env::var("IMAGE").expect("IMAGE=/path/to/image, a file of `export-embedded`");
    assert!(
        Path::new(&image).is_file(),
        "there is no {image}: write it with `export-embedded --out {image}`"
    );
    println!("cargo:rerun-if-changed={image}");
    println!("cargo:rustc-env=IMAGE={image}");
}
