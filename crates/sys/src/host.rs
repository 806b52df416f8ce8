//! [`Host`] on Linux: userfaultfd, madvise and futexes.
//!
//! What     [`LinuxHost`] carries out each call of core's port with one system call.
//! Why      the program's memory and the arena are registered with the *same* descriptor. The kernel then
//!          refuses to move a frame in either direction while a change of the program's mappings is under
//!          way or its event unread, in one atomic check. With a descriptor of its own for the arena, a
//!          page could be moved out of a mapping that was replaced a moment ago, and be thrown away when the
//!          old mapping's event is read.
//!          A descriptor that reports events would also report every release of an arena slot, and refuse
//!          everything until that is read; therefore frames are released by way of a [`Chute`]: moved, for
//!          a tenth of a microsecond, to addresses of another descriptor, and discarded there.
//! Owns     the descriptors, a page map to scan and a list of mappings to ask. No page state: it says how far a
//!          call got, and never tries again.
//! Locks    none of its own but the chute's. Faulting threads call in here: nothing allocates, logs or
//!          waits, but [`Park::park`] (at most a millisecond) and [`Host::discard`] (until the program's
//!          events are read).
//! Fails    as [`Progress`] says; what a [`Stop`] means is written there and in `uffd::resolve`.

use core::ptr::NonNull;
use std::io;

use rustix::io::Errno;
use rustix::mm::Advice;
use rustix::thread::futex;
use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::host::{Host, Install, Progress, Rights, Sort, Stop, Unusual};
use uhmm_core::sync::{AtomicU32, Park};

use crate::futex::Lock;
use crate::mapping::Mapping;
use crate::relay::Relay;
use crate::rights::MappingRights;
use crate::scan::{Categories, PagemapScan, Query, Region, Scanned};
use crate::uffd::{Features, Mode, Uffd};

#[cfg(test)]
mod tests;

/// How a [`LinuxHost`] behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HostOptions {
    /// Behave as a kernel that cannot move frames, to use and test the copying way.
    pub forced_fallback: bool,
    /// Read page map entries even where `PAGEMAP_SCAN` exists.
    pub forced_pagemap: bool,
}

/// The running kernel, for one program and one arena.
#[derive(Debug)]
pub struct LinuxHost {
    program: Uffd,
    chute: Option<Chute>,
    forced_fallback: bool,
    scanner: PagemapScan,
    rights: MappingRights,
    relay: Relay,
}

/// Addresses through which frames leave without an event.
#[derive(Debug)]
pub struct Chute {
    uffd: Uffd,
    addresses: Mapping,
    one_at_a_time: Lock<()>,
}

/// Pages that a chute takes at a time.
const CHUTE: PageCount = PageCount::new(512);

impl Chute {
    /// A chute. Needs a userfaultfd of its own.
    pub fn new() -> io::Result<Self> {
        let wanted = Features::SIGBUS.union(Features::MOVE);
        let uffd = Uffd::open(wanted).map_err(io::Error::other)?;
        let addresses = Mapping::reserve(CHUTE.bytes(), "uhmm-chute")?;
        addresses.advise_no_huge()?;
        addresses.dont_fork()?;
        // SAFETY: the mapping is ours and never touched, so that no fault on it waits for anybody.
        unsafe { uffd.register(addresses.range(), Mode::MISSING) }.map_err(io::Error::other)?;
        Ok(Self { uffd, addresses, one_at_a_time: Lock::new(()) })
    }

    /// Lets go of the frames of `runs`. `false` if some frame could not be moved.
    ///
    /// Frames are moved run by run and discarded together: each call has other processors forget addresses.
    ///
    /// # Safety
    /// The slots must be the caller's own.
    unsafe fn drop_frames(&self, runs: &[VaRange]) -> bool {
        let _alone = self.one_at_a_time.lock();
        let mut filled = PageCount::ZERO;
        for run in runs {
            let mut rest = Some(*run);
            while let Some(part) = rest {
                let pages = part.pages().at_most(CHUTE);
                if filled.plus(pages) > CHUTE && !self.empty(&mut filled) {
                    return false;
                }
                let to = self.addresses.range().first().forward(filled).base();
                // SAFETY: the source is the caller's own, the destination ours and empty.
                let progress = unsafe { self.uffd.move_pages(to, part.start(), pages, false) };
                filled = filled.plus(progress.done);
                if progress.done.is_zero() {
                    self.empty(&mut filled);
                    return false;
                }
                rest = part.skip(progress.done);
            }
        }
        self.empty(&mut filled)
    }

