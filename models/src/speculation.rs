//! Whether a sequence's next tokens are guessed and verified together.

/// How tokens are drafted. The tokens that are written are the same with every setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Speculation {
    /// Not at all.
    #[default]
    Off,
}
