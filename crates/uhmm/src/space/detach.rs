//! Private mappings of files: their written pages become anonymous memory, which can be watched.
//!
//! What    [`Space::detach`] gives the pages of such mappings that the process has to itself (copied when it wrote to
//!         them) an anonymous mapping, watched from its first moment. The file's own pages stay: they go on saying what
//!         the file says, and no page of theirs is migrated by the kernel either.
//! Why     such a page is anonymous memory to the kernel, whose `migrate_vma` moves it; userfaultfd asks what the mapping
//!         is, and watches none of a file. So the mapping has to go, and nobody may notice.
//! How     the pages are *held* ([`HeldPages`]): their frames outlive the mapping. Their words are claimed
//!         ([`Mm::begin_replacement`](uhmm_core::mm::Mm::begin_replacement)). One call puts an empty mapping in the place
//!         of the file's; a load or a store, of a thread or of the kernel for it, finds the one or the other, and waits
//!         where it finds the empty one. What the frames hold then, every store included, is put in place.
//! Owns    nothing beyond the call. The new mappings are the program's, as the old ones were.
//! Locks   [`Managed`]'s `changing`, for writing, around the look at the mappings and all that follows from it: no call of
//!         the program's that comes by way of [`Space::remapping`] or [`Space::protecting`] lies in between. Inside it,
//!         `replacing`, around the frames; a handler takes that under the layout lock, when the program forks.
//! Races   *a thread stores meanwhile*: before the one call, to the frame that is held; after it, it waits. *The program
//!         forks*: before, the child has the file's mapping; after, its handler fills it from the frames. *It unmaps or
//!         discards pages after the call*: they are not filled. *The file becomes shorter*: before, its pages are absent
//!         and stay; after, they are the program's like any memory.
//! Fails   with a [`DetachError`] before anything is changed; afterwards part by part, with a count of what stays and why.
//!         Contents that the kernel does not give back would be poisoned, never zeros.

use std::io;

use uhmm_addr::{PageCount, VaRange, Vpn};
use uhmm_core::host::{Host, Sort, Unusual};
use uhmm_sys::held::HeldPages;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::signals::Blocked;
use uhmm_sys::smaps::{self, Plain};
use uhmm_sys::uffd::Mode;

use super::{MappingKind, ProgramMapping, Space};
use crate::managed::Managed;

/// Pages that are held at a time: they count as locked memory, of which an ordinary user may have little.
const BATCH: PageCount = PageCount::new(128);

/// What became of the pages of private mappings of files. Each is counted once.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Detached {
    /// Anonymous memory from now on, and watched.
    pub pages: PageCount,
    /// The file's own, or absent: nobody has written to them.
    pub clean: PageCount,
    /// In a mapping that is more than memory of a file (locked, not inherited, advised about; not readable), which an
    /// anonymous mapping in its place would not be.
    pub special: PageCount,
    /// They could not be held or replaced now: no io_uring, or one before Linux 6.5; too much locked memory; too many
    /// mappings; pinned.
    pub busy: PageCount,
}

/// Why nothing was detached.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// A mapping that takes another one's place is an event, which the signal engine does not hear.
    #[error("private mappings of files need the engine `Threads`")]
    Deaf,
    /// The list of mappings could not be read.
    #[error("the mappings of this process cannot be listed")]
    Unlisted(#[from] io::Error),
}

/// Frames whose mapping is being replaced, for whoever serves the child of a fork.
pub(crate) type Replacing = Option<HeldPages>;

impl Space {
    /// Gives those pages of private mappings of files in `range` that were written an anonymous mapping, and watches it,
    /// as [`Space::watch`]. All else of the range stays as it is. No store is lost, by whomever, and no access fails.
    ///
    /// Afterwards these pages are memory like any other: `/proc/self/maps` shows no file, and making the file shorter
    /// does not take them away. Discarded, they read as zeros, no longer as the file.
    ///
    /// # Errors
    /// [`DetachError::Deaf`] with the signal engine; [`DetachError::Unlisted`].
    ///
    /// # Safety
    /// As [`Space::watch`]. While this runs, the mappings of `range` may be changed, and its pages discarded, by way of
    /// [`Space::remapping`] and [`Space::protecting`] only, and nothing may be transferred into its pages that does not go
    /// by their addresses: by direct I/O, by registered buffers, by `process_vm_writev` or a debugger. The kernel tells
    /// nobody of such transfers, and they would go to frames that nobody looks at any more.
    pub unsafe fn detach(&self, range: VaRange) -> Result<Detached, DetachError> {
        let managed = &*self.inner.managed;
        if !managed.hears_events() {
            return Err(DetachError::Deaf);
        }
        // A signal handler that touched a page would wait for this very thread.
        let _blocked = Blocked::all();
        let _alone = managed.keep_mappings();
        let mut done = Detached::default();
        for mapping in self.mappings(range)? {
            if mapping.kind == MappingKind::PrivateFile {
                // SAFETY: the caller's promise; the mappings stay as they are until `_alone` is dropped.
                unsafe { detach_mapping(managed, &mapping, &mut done) }?;
            }
        }
        Ok(done)
    }

    /// Has `change` map something over memory, unmap, move or discard it: for whoever sees the program's own calls of
    /// `munmap`, `mremap`, `madvise`, and `mmap` at given addresses. It waits while [`Space::detach`] runs, and the other
    /// way round.
    pub fn remapping<R>(&self, change: impl FnOnce() -> R) -> R {
        // First: a signal handler that changes mappings would wait for this very thread.
        let _blocked = Blocked::all();
        let _kept = self.inner.managed.change_mappings();
        change()
    }
}

