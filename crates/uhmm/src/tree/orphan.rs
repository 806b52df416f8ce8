//! A forked child that has no handler of its own yet.
//!
//! What     [`Orphan`]: the child's userfaultfd and its page table, between the moment at which its parent read
//!          the fork event and the moment at which the child's agent takes over.
//! Why      the C library touches memory in the child before any hook of ours runs there, and the parent may
//!          be gone by then. A child made without the C library never gets an agent: it gets all of its pages.
//! Owns     the descriptor, and one reference on the device page of every word in the table.
//! Fails    a page that its device does not give is poisoned. While this is closed too early the child reads
//!          zeros where something was; so nobody drops it before [`Orphan::step_home`] says so, or the child
//!          is gone.

use std::time::{Duration, Instant};

use uhmm_addr::{PageCount, Pfn, PfnRange, VaRange, VirtAddr, Vpn};
use uhmm_core::device::Transfer;
use uhmm_core::fault::Access;
use uhmm_core::fault::decide::{Action, decide};
use uhmm_core::host::{Install, Stop};
use uhmm_core::pagemap::Pagemap;
use uhmm_core::pagetable::{PageWord, State};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::uffd::{Event, EventBuffer, ReadOutcome, Uffd};

use super::table::Table;

/// Pages that are read from the device at once.
const RUN: usize = 64;
/// Pages brought home in one step, between looks at everybody else.
const STEP: usize = 1024;

/// What the keeper lends to its orphans: the device, and memory of its own to read into.
pub(super) struct Nursery<'k> {
    pub(super) pagemap: &'k Pagemap,
    /// At least [`Nursery::BYTES`].
    pub(super) room: &'k Mapping,
}

impl Nursery<'_> {
    /// Bytes that are read at once.
    pub(super) const BYTES: usize = RUN * uhmm_addr::PAGE_SIZE;

    /// Reads pages into the room. `false` if the device cannot give them.
    fn read(&self, first: Pfn, pages: PageCount) -> bool {
        debug_assert!(pages.bytes() <= self.room.len());
        let page = self.pagemap.device_page(first);
        // SAFETY: the room is memory of the keeper's, at least as long, aligned to pages, reached through raw
        // pointers alone, and used by its one thread.
        let mut transfer = [unsafe { Transfer::new(page, self.room.as_ptr(), pages) }];
        self.pagemap.device().read(&mut transfer);
        transfer[0].outcome().is_ok()
    }

    /// The pfn of a word, if it is the device's. Words come from other processes.
    fn pfn(&self, word: PageWord) -> Option<Pfn> {
        word.pfn().filter(|pfn| self.pagemap.contains(*pfn))
    }

    /// One more reference to what the word owns.
    pub(super) fn get(&self, word: PageWord) {
        if let Some(pfn) = self.pfn(word)
            && self.pagemap.count(pfn) > 0
        {
            self.pagemap.get(pfn);
        }
    }

    /// One reference less to what the word owned.
    pub(super) fn put(&self, word: PageWord) {
        if let Some(pfn) = self.pfn(word)
            && self.pagemap.count(pfn) > 0
        {
            // SAFETY: the keeper's pagemap is in no registry, whatever the word says.
            unsafe { self.pagemap.put_counted(PfnRange::new(pfn, PageCount::ONE)) };
        }
    }
}

/// How it stands with an orphan.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// It lives; there may be more to do.
    Alive,
    /// It has all of its pages and needs nobody.
    Home,
    /// The process is gone.
    Dead,
}

/// What came of one page.
enum Outcome {
    Done,
    /// Events must be read first, or memory must come free.
    Later,
    Dead,
}

/// A child without a handler.
pub(super) struct Orphan {
    /// By which it will present itself; `None` if it cannot.
    pub(super) cookie: Option<u64>,
    pub(super) uffd: Uffd,
    pub(super) table: Table,
    pub(super) since: Instant,
    waiting: Vec<(VirtAddr, Access)>,
}

impl Orphan {
    pub(super) fn new(cookie: Option<u64>, uffd: Uffd, table: Table) -> Self {
        Self { cookie, uffd, table, since: Instant::now(), waiting: Vec::new() }
    }

    /// The same, whose agent will not come.
    pub(super) fn unexpected(self) -> Self {
        Self { cookie: None, ..self }
    }

    /// How long nobody has taken over.
    pub(super) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether faults wait that could not be resolved yet.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets every thread go whose fault has been read and not resolved: it faults again, and whoever reads the
    /// descriptor then gets the message.
    pub(super) fn let_go(&mut self) {
        for (addr, _) in self.waiting.drain(..) {
            self.uffd.wake(VaRange::page(addr.page()));
        }
    }

