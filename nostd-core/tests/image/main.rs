//! Images: written, opened, run, and damaged in every way.

mod damage;
mod model;
mod vocabulary;