    /// Discards the first `filled` pages. `false` if that was refused.
    fn empty(&self, filled: &mut PageCount) -> bool {
        let pages = core::mem::replace(filled, PageCount::ZERO);
        // SAFETY: what was moved here is wanted by nobody.
        pages.is_zero() || unsafe { dont_need(self.addresses.range().take(pages)) }.is_ok()
    }
}

/// Longest sleep, so that no thread depends for ever on somebody else's wake-up.
const NAP: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

impl LinuxHost {
    /// A host on the descriptor that watches both the program's memory and the arena. `chute` is needed if
    /// that descriptor reports removals. Fails where the page map of this process cannot be opened.
    pub fn new(program: Uffd, chute: Option<Chute>, options: HostOptions) -> io::Result<Self> {
        debug_assert!(chute.is_some() || !program.features().contains(Features::EVENT_REMOVE));
        let scanner =
            if options.forced_pagemap { PagemapScan::open_fallback() } else { PagemapScan::open() }?;
        Ok(Self {
            program,
            chute,
            forced_fallback: options.forced_fallback,
            scanner,
            rights: MappingRights::open()?,
            relay: Relay::new(),
        })
    }

    /// The descriptor that watches the program's memory and the arena.
    pub const fn program(&self) -> &Uffd {
        &self.program
    }

    /// Tells what is mapped, and how.
    pub const fn rights(&self) -> &MappingRights {
        &self.rights
    }

    /// Tells what is present.
    pub const fn scanner(&self) -> &PagemapScan {
        &self.scanner
    }

    /// Where wake-ups are left to a thread on the faulter's processor.
    pub const fn relay(&self) -> &Relay {
        &self.relay
    }

    /// Wakes again for what the relay's listener took and may not have got round to; to be called before
    /// sleeping, and when nothing happens.
    pub fn settle(&self) {
        self.relay.settle(|range| self.program.wake(range));
    }

    /// Wakes whoever waits for the pages of `range` that were installed without that.
    fn wake_installed(&self, range: VaRange) {
        if !self.relay.offer(range) {
            self.program.wake(range);
        }
    }

    /// Gives the process frames of its own for pages of `range` that it shares with a child or a parent after
    /// fork, as a store to each would, so that they can be moved. Pages that are absent come home. To be
    /// called with no lock held: it waits for fault handlers.
    pub fn unshare(&self, range: VaRange) {
        let _ = self.touch(range, true);
    }
}

impl LinuxHost {
    /// What a move that stopped early did, by a look at both sides. Linux 6.18 miscounts: when a page cannot be
    /// moved at once (it was being written, or its lock was taken) it begins again, forgets that it has to go on
    /// after that, and meets the page that it has just moved: not counted, and reported as `EEXIST`.
    ///
    /// Both sides are the caller's meanwhile, by a claim or as slots of its own.
    fn recount(&self, told: Progress, source: VirtAddr, to: VirtAddr, pages: PageCount) -> Progress {
        let hidden = match told.stop {
            Stop::Present => true,
            // Whatever stopped a move part of the way.
            Stop::Pending => !told.done.is_zero(),
            _ => false,
        };
        if !hidden {
            return told;
        }
        let mut done = told.done;
        while done < pages
            && self.is_occupied(source.page().forward(done)) == Some(false)
            && self.is_occupied(to.page().forward(done)) == Some(true)
        {
            done = done.plus(PageCount::ONE);
        }
        match done {
            done if done == told.done => told,
            done if done == pages => Progress::complete(pages),
            done => Progress::stopped(done, Stop::Pending),
        }
    }

