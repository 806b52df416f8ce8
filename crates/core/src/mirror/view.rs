//! What is known of a page, as a driver's table takes it over.
//!
//! What    [`PageView`], one page; [`Pages`], consecutive ones.
//! Why     the kernel overlays request, result, order and page number in one word (`hmm_pfns`); here what cannot be
//!         together cannot be said.
//! Fails   nothing here fails.

use uhmm_addr::{Geometry, Pfn, VaRange, VirtAddr, Vpn};

use crate::notifier::Owner;

/// Why a page cannot be had, whatever is asked (the kernel's `HMM_PFN_ERROR`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// Nothing that may be read is mapped there, or not the mapping that was watched.
    Unmapped,
    /// A device has lost the contents.
    Poisoned,
}

/// What is known of one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PageView {
    /// Nothing there now: never touched, given up, on its way, or on a device of somebody else. To ask for it would
    /// bring it.
    #[default]
    Absent,
    /// In RAM, reached at its own address: its frame's number is not to be had in user space, and is no secret that a
    /// device must know that reaches memory by address.
    Ram {
        /// A store needs nothing of the space. A page that is shared since a fork is replaced by the system itself.
        write: bool,
        /// 2 MiB where one huge page maps the whole chunk, and all of the chunk was asked about; otherwise 4 KiB.
        order: Geometry,
    },
    /// The page of zeros that everybody shares, reached at its own address: to be read only.
    Zeros,
    /// On the caller's own device.
    Device {
        /// Which page of it.
        pfn: Pfn,
        /// The mapping may be written.
        write: bool,
    },
    /// The caller's alone, which nobody else can touch without its being told
    /// ([`Mirror::exclusive`](super::Mirror::exclusive)).
    Exclusive {
        /// Where its frame lies: memory of this process, good for loads, stores and atomic operations with the
        /// mirror's lock held.
        at: VirtAddr,
    },
    /// On a coherent device, mapped in place: reached at its own address, by the program and by every device. A driver
    /// knows its own pages by the owner, and may go past the page table for them.
    Coherent {
        /// Whose page it is.
        owner: Owner,
        /// Which one.
        pfn: Pfn,
        /// A store needs nothing of the space.
        write: bool,
    },
    /// Never to be had.
    Error(Unusable),
}

impl PageView {
    /// Whether the page can be read where it is (`HMM_PFN_VALID`).
    pub const fn is_valid(self) -> bool {
        match self {
            Self::Ram { .. } | Self::Zeros | Self::Device { .. } => true,
            Self::Coherent { .. } | Self::Exclusive { .. } => true,
            Self::Absent | Self::Error(_) => false,
        }
    }

    /// Whether it can be written where it is (`HMM_PFN_WRITE`).
    pub const fn may_write(self) -> bool {
        match self {
            Self::Ram { write, .. } | Self::Device { write, .. } | Self::Coherent { write, .. } => write,
            Self::Exclusive { .. } => true,
            Self::Zeros | Self::Absent | Self::Error(_) => false,
        }
    }

    /// Whether it is the caller's alone.
    pub const fn is_exclusive(self) -> bool {
        matches!(self, Self::Exclusive { .. })
    }

    /// The size of the mapping that the page is part of.
    pub const fn order(self) -> Geometry {
        match self {
            Self::Ram { order, .. } => order,
            _ => Geometry::K4,
        }
    }

    /// Why it cannot be had.
    pub const fn error(self) -> Option<Unusable> {
        match self {
            Self::Error(why) => Some(why),
            _ => None,
        }
    }
}

/// Consecutive pages and what is known of each.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    range: VaRange,
    views: &'a [PageView],
}

impl<'a> Pages<'a> {
    pub(super) fn new(range: VaRange, views: &'a [PageView]) -> Self {
        debug_assert_eq!(range.pages().get(), views.len());
        Self { range, views }
    }

    /// Which pages.
    pub const fn range(&self) -> VaRange {
        self.range
    }

    /// What is known of each, in order.
    pub const fn views(&self) -> &'a [PageView] {
        self.views
    }

    /// Page by page, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Vpn, PageView)> {
        self.range.iter().zip(self.views.iter().copied())
    }
}
