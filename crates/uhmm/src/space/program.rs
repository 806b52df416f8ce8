//! Memory that the program maps and unmaps as it likes, for a driver that is asked about addresses.
//!
//! What    [`Space::mappings`] lists what is mapped in a range (the kernel's walk over `vm_area_struct`s);
//!         [`Space::watch`] puts such memory under management, [`Space::unwatch`] ends that.
//! Why     a driver gets addresses, at which anything may be mapped and which change without its leave. An
//!         [`Adoption`](super::Adoption) is of memory that stays.
//! Owns    nothing: a mapping that goes takes its registration with it, and a new one at its place is not watched. So
//!         a driver watches what it is asked about each time; where nothing has changed that costs one call.
//! Races   a list of mappings is old when it arrives. Pages of a mapping that changed since it was watched are not
//!         taken out ([`Skip::Changed`](uhmm_core::stats::Skip::Changed)).
//! Fails   with a [`MapError`]; then nothing is watched that was not before.

use std::io;

use uhmm_addr::VaRange;
use uhmm_sys::mapping;
use uhmm_sys::maps::MapEntry;
use uhmm_sys::signals::Blocked;

use super::{MapError, Space};

/// What is behind a mapping, as far as it matters to who wants to move its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingKind {
    /// Private and anonymous: it can be watched, and its pages can be moved.
    Anonymous,
    /// A private mapping of a file: pages that were written can be moved when they were detached ([`Space::detach`]).
    PrivateFile,
    /// Huge pages of a pool (hugetlb).
    HugePool,
    /// A shared file, shared memory, or memory of uhmm's own: pages stay where they are.
    Other,
}

/// A mapping, or the part of it that was asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProgramMapping {
    /// The pages.
    pub range: VaRange,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// What is behind it.
    pub kind: MappingKind,
}

fn kind_of(entry: &MapEntry<'_>, asked: VaRange) -> MappingKind {
    let named = |name: &[u8]| entry.path.starts_with(name);
    if named(b"/anon_hugepage") {
        MappingKind::HugePool
    } else if entry.shared || named(b"[anon:uhmm") || mapping::is_ours(asked) {
        MappingKind::Other
    } else if entry.inode != 0 {
        MappingKind::PrivateFile
    } else if entry.path.is_empty() || entry.path == b"[heap]" || named(b"[anon:") {
        MappingKind::Anonymous
    } else {
        MappingKind::Other
    }
}

impl Space {
    /// The mappings of this process in `range`, cut at its ends, in order.
    ///
    /// # Errors
    /// If the list cannot be read.
    pub fn mappings(&self, range: VaRange) -> io::Result<Vec<ProgramMapping>> {
        let mut found = Vec::new();
        let mut rest = Some(range);
        self.inner.managed.mm().host().rights().entries(range, |entry| {
            // One that was joined with the one before it since that was told begins there.
            let Some(left) = rest else { return };
            if let Some(common) = entry.range.intersect(left) {
                let kind = kind_of(&entry, common);
                found.push(ProgramMapping { range: common, read: entry.read, write: entry.write, kind });
                rest = left.skip(common.end_page().since(left.first()));
            }
        })?;
        Ok(found)
    }

    /// Puts `range`, mapped by the program and [`MappingKind::Anonymous`], under management until the program unmaps
    /// it. What is watched or adopted already stays so.
    ///
    /// # Errors
    /// [`MapError::Deaf`] with the signal engine, [`MapError::Register`] where the memory is not of that kind.
    ///
    /// # Safety
    /// It must not be memory that the space itself needs to work: the stacks of its threads, or what they allocate.
    /// It must be unwatched, or unmapped, before the last handle of the space is dropped: pages that are away then
    /// would read as zeros.
    pub unsafe fn watch(&self, range: VaRange) -> Result<(), MapError> {
        let managed = &self.inner.managed;
        if !managed.hears_events() {
            return Err(MapError::Deaf);
        }
        let _blocked = Blocked::all();
        // SAFETY: the caller's promise; the handler threads run as long as the space.
        Ok(unsafe { managed.watch(range) }?)
    }

    /// The program's own discard of `range` (`MADV_DONTNEED` and its like) is over: pages that are there now are new
    /// ones, and can be moved. Without a word of it they can after they were touched: the event comes before the kernel
    /// has taken them.
    pub fn discarded(&self, range: VaRange) {
        // What the event says must not come after this.
        self.catch_up();
        self.inner.managed.mm().removal_done(range);
    }

    /// Waits until what the program did to its mappings, in calls that have returned, has been told to mirrors and
    /// subscribers. For a driver that is asked about addresses by a thread that may have unmapped them a moment ago.
    pub fn catch_up(&self) {
        let _blocked = Blocked::all();
        self.inner.managed.mm().catch_up();
    }

    /// Brings the pages of `range` home and ends the watch over it.
    pub fn unwatch(&self, range: VaRange) {
        self.inner.release(range);
    }
}
