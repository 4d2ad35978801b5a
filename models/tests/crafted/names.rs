//! Names that come from outside: of files on the Hub, and of the parts of a model.

use crate::{memory, refused};
use candle_sparse_models::files::ModelFiles;

#[test]
fn names_that_lead_out_of_the_folder_are_no_models() {
    let _alone = memory::alone();
    for name in ["../../etc/passwd", "/etc/passwd", "a/../../b.gguf", "~/x", "..", "./none/../x.gguf"] {
        refused(name, name.len(), "", || match ModelFiles::local(name) {
            Ok(None) => candle_core::bail!("may be an id on the Hub"),
            other => other,
        });
    }
}
