//! What is present in a range of our own memory: `PAGEMAP_SCAN`.
//!
//! What     [`PagemapScan::scan`] lists the stretches of pages that match a [`Query`].
//! Why      migration wants the pages that hold contents, and mincore(2) does not tell a zero page, a
//!          file's page or a written page from the others. Linux 6.7 does, in one pass.
//! Owns     a descriptor of `/proc/self/pagemap`. An answer is old when it arrives: it is a hint of where
//!          to look, and the call that takes the page decides.
//! Fallback where the kernel does not know the request, the 8-byte entries of the same file are read.
//!          They tell [`Categories::PRESENT`], [`Categories::SWAPPED`], [`Categories::FILE`] and
//!          [`Categories::WRITTEN`]; a zero page looks like any other, and nothing is ever huge.
//! Fails    with the kernel's error number; `EFAULT` for addresses outside user space.

use core::sync::atomic::{AtomicBool, Ordering};
use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};

use crate::uapi;

#[cfg(test)]
mod tests;

/// What a page is, one bit each; the kernel's `PAGE_IS_*`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Categories(u64);

impl Categories {
    /// None.
    pub const NONE: Self = Self(0);
    /// Written since it was last protected (`WP_ASYNC`), or never protected.
    pub const WRITTEN: Self = Self(raw::PAGE_IS_WRITTEN as u64);
    /// A file's or shared memory.
    pub const FILE: Self = Self(raw::PAGE_IS_FILE as u64);
    /// In RAM.
    pub const PRESENT: Self = Self(raw::PAGE_IS_PRESENT as u64);
    /// In swap, or on its way between places.
    pub const SWAPPED: Self = Self(raw::PAGE_IS_SWAPPED as u64);
    /// The shared page of zeros: present, with nothing to copy.
    pub const ZERO: Self = Self(raw::PAGE_IS_PFNZERO as u64);
    /// Part of a huge mapping.
    pub const HUGE: Self = Self(raw::PAGE_IS_HUGE as u64);

    /// Both together.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among them.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Which pages are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Query {
    /// Pages that are all of these,
    pub required: Categories,
    /// none of these,
    pub excluded: Categories,
    /// and one of these,
    pub any: Categories,
    /// or not one of these: that a page has one of the first or lacks one of the second is enough. Unless both name none.
    pub lacking: Categories,
    /// What an answer tells. Neighbours that are equal in these make one region.
    pub report: Categories,
}

impl Query {
    /// Present pages with contents of their own: neither zeros nor a file's.
    pub const PRESENT: Self = Self {
        required: Categories::PRESENT,
        excluded: Categories::ZERO.union(Categories::FILE),
        any: Categories::NONE,
        lacking: Categories::NONE,
        report: Categories::PRESENT,
    };

    const fn matches(self, page: Categories) -> bool {
        page.contains(self.required)
            && !page.meets(self.excluded)
            && (self.any.union(self.lacking).0 == 0 || page.meets(self.any) || !page.contains(self.lacking))
    }
}

/// Neighbouring pages that match and are alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// Where.
    pub range: VaRange,
    /// What they are, as far as [`Query::report`] asked.
    pub categories: Categories,
}

impl Region {
    /// A value to fill an array with before a scan.
    pub const UNUSED: Self = Self { range: VaRange::page(Vpn::new(0)), categories: Categories::NONE };
}

/// How far a scan got.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scanned {
    /// Regions written, from the front.
    pub regions: usize,
    /// Everything before was looked at: the end of the range, unless the regions did not fit.
    pub walk_end: VirtAddr,
}

/// A descriptor of this process's page map.
#[derive(Debug)]
pub struct PagemapScan {
    file: OwnedFd,
    fallback: AtomicBool,
}

/// Regions asked for at a time; 1.5 KiB of stack.
const BATCH: usize = 64;

/// One scan. Its result is how many regions were written, and where the walk ended.
struct Request(uapi::pm_scan_arg);

// SAFETY: the opcode is made from the size of `pm_scan_arg`, and `as_ptr` points to one. The kernel writes
// to it and to the `vec_len` regions at `vec`; whoever makes a `Request` keeps those alive (`walk`).
unsafe impl Ioctl for Request {
    type Output = (usize, VirtAddr);
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        uapi::PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, arg: *mut core::ffi::c_void) -> Result<Self::Output, Errno> {
        // SAFETY: this is the pointer that `as_ptr` gave, to a structure that `ioctl` still holds.
        let walk_end = unsafe { (*arg.cast::<uapi::pm_scan_arg>()).walk_end };
        Ok((usize::try_from(out).unwrap_or(0), VirtAddr::new(walk_end as usize)))
    }
}

