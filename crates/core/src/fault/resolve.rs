//! Carrying out what the decision table says.
//!
//! Locks: the layout lock for reading around every call that takes a page out or puts one in, together
//! with the change of its word; never across a transfer of the device. A claim on the way *in* spans the
//! transfer; all other claims begin and end under one hold of the lock.

use core::ptr::NonNull;

use uhmm_addr::{CHUNK_PAGES, Geometry, PAGE_SIZE, PageCount, Pfn, PfnRange, VaRange, VirtAddr, Vpn};

use super::decide::{Access, Action, decide};
use super::scratch::{MAX_WINDOW, Scratch};
use super::window::{Direction, Window};
use crate::device::{Transfer, TransferError};
use crate::frame::{Framed, Run};
use crate::host::{Host, Install, Stop};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::stats::Counter;

/// The most pages that one fault on fresh memory fills.
const FILL_WINDOW: usize = 16;
/// The most runs of frames that one window is put together from.
const RUNS: usize = 8;

/// A fault, as an engine hands it in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The address that was touched.
    pub addr: VirtAddr,
    /// How.
    pub access: Access,
    /// Whether a thread of uhmm's own touched it (see [`decide`]).
    pub ours: bool,
}

/// What became of a fault, and what the engine does next.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// Done, and whoever waited was woken; the page came with this many in all.
    Resolved(PageCount),
    /// Another thread moves the page and wakes the faulter when it is done. A faulting thread that
    /// resolves its own fault calls [`Mm::wait_in_flight`] and touches the page again.
    InFlight,
    /// Events wait to be read: read and apply them, then resolve this fault again. It is not lost.
    Pending,
    /// No frame may be taken now: let the evictor free some, then resolve this fault again.
    Starved,
    /// The contents are lost for this reason; the thread gets SIGBUS.
    Poisoned(Option<TransferError>),
    /// The address is not under management: somebody else's fault.
    Unmanaged,
}

/// What one step of the loop found.
enum Step {
    Done(Resolution),
    /// The word changed under us: look again.
    Again,
}

impl<H: Host> Mm<H> {
    /// Resolves `fault`.
    pub fn resolve(&self, fault: Fault, scratch: &mut Scratch) -> Resolution {
        let page = fault.addr.page();
        let Some(entry) = self.table.get(page) else { return Resolution::Unmanaged };
        loop {
            let word = entry.load();
            let step = match decide(fault.access, word, fault.ours) {
                Action::Fill => self.fill(page, word, fault.access, scratch),
                Action::Fetch if word.state() == State::Resident && self.is_present(page) => {
                    // The message of a second thread, which another one's transfer has answered.
                    self.host.wake(VaRange::page(page));
                    Step::Done(Resolution::Resolved(PageCount::ZERO))
                }
                Action::Fetch => {
                    let asked = self.windows.on_fault(page);
                    let tracked = fault.access == Access::Read && self.tracks(page);
                    self.fetch(page, word, asked, tracked, scratch)
                }
                Action::TakeBack => {
                    self.windows.passed(page);
                    self.take_back(page, word, fault.access)
                }
                Action::Lift => self.lift(page, word),
                Action::Wait => match entry.wait() {
                    Ok(()) => Step::Done(Resolution::InFlight),
                    Err(_) => Step::Again,
                },
                Action::Wake => {
                    self.host.wake(VaRange::page(page));
                    Step::Done(Resolution::Resolved(PageCount::ZERO))
                }
                Action::Poison => self.poison(page, None),
            };
            if let Step::Done(resolution) = step {
                if matches!(resolution, Resolution::Resolved(_)) {
                    self.stats.add(Counter::Faults, 1);
                }
                return resolution;
            }
        }
    }

