//! The simulated address space: what is mapped, present, protected, pinned and poisoned.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::fault::Access;
use uhmm_core::host::{Progress, Stop};

/// What the program did to its mappings; until it is read, every call of the host answers
/// [`Stop::Pending`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The pages are about to be taken away (`MADV_DONTNEED`).
    Remove(VaRange),
    /// The mapping is gone.
    Unmap(VaRange),
    /// The mapping was moved.
    Remap(VaRange, VirtAddr),
}

/// What a touch of a page meets, if not its contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trap {
    /// A fault that the engine resolves.
    Fault(Access),
    /// SIGBUS: the page is poisoned.
    Bus,
    /// SIGSEGV: nothing is mapped there, or not for this access.
    Segv,
}

/// One mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) range: VaRange,
    pub(super) read_only: bool,
    pub(super) locked: bool,
}

/// A present page of the program.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) bytes: Box<[u8]>,
    pub(super) protected: bool,
    pub(super) pinned: bool,
}

impl Page {
    pub(super) fn of(bytes: Box<[u8]>) -> Self {
        Self { bytes, protected: false, pinned: false }
    }
}

/// Memory of ours in which frames lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Slots {
    Arena,
    /// That of a coherent device.
    Device,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Calls up to and with the one that fails, and how.
    pub(super) fail: Option<(u64, Stop)>,
    pub(super) no_move: bool,
    pub(super) calls: u64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) areas: Vec<Area>,
    pub(super) pages: BTreeMap<Vpn, Page>,
    pub(super) poisoned: BTreeSet<Vpn>,
    /// Chunks of the program that one huge page maps.
    pub(super) huge: BTreeSet<usize>,
    /// Arena pages with a frame, and arena chunks whose frame is a huge one.
    pub(super) framed: BTreeSet<usize>,
    pub(super) huge_frames: BTreeSet<usize>,
    /// Pages of a coherent device's memory with a frame.
    pub(super) device_frames: BTreeSet<usize>,
    pub(super) events: VecDeque<Event>,
    pub(super) plan: Plan,
    /// Pages that were copied into the arena.
    pub(super) copied_out: usize,
}

impl State {
    /// Counts a call: `Err` if it is the one to fail, or if events wait to be read.
    pub(super) fn enter(&mut self, minds_events: bool) -> Result<(), Progress> {
        self.plan.calls += 1;
        if let Some((n, stop)) = self.plan.fail.take() {
            if n == 1 {
                return Err(Progress::stopped(PageCount::ZERO, stop));
            }
            self.plan.fail = Some((n - 1, stop));
        }
        if minds_events && !self.events.is_empty() {
            return Err(Progress::stopped(PageCount::ZERO, Stop::Pending));
        }
        Ok(())
    }

    /// Which pages of this memory have a frame.
    pub(super) const fn slots(&self, slots: Slots) -> &BTreeSet<usize> {
        match slots {
            Slots::Arena => &self.framed,
            Slots::Device => &self.device_frames,
        }
    }

    pub(super) const fn slots_mut(&mut self, slots: Slots) -> &mut BTreeSet<usize> {
        match slots {
            Slots::Arena => &mut self.framed,
            Slots::Device => &mut self.device_frames,
        }
    }

    /// Does `step` for the pages of `range` until one of them stops it. As in the kernel, a call that got
    /// part of the way says no more than that it should be repeated.
    pub(super) fn each(
        &mut self,
        range: VaRange,
        mut step: impl FnMut(&mut Self, Vpn, usize) -> Result<(), Stop>,
    ) -> Progress {
        for (n, page) in range.iter().enumerate() {
            if let Err(stop) = step(self, page, n) {
                return Progress::stopped(PageCount::new(n), if n > 0 { Stop::Pending } else { stop });
            }
        }
        Progress::complete(range.pages())
    }

    pub(super) fn area(&self, page: Vpn) -> Option<Area> {
        self.areas.iter().find(|area| area.range.contains(page)).copied()
    }

    /// Whether `page` can be filled; `writable` if the way of filling needs a mapping that may be written.
    pub(super) fn vacant(&self, page: Vpn, writable: bool) -> Result<(), Stop> {
        let area = self.area(page).ok_or(Stop::Unmapped)?;
        if writable && area.read_only {
            return Err(Stop::Refused);
        }
        if self.pages.contains_key(&page) || self.poisoned.contains(&page) {
            return Err(Stop::Present);
        }
        Ok(())
    }

    /// Takes pages away, as the kernel does at the end of `MADV_DONTNEED` and `munmap`.
    pub(super) fn zap(&mut self, range: VaRange) {
        for page in range.iter() {
            self.split_huge(page);
            self.pages.remove(&page);
            self.poisoned.remove(&page);
        }
    }

    pub(super) fn split_huge(&mut self, page: Vpn) {
        self.huge.remove(&page.chunk());
    }

    /// Cuts mappings at the borders of `range` and takes out what lies inside.
    pub(super) fn cut(&mut self, range: VaRange) -> Vec<Area> {
        let (mut inside, mut rest) = (Vec::new(), Vec::new());
        for area in self.areas.drain(..) {
            let Some(common) = area.range.intersect(range) else {
                rest.push(area);
                continue;
            };
            inside.push(Area { range: common, ..area });
            let before = VaRange::of_pages(area.range.first(), common.first().since(area.range.first()));
            let behind = VaRange::of_pages(common.end_page(), area.range.end_page().since(common.end_page()));
            rest.extend([before, behind].into_iter().flatten().map(|range| Area { range, ..area }));
        }
        self.areas = rest;
        inside
    }

    pub(super) fn touch(&self, page: Vpn, write: bool) -> Result<(), Trap> {
        let area = self.area(page).ok_or(Trap::Segv)?;
        if write && area.read_only {
            return Err(Trap::Segv);
        }
        if self.poisoned.contains(&page) {
            return Err(Trap::Bus);
        }
        match self.pages.get(&page) {
            None => Err(Trap::Fault(if write { Access::Write } else { Access::Read })),
            Some(page) if write && page.protected => Err(Trap::Fault(Access::WriteProtected)),
            Some(_) => Ok(()),
        }
    }
}

/// Whether `range` is exactly one chunk.
pub(super) fn is_chunk(range: VaRange) -> bool {
    range.first().in_chunk() == 0 && range.pages().get() == CHUNK_PAGES
}

/// A page in which every word tells `value` and where it stands; zeros for 0.
pub(super) fn page_of(value: u64) -> Box<[u8]> {
    let mut bytes = vec![0; PAGE_SIZE].into_boxed_slice();
    if value != 0 {
        for (n, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
            word.copy_from_slice(&value.wrapping_mul(2 * n + 1).to_le_bytes());
        }
    }
    bytes
}

/// The value that a page was made of.
///
/// # Panics
/// If the page is a mixture: no way of moving pages may ever tear one.
pub(super) fn value_of(bytes: &[u8]) -> u64 {
    let value = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    assert_eq!(bytes, &*page_of(value), "the page is torn");
    value
}
