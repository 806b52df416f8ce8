//! The second half of a fetch: what was read takes its place in the program's address space, and the words of
//! the claimed pages say so.
//!
//! Locks: the layout lock for reading, over the installing and the change of the words.

use core::ptr::NonNull;

use uhmm_addr::{PageCount, Pfn, PfnRange, VaRange, Vpn};

use super::fetch::RUNS;
use super::resolve::{Resolution, Step};
use super::scratch::Scratch;
use crate::frame::{Framed, Run};
use crate::host::{Host, Install, Stop};
use crate::mm::Mm;
use crate::pagetable::PageWord;
use crate::stats::Counter;

/// How a claimed page came to be in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// Put there by ourselves, a small page, and writable as far as the mapping is.
    Installed,
    /// The same, write-protected, because it keeps its copy.
    Tracked,
    /// Otherwise: by somebody else, or as part of a huge page.
    There,
}

impl<H: Host> Mm<H> {
    /// Puts the pages that were read into the program's address space and settles their words. The fault was
    /// on the `touched`th of them.
    #[expect(clippy::too_many_arguments, reason = "the second half of fetch, called from two places")]
    pub(super) fn install_window(
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
    pub(super) fn wanted(&self, page: Vpn, from: PageCount, most: PageCount) -> PageCount {
        let wanted = (0..most.get()).take_while(|n| {
            let entry = self.table.entry(page.forward(from).forward(PageCount::new(*n)));
            !entry.load().is_discarded()
        });
        PageCount::new(wanted.count())
    }

    /// Claimed pages are in the program's address space now: their words say so, and whoever waits for us is
    /// woken. Threads that wait in the kernel were woken by what installed the page. Counted before the words say so:
    /// who finds the pages moved out again finds that they had come.
    pub(super) fn settle_home(&self, page: Vpn, pfns: &[Pfn], how: Arrival) {
        self.stats.add(Counter::MovedIn, pfns.len());
        let tracked = how == Arrival::Tracked;
        for (n, pfn) in pfns.iter().enumerate() {
            let page = page.forward(PageCount::new(n));
            let home = match how {
                Arrival::Installed => PageWord::INSTALLED,
                Arrival::Tracked => PageWord::tracked(*pfn),
                Arrival::There => PageWord::RESIDENT,
            };
            let entry = self.table.entry(page);
            let left = entry.leave(home.reused_like(entry.load()));
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
        self.settle_home(page, &[pfn], Arrival::There);
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
            let arrival = if tracked { Arrival::Tracked } else { Arrival::Installed };
            self.settle_home(page.forward(home), pfns, arrival);
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
            self.settle_home(page.forward(home), pfns, Arrival::Installed);
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
}
