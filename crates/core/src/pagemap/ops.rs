//! What a pagemap asks of whoever registered it.
//!
//! What    [`PagemapOps`] (the kernel's `struct dev_pagemap_ops`), every call with a default.
//! Why     only the driver knows who has mapped its pages, and how its queue of requests is stopped.
//! Locks   called with no lock of the pagemap held, from any thread. [`PagemapOps::page_free`] runs wherever the last
//!         reference is dropped, a fault handler included: it must not allocate, block, or touch managed memory.

use uhmm_addr::PfnRange;

use super::Pagemap;
use super::poison::{Failure, Told};

/// The calls of a driver. The kernel's third one, `migrate_to_ram`, is [`Device::read`](crate::device::Device::read):
/// what a touch needs of a private page is its bytes; the rest is the library's.
pub trait PagemapOps: Send + Sync {
    /// The last reference to these pages is gone, and nobody can get them before this returns. Whoever waits until
    /// pages are not in use is woken here (`dax_wait_page`).
    fn page_free(&self, map: &Pagemap, pages: PfnRange) {
        let _ = (map, pages);
    }

    /// These pages, one compound page, are lost. [`Told::Generic`] if the mappers that have registered themselves
    /// shall be told (`-EOPNOTSUPP`).
    fn memory_failure(&self, map: &Pagemap, failure: &Failure) -> Told {
        let _ = (map, failure);
        Told::Generic
    }

    /// First step of the teardown: no request for these pages begins any more, and those that had begun have ended
    /// (`blk_mq_freeze_queue`; the order of the series that gave pages one reference to their pagemap).
    fn freeze(&self, map: &Pagemap) {
        let _ = map;
    }

    /// The teardown gave up: requests may begin again.
    fn thaw(&self, map: &Pagemap) {
        let _ = map;
    }

    /// Second step: whatever maps these pages, mirrors of devices included, must let go of them. New references are
    /// refused already, and those that are held may be kept for a while.
    fn invalidate(&self, map: &Pagemap) {
        let _ = map;
    }

    /// Last step: no page is referred to, and none can be found by its number. What belongs to the queue may go.
    fn released(&self) {}
}
