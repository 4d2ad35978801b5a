//! Settings that can gain fields without breaking a program: `#[non_exhaustive]`, changed by `with_…` methods.

/// A `with_…` method for each field of a type of settings.
#[doc(hidden)]
#[macro_export]
macro_rules! with_methods {
    ($type:ty { $($with:ident: $field:ident: $of:ty),* $(,)? }) => {
        impl $type {
            $(
                #[doc = concat!("The same with another [`", stringify!($field), "`](Self::", stringify!($field), ").")]
                #[must_use]
                pub const fn $with(mut self, $field: $of) -> Self {
                    self.$field = $field;
                    self
                }
            )*
        }
    };
}