    /// The pages of `range` that match `query`, as [`Host::present`] gives them; `None` where the page map cannot
    /// be read.
    fn list(&self, range: VaRange, query: Query, found: &mut [VaRange]) -> Option<(usize, Vpn)> {
        let mut regions = [Region::UNUSED; 32];
        let most = found.len().min(regions.len());
        let scanned = self.scanner.scan(range, query, &mut regions[..most]).ok()?;
        for (place, region) in found.iter_mut().zip(&regions[..scanned.regions]) {
            *place = region.range;
        }
        Some((scanned.regions, scanned.walk_end.page().max(range.first().forward(PageCount::ONE))))
    }

    /// [`Host::unusual`] by asking for that. `None` where that cannot be told: some of it is not mapped, perhaps.
    fn scan_unusual(&self, range: VaRange, found: &mut [Unusual]) -> Option<(usize, Vpn)> {
        let unusual =
            Query { any: SPECIAL, lacking: PLAIN, report: PLAIN.union(SPECIAL), ..Query::default() };
        let mut regions = [Region::UNUSED; 32];
        let most = found.len().min(regions.len());
        let scanned = self.scanner.scan(range, unusual, &mut regions[..most]).ok()?;
        for (place, region) in found.iter_mut().zip(&regions[..scanned.regions]) {
            *place = as_unusual(region);
        }
        self.rights.is_mapped(range).then(|| (scanned.regions, scanned.walk_end.page()))
    }

    /// [`Host::unusual`] by asking for what is present: of anything that may be mapped or not. `more` is asked about
    /// besides.
    fn scan_present(&self, range: VaRange, more: Categories, found: &mut [Unusual]) -> Option<(usize, Vpn)> {
        let report = PLAIN.union(SPECIAL).union(more);
        let present = Query { required: Categories::PRESENT, report, ..Query::default() };
        let mut regions = [Region::UNUSED; 32];
        // Each may have something absent before it; something absent may be the last.
        let most = ((found.len() - 1) / 2).min(regions.len()).max(1);
        let scanned = self.scanner.scan(range, present, &mut regions[..most]).ok()?;
        let end = scanned.walk_end.page().max(range.first().forward(PageCount::ONE));
        let (mut filled, mut from) = (0, range.first());
        for region in &regions[..scanned.regions] {
            let gap = VaRange::of_pages(from, region.range.first().since(from)).map(Unusual::absent);
            let page = Some(as_unusual(region)).filter(|_| region.categories != PLAIN);
            for unusual in gap.into_iter().chain(page) {
                found[filled] = unusual;
                filled += 1;
            }
            from = region.range.end_page();
        }
        if let Some(gap) = VaRange::of_pages(from, end.since(from)) {
            // With room for two there may be none left: then it is looked at again.
            let Some(place) = found.get_mut(filled) else { return Some((filled, from)) };
            *place = Unusual::absent(gap);
            filled += 1;
        }
        Some((filled, end))
    }

    /// Whether there is a page, of whatever kind; `None` where the page map cannot be read.
    fn is_occupied(&self, page: Vpn) -> Option<bool> {
        let any = Query { any: Categories::PRESENT.union(Categories::SWAPPED), ..Query::default() };
        let mut found = [Region::UNUSED; 1];
        self.scanner.scan(VaRange::page(page), any, &mut found).ok().map(|scanned| scanned.regions > 0)
    }
}

/// What a page is as a rule.
const PLAIN: Categories = Categories::PRESENT.union(Categories::WRITTEN);
/// What it may be besides.
const SPECIAL: Categories = Categories::ZERO.union(Categories::HUGE);

fn as_unusual(region: &Region) -> Unusual {
    let is = |what| region.categories.contains(what);
    let present = is(Categories::PRESENT);
    Unusual {
        range: region.range,
        present,
        write: present && is(Categories::WRITTEN) && !is(Categories::ZERO),
        huge: is(Categories::HUGE),
        zero: is(Categories::ZERO),
        file: is(Categories::FILE),
    }
}

fn refused() -> Progress {
    Progress::stopped(PageCount::ZERO, Stop::Refused)
}