    /// Brings home the pages of `range` that are on a device, window by window, ahead of any fault. Returns
    /// how many came; stops early when frames run out or events are pending.
    pub fn prefetch(&self, range: VaRange, scratch: &mut Scratch) -> PageCount {
        let mut home = PageCount::ZERO;
        let mut rest = Some(range);
        while let Some(part) = rest {
            let page = part.first();
            let word = self.table.entry(page).load();
            let mut step = PageCount::ONE;
            if word.state() == State::Device || word.state() == State::Staged {
                let room = PageCount::new(CHUNK_PAGES - page.in_chunk());
                let most = part.pages().at_most(room).at_most(MAX_WINDOW);
                let asked = Window { pages: most, direction: Direction::Up };
                let done = if word.state() == State::Device {
                    scratch.ahead = true;
                    let done = self.fetch(page, word, asked, self.tracks(page), scratch);
                    scratch.ahead = false;
                    done
                } else {
                    self.take_back(page, word, Access::Read)
                };
                match done {
                    Step::Done(Resolution::Resolved(pages)) => {
                        home = home.plus(pages);
                        step = pages.max(PageCount::ONE);
                    }
                    Step::Done(Resolution::InFlight | Resolution::Poisoned(_)) | Step::Again => {}
                    Step::Done(_) => return home,
                }
            }
            rest = part.skip(step);
        }
        home
    }

    /// Gives a fault up that must not be answered with bytes: the page becomes poisoned.
    fn poison(&self, page: Vpn, why: Option<TransferError>) -> Step {
        let progress = self.host.poison(VaRange::page(page));
        self.host.wake(VaRange::page(page));
        Step::Done(match progress.stop {
            Stop::Pending => Resolution::Pending,
            _ => Resolution::Poisoned(why),
        })
    }

    // --- fresh memory -----------------------------------------------------------------------------------

    /// Fills absent pages with zeros. They are claimed for that: between a look at the word and the filling, a
    /// page may be filled by another handler, written by the program and taken out by the evictor, and zeros
    /// must not take the place of what is in its slot then.
    fn fill(&self, page: Vpn, word: PageWord, access: Access, scratch: &Scratch) -> Step {
        let _layout = self.layout.read(&self.host);
        let write = access == Access::Write;
        if word.state() == State::Moving {
            // A thread of our own, past its own claim, which stays.
            let (_, step) = self.fill_claimed(page, PageCount::ONE, true, scratch);
            return Step::Done(step);
        }
        let mut was = [PageWord::EMPTY; FILL_WINDOW];
        let claim = |n: usize, word: PageWord| {
            let entry = self.table.entry(page.forward(PageCount::new(n)));
            entry.exchange(word, PageWord::filling().with_pinned(word.is_pinned())).is_ok()
        };
        if !claim(0, word) {
            return Step::Again;
        }
        was[0] = word;
        let room = FILL_WINDOW.min(CHUNK_PAGES - page.in_chunk());
        let claimed = 1 + (1..room).take_while(|n| claim(*n, PageWord::EMPTY)).count();
        let mut most = PageCount::new(claimed);
        let (done, resolution) = loop {
            let (done, resolution) = self.fill_claimed(page, most, write, scratch);
            // The window may reach past the mapping; a page by itself cannot.
            if done.is_zero() && resolution == Resolution::Unmanaged && most > PageCount::ONE {
                most = PageCount::ONE;
                continue;
            }
            break (done, resolution);
        };
        for (n, was) in was[..claimed].iter().enumerate() {
            let page = page.forward(PageCount::new(n));
            let filled = n < done.get();
            let left = self.table.entry(page).leave(if filled { PageWord::EMPTY } else { *was });
            self.after_leave(page, left.wake);
        }
        Step::Done(match resolution {
            // Already there, or not ours: the thread's next attempt tells.
            Resolution::Unmanaged => {
                self.host.wake(VaRange::page(page));
                Resolution::Resolved(PageCount::ZERO)
            }
            resolution => resolution,
        })
    }

