//! Sizes of compound pages.

use core::fmt;

use crate::PageCount;

/// The size in which a pagemap hands out its pages (the kernel's `vmemmap_shift`; `geometry` in the
/// device-dax series).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Geometry {
    /// 4 KiB: every page is its own head.
    #[default]
    K4,
    /// 2 MiB: 512 pages share a descriptor.
    M2,
    /// 1 GiB: 262,144 pages share a descriptor.
    G1,
}

impl Geometry {
    /// log2 of the pages in one compound page: 0, 9 or 18.
    pub const fn order(self) -> u32 {
        match self {
            Self::K4 => 0,
            Self::M2 => 9,
            Self::G1 => 18,
        }
    }

    /// Pages in one compound page.
    pub const fn pages(self) -> PageCount {
        PageCount::new(1 << self.order())
    }

    /// Bytes in one compound page.
    pub const fn bytes(self) -> usize {
        self.pages().bytes()
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::K4 => "4K",
            Self::M2 => "2M",
            Self::G1 => "1G",
        })
    }
}