    /// Reads what has happened and does what is needed. Children that it forked meanwhile go to `born`.
    pub(super) fn serve(&mut self, nursery: &Nursery<'_>, born: &mut Vec<Self>) -> Standing {
        // Every event before any fault: a fault may be older than the event that explains it.
        if self.read_all(nursery, born) == Standing::Dead {
            return Standing::Dead;
        }
        for (addr, access) in core::mem::take(&mut self.waiting) {
            match self.resolve(nursery, addr.page(), access) {
                Outcome::Done => {}
                Outcome::Later => self.waiting.push((addr, access)),
                Outcome::Dead => return Standing::Dead,
            }
        }
        Standing::Alive
    }

    fn read_all(&mut self, nursery: &Nursery<'_>, born: &mut Vec<Self>) -> Standing {
        let mut buffer = EventBuffer::new();
        loop {
            match self.uffd.read(&mut buffer) {
                ReadOutcome::Events(_) => {}
                ReadOutcome::Empty => return Standing::Alive,
                ReadOutcome::Closed | ReadOutcome::Failed(_) => return Standing::Dead,
            }
            for event in &mut buffer {
                match event {
                    Event::Fault { addr, access, .. } => self.waiting.push((addr, access)),
                    Event::Remove(range) => self.forget(nursery, range, true),
                    Event::Unmap(range) => self.forget(nursery, range, false),
                    Event::Remap { from, to, len } => self.remap(nursery, from, to, len),
                    Event::Fork(uffd) => match self.table.duplicate(|word| nursery.get(word)) {
                        Ok(table) => born.push(Self::new(None, uffd, table)),
                        Err(_) => self.lose(nursery, &uffd),
                    },
                }
            }
        }
    }

    /// There is no memory to keep a table for a child that watches with `uffd`: it gets SIGBUS where it would
    /// otherwise read zeros.
    fn lose(&self, nursery: &Nursery<'_>, uffd: &Uffd) {
        self.table.walk(None, |page, word| {
            if nursery.pfn(word).is_some() {
                let _ = uffd.poison(VaRange::page(page));
            }
        });
    }

    /// Replaces a word and gives up what the old one owned. What cannot be stored keeps its reference: that
    /// loses space on the device and no contents.
    fn settle(&self, nursery: &Nursery<'_>, page: Vpn, old: PageWord, new: PageWord) {
        if self.table.store(page, new).is_ok() {
            nursery.put(old);
        }
    }

    fn forget(&self, nursery: &Nursery<'_>, range: VaRange, hold: bool) {
        self.table.walk(Some(range), |page, old| {
            let new = if hold {
                PageWord::EMPTY.with_discarded().with_pinned(old.is_pinned())
            } else {
                PageWord::EMPTY
            };
            self.settle(nursery, page, old, new);
        });
    }

    fn remap(&self, nursery: &Nursery<'_>, from: VirtAddr, to: VirtAddr, len: usize) {
        let Some(range) = VaRange::covering(from, len) else { return };
        self.table.walk(Some(range), |page, word| {
            let target = to.page().forward(page.since(range.first()));
            let stale = self.table.load(target);
            // The reference goes along.
            if self.table.store(target, word).is_ok() {
                nursery.put(stale);
                let _ = self.table.store(page, PageWord::EMPTY);
            }
        });
    }

    fn resolve(&self, nursery: &Nursery<'_>, page: Vpn, access: Access) -> Outcome {
        let (range, word) = (VaRange::page(page), self.table.load(page));
        match decide(access, word, false) {
            Action::Fill => match self.uffd.zero(range, true).stop {
                Stop::Complete => {
                    self.settle(nursery, page, word, PageWord::RESIDENT.with_pinned(word.is_pinned()));
                    Outcome::Done
                }
                stop => self.unfinished(range, stop),
            },
            Action::Fetch => self.fetch(nursery, range, word),
            Action::Lift => {
                if word.is_tracked() {
                    self.settle(nursery, page, word, word.without_copy());
                }
                match self.uffd.write_protect(range, false, true).stop {
                    Stop::Complete => Outcome::Done,
                    stop => self.unfinished(range, stop),
                }
            }
            Action::Wake => {
                self.uffd.wake(range);
                Outcome::Done
            }
            // A child has no arena, and nobody moves its pages: a word that says so is of no use, and what it
            // stood for is lost.
            Action::TakeBack | Action::Wait | Action::Poison => self.poison(nursery, range, word),
        }
    }

    fn unfinished(&self, range: VaRange, stop: Stop) -> Outcome {
        match stop {
            Stop::Pending | Stop::NoMemory => Outcome::Later,
            Stop::Exiting => Outcome::Dead,
            // It is there, or it is no page of ours any more: the next touch will tell.
            _ => {
                self.uffd.wake(range);
                Outcome::Done
            }
        }
    }

