//! An open device: its table, and what it does when it is asked.
//!
//! What    [`Handle`]: reads and writes through the device's table, as the table's faults; migrations; snapshots;
//!         release. The ranges that it gets are whole pages.
//! Owns    its table. Its end brings every page of the device home, whoever moved it there, as the kernel's does.
//! Locks   its own around each operation; [`Dmirror`]'s `leaving`, and the mirrors', inside.
//! Races   *unmapped, discarded or protected while the device copies*: it finds the page, or an error, never another
//!         one's memory; see [`load`](crate::load). A device page is copied under the lock of the mirror that says that
//!         it is there.
//! Fails   with an [`Error`]. What was moved until then stays moved, and what was written stays written.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uhmm::mirror::{DEFAULT_TIMEOUT, Mirror, PageView, Want};
use uhmm::space::{MappingKind, ProgramMapping};
use uhmm::{PageCount, VaRange};

use crate::areas::{Areas, Table, is_own, runs};
use crate::transfer::{Buffer, Page, Unreachable, load, touch};
use crate::{Dmirror, Error, Node, snapshot};

/// What an operation did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Pages that were copied, moved or looked at.
    pub pages: PageCount,
    /// Times that the device missed a page in its table.
    pub faults: u64,
}

/// Times that a mapping that was found gone is looked for anew.
const LOOKS: usize = 8;
/// Pages that are looked at together on the way home.
const BATCH: PageCount = PageCount::new(512);

/// An open device.
pub struct Handle<'m> {
    machine: &'m Dmirror,
    node: Node,
    areas: Mutex<Areas<'m>>,
}

impl fmt::Debug for Handle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What the front of a range is, as the table says.
enum Front {
    /// So many pages in RAM.
    Ram(PageCount),
    /// So many pages on the device, which were copied.
    Copied(PageCount),
    Missing,
}

impl<'m> Handle<'m> {
    pub(crate) fn new(machine: &'m Dmirror, node: Node) -> Self {
        Self { machine, node, areas: Mutex::default() }
    }

    /// Which device it is.
    pub const fn node(&self) -> Node {
        self.node
    }

