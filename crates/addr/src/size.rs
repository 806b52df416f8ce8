//! Sizes in bytes, as people write them.

use core::fmt;
use core::str::FromStr;

use crate::{PAGE_SIZE, PageCount};

/// A size in bytes. Parses `4096`, `64K`, `64KiB`, `2M`, `2MiB`, `1.5GiB`, `64GB`, `1T`.
///
/// `K`, `M`, `G`, `T` and their `iB` forms are powers of 1024; `kB`, `KB`, `MB`, `GB`, `TB` are powers of
/// 1000, as in the SI.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct ByteSize(u64);

/// Why a text is no size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ParseSizeError {
    /// Nothing there.
    Empty,
    /// The number in front is missing or malformed.
    Number,
    /// The unit behind the number is unknown.
    Unit,
    /// More than 2^64 bytes.
    Overflow,
}

impl fmt::Display for ParseSizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "a size is needed, such as 64MiB",
            Self::Number => "the number is malformed; write a size such as 64MiB or 1.5GiB",
            Self::Unit => {
                "the unit is unknown; use K, M, G or T (KiB.. are the same, kB.. are powers of 1000)"
            }
            Self::Overflow => "the size is more than 2^64 bytes",
        })
    }
}

impl core::error::Error for ParseSizeError {}

impl ByteSize {
    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// This many KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// This many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// This many GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whole pages in it, rounded down.
    pub const fn pages(self) -> PageCount {
        PageCount::new((self.0 / PAGE_SIZE as u64) as usize)
    }
}

const UNITS: [(&str, u64); 18] = [
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("kB", 1000),
    ("KB", 1000),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ParseSizeError::Empty);
        }
        let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let unit = unit.trim_start();
        let &(_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(ParseSizeError::Unit)?;
        let (whole, fraction) = match number.split_once('.') {
            None => (number, ""),
            Some((whole, fraction)) if !fraction.is_empty() && fraction.len() <= 9 => (whole, fraction),
            Some(_) => return Err(ParseSizeError::Number),
        };
        if whole.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseSizeError::Number);
        }
        // Only digits are left, so that the one way to fail is a number that is too large.
        let whole: u128 = whole.parse().map_err(|_| ParseSizeError::Overflow)?;
        let scaled = whole.checked_mul(u128::from(scale)).ok_or(ParseSizeError::Overflow)?;
        let part = match fraction.parse::<u128>() {
            Ok(digits) => digits * u128::from(scale) / 10u128.pow(fraction.len() as u32),
            Err(_) => 0,
        };
        let bytes = scaled.checked_add(part).ok_or(ParseSizeError::Overflow)?;
        u64::try_from(bytes).map(Self).map_err(|_| ParseSizeError::Overflow)
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that leaves at most one decimal: `64 MiB`, `1.5 GiB`, `4097 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << shift {
                let tenths = (u128::from(self.0) * 10) >> shift;
                return if tenths % 10 == 0 {
                    write!(f, "{} {unit}", tenths / 10)
                } else {
                    write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