    fn poison(&self, nursery: &Nursery<'_>, range: VaRange, word: PageWord) -> Outcome {
        match self.uffd.poison(range).stop {
            Stop::Complete => {
                self.settle(nursery, range.first(), word, PageWord::POISONED);
                Outcome::Done
            }
            stop => self.unfinished(range, stop),
        }
    }

    /// Brings the page of `word` home.
    fn fetch(&self, nursery: &Nursery<'_>, range: VaRange, word: PageWord) -> Outcome {
        match nursery.pfn(word) {
            Some(pfn) if nursery.read(pfn, PageCount::ONE) => self.install(nursery, range, &[word]),
            _ => self.poison(nursery, range, word),
        }
    }

    /// Copies what is in the room to `range`, whose words are `words`.
    fn install(&self, nursery: &Nursery<'_>, range: VaRange, words: &[PageWord]) -> Outcome {
        let (mut at, mut words) = (Some(range), words);
        while let Some(rest) = at {
            let offset = range.pages().minus(rest.pages()).bytes();
            // SAFETY: the offset lies in the room, as the range is no longer than what was read into it.
            let source = unsafe { nursery.room.as_ptr().add(offset) };
            // SAFETY: the room has as many bytes from there on, holds what the child is to find, and is ordinary
            // memory of the keeper.
            let progress = unsafe { self.uffd.copy(rest, source, Install::Writable, true) };
            let mut done = progress.done.get();
            let outcome = match progress.stop {
                Stop::Complete | Stop::Pending if done > 0 => Outcome::Done,
                Stop::Complete => Outcome::Done,
                // It has a page of its own, or no place for one: either way it has no use for this one.
                Stop::Present | Stop::Unmapped | Stop::Refused | Stop::Errno(_) => {
                    self.uffd.wake(rest.take(PageCount::ONE));
                    done += 1;
                    Outcome::Done
                }
                stop => self.unfinished(rest, stop),
            };
            for (page, word) in rest.iter().zip(words).take(done) {
                self.settle(nursery, page, *word, PageWord::RESIDENT.with_pinned(word.is_pinned()));
            }
            if !matches!(outcome, Outcome::Done) {
                return outcome;
            }
            words = &words[done.min(words.len())..];
            at = rest.skip(PageCount::new(done));
        }
        Outcome::Done
    }

    /// Brings some more of the child's pages home; [`Standing::Home`] when none is left on the device.
    pub(super) fn step_home(&mut self, nursery: &Nursery<'_>) -> Standing {
        let (mut left, mut standing) = (STEP, Standing::Alive);
        let mut run: Vec<(Vpn, PageWord)> = Vec::with_capacity(RUN);
        let all = self.table.walk_while(None, |page, word| {
            let Some(pfn) = nursery.pfn(word) else { return true };
            let follows = run.last().is_none_or(|(before, old)| {
                before.forward(PageCount::ONE) == page
                    && nursery.pfn(*old).is_some_and(|old| old.forward(PageCount::ONE) == pfn)
            });
            if (!follows || run.len() == RUN) && !self.bring(nursery, &mut run, &mut standing) {
                return false;
            }
            run.push((page, word));
            left -= 1;
            left > 0
        });
        let brought = self.bring(nursery, &mut run, &mut standing);
        if all && brought && standing == Standing::Alive { Standing::Home } else { standing }
    }

    /// Brings a run of pages home that follow each other here and there. `false` if the rest must wait.
    fn bring(&self, nursery: &Nursery<'_>, run: &mut Vec<(Vpn, PageWord)>, standing: &mut Standing) -> bool {
        let words: Vec<PageWord> = run.iter().map(|(_, word)| *word).collect();
        let pages = PageCount::new(run.len());
        let first = run.first().map(|(page, _)| *page);
        run.clear();
        let Some(range) = first.and_then(|first| VaRange::of_pages(first, pages)) else { return true };
        let outcome = match words.first().and_then(|word| nursery.pfn(*word)) {
            Some(pfn) if nursery.read(pfn, pages) => self.install(nursery, range, &words),
            // One of them is bad: page by page, so that the others live.
            _ => range.iter().zip(&words).fold(Outcome::Done, |so_far, (page, word)| match so_far {
                Outcome::Done => self.fetch(nursery, VaRange::page(page), *word),
                stopped => stopped,
            }),
        };
        if let Outcome::Dead = outcome {
            *standing = Standing::Dead;
        }
        matches!(outcome, Outcome::Done)
    }

    /// Gives up what the words own: the child is gone, or has everything.
    pub(super) fn release(self, nursery: &Nursery<'_>) {
        release(&self.table, nursery);
    }
}

/// Gives up everything that the words of a table own, whose process is gone.
pub(super) fn release(table: &Table, nursery: &Nursery<'_>) {
    table.walk(None, |_, word| match word.state() {
        State::Empty | State::Staged | State::Poisoned => {}
        _ => nursery.put(word),
    });
}