    /// The table, with nothing in it of mappings that the program knows to be gone.
    fn areas(&self) -> MutexGuard<'_, Areas<'m>> {
        self.machine.space().catch_up();
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device reads `range`, wherever its pages are, into `into`.
    ///
    /// # Errors
    /// [`Error::Fault`] where nothing that can be read is mapped.
    ///
    /// # Panics
    /// If `into` is not as long as the range.
    pub fn read(&self, range: VaRange, into: &mut [u8]) -> Result<Counts, Error> {
        self.access(range, Want::Read, Buffer::Into(into))
    }

    /// The device writes `from` to `range`, wherever its pages are.
    ///
    /// # Errors
    /// [`Error::Permission`] where it may only be read, and as [`Handle::read`]. Pages before the one that failed may be
    /// written.
    ///
    /// # Panics
    /// If `from` is not as long as the range.
    pub fn write(&self, range: VaRange, from: &[u8]) -> Result<Counts, Error> {
        self.access(range, Want::Write, Buffer::From(from))
    }

    fn access(&self, range: VaRange, want: Want, mut buffer: Buffer<'_>) -> Result<Counts, Error> {
        let mut areas = self.areas();
        let mut counts = Counts::default();
        let done = loop {
            match self.copy(&areas, range, counts.pages, &mut buffer) {
                Ok(pages) => counts.pages = pages,
                Err(Unreachable) => break Err(self.why_not(range, want)),
            }
            let Some(rest) = range.skip(counts.pages) else { break Ok(counts) };
            counts.faults += 1;
            if let Err(error) = self.fault(&mut areas, rest, want) {
                break Err(error);
            }
        };
        areas.forget_plain();
        done
    }

    /// Copies the pages of `range` from number `done` on, up to the first one that the table lacks. Returns its number.
    fn copy(
        &self,
        areas: &Areas<'m>,
        range: VaRange,
        mut done: PageCount,
        buffer: &mut Buffer<'_>,
    ) -> Result<PageCount, Unreachable> {
        let mut page = Page::new();
        // What the table says to be in RAM stays there.
        let _stay = self.machine.stay();
        while let Some(rest) = range.skip(done) {
            let Some(area) = areas.at(rest.first()) else { break };
            let Some(part) = area.range.intersect(rest) else { break };
            let front = match &area.mirror {
                None => Front::Ram(part.pages()),
                Some(mirror) => {
                    let mut buffer = buffer.part(done, part.pages());
                    mirror.look(|table| self.copy_own(table, part, &mut buffer, &mut page))?
                }
            };
            done = match front {
                Front::Missing => break,
                Front::Copied(pages) => done.plus(pages),
                Front::Ram(pages) => {
                    buffer.part(done, pages).ram(part.start())?;
                    done.plus(pages)
                }
            };
        }
        Ok(done)
    }

    /// Copies the device's own pages at the front of `part`, under the mirror's lock.
    fn copy_own(
        &self,
        table: &Table,
        part: VaRange,
        buffer: &mut Buffer<'_>,
        page: &mut Page,
    ) -> Result<Front, Unreachable> {
        // What is the device's alone is for its atomic operations; to be written it is faulted on, as there.
        let writable = |view: &PageView| view.may_write() && !view.is_exclusive();
        let usable = |view: &PageView| if buffer.writes() { writable(view) } else { view.is_valid() };
        let views = &table.from(part.first())[..part.pages().get()];
        let there = views.iter().take_while(|view| usable(view)).count();
        let views = &views[..there];
        let memory = self.machine.device(self.node);
        let mut copied = PageCount::ZERO;
        for view in views {
            let piece = buffer.part(copied, PageCount::ONE);
            match view {
                PageView::Device { pfn, .. } => memory.copy(*pfn, page, piece)?,
                // The frame is the device's alone as long as the lock is held.
                PageView::Exclusive { at } => piece.ram(*at)?,
                _ => break,
            }
            copied = copied.plus(PageCount::ONE);
        }
        if !copied.is_zero() {
            return Ok(Front::Copied(copied));
        }
        let of_device =
            |view: &PageView| matches!(view, PageView::Device { .. } | PageView::Exclusive { .. });
        let ram = views.iter().take_while(|view| !of_device(view)).count();
        Ok(if ram == 0 { Front::Missing } else { Front::Ram(PageCount::new(ram)) })
    }

    /// What the mappings say about an access that the kernel refused.
    fn why_not(&self, range: VaRange, want: Want) -> Error {
        match self.permitted(range, want) {
            Ok((_, Err(error))) | Err(error) => error,
            Ok((_, Ok(()))) => Error::Fault,
        }
    }

    /// The mappings at the front of `range` that permit what is wanted, and why not all of it does.
    fn permitted(
        &self,
        range: VaRange,
        want: Want,
    ) -> Result<(Vec<ProgramMapping>, Result<(), Error>), Error> {
        let mut mappings = self.machine.space().mappings(range).map_err(|_| Error::NoMemory)?;
        let mut at = range.first();
        for n in 0..mappings.len() {
            let mapping = &mappings[n];
            let why_not = if mapping.range.first() != at || !mapping.read {
                Some(Error::Fault)
            } else {
                (want == Want::Write && !mapping.write).then_some(Error::Permission)
            };
            at = mapping.range.end_page();
            if let Some(why_not) = why_not {
                mappings.truncate(n);
                return Ok((mappings, Err(why_not)));
            }
        }
        Ok((mappings, if at == range.end_page() { Ok(()) } else { Err(Error::Fault) }))
    }

    /// Has the pages of `range` brought where the device reaches them, and puts them into the table.
    fn fault(&self, areas: &mut Areas<'m>, range: VaRange, want: Want) -> Result<(), Error> {
        let mut looks = 0;
        loop {
            looks += 1;
            let done = self.fault_once(areas, range, want);
            // Mapped anew, perhaps, while the mirror was told that the old mapping went.
            if done != Err(Error::Fault) || looks == LOOKS || !areas.is_dead(range) {
                return done;
            }
        }
    }

    fn fault_once(&self, areas: &mut Areas<'m>, range: VaRange, want: Want) -> Result<(), Error> {
        let (mappings, permitted) = self.permitted(range, want)?;
        for mapping in &mappings {
            areas.cover(self.machine.space(), self.node, mapping)?;
        }
        // What is in front of a hole comes as well, as there, and is not put into the table.
        for mapping in &mappings {
            if permitted.is_err() && mapping.kind != MappingKind::Anonymous {
                touch(mapping.range, want);
            }
            for (part, mirror) in areas.watched(mapping.range) {
                self.end_loans(part, mirror);
                mirror.populate(part, want, |table, pages| {
                    if permitted.is_ok() {
                        table.install(pages);
                    }
                })?;
            }
        }
        permitted
    }

    /// A device that faults on pages gets them as anybody does; those that were its alone are so no more.
    fn end_loans(&self, range: VaRange, mirror: &Mirror<'_, Table>) {
        let mut lent = vec![false; range.pages().get()];
        mirror.look(|table| table.lent(range, &mut lent));
        for (page, _) in range.iter().zip(lent).filter(|(_, lent)| *lent) {
            // What is not there any more is found by whoever asks next.
            let _ = load(page.base(), &mut [0]);
        }
    }

    /// Moves the pages of `range` to the device, and has it read them into `into`. Private anonymous memory can be
    /// moved, pages that were never touched included, and what was written of private mappings of files; pages on other
    /// devices are not.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something is not mapped, may not be read, or is a pool's huge page; [`Error::NotThere`] if
    /// a page could not be moved.
    ///
    /// # Panics
    /// If `into` is not as long as the range.
    pub fn migrate_to_device(&self, range: VaRange, into: &mut [u8]) -> Result<Counts, Error> {
        let own = self.machine.owner(self.node)?;
        let mut areas = self.areas();
        let space = self.machine.space();
        self.detach(range, &space.mappings(range).map_err(|_| Error::NoMemory)?)?;
        let moved = self.each_mapping(range, |mapping| {
            areas.cover(space, self.node, &mapping)?;
            for (part, mirror) in areas.watched(mapping.range) {
                self.settle(part);
                // Those that are the device's alone would stay, and be told of for nothing.
                let mut lent = vec![false; part.pages().get()];
                mirror.look(|table| table.lent(part, &mut lent));
                let leave = self.machine.leave();
                for part in runs(part, &lent, |lent| !lent) {
                    let _ = space.migration(part).to(self.node.index()).run()?;
                }
                drop(leave);
                mirror.populate(part, Want::Nothing, |table, pages| table.install_own(pages, own))?;
            }
            // What is not watched is not moved, and must not be read as if it were.
            areas.forget_plain();
            Ok(())
        });
        moved?;
        let copied = self.copy(&areas, range, PageCount::ZERO, &mut Buffer::Into(into));
        match copied {
            Ok(pages) if pages == range.pages() => Ok(Counts { pages, faults: 0 }),
            Ok(_) | Err(Unreachable) => Err(Error::NotThere),
        }
    }

    /// Makes memory that can be watched of what was written in private mappings of files, if there are any among the
    /// mappings of `range`. Whether it did, so that these are others now.
    fn detach(&self, range: VaRange, mappings: &[ProgramMapping]) -> Result<bool, Error> {
        if !mappings.iter().any(|mapping| mapping.kind == MappingKind::PrivateFile) {
            return Ok(false);
        }
        // What devices store goes past the page table.
        let _leave = self.machine.leave();
        // SAFETY: what a device may be asked about was promised to the machine (`Dmirror::new`).
        let done = unsafe { self.machine.space().detach(range) }.map_err(|_| Error::NoMemory)?;
        Ok(!done.pages.is_zero())
    }

    /// Waits a while until no page of `range` is on its way: a program goes on as soon as its page is there, a moment
    /// before the page can leave again.
    fn settle(&self, range: VaRange) {
        let start = Instant::now();
        while !self.machine.space().is_settled(range) && start.elapsed() < DEFAULT_TIMEOUT {
            std::thread::yield_now();
        }
    }

    /// Moves those pages of `range` home that are on the device, and counts them.
    ///
    /// # Errors
    /// [`Error::Invalid`] as with [`Handle::migrate_to_device`].
    pub fn migrate_to_system(&self, range: VaRange) -> Result<Counts, Error> {
        let own = self.machine.owner(self.node)?;
        let mut areas = self.areas();
        let space = self.machine.space();
        let mut counts = Counts::default();
        let done = self.each_mapping(range, |mapping| {
            // What was watched piece by piece is asked for as one.
            areas.cover(space, self.node, &mapping)?;
            let mut views = [PageView::Absent; BATCH.get()];
            let mut rest = Some(mapping.range);
            while let Some(left) = rest {
                let batch = left.take(BATCH);
                rest = left.skip(batch.pages());
                let views = &mut views[..batch.pages().get()];
                space.snapshot(batch, Some(self.node.index()), views)?;
                for part in runs(batch, views, |view| is_own(*view, own)) {
                    let came = space.recall(part, self.node.index())?.moved;
                    counts.pages = counts.pages.plus(came);
                }
            }
            Ok(())
        });
        areas.forget_plain();
        done.map(|()| counts)
    }

    /// Calls `f` for the mappings of `range`, in order, up to the first place where pages cannot be moved.
    fn each_mapping(
        &self,
        range: VaRange,
        mut f: impl FnMut(ProgramMapping) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut at = range.first();
        for mapping in self.machine.space().mappings(range).map_err(|_| Error::NoMemory)? {
            if mapping.range.first() != at || !mapping.read || mapping.kind == MappingKind::HugePool {
                return Err(Error::Invalid);
            }
            at = mapping.range.end_page();
            f(mapping)?;
        }
        if at == range.end_page() { Ok(()) } else { Err(Error::Invalid) }
    }

    /// What the device would see of the pages of `range`, a byte for each, as the kernel's `HMM_DMIRROR_PROT_*`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the range is no user memory.
    ///
    /// # Panics
    /// If `into` has more or fewer bytes than the range has pages.
    pub fn snapshot(&self, range: VaRange, into: &mut [u8]) -> Result<Counts, Error> {
        assert_eq!(range.pages().get(), into.len(), "one byte for each page");
        let own = self.machine.owner(self.node)?;
        self.settle(range);
        let mut rest = into;
        self.machine.space().segments(range, Some(self.node.index()), |segment| {
            let bytes = rest.split_off_mut(..segment.range().pages().get()).expect("as many as pages");
            // Pages that are alike are so to the device, wherever on it they lie.
            bytes.fill(snapshot::byte(segment.view(), own, self.node.kind()));
        })?;
        Ok(Counts { pages: range.pages(), faults: 0 })
    }

    /// Takes the pages of `range` for the device alone, until somebody else touches them, and has it read them into
    /// `into`.
    ///
    /// # Errors
    /// [`Error::Busy`] if not all of them can be had, whyever; [`Error::NotThere`] if one was touched meanwhile.
    ///
    /// # Panics
    /// If `into` is not as long as the range.
    pub fn exclusive(&self, range: VaRange, into: &mut [u8]) -> Result<Counts, Error> {
        let mut areas = self.areas();
        let (mut mappings, mut permitted) = self.permitted(range, Want::Write)?;
        // A file's own page becomes the process's by being asked for.
        for mapping in mappings.iter().filter(|mapping| mapping.kind == MappingKind::PrivateFile) {
            touch(mapping.range, Want::Write);
        }
        if self.detach(range, &mappings)? {
            (mappings, permitted) = self.permitted(range, Want::Write)?;
        }
        for mapping in &mappings {
            areas.cover(self.machine.space(), self.node, mapping)?;
        }
        let mut taken = PageCount::ZERO;
        // Pages in front of a hole are taken as well, as there, and not put into the table.
        for mapping in &mappings {
            if mapping.kind != MappingKind::Anonymous {
                touch(mapping.range, Want::Write);
            }
            for (part, mirror) in areas.watched(mapping.range) {
                let _leave = self.machine.leave();
                let done =
                    mirror.exclusive(part, |table, pages| table.install_exclusive(pages, permitted.is_ok()));
                taken = taken.plus(done.map_err(|_| Error::Busy)?.pages);
            }
        }
        areas.forget_plain();
        if taken < range.pages() {
            return Err(Error::Busy);
        }
        match self.copy(&areas, range, PageCount::ZERO, &mut Buffer::Into(into)) {
            Ok(pages) if pages == range.pages() => Ok(Counts { pages, faults: 0 }),
            Ok(_) | Err(Unreachable) => Err(Error::NotThere),
        }
    }

    /// Whether a page of `range` is the device's alone.
    pub fn is_exclusive(&self, range: VaRange) -> bool {
        let areas = self.areas();
        let has = |table: &Table, part: VaRange| {
            table.from(part.first())[..part.pages().get()].iter().any(|view| view.is_exclusive())
        };
        areas.watched(range).any(|(part, mirror)| mirror.look(|table| has(table, part)))
    }

    /// Moves every page of the device home, whoever moved it there. The device can be used again.
    ///
    /// # Errors
    /// [`Error::NoMemory`]. Pages that could not be moved stay.
    pub fn release(&self) -> Result<Counts, Error> {
        let done = self.machine.space().evacuate(self.node.index(), None)?;
        Ok(Counts { pages: done.moved, faults: 0 })
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        *self.areas.get_mut().unwrap_or_else(PoisonError::into_inner) = Areas::default();
        // Without memory for it the pages stay where they are, and come home when they are touched.
        let _ = self.release();
    }
}