/// Takes the pages of `range` away.
///
/// # Safety
/// Nobody may need the contents.
unsafe fn dont_need(range: VaRange) -> Result<(), Errno> {
    let start = core::ptr::with_exposed_provenance_mut(range.start().get());
    // SAFETY: the caller says that the contents may go; the mapping stays, so that no pointer dangles.
    unsafe { rustix::mm::madvise(start, range.bytes(), Advice::LinuxDontNeed) }
}

impl Host for LinuxHost {
    fn can_move(&self) -> bool {
        !self.forced_fallback && self.program.features().contains(Features::MOVE)
    }

    unsafe fn isolate(&self, range: VaRange, slot: VirtAddr) -> Progress {
        if !self.can_move() {
            return refused();
        }
        // SAFETY: the caller has claimed the pages and knows where they go.
        let told = unsafe { self.program.move_pages(slot, range.start(), range.pages(), false) };
        self.recount(told, range.start(), slot, range.pages())
    }

    unsafe fn install(&self, slot: VirtAddr, range: VaRange) -> Progress {
        if !self.can_move() {
            return refused();
        }
        // SAFETY: the slots are the caller's own, and it knows that they are empty afterwards.
        let told = unsafe { self.program.move_pages(range.start(), slot, range.pages(), true) };
        let progress = self.recount(told, slot, range.start(), range.pages());
        if progress.done > told.done {
            // The kernel wakes for what it counts only.
            self.program.wake(range.take(progress.done));
        }
        progress
    }

    unsafe fn install_copy(&self, source: NonNull<u8>, range: VaRange, how: Install) -> Progress {
        let relayed = self.relay.is_listening();
        // SAFETY: the caller says that `source` is readable for that length and not managed, so that
        // reading it raises no fault that we would have to resolve.
        let progress = unsafe { self.program.copy(range, source, how, !relayed) };
        if relayed && !progress.done.is_zero() {
            self.wake_installed(range.take(progress.done));
        }
        if !relayed {
            self.settle();
        }
        progress
    }

    unsafe fn copy_out(&self, range: VaRange, slot: VirtAddr) -> Progress {
        let slots = VaRange::of_pages(slot.page(), range.pages());
        let source = NonNull::new(core::ptr::with_exposed_provenance_mut(range.start().get()));
        let (Some(slots), Some(source)) = (slots, source) else {
            return refused();
        };
        // SAFETY: the slots are the caller's own and empty. `range` is the program's memory, mapped as long
        // as it is managed; were it not, the kernel would say EFAULT instead of reading. Its pages are
        // present, as the caller says, so that reading them waits for nobody.
        unsafe { self.program.copy(slots, source, Install::Writable, false) }
    }

    fn install_zero(&self, range: VaRange) -> Progress {
        self.program.zero(range, true)
    }

    fn write_protect(&self, range: VaRange, protect: bool) -> Progress {
        self.program.write_protect(range, protect, true)
    }

    /// Waits until the program's events are read, if those of removal are enabled: the caller must not be
    /// the one who reads them, and must hold no lock that reader takes.
    unsafe fn discard(&self, range: VaRange) -> Progress {
        // SAFETY: the caller has copied the contents and shut writers out.
        match unsafe { dont_need(range) } {
            Ok(()) => Progress::complete(range.pages()),
            Err(errno) => Progress::stopped(
                PageCount::ZERO,
                match errno {
                    Errno::INVAL => Stop::Refused,
                    Errno::NOMEM => Stop::Unmapped,
                    Errno::AGAIN => Stop::Pending,
                    other => Stop::Errno(other.raw_os_error()),
                },
            ),
        }
    }

    /// False where `PAGEMAP_SCAN` is missing: page map entries do not tell.
    fn is_huge(&self, range: VaRange) -> bool {
        let huge = Query { required: Categories::HUGE, report: Categories::HUGE, ..Query::default() };
        let mut found = [Region::UNUSED; 1];
        matches!(self.scanner.scan(range, huge, &mut found), Ok(Scanned { regions: 1, .. }))
            && found[0].range == range
    }

