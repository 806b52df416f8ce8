//! What is asked of a range of pages, and why it cannot be had.
//!
//! What    [`Want`] of a page (the kernel's `HMM_PFN_REQ_FAULT` and `_WRITE`), [`Request`] of a range (`default_flags`,
//!         `pfn_flags_mask`, `dev_private_owner`), [`RangeFaultError`], and [`Patience`], the caller's deadline.
//! Why     request and result are two types; the kernel overlays their bits in one array, and what is left of a
//!         request after a failure must be known by position.
//! Fails   each error says what its caller can do next.

use alloc::sync::Arc;

use uhmm_addr::{VaRange, VirtAddr};

use crate::frame::Holder;
use crate::pagemap::Pagemap;

/// What a page must be afterwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Want {
    /// As it is: nothing is brought there.
    #[default]
    Nothing,
    /// Readable, or the call fails.
    Read,
    /// Writable, or the call fails.
    Write,
}

/// What is asked of a range: what every page must be at least, what single pages must be, and whose private pages may
/// stay where they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    default: Want,
    mask: Want,
    wants: &'a [Want],
    own: Option<&'a Arc<Pagemap>>,
    holder: Option<Holder>,
}

impl<'a> Request<'a> {
    /// The pages as they are: never faults, never waits for a page.
    pub const SNAPSHOT: Self =
        Self { default: Want::Nothing, mask: Want::Nothing, wants: &[], own: None, holder: None };

    /// Every page like this.
    pub const fn all(default: Want) -> Self {
        Self { default, ..Self::SNAPSHOT }
    }

    /// The same, and the `n`th page as `wants[n]` says, but nothing beyond `mask`.
    #[must_use]
    pub const fn each(self, mask: Want, wants: &'a [Want]) -> Self {
        Self { mask, wants, ..self }
    }

    /// The same for the driver of the device behind `own`: its pages are reported where they are. All others are
    /// brought home.
    #[must_use]
    pub const fn owning(self, own: &'a Arc<Pagemap>) -> Self {
        Self { own: Some(own), ..self }
    }

    /// The same for the mirror that has this number: pages that are lent to it are reported where they are.
    pub(super) const fn holding(self, holder: Holder) -> Self {
        Self { holder: Some(holder), ..self }
    }

    /// Whether what is lent to `holder` is lent to the caller.
    pub(super) fn is_held(&self, holder: Holder) -> bool {
        self.holder == Some(holder)
    }

    /// What is wanted of page number `n`.
    pub(super) fn want(&self, n: usize) -> Want {
        self.wants.get(n).map_or(Want::Nothing, |want| *want.min(&self.mask)).max(self.default)
    }

    /// Whether a page can be wanted at all.
    pub(super) fn asks(&self) -> bool {
        self.default.max(self.mask) > Want::Nothing
    }

    /// Whether every page is wanted alike.
    pub(super) const fn is_uniform(&self) -> bool {
        self.wants.is_empty()
    }

    /// The request for the pages from number `n` on.
    pub(super) fn skip(self, n: usize) -> Self {
        Self { wants: self.wants.get(n..).unwrap_or(&[]), ..self }
    }

    /// Whether pages of `map` are the caller's own: devices that share a link share an owner.
    pub(super) fn is_own(&self, map: &Pagemap) -> bool {
        self.own.is_some_and(|own| own.owner() == map.owner())
    }
}

impl From<Want> for Request<'_> {
    fn from(want: Want) -> Self {
        Self::all(want)
    }
}

/// Why it is tried once more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retry {
    /// Pages changed while they were looked at.
    Changed,
    /// A page is on its way, by another thread.
    InFlight,
    /// Events of the program's own changes wait to be read.
    Pending,
    /// No frame may be taken now, until the evictor has made room.
    Starved,
}

/// How long the caller tries. There is no clock here.
pub trait Patience {
    /// The first try for a batch of pages.
    fn begin(&mut self);

    /// Whether to try the batch once more, and for this reason; may wait a moment before it answers.
    fn again(&mut self, why: Retry) -> bool;

    /// Does `work`, in which the calling thread takes pages out of the program's address space. Where fault handlers
    /// have to know such threads (see [`decide`](crate::fault::decide)), they are told around it.
    fn moving(&mut self, work: &mut dyn FnMut()) {
        work();
    }
}

/// Why pages are not as was asked. Pages that were brought home meanwhile stay there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RangeFaultError {
    /// A page is to be written and its mapping forbids it (`EPERM`). Ask to read, or let the program permit it.
    #[error("{0} may not be written: its mapping is read-only")]
    Permission(VirtAddr),
    /// Nothing that could be read is mapped there, or it is not under management any more (`EFAULT`).
    #[error("{0} is not mapped, or not managed any more")]
    Fault(VirtAddr),
    /// The contents were lost by a device (`EFAULT`, `EHWPOISON`).
    #[error("the contents of {0} are lost")]
    Poisoned(VirtAddr),
    /// Patience came to an end (`EBUSY`): the same call may succeed later.
    #[error("the pages did not come to rest in time ({0:?})")]
    TimedOut(Retry),
    /// The address space comes to its end: no call will succeed any more.
    #[error("the address space is closing")]
    Closed,
    /// The pages do not lie in the mirror, or in the page table (`EINVAL`).
    #[error("{0} lies outside of what can be asked about")]
    Outside(VaRange),
}
