//! An address space under management, with all the memory that takes: the parts that the library's
//! [`Space`](crate::Space) and the agent of `uhmm run` have in common.
//!
//! What    [`Plan`] says what is wanted, [`Managed::build`] reserves the memory, opens userfaultfd and puts
//!         core's [`Mm`] together.
//! Owns    every mapping: the page table (flat over all user addresses, backed where it is used), the arenas.
//!         All of it is uhmm's own memory: never registered for faults of the program, never moved.
//! Locks   `ranges`, taken by threads that change or walk the managed ranges, never by a fault handler. `changing`,
//!         outside everything: the program's own calls read, whoever replaces mappings writes. `replacing`, inside the
//!         layout lock, around the frames of mappings that are being replaced.
//! Fails   [`BuildError`]: no userfaultfd for this user, or no address space.

mod build;
mod home;
mod pressure;
mod ranges;
mod threads;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use uhmm_addr::PageCount;
use uhmm_core::fault::Scratch;
use uhmm_core::mm::Mm;
use uhmm_core::pagetable::PageTable;
use uhmm_core::sync::{Gate, ReadGuard, WriteGuard};
use uhmm_sys::futex::Lock;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::uffd::Features;

use ranges::{PUBLISHED, Ranges};
use threads::OURS;

use crate::space::Replacing;

pub use build::{BuildError, Plan, Reports};
pub use threads::Lent;

/// User addresses have 47 bits; so many pages.
pub const USER_PAGES: PageCount = PageCount::new(1 << 35);
/// Bytes of a page table that covers them all, and of the bits for its used chunks behind it. Reserved, not
/// used.
pub const TABLE_BYTES: usize = TABLE_WORDS * size_of::<u64>();
const TABLE_WORDS: usize = USER_PAGES.get() + PageTable::used_words(USER_PAGES);

/// An address space under management.
#[derive(Debug)]
pub struct Managed {
    mm: Mm<LinuxHost>,
    ranges: Lock<Ranges>,
    /// Bumped when there is room again for faults that found none.
    room: AtomicU32,
    /// Bumped when the evictor should look.
    kick: AtomicU32,
    ours: [AtomicU32; OURS],
    /// The managed ranges once more, as first page and length, for the signal handler.
    published: Box<[[AtomicUsize; 2]; PUBLISHED]>,
    /// The evictor is asked to look when fewer pages than this may be taken.
    low: AtomicUsize,
    /// The processor of a handler that must not be held up, plus one; 0 if there is none.
    busy: AtomicU32,
    changing: Gate,
    /// The thread that keeps mappings as they are.
    keeper: AtomicU32,
    replacing: Lock<Replacing>,
    // The tables lie in these; dropped after `mm`.
    memory: Vec<Mapping>,
}

/// The number of the calling thread.
fn this_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

/// The program's mappings stay as they are; see [`Managed::keep_mappings`].
#[derive(Debug)]
#[must_use = "mappings may change again when this is dropped"]
pub struct Kept<'a> {
    keeper: &'a AtomicU32,
    _alone: WriteGuard<'a, LinuxHost>,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.keeper.store(0, Ordering::Relaxed);
    }
}

impl Managed {
    /// The mechanisms.
    pub const fn mm(&self) -> &Mm<LinuxHost> {
        &self.mm
    }

    /// Keeps the program's mappings as they are, as far as it changes them by way of [`Managed::change_mappings`]. Not to
    /// be called by a thread that does already.
    pub fn keep_mappings(&self) -> Kept<'_> {
        let alone = self.changing.write(self.mm.host());
        self.keeper.store(this_thread(), Ordering::Relaxed);
        Kept { keeper: &self.keeper, _alone: alone }
    }

    /// The calling thread is about to change mappings, until the guard is dropped. `None` for the thread that keeps them,
    /// whose own memory may come and go.
    pub fn change_mappings(&self) -> Option<ReadGuard<'_, LinuxHost>> {
        (self.keeper.load(Ordering::Relaxed) != this_thread()).then(|| self.changing.read(self.mm.host()))
    }

    /// The frames of mappings that are being replaced.
    pub(crate) const fn replacing(&self) -> &Lock<Replacing> {
        &self.replacing
    }

    /// Whether events tell what the program does to its mappings.
    pub fn hears_events(&self) -> bool {
        self.mm.host().program().features().contains(Features::EVENT_REMOVE)
    }

    /// Working memory for one more fault handler. The mapping belongs to it.
    pub fn scratch() -> io::Result<(Scratch, Mapping)> {
        let buffer = Mapping::reserve(Scratch::BUFFER_BYTES, "uhmm-scratch")?;
        // Not present yet: who meets single pages only uses a hundredth of it.
        buffer.advise_no_huge()?;
        // SAFETY: a fresh mapping of that size, all zero, used for nothing else; whoever gets the pair keeps
        // them together.
        Ok((unsafe { Scratch::new(buffer.as_ptr()) }, buffer))
    }

    /// Lets go of it in the child of a fork, where its descriptors are not: the numbers may name files of the
    /// program. The memory is unmapped.
    ///
    /// # Safety
    /// The process must be a fresh child, in which no thread of the parent runs that uses this space.
    pub unsafe fn abandon(self: Arc<Self>) {
        for mapping in &self.memory {
            // SAFETY: no thread uses the space (the caller's promise), and it is never dropped (below).
            unsafe { mapping.unmap_in_child() };
        }
        std::mem::forget(self);
    }
}
