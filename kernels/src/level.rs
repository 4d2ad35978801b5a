//! Which instruction sets there are, and which one to use.

use crate::arch::Token;
use core::fmt;

/// An instruction set that kernels are compiled for. More may be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Level {
    /// Plain Rust.
    Scalar,
    /// AVX2, FMA and F16C (x86-64, 2013 on).
    Avx2,
    /// AVX2 with AVX-VNNI (Alder Lake, Zen 5 on), for CPUs without AVX-512.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 on).
    Avx512,
    /// AVX-512 with BF16 (Cooper Lake, Zen 4 on): what BF16 matrices are multiplied with is rounded to BF16. Only where it is
    /// asked for.
    Avx512Bf16,
    /// NEON (every aarch64).
    Neon,
    /// NEON with dot product (Cortex-A55, Apple, Graviton 2 on).
    NeonDotprod,
}

impl Level {
    /// Every level of all architectures; those of one architecture worst first.
    pub const ALL: [Self; 7] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Neon,
        Self::NeonDotprod,
    ];

    /// The name used by `CANDLE_SPARSE_LEVEL` and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx_vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon_dotprod",
        }
    }

    /// Whether this CPU can run it.
    #[must_use]
    pub fn is_supported(self) -> bool {
        self == Self::Scalar || Token::detect(self).is_some()
    }

    /// Whether products with BF16 matrices are as exact as F32 allows; at other levels the columns are rounded to BF16.
    #[must_use]
    pub const fn is_exact(self) -> bool {
        !matches!(self, Self::Avx512Bf16)
    }

    /// The best exact level this CPU can run.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|l| l.is_exact() && l.is_supported()).unwrap_or(Self::Scalar)
    }

    /// The level named by a setting, or the best exact one where there is none.
    ///
    /// # Errors
    /// No such level, or this CPU lacks it.
    pub fn choose(setting: Option<&str>) -> Result<Self, LevelError> {
        let Some(name) = setting.filter(|s| !s.is_empty()) else { return Ok(Self::best()) };
        let level = Self::ALL.into_iter().find(|l| l.name().eq_ignore_ascii_case(name));
        match level {
            Some(level) if level.is_supported() => Ok(level),
            Some(level) => Err(LevelError { name: level.name().into(), known: true }),
            None => Err(LevelError { name: name.into(), known: false }),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `CANDLE_SPARSE_LEVEL` asks for a level that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LevelError {
    name: String,
    known: bool,
}

impl fmt::Display for LevelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.known { "is not supported by this CPU" } else { "is not a level" };
        let have: Vec<_> = Level::ALL.into_iter().filter(|l| l.is_supported()).map(Level::name).collect();
        write!(f, "CANDLE_SPARSE_LEVEL: '{}' {what}; this CPU has {}", self.name, have.join(", "))
    }
}

impl core::error::Error for LevelError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_honoured_or_refused() {
        assert_eq!(Level::choose(None), Ok(Level::best()));
        assert_eq!(Level::choose(Some("")), Ok(Level::best()));
        assert_eq!(Level::choose(Some("SCALAR")), Ok(Level::Scalar));
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        assert!(Level::choose(Some(foreign)).unwrap_err().to_string().contains("not supported"));
        assert!(Level::choose(Some("sse9")).unwrap_err().to_string().contains("not a level"));
    }

    /// Guards against SIMD code that no build ever runs: the build says what its CPU must reach.
    #[test]
    fn this_cpu_reaches_the_level_its_flags_promise() {
        println!("level: {}", Level::best());
        #[cfg(target_arch = "aarch64")]
        assert_ne!(Level::best(), Level::Scalar);
        #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
        {
            let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
            let has = |f: &str| flags.split_whitespace().any(|w| w == f);
            if has("avx2") && has("fma") && has("f16c") {
                assert_ne!(Level::best(), Level::Scalar);
            }
            if ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"].iter().all(|f| has(f)) {
                assert_eq!(Level::best(), Level::Avx512);
            }
        }
    }
}