    /// Where the page map cannot be read, everything counts as present.
    fn present(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn) {
        self.list(range, Query::PRESENT, found).unwrap_or_else(|| {
            if let Some(first) = found.first_mut() {
                *first = range;
            }
            (1, range.end_page())
        })
    }

    /// Where the page map cannot be read, nothing counts as a hole.
    fn holes(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn) {
        let any = Categories::PRESENT.union(Categories::SWAPPED);
        let nothing = Query { excluded: any, ..Query::default() };
        self.list(range, nothing, found).unwrap_or((0, range.end_page()))
    }

    /// Where the mappings cannot be asked about, none is known.
    fn mappings(&self, range: VaRange, found: &mut [Rights]) -> (usize, Vpn) {
        let Ok((count, end)) = self.rights.list(range, found) else { return (0, range.end_page()) };
        (count, end.max(range.first().forward(PageCount::ONE)))
    }

    /// Where the page map cannot be read, nothing is known to be there. Without `PAGEMAP_SCAN` the page of zeros looks
    /// like any other, and nothing is huge.
    ///
    /// The kernel spends more on telling of a page than on looking at it. Of memory that is known to be mapped it is
    /// therefore asked what is unusual; it passes over what is not mapped at all.
    fn unusual(&self, range: VaRange, sort: Sort, found: &mut [Unusual]) -> (usize, Vpn) {
        let looked = match sort {
            Sort::Managed => self.scan_unusual(range, found),
            Sort::Anonymous => None,
            Sort::File => self.scan_present(range, Categories::FILE, found),
        };
        looked.or_else(|| self.scan_present(range, Categories::NONE, found)).unwrap_or_else(|| {
            found[0] = Unusual::absent(range);
            (1, range.end_page())
        })
    }

    fn touch(&self, range: VaRange, write: bool) -> Progress {
        let start = core::ptr::with_exposed_provenance_mut(range.start().get());
        let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        // SAFETY: contents do not change; where nothing is mapped, or not for this access, the call fails.
        match unsafe { rustix::mm::madvise(start, range.bytes(), advice) } {
            Ok(()) => Progress::complete(range.pages()),
            Err(Errno::NOMEM) => Progress::stopped(PageCount::ZERO, Stop::Unmapped),
            Err(Errno::INVAL) => Progress::stopped(PageCount::ZERO, Stop::Refused),
            Err(errno) => Progress::stopped(PageCount::ZERO, Stop::Errno(errno.raw_os_error())),
        }
    }

    fn hears(&self) -> bool {
        self.program.features().contains(Features::EVENT_REMOVE)
    }

    /// Every request of userfaultfd is refused while a change is under way, before the kernel looks at what is asked:
    /// here, about a page that nobody can map.
    fn is_changing(&self) -> bool {
        self.program.zero(VaRange::page(Vpn::new(0)), false).stop == Stop::Pending
    }

    unsafe fn release(&self, runs: &[VaRange]) {
        let released = match &self.chute {
            // SAFETY: as above.
            Some(chute) if chute.uffd.features().contains(Features::MOVE) => unsafe {
                chute.drop_frames(runs)
            },
            _ => false,
        };
        if released {
            return;
        }
        for run in runs {
            // SAFETY: as above. With events enabled this waits until the event is read, which is why the
            // chute comes first.
            let result = unsafe { dont_need(*run) };
            debug_assert!(result.is_ok(), "arena slots are mapped, anonymous and not locked");
        }
    }

    fn wake(&self, range: VaRange) {
        self.program.wake(range);
    }

    fn poison(&self, range: VaRange) -> Progress {
        self.program.poison(range)
    }
}

impl Park for LinuxHost {
    fn park(&self, word: &AtomicU32, expected: u32) {
        // Every outcome (woken, word changed, time passed, signal) means "look again".
        let _ = futex::wait(word, futex::Flags::PRIVATE, expected, Some(&NAP));
    }

    fn unpark(&self, word: &AtomicU32) {
        // Cannot fail for a word that exists; were it missed, the sleepers look again after a nap.
        let _ = futex::wake(word, futex::Flags::PRIVATE, i32::MAX as u32);
    }
}