    /// Fills up to `most` pages. Returns how many, and what that means; `Unmanaged` where nothing could be.
    fn fill_claimed(
        &self,
        page: Vpn,
        most: PageCount,
        write: bool,
        scratch: &Scratch,
    ) -> (PageCount, Resolution) {
        let taken = match write {
            true if self.may_grow() => self.take_allowance(most),
            true => None,
            false => Some(most),
        };
        let Some(pages) = taken else { return (PageCount::ZERO, Resolution::Starved) };
        let range = VaRange::page(page).grow(pages);
        let progress = if write {
            // SAFETY: the scratch keeps a window of zeros.
            unsafe { self.host.install_copy(scratch.zeros, range, Install::Writable) }
        } else {
            self.host.install_zero(range)
        };
        if write {
            self.grant(pages.minus(progress.done));
        }
        self.stats.add(Counter::Filled, progress.done.get());
        let resolution = match progress.stop {
            _ if !progress.done.is_zero() => Resolution::Resolved(progress.done),
            Stop::Pending => Resolution::Pending,
            Stop::NoMemory => Resolution::Starved,
            _ => Resolution::Unmanaged,
        };
        (progress.done, resolution)
    }

    // --- from the arena ---------------------------------------------------------------------------------

    fn take_back(&self, page: Vpn, word: PageWord, access: Access) -> Step {
        let Some(slot) = word.slot() else { return Step::Again };
        let layout = self.layout.read(&self.host);
        let entry = self.table.entry(page);
        if entry.exchange(word, PageWord::moving_back(slot).claimed_from(word)).is_err() {
            return Step::Again;
        }
        let range = VaRange::page(page);
        let (arena, index) = self.arena_of(slot);
        let source = NonNull::new(arena.address(index).get() as *mut u8).expect("slots have addresses");
        let copy = arena.copy_of(index);
        let keep_copy = !word.is_writing() && copy.is_some() && access == Access::Read && self.tracks(page);
        let home = if let (true, Some(pfn)) = (keep_copy, copy) {
            PageWord::tracked(pfn)
        } else {
            PageWord::RESIDENT
        };
        let how = if keep_copy { Install::Tracked } else { Install::Writable };
        let mut moved = false;
        let mut stop = Stop::Refused;
        if !word.is_writing() && !keep_copy {
            // SAFETY: the slot came out of the word by the exchange above: it is ours.
            let progress = unsafe { self.host.install(arena.address(index), range) };
            moved = progress.is_complete();
            stop = progress.stop;
        }
        if stop == Stop::Refused {
            // SAFETY: as above; while a device reads the slot, it holds the contents all the same.
            stop = unsafe { self.host.install_copy(source, range, how) }.stop;
        }
        if !matches!(stop, Stop::Complete | Stop::Present | Stop::Unmapped | Stop::Exiting) {
            let left = entry.leave(word);
            self.after_leave(page, left.wake);
            return Step::Done(match stop {
                Stop::NoMemory => Resolution::Starved,
                Stop::Pending | Stop::Busy => Resolution::Pending,
                _ => {
                    // The contents are safe where they are; the thread tries again.
                    self.host.wake(range);
                    Resolution::Resolved(PageCount::ZERO)
                }
            });
        }
        // Installed, or present already, or the mapping is not ours any more: home as far as we are
        // concerned. Nothing was discarded meanwhile, because the layout lock was held all the time.
        if keep_copy && stop == Stop::Complete {
            arena.take_copy(index);
        }
        let home = if stop == Stop::Complete { home } else { PageWord::RESIDENT };
        let left = entry.leave(home.heated_like(word).hotter());
        drop(layout);
        if !word.is_writing() {
            if let Some(copy) = arena.take_copy(index) {
                self.pagemaps.of(copy).put(copy);
            }
            if arena.unit() == Geometry::K4 {
                let run = arena.adopt(&self.host, index);
                if moved { drop(run.emptied()) } else { drop(run) }
            }
        }
        if stop != Stop::Complete {
            // Nothing was installed, which would have woken the threads that wait in the kernel.
            self.host.wake(range);
        }
        self.after_leave(page, left.wake);
        self.stats.add(Counter::TakenBack, 1);
        Step::Done(Resolution::Resolved(PageCount::ONE))
    }

    /// Takes a staged page back outside of a fault. `None` if the word had changed.
    pub(crate) fn take_back_now(&self, page: Vpn, word: PageWord) -> Option<Resolution> {
        match self.take_back(page, word, Access::Write) {
            Step::Done(resolution) => Some(resolution),
            Step::Again => None,
        }
    }

