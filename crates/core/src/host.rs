//! The port to the operating system: what it does to the program's page table for us.
//!
//! What     [`Host`], implemented by `uhmm-sys` on userfaultfd and by the simulated host of the tests.
//! Why      the protocol of migration and fault resolution can then be model-checked and failed at every
//!          step with no kernel in reach.
//! Owns     nothing. A host keeps no page state and never retries on its own: it says how far a call got
//!          and why it stopped, and the mechanisms decide.
//! Locks    called with the layout lock held for reading where the module says so, otherwise with none.
//! Fails    every call reports a [`Progress`]; `Stop` names the next step of the caller.

use core::ptr::NonNull;

use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};

use crate::sync::Park;

/// Why a call on a range of pages ended where it did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// At the end of the range.
    Complete,
    /// An event (munmap, mremap, fork, madvise) waits to be read: let go of every lock, let the events be
    /// read, look everything up again. The call may have stopped for another reason as well, which the
    /// next call at this page tells.
    Pending,
    /// The next page is pinned for DMA or shared by fork. Back off; another way may copy it.
    Busy,
    /// The next page of the destination is there already. Somebody resolved it first.
    Present,
    /// The next page of the source is not there: a hole.
    Hole,
    /// The mapping does not allow it (read-only, locked, not anonymous, of another protection). Another
    /// way may work; this one never will.
    Refused,
    /// No mapping at the next page, or none that is registered, and no event about that waits to be read.
    Unmapped,
    /// No memory for the page.
    NoMemory,
    /// The process is exiting.
    Exiting,
    /// An error number that no rule covers.
    Errno(i32),
}

/// How far a call on a range of pages got. Counts are pages and never negative: the kernel reports an
/// error in the field that otherwise counts bytes, and that is decoded once, in the adapter.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Pages done, from the front.
    pub done: PageCount,
    /// Why not more.
    pub stop: Stop,
}

impl Progress {
    /// The whole range.
    pub const fn complete(pages: PageCount) -> Self {
        Self { done: pages, stop: Stop::Complete }
    }

    /// `done` pages, then `stop`.
    pub const fn stopped(done: PageCount, stop: Stop) -> Self {
        Self { done, stop }
    }

    /// Whether the whole range was done.
    pub const fn is_complete(self) -> bool {
        matches!(self.stop, Stop::Complete)
    }
}

/// How a page is installed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Install {
    /// Writable as far as the mapping is.
    Writable,
    /// Write-protected: the first write raises a fault of kind [`crate::fault::Access::WriteProtected`].
    Tracked,
}

/// A mapping, or the part of it that was asked about, and what the program may do there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    /// The pages.
    pub range: VaRange,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// What is written is everybody's: not a private mapping.
    pub shared: bool,
    /// There is a file behind it, or shared memory: some of its pages may be that one's own.
    pub file: bool,
}

/// What kind of memory is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sort {
    /// Under management: that it is not mapped any more is heard, or kept off by the layout lock.
    Managed,
    /// Anonymous, and nobody's that we know of.
    Anonymous,
    /// There is a file behind it, or shared memory.
    File,
}

/// Neighbouring pages that are alike, and not what pages are as a rule: in RAM, one by one, the process's own, with
/// nothing in a store's way but, perhaps, the mapping's [`Rights`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unusual {
    /// The pages.
    pub range: VaRange,
    /// A load finds them without a fault, if only as zeros.
    pub present: bool,
    /// A store finds nothing in its way but, perhaps, the mapping's [`Rights`]: the pages are not
    /// write-protected, and not the page of zeros that everybody shares.
    pub write: bool,
    /// Part of a huge page's mapping.
    pub huge: bool,
    /// The page of zeros that everybody shares.
    pub zero: bool,
    /// A file's own page, or shared memory's: in a private mapping, the first store replaces it. Told of [`Sort::File`].
    pub file: bool,
}

impl Unusual {
    /// Pages that are not there.
    pub const fn absent(range: VaRange) -> Self {
        Self { range, present: false, write: false, huge: false, zero: false, file: false }
    }
}

/// What the operating system does for us. `range` is always the program's memory, `slot` the arena's.
///
/// None of these can lose contents by itself, with two exceptions that take their source away and are
/// therefore `unsafe` to call: [`Host::isolate`] and [`Host::discard`].
pub trait Host: Park {
    /// Whether frames can change places at all; where not, `isolate` and `install` always refuse.
    fn can_move(&self) -> bool {
        true
    }