/// Stretches of written pages that are told at a time, and what lies between them.
const WRITTEN: usize = 64;

/// The pages of `range` that are there and not the file's own, which the process has written, into `found`. Returns how
/// many stretches there are, and the page up to which was looked.
fn written(managed: &Managed, range: VaRange, found: &mut [VaRange; WRITTEN]) -> (usize, Vpn) {
    let mut unusual = [Unusual::absent(range); WRITTEN / 2 - 1];
    let (count, end) = managed.mm().host().unusual(range, Sort::File, &mut unusual);
    let (mut filled, mut from) = (0, range.first());
    let mut add = |first: Vpn, end: Vpn| {
        if let Some(stretch) = VaRange::of_pages(first, end.since(first)) {
            found[filled] = stretch;
            filled += 1;
        }
    };
    for other in &unusual[..count] {
        add(from, other.range.first());
        if other.present && !other.file && !other.zero {
            add(other.range.first(), other.range.end_page());
        }
        from = other.range.end_page();
    }
    add(from, end);
    (filled, end)
}

/// # Safety
/// As [`Space::detach`].
unsafe fn detach_mapping(managed: &Managed, mapping: &ProgramMapping, done: &mut Detached) -> io::Result<()> {
    let plain = if mapping.read { smaps::plain(mapping.range)? } else { None };
    let mut clean = mapping.range.pages();
    let mut found = [mapping.range; WRITTEN];
    let mut rest = Some(mapping.range);
    while let Some(part) = rest {
        let (count, end) = written(managed, part, &mut found);
        for run in &found[..count] {
            let run = *run;
            clean = clean.minus(run.pages());
            let Some(plain) = plain else {
                done.special = done.special.plus(run.pages());
                continue;
            };
            let (mut left, mut most) = (Some(run), BATCH);
            while let Some(run) = left {
                let batch = run.take(most);
                // SAFETY: the caller's promise.
                match unsafe { replace(managed, batch, mapping.write, plain) } {
                    Ok(()) => {
                        // SAFETY: as above. What cannot be watched was unmapped meanwhile.
                        let _ = unsafe { managed.watch(batch) };
                        done.pages = done.pages.plus(batch.pages());
                    }
                    // One page of them, perhaps, or they are too many.
                    Err(Busy::Now) if batch.pages() > PageCount::ONE => {
                        most = PageCount::new(batch.pages().get() / 2);
                        continue;
                    }
                    Err(Busy::Now | Busy::Always) => done.busy = done.busy.plus(batch.pages()),
                }
                left = run.skip(batch.pages());
                most = PageCount::new(most.get() * 2).at_most(BATCH);
            }
        }
        rest = VaRange::of_pages(end, part.end_page().since(end));
    }
    done.clean = done.clean.plus(clean);
    Ok(())
}

/// Nothing was changed.
enum Busy {
    /// Some of the pages cannot be had now.
    Now,
    /// None can: the kernel does not let pages be held.
    Always,
}

/// # Safety
/// As [`Space::detach`]; the pages are there, and the process's own.
unsafe fn replace(managed: &Managed, range: VaRange, write: bool, plain: Plain) -> Result<(), Busy> {
    let mm = managed.mm();
    let mut empty = Mapping::replacement(range.bytes(), write, plain.accounted).map_err(|_| Busy::Now)?;
    // SAFETY: nobody touches it where it is; where it goes, the caller gives it into our power.
    unsafe { mm.host().program().register(empty.range(), Mode::MISSING_AND_WP) }.map_err(|_| Busy::Now)?;
    // A system that is told to lock what is mapped (`mlockall`) puts pages there, which nobody would wait for.
    if mm.host().present(empty.range(), &mut [range]).0 > 0 {
        return Err(Busy::Always);
    }
    // What may not be written is not written, as long as its protection stays.
    let held = if write { HeldPages::hold(range) } else { HeldPages::copied(range) };
    let held = held.map_err(|error| match error.kind() {
        io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied => Busy::Always,
        _ => Busy::Now,
    })?;
    let mut replacement = mm.begin_replacement(range).ok_or(Busy::Now)?;
    let contents = held.contents();
    // From here on a fork finds what the child may lack.
    *managed.replacing().lock() = Some(held);
    let done = loop {
        // SAFETY: what is in the file's mapping is held, and the file's mapping the caller's to give up. Handlers read
        // the event; no lock of theirs is held here.
        match unsafe { empty.replace(range.start()) } {
            Ok(()) => break Ok(()),
            Err((back, _)) if is_mapped(range) => {
                drop(back);
                break Err(Busy::Now);
            }
            // The kernel has taken the old mapping away and not put the new one there: nothing else will do.
            Err((back, _)) => {
                empty = back;
                std::thread::yield_now();
            }
        }
    };
    if done.is_ok() {
        // Nobody can store to the frames any more: this is the last that they will say.
        let last = managed.replacing().lock().as_mut().map_or(Ok(()), HeldPages::refresh);
        match last {
            Ok(()) => {
                // SAFETY: the buffer is as long as the range, ours, and kept until the lock's value is dropped below.
                while !unsafe { replacement.fill(contents) } {
                    std::thread::yield_now();
                }
                drop(replacement);
            }
            Err(_) => replacement.lose(),
        }
    }
    *managed.replacing().lock() = None;
    done
}

/// Whether all of `range` is mapped.
fn is_mapped(range: VaRange) -> bool {
    let start = std::ptr::with_exposed_provenance_mut(range.start().get());
    // SAFETY: it reads and writes no memory, and looks the mappings up.
    unsafe { rustix::mm::msync(start, range.bytes(), rustix::mm::MsyncFlags::ASYNC) }.is_ok()
}