    /// Wakes whoever left the waited flag on a word that has come to rest.
    pub(crate) fn after_leave(&self, page: Vpn, wake: bool) {
        if wake {
            self.wake(VaRange::page(page));
        }
    }

    // --- write protection -------------------------------------------------------------------------------

    /// Lifts the protection of a page under a claim of its own: were the page to leave and come back protected
    /// between the look at its word and the call, a store would go unnoticed, and the store be lost with it.
    fn lift(&self, page: Vpn, word: PageWord) -> Step {
        let _layout = self.layout.read(&self.host);
        let claim = |page: Vpn, word: PageWord| {
            self.table.entry(page).exchange(word, PageWord::filling().with_pinned(word.is_pinned())).is_ok()
        };
        if !claim(page, word) {
            return Step::Again;
        }
        let mut was = [word; FILL_WINDOW];
        let mut claimed = 1;
        if word.is_tracked() {
            self.note_written(page);
            // Where pages are written in order, the neighbours' faults are spared.
            while claimed < FILL_WINDOW.min(CHUNK_PAGES - page.in_chunk()) {
                let next = page.forward(PageCount::new(claimed));
                let word = self.table.entry(next).load();
                if !word.is_tracked() || self.tracks(page) || !claim(next, word) {
                    break;
                }
                was[claimed] = word;
                claimed += 1;
            }
        }
        let pages = PageCount::new(claimed);
        let range = VaRange::page(page).grow(pages);
        let progress = self.host.write_protect(range, false);
        let lifted = progress.stop != Stop::Pending;
        for (page, word) in range.iter().zip(was) {
            let left = self.table.entry(page).leave(if lifted { word.without_copy() } else { word });
            if lifted {
                self.free(word);
            }
            self.after_leave(page, left.wake);
        }
        if !lifted {
            return Step::Done(Resolution::Pending);
        }
        if !progress.is_complete() {
            self.host.wake(range);
        }
        self.stats.add(Counter::Lifted, 1);
        Step::Done(Resolution::Resolved(pages))
    }

    // --- from a device ----------------------------------------------------------------------------------