    /// Moves the frames of `range` into the empty arena slots at `slot`, each page atomically
    /// (`UFFDIO_MOVE`). A touch of a moved page faults. [`Stop::Refused`] where the kernel cannot move.
    ///
    /// # Safety
    /// The pages vanish from `range`: the caller must have claimed their page words, and must put them
    /// back or record where they went.
    unsafe fn isolate(&self, range: VaRange, slot: VirtAddr) -> Progress;

    /// Moves frames from the arena slots at `slot` to the absent pages of `range`, and wakes whoever waits
    /// for them.
    ///
    /// # Safety
    /// The slots must be the caller's own (a [`crate::frame::Run`]); they are empty afterwards as far as
    /// the progress says.
    unsafe fn install(&self, slot: VirtAddr, range: VaRange) -> Progress;

    /// Fills the absent pages of `range` with a copy of `source` and wakes whoever waits for them
    /// (`UFFDIO_COPY`).
    ///
    /// # Safety
    /// `source` must be readable for the length of `range` and must not be managed memory.
    unsafe fn install_copy(&self, source: NonNull<u8>, range: VaRange, how: Install) -> Progress;

    /// Fills empty arena slots with a copy of the present pages of `range` (the fallback's copy-out).
    /// The caller has write-protected `range` before.
    ///
    /// # Safety
    /// The slots must be the caller's own and empty.
    unsafe fn copy_out(&self, range: VaRange, slot: VirtAddr) -> Progress;

    /// Makes the absent pages of `range` zero and wakes whoever waits.
    fn install_zero(&self, range: VaRange) -> Progress;

    /// Write-protects the present pages of `range`, or lifts that and wakes the writers that wait.
    fn write_protect(&self, range: VaRange, protect: bool) -> Progress;

    /// Takes the pages of `range` away (`MADV_DONTNEED`).
    ///
    /// # Safety
    /// The contents are lost: the caller must have copied them, with writes shut out before the copy.
    unsafe fn discard(&self, range: VaRange) -> Progress;

    /// Whether the 2 MiB of `range` are mapped by one huge page.
    fn is_huge(&self, range: VaRange) -> bool;

    /// The present pages of `range`, in order, into `found`. Returns how many entries were filled and the
    /// page up to which was looked: further than which, or past the end, the caller asks again.
    fn present(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn);

    /// The pages of `range` where there is nothing at all, not even the zero page or a page in swap, as
    /// [`Host::present`] gives the present ones. Those of which that cannot be told are left out.
    fn holes(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn);

    /// The mappings of `range`, cut at its ends, in order, into `found`. Returns how many entries were filled and the
    /// page up to which was looked, as [`Host::present`].
    fn mappings(&self, range: VaRange, found: &mut [Rights]) -> (usize, Vpn);

    /// The pages of `range` that are [`Unusual`], in order, into `found`. Returns how many entries were filled and the
    /// page up to which was looked, as [`Host::present`]: up to there, all others are as pages are as a rule. There is
    /// room for two at least. What is said of managed memory is worth nothing if its mapping changes meanwhile
    /// ([`Host::is_changing`]).
    fn unusual(&self, range: VaRange, sort: Sort, found: &mut [Unusual]) -> (usize, Vpn);

    /// Has pages of `range` there as a load, or a store, to each would (`MADV_POPULATE_READ`, `_WRITE`): from the
    /// system's own swap, or instead of the page of zeros. To be called with no lock held: where pages are absent
    /// it waits for fault handlers.
    fn touch(&self, range: VaRange, write: bool) -> Progress;

    /// Whether the program's own changes of its mappings are told of by events. Where not, what is known of pages is worth
    /// nothing a moment later.
    fn hears(&self) -> bool {
        true
    }

    /// Whether a change of mappings is under way whose event is yet to be read: what was seen of any page may be
    /// over. As long as the layout lock is held, a change that has begun stays under way.
    fn is_changing(&self) -> bool;

    /// Lets the frames of arena slots go back to the system; the slots are empty afterwards. Many runs at a time
    /// cost less than one after the other.
    ///
    /// # Safety
    /// The slots must be the caller's own.
    unsafe fn release(&self, runs: &[VaRange]);

    /// Wakes every thread that waits for a page of `range`.
    fn wake(&self, range: VaRange);

    /// Makes any access to the absent pages of `range` raise SIGBUS, and wakes whoever waits.
    fn poison(&self, range: VaRange) -> Progress;
}