impl PagemapScan {
    /// Opens the page map of this process.
    pub fn open() -> io::Result<Self> {
        let file = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file, fallback: AtomicBool::new(false) })
    }

    /// The same, never asking with `PAGEMAP_SCAN`.
    pub fn open_fallback() -> io::Result<Self> {
        let scan = Self::open()?;
        scan.fallback.store(true, Ordering::Relaxed);
        Ok(scan)
    }

    /// Whether the entries are read, because the kernel has no `PAGEMAP_SCAN`. Known after the first scan.
    pub fn is_fallback(&self) -> bool {
        self.fallback.load(Ordering::Relaxed)
    }

    /// Lists the present pages that have contents of their own ([`Query::PRESENT`]).
    pub fn present(&self, range: VaRange, out: &mut [Region]) -> Result<Scanned, Errno> {
        self.scan(range, Query::PRESENT, out)
    }

    /// Lists the regions of `range` that match, in order, as many as fit into `out`.
    pub fn scan(&self, range: VaRange, query: Query, out: &mut [Region]) -> Result<Scanned, Errno> {
        let mut list = List { out, len: 0 };
        let walk_end = if self.is_fallback() {
            self.read_entries(range, query, &mut list)?
        } else {
            match self.walk(range, query, &mut list) {
                Err(Errno::NOTTY) => {
                    self.fallback.store(true, Ordering::Relaxed);
                    self.read_entries(range, query, &mut list)?
                }
                walked => walked?,
            }
        };
        Ok(Scanned { regions: list.len, walk_end })
    }

    fn walk(&self, range: VaRange, query: Query, list: &mut List<'_>) -> Result<VirtAddr, Errno> {
        let mut from = range.start();
        let mut batch = [uapi::page_region { start: 0, end: 0, categories: 0 }; BATCH];
        while from < range.end() && list.room() > 0 {
            let arg = uapi::pm_scan_arg {
                size: size_of::<uapi::pm_scan_arg>() as u64,
                flags: 0,
                start: from.get() as u64,
                end: range.end().get() as u64,
                walk_end: 0,
                vec: batch.as_mut_ptr().expose_provenance() as u64,
                vec_len: list.room().min(BATCH) as u64,
                max_pages: 0,
                category_inverted: query.excluded.0 | query.lacking.0,
                category_mask: query.required.0 | query.excluded.0,
                category_anyof_mask: query.any.0 | query.lacking.0,
                return_mask: query.report.0,
            };
            // SAFETY: `Request` describes this request (see there), and `batch` has room for the `vec_len`
            // regions that the kernel may write.
            let (found, walk_end) = unsafe { ioctl(&self.file, Request(arg))? };
            for region in &batch[..found.min(BATCH)] {
                let start = VirtAddr::new(region.start as usize).page();
                let pages = VirtAddr::new(region.end as usize).page().since(start);
                if let Some(range) = VaRange::of_pages(start, pages) {
                    list.push(Region { range, categories: Categories(region.categories) });
                }
            }
            // A walk that makes no progress would go on for ever.
            if walk_end <= from {
                return Err(Errno::IO);
            }
            from = walk_end;
        }
        Ok(from)
    }

    fn read_entries(&self, range: VaRange, query: Query, list: &mut List<'_>) -> Result<VirtAddr, Errno> {
        const ENTRY: usize = size_of::<u64>();
        let mut bytes = [0_u8; 512 * ENTRY];
        let mut rest = Some(range);
        while let Some(range) = rest {
            let head = range.take(PageCount::new(512));
            let want = head.pages().get() * ENTRY;
            let got =
                rustix::io::pread(&self.file, &mut bytes[..want], head.first().get() as u64 * ENTRY as u64)?;
            if got < ENTRY {
                return Err(Errno::FAULT);
            }
            let pages = bytes[..got].as_chunks::<ENTRY>().0;
            for (index, entry) in pages.iter().enumerate() {
                let page = head.first().forward(PageCount::new(index));
                let categories = entry_categories(u64::from_ne_bytes(*entry));
                if !query.matches(categories) {
                    continue;
                }
                let region = Region { range: VaRange::page(page), categories: categories.and(query.report) };
                if !list.push(region) {
                    return Ok(page.base());
                }
            }
            rest = range.skip(PageCount::new(pages.len()));
        }
        Ok(range.end())
    }
}

/// What an entry of the page map tells.
fn entry_categories(entry: u64) -> Categories {
    let bit = |number: u32, category: Categories| {
        if entry >> number & 1 != 0 { category } else { Categories::NONE }
    };
    let place = bit(63, Categories::PRESENT).union(bit(62, Categories::SWAPPED));
    let protected = entry >> 57 & 1 != 0;
    let written = if place == Categories::NONE || protected { Categories::NONE } else { Categories::WRITTEN };
    place.union(bit(61, Categories::FILE)).union(written)
}

/// The answer while it grows.
struct List<'a> {
    out: &'a mut [Region],
    len: usize,
}

impl List<'_> {
    fn room(&self) -> usize {
        self.out.len() - self.len
    }

    /// Adds a region, or makes the last one longer. `false` if there is no room.
    fn push(&mut self, region: Region) -> bool {
        if let Some(last) = self.out[..self.len].last_mut()
            && last.categories == region.categories
            && last.range.end_page() == region.range.first()
            && let Some(joined) =
                VaRange::of_pages(last.range.first(), last.range.pages().plus(region.range.pages()))
        {
            last.range = joined;
            return true;
        }
        let Some(free) = self.out.get_mut(self.len) else {
            return false;
        };
        *free = region;
        self.len += 1;
        true
    }
}