    fn fetch(&self, page: Vpn, word: PageWord, asked: Window, tracked: bool, scratch: &mut Scratch) -> Step {
        if let Some(step) = self.fetch_huge(page, word) {
            return step;
        }
        let Some((mut first, claimed)) = self.claim_window(page, word, asked, scratch) else {
            return Step::Again;
        };
        // Frames: a tracked page must be copied in; otherwise free frames of the arena take its place. A copy
        // takes a page from the system, whatever it is made from, and that is what the allowance is for.
        let mut runs: [Option<Run<'_, Framed, H>>; RUNS] = [const { None }; RUNS];
        let mut framed = PageCount::ZERO;
        if !tracked && self.host.can_move() {
            for run in &mut runs {
                let missing = claimed.minus(framed);
                if missing.is_zero() {
                    break;
                }
                *run = self.arena.take_framed(&self.host, missing);
                let Some(run) = run else { break };
                framed = framed.plus(run.pages());
            }
        }
        let (window, copying) = if framed.is_zero() {
            match self.take_allowance(claimed) {
                Some(pages) => (pages, true),
                None => {
                    self.give_up(first, PageCount::ZERO, claimed, scratch);
                    return Step::Done(Resolution::Starved);
                }
            }
        } else {
            (framed, false)
        };
        if window < claimed {
            // The touched page is at one end of the window; the other end gives.
            let over = claimed.minus(window);
            if first == page {
                self.give_up(first, window, over, scratch);
            } else {
                self.give_up(first, PageCount::ZERO, over, scratch);
                scratch.pfns.copy_within(over.get()..claimed.get(), 0);
                first = first.forward(over);
            }
        }
        if window < asked.pages {
            self.windows.clipped(page, asked, window);
        }
        let touched = page.since(first);
        if let Err(error) = self.read_window(window, &runs, scratch) {
            // Only the page that was touched is worth a second attempt by itself.
            self.give_up(first, PageCount::ZERO, touched, scratch);
            let behind = touched.plus(PageCount::ONE);
            self.give_up(first, behind, window.minus(behind), scratch);
            scratch.pfns[0] = scratch.pfns[touched.get()];
            if self.read_window(PageCount::ONE, &runs, scratch).is_err() {
                if copying {
                    self.grant(window);
                }
                return self.lose(page, scratch.pfns[0], error);
            }
            let touched = PageCount::ZERO;
            let step = self.install_window(page, touched, PageCount::ONE, runs, copying, tracked, scratch);
            if copying {
                self.grant(window.minus(PageCount::ONE));
            }
            return step;
        }
        self.install_window(first, touched, window, runs, copying, tracked, scratch)
    }

    /// Claims `page`, and the pages of its chunk that follow it in the window's direction on the same device.
    /// Returns the first page of the claimed ones and their number; `page` is the first or the last of them.
    fn claim_window(
        &self,
        page: Vpn,
        word: PageWord,
        window: Window,
        scratch: &mut Scratch,
    ) -> Option<(Vpn, PageCount)> {
        let pfn = word.pfn()?;
        let claim = |page: Vpn, word: PageWord, pfn: Pfn| {
            self.table.entry(page).exchange(word, PageWord::moving_in(pfn).claimed_from(word)).is_ok()
        };
        if !claim(page, word, pfn) {
            return None;
        }
        scratch.pfns[0] = pfn;
        let device = self.pagemaps.of(pfn).range();
        let room = match window.direction {
            Direction::Up => CHUNK_PAGES - page.in_chunk(),
            Direction::Down => page.in_chunk() + 1,
        };
        let most = room.min(MAX_WINDOW.get()).min(window.pages.get());
        let mut claimed = 1;
        while claimed < most {
            let next = match window.direction {
                Direction::Up => page.forward(PageCount::new(claimed)),
                Direction::Down => page.back(PageCount::new(claimed)),
            };
            let word = self.table.entry(next).load();
            let on_device = word.pfn().filter(|pfn| word.state() == State::Device && device.contains(*pfn));
            let Some(pfn) = on_device.filter(|pfn| claim(next, word, *pfn)) else { break };
            scratch.pfns[claimed] = pfn;
            claimed += 1;
        }
        let first = match window.direction {
            Direction::Up => page,
            Direction::Down => {
                scratch.pfns[..claimed].reverse();
                page.back(PageCount::new(claimed - 1))
            }
        };
        Some((first, PageCount::new(claimed)))
    }

    /// Gives the claims on `pages` pages from the `skip`th on back: the contents stay on the device.
    fn give_up(&self, page: Vpn, skip: PageCount, pages: PageCount, scratch: &Scratch) {
        for n in skip.get()..skip.get() + pages.get() {
            self.leave_on_device(page.forward(PageCount::new(n)), scratch.pfns[n]);
        }
    }

    fn leave_on_device(&self, page: Vpn, pfn: Pfn) {
        let entry = self.table.entry(page);
        let tracked = entry.load().is_tracked();
        let left = entry.leave(if tracked { PageWord::tracked(pfn) } else { PageWord::device(pfn) });
        if left.discarded {
            self.pagemaps.of(pfn).put(pfn);
        }
        self.after_leave(page, left.wake);
    }

    /// Reads the first `window` claimed pages into the runs' frames, or into the bounce buffer.
    fn read_window(
        &self,
        window: PageCount,
        runs: &[Option<Run<'_, Framed, H>>; RUNS],
        scratch: &mut Scratch,
    ) -> Result<(), TransferError> {
        let map = self.pagemaps.of(scratch.pfns[0]);
        scratch.transfers.clear();
        let mut from_runs = runs.iter().flatten().flat_map(|run| {
            let base = run.as_ptr();
            (0..run.pages().get()).map(move |n| {
                // SAFETY: inside the run, which is that long.
                unsafe { base.add(n * PAGE_SIZE) }
            })
        });
        for n in 0..window.get() {
            let ram = from_runs.next().unwrap_or_else(|| {
                // SAFETY: the bounce buffer has room for a whole window.
                unsafe { scratch.bounce.add(n * PAGE_SIZE) }
            });
            // SAFETY: the frames belong to the runs, the buffer to the scratch; nobody else reads or writes
            // them before the call of the device below has returned.
            unsafe { scratch.transfers.push(map.device_page(scratch.pfns[n]), ram) };
        }
        let batch = scratch.transfers.as_mut_slice();
        if scratch.ahead {
            map.device().read_ahead(batch);
        } else {
            map.device().read(batch);
        }
        batch.iter().try_for_each(Transfer::outcome)
    }

    /// The contents of a claimed page are lost.
    fn lose(&self, page: Vpn, pfn: Pfn, why: TransferError) -> Step {
        let entry = self.table.entry(page);
        if entry.load().is_tracked() {
            // The fault may have been an old one, and the page be there: only its copy is lost then.
            match self.host.poison(VaRange::page(page)).stop {
                Stop::Pending => {
                    self.leave_on_device(page, pfn);
                    return Step::Done(Resolution::Pending);
                }
                Stop::Present => {
                    let _ = entry.leave(PageWord::RESIDENT);
                    self.pagemaps.of(pfn).put(pfn);
                    self.wake(VaRange::page(page));
                    return Step::Done(Resolution::Resolved(PageCount::ZERO));
                }
                _ => {}
            }
        }
        let left = entry.leave(PageWord::POISONED);
        self.pagemaps.of(pfn).put(pfn);
        if left.discarded {
            self.after_leave(page, true);
            return Step::Again;
        }
        self.stats.add(Counter::Poisoned, 1);
        self.poison(page, Some(why))
    }

    /// Puts the pages that were read into the program's address space and settles their words. The fault was
    /// on the `touched`th of them.
    #[expect(clippy::too_many_arguments, reason = "the second half of fetch, called from two places")]
    fn install_window(
        &self,
        page: Vpn,
        touched: PageCount,
        window: PageCount,
        runs: [Option<Run<'_, Framed, H>>; RUNS],
        copying: bool,
        tracked: bool,
        scratch: &Scratch,
    ) -> Step {
        let layout = self.layout.read(&self.host);
        let mut home = PageCount::ZERO;
        let mut stop = Stop::Complete;
        if copying {
            let how = if tracked { Install::Tracked } else { Install::Writable };
            (home, stop) = self.install_copied(page, scratch.bounce, window, how, tracked, scratch, home);
        } else {
            for run in runs.into_iter().flatten() {
                if stop != Stop::Complete {
                    break;
                }
                let part = run.pages().at_most(window.minus(home));
                let (used, _) = run.split(part);
                let Some(run) = used else { break };
                (home, stop) = self.install_moved(page, run, scratch, home);
            }
        }
        drop(layout);
        self.give_up(page, home, window.minus(home), scratch);
        self.stats.add(Counter::MovedIn, home.get());
        if copying {
            self.grant(window.minus(home));
        }
        Step::Done(match stop {
            _ if home > touched => Resolution::Resolved(home),
            Stop::Pending | Stop::Busy => Resolution::Pending,
            Stop::NoMemory => Resolution::Starved,
            _ => {
                // The address is no longer ours to fill; the thread's next attempt meets what is there.
                self.host.wake(VaRange::page(page.forward(touched)));
                Resolution::Resolved(PageCount::ZERO)
            }
        })
    }

    /// Pages from the `from`th claimed one on that were not discarded, at most `most`.
    fn wanted(&self, page: Vpn, from: PageCount, most: PageCount) -> PageCount {
        let wanted = (0..most.get()).take_while(|n| {
            let entry = self.table.entry(page.forward(from).forward(PageCount::new(*n)));
            !entry.load().is_discarded()
        });
        PageCount::new(wanted.count())
    }

    /// Claimed pages are in the program's address space now: their words say so, and whoever waits for us is
    /// woken. Threads that wait in the kernel were woken by what installed the page.
    fn settle_home(&self, page: Vpn, pfns: &[Pfn], tracked: bool) {
        for (n, pfn) in pfns.iter().enumerate() {
            let page = page.forward(PageCount::new(n));
            let home = if tracked { PageWord::tracked(*pfn) } else { PageWord::RESIDENT };
            let left = self.table.entry(page).leave(home);
            debug_assert!(!(tracked && left.discarded), "the layout lock keeps discards out");
            self.after_leave(page, left.wake);
        }
        if !tracked {
            self.put_pages(pfns);
        }
    }

    /// The page was there already, by whomever: it is the newer one. Threads that wait in the kernel for ours
    /// are woken by nobody else.
    fn settle_present(&self, page: Vpn, pfn: Pfn) {
        self.settle_home(page, &[pfn], false);
        self.host.wake(VaRange::page(page));
    }

    /// One reference less to each page, those side by side in one step.
    fn put_pages(&self, pfns: &[Pfn]) {
        let mut rest = pfns;
        while let Some(first) = rest.first() {
            let next = |n: usize| first.forward(PageCount::new(n));
            let len = 1 + (1..rest.len()).take_while(|n| rest[*n] == next(*n)).count();
            self.pagemaps.of(*first).put_range(PfnRange::new(*first, PageCount::new(len)));
            rest = &rest[len..];
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one step of install_window, called from two places")]
    fn install_copied(
        &self,
        page: Vpn,
        source: NonNull<u8>,
        window: PageCount,
        how: Install,
        tracked: bool,
        scratch: &Scratch,
        done_before: PageCount,
    ) -> (PageCount, Stop) {
        let mut done = PageCount::ZERO;
        while done < window {
            let home = done_before.plus(done);
            let wanted = self.wanted(page, home, window.minus(done));
            if wanted.is_zero() {
                // Discarded: the claim ends with an empty word, and nothing is installed.
                let n = home.get();
                self.leave_on_device(page.forward(home), scratch.pfns[n]);
                self.host.wake(VaRange::page(page.forward(home)));
                done = done.plus(PageCount::ONE);
                continue;
            }
            let range = VaRange::page(page.forward(home)).grow(wanted);
            // SAFETY: the source holds the whole window and is ours.
            let progress = unsafe { self.host.install_copy(source.add(done.bytes()), range, how) };
            let pfns = &scratch.pfns[home.get()..home.plus(progress.done).get()];
            self.settle_home(page.forward(home), pfns, tracked);
            done = done.plus(progress.done);
            match progress.stop {
                Stop::Complete => {}
                Stop::Present => {
                    // Somebody else's page is there (a child's, inherited); it is the newer one.
                    let n = done_before.plus(done);
                    self.settle_present(page.forward(n), scratch.pfns[n.get()]);
                    done = done.plus(PageCount::ONE);
                }
                // A call that got part of the way does not say why it stopped; the next one does.
                Stop::Pending if !progress.done.is_zero() => {}
                stop => return (done_before.plus(done), stop),
            }
        }
        (done_before.plus(done), Stop::Complete)
    }

    fn install_moved(
        &self,
        page: Vpn,
        run: Run<'_, Framed, H>,
        scratch: &Scratch,
        done_before: PageCount,
    ) -> (PageCount, Stop) {
        let mut rest = Some(run);
        let mut home = done_before;
        while let Some(run) = rest.take() {
            let wanted = self.wanted(page, home, run.pages());
            if wanted.is_zero() {
                self.leave_on_device(page.forward(home), scratch.pfns[home.get()]);
                self.host.wake(VaRange::page(page.forward(home)));
                home = home.plus(PageCount::ONE);
                rest = run.split(PageCount::ONE).1;
                continue;
            }
            let range = VaRange::page(page.forward(home)).grow(wanted);
            // SAFETY: the run is ours; what was moved out of it is recorded by the split below.
            let progress = unsafe { self.host.install(run.address(), range) };
            let pfns = &scratch.pfns[home.get()..home.plus(progress.done).get()];
            self.settle_home(page.forward(home), pfns, false);
            home = home.plus(progress.done);
            let (moved, left) = run.split(progress.done);
            drop(moved.map(Run::emptied));
            let Some(left) = left else { break };
            match progress.stop {
                Stop::Complete => rest = Some(left),
                Stop::Pending if !progress.done.is_zero() => rest = Some(left),
                Stop::Present => {
                    self.settle_present(page.forward(home), scratch.pfns[home.get()]);
                    home = home.plus(PageCount::ONE);
                    rest = left.split(PageCount::ONE).1;
                }
                Stop::Refused => {
                    // The mapping takes no moved page (read-only); a copy it does.
                    let pages = left.pages();
                    return self.install_copied(
                        page,
                        left.as_ptr(),
                        pages,
                        Install::Writable,
                        false,
                        scratch,
                        home,
                    );
                }
                stop => return (home, stop),
            }
        }
        (home, Stop::Complete)
    }

    // --- huge pages --------------------------------------------------------------------------------------

    /// Brings a whole chunk home as one huge page, if it left as one and a huge frame is free.
    fn fetch_huge(&self, page: Vpn, word: PageWord) -> Option<Step> {
        let huge = self.huge.as_ref()?;
        let chunk = page.chunk_base();
        let first = Pfn::new(word.pfn()?.get().checked_sub(page.in_chunk() as u64)?);
        let expected = |n: usize| PageWord::device(first.forward(PageCount::new(n)));
        let aligned = self.pagemaps.of(word.pfn()?).device_page(first).0.is_multiple_of(CHUNK_PAGES as u64);
        let ends = [0, CHUNK_PAGES - 1].map(|n| {
            let entry = self.table.get(chunk.forward(PageCount::new(n)));
            entry.is_some_and(|entry| entry.load() == expected(n))
        });
        if word.is_tracked() || !aligned || ends != [true, true] {
            return None;
        }
        let run = huge.take_framed(&self.host, Geometry::M2.pages())?;
        let claimed = (0..CHUNK_PAGES)
            .take_while(|n| {
                let pfn = first.forward(PageCount::new(*n));
                let entry = self.table.entry(chunk.forward(PageCount::new(*n)));
                entry.exchange(expected(*n), PageWord::moving_in(pfn)).is_ok()
            })
            .count();
        let put_back = |range: core::ops::Range<usize>| {
            for n in range {
                let n = PageCount::new(n);
                self.leave_on_device(chunk.forward(n), first.forward(n));
            }
        };
        if claimed < CHUNK_PAGES {
            put_back(0..claimed);
            return None;
        }
        let map = self.pagemaps.of(first);
        // SAFETY: the frame is the run's, which nobody else touches.
        let mut batch = [unsafe { Transfer::new(map.device_page(first), run.as_ptr(), run.pages()) }];
        map.device().read(&mut batch);
        let range = VaRange::page(chunk).grow(Geometry::M2.pages());
        let layout = self.layout.read(&self.host);
        let whole = self.wanted(chunk, PageCount::ZERO, Geometry::M2.pages()).get() == CHUNK_PAGES;
        if batch[0].outcome().is_err() || !whole {
            drop(layout);
            put_back(0..CHUNK_PAGES);
            return None;
        }
        // SAFETY: as above.
        let progress = unsafe { self.host.install(run.address(), range) };
        if !progress.is_complete() {
            // What arrived stays; the rest is still on the device, and its frames are let go.
            for n in 0..progress.done.get() {
                let n = PageCount::new(n);
                self.settle_home(chunk.forward(n), &[first.forward(n)], false);
            }
            drop(layout);
            put_back(progress.done.get()..CHUNK_PAGES);
            // SAFETY: the run is ours.
            unsafe { self.host.release(run.range()) };
            drop(run.emptied());
            return Some(Step::Done(match progress.stop {
                _ if progress.done.get() > page.in_chunk() => Resolution::Resolved(progress.done),
                Stop::Pending => Resolution::Pending,
                _ => return None,
            }));
        }
        for n in 0..CHUNK_PAGES {
            let page = chunk.forward(PageCount::new(n));
            let left = self.table.entry(page).leave(PageWord::RESIDENT);
            self.after_leave(page, left.wake);
        }
        map.put_range(PfnRange::new(first, Geometry::M2.pages()));
        drop(layout);
        drop(run.emptied());
        self.stats.add(Counter::MovedIn, CHUNK_PAGES);
        Some(Step::Done(Resolution::Resolved(Geometry::M2.pages())))
    }
}
