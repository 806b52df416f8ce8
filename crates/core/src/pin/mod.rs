//! Pins: pages that stay in RAM because somebody outside counts on them where they are.
//!
//! What    [`Mm::pin`] brings the pages of a range home and makes them unmovable; [`Mm::unpin`] ends that.
//!         [`Mm::pin_in_place`] lets pages that a coherent device has mapped stay there.
//!         [`Mm::pins`] lists who holds what, and where in the source it was taken.
//! Why     buffers that a device, io_uring or a driver transfers to and from behind the page table's back. The kernel
//!         has `pin_user_pages` (FOLL_PIN) for it; it refuses to move such pages as well, but only tells after
//!         it was asked for each.
//! How     what is away comes home, holes are filled, and one touch by the system (`MADV_POPULATE_WRITE`) makes every page
//!         the process's own. A flag in each page's word, which whoever wants to move the page looks at, and a list of
//!         holders. A page has the flag as long as any holder's range has the page; those of whole chunks may have it for
//!         longer, so that they can be pinned again in no time (`pin::ready`).
//! Owns    a [`Pin`] is a debt: whoever got it gives it back to `unpin`.
//! Locks   one over the list, and over the clearing of flags; inside it nothing but waits for pages in flight, and the
//!         locks under which a page is taken from where a coherent device has it mapped. A
//!         flag is set outside of it, after its holder is on the list: who clears sees the holder or comes before it.
//! Fails   with a [`PinError`]; then nothing is pinned, though some pages may have come home.

mod ready;

use alloc::vec::Vec;
use core::panic::Location;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, VirtAddr, Vpn};

use crate::fault::{Access, Fault, Resolution, Scratch};
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::sync::locked::Locked;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use ready::{Changes, Moment, Ready};

/// Why a range could not be pinned, and what the caller can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PinError {
    /// No page may be taken from the system now: wait for room, then try again.
    #[error("there is no room in RAM for the page at {0}")]
    Starved(VirtAddr),
    /// An event is yet to be read: let that happen, then try again.
    #[error("the mapping at {0} is changing")]
    Pending(VirtAddr),
    /// The page is lost; whoever reads it gets SIGBUS.
    #[error("the page at {0} is lost")]
    Poisoned(VirtAddr),
    /// Not managed, or not mapped any more.
    #[error("there is no managed page at {0}")]
    Unmanaged(VirtAddr),
    /// The page is on a coherent device and cannot leave it: somebody else has pinned it there.
    #[error("the page at {0} is held on its device")]
    Busy(VirtAddr),
    /// The mapping cannot be written to.
    #[error("{0} cannot be pinned for writing: it cannot be written to")]
    ReadOnly(VaRange),
}

/// What a pin is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinFor {
    /// Others read the pages.
    Read,
    /// Others write to them.
    Write,
}

/// How long a pin is to last, as far as the pages of coherent devices are concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinTerm {
    /// As long as its holder likes: in RAM, so that the device can be emptied (`FOLL_LONGTERM`).
    Long,
    /// A transfer: where the page is mapped.
    Short,
}

/// A range that is pinned. To be given back to [`Mm::unpin`].
#[must_use = "pages stay pinned until this is given back"]
#[derive(PartialEq, Eq, Debug)]
pub struct Pin {
    number: u64,
    range: VaRange,
}

/// Where in the source something was done.
type Place = &'static Location<'static>;

/// Who holds a pin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holder {
    number: u64,
    /// The pages.
    pub range: VaRange,
    /// What for.
    pub purpose: PinFor,
    /// How long.
    pub term: PinTerm,
    /// Where it was taken.
    pub place: Place,
}

/// The holders of pins of one address space.
#[derive(Debug)]
pub(crate) struct Pins {
    list: Locked<List>,
    next: AtomicU64,
    /// Whether chunks are ready, for whoever would take the lock for that.
    ready: AtomicUsize,
    changes: Changes,
}

#[derive(Debug, Default)]
struct List {
    holders: Vec<Holder>,
    ready: Ready,
}

impl List {
    /// The parts of `range` that nobody holds, in order.
    fn unheld(&self, range: VaRange) -> Vec<VaRange> {
        let mut unheld = alloc::vec![range];
        for held in self.holders.iter().filter_map(|holder| holder.range.intersect(range)) {
            unheld = unheld
                .into_iter()
                .flat_map(|part| {
                    let before = held.first().since(part.first()).at_most(part.pages());
                    let behind = part.skip(held.end_page().since(part.first()));
                    [VaRange::of_pages(part.first(), before), behind]
                })
                .flatten()
                .collect();
        }
        unheld
    }
}

impl Pins {
    pub(crate) fn new() -> Self {
        Self {
            list: Locked::new(List::default()),
            next: AtomicU64::new(0),
            ready: AtomicUsize::new(0),
            changes: Changes::new(),
        }
    }

    fn new_holder(&self, range: VaRange, purpose: PinFor, term: PinTerm, place: Place) -> Holder {
        Holder { number: self.next.fetch_add(1, Ordering::Relaxed), range, purpose, term, place }
    }
}

/// Looks at a page that does not come to rest before its events are read, or before it is somebody else's turn.
const LOOKS: usize = 1000;

impl<H: Host> Mm<H> {
    /// Pins `range`: its pages are in RAM when this returns, and stay where they are until the pin is given back.
    /// Absent pages are filled; for [`PinFor::Write`], pages of which the device has a copy lose it, and pages that are
    /// shared since a fork become the process's own. To be called with no lock held.
    #[track_caller]
    pub fn pin(&self, range: VaRange, purpose: PinFor, scratch: &mut Scratch) -> Result<Pin, PinError> {
        self.pin_for(range, purpose, PinTerm::Long, scratch)
    }

    /// As [`Mm::pin`], for a while: pages that are mapped in place on a coherent device stay there (`pin_user_pages`
    /// without `FOLL_LONGTERM`).
    #[track_caller]
    pub fn pin_in_place(
        &self,
        range: VaRange,
        purpose: PinFor,
        scratch: &mut Scratch,
    ) -> Result<Pin, PinError> {
        self.pin_for(range, purpose, PinTerm::Short, scratch)
    }

    /// As [`Mm::pin`] or [`Mm::pin_in_place`], by `term`.
    #[track_caller]
    pub fn pin_for(
        &self,
        range: VaRange,
        purpose: PinFor,
        term: PinTerm,
        scratch: &mut Scratch,
    ) -> Result<Pin, PinError> {
        if let Some(pin) = self.pin_again(range, purpose, term) {
            return Ok(pin);
        }
        let holder = self.pins.new_holder(range, purpose, term, Location::caller());
        self.pins.list.lock(&self.host).holders.push(holder);
        let pin = Pin { number: holder.number, range };
        let whole = range.chunks().filter(|chunk| chunk.pages().get() == CHUNK_PAGES);
        let since: Vec<(VaRange, Moment)> =
            whole.map(|chunk| (chunk, self.pins.changes.now(chunk.first()))).collect();
        // From here on nothing leaves; what is leaving is waited for.
        self.flag_pinned(range, true);
        let brought = self.bring_pinned(range, purpose, term, scratch);
        match brought.and_then(|()| self.own_pinned(range, purpose)) {
            Ok(()) => {
                if purpose == PinFor::Write && self.host.hears() {
                    self.note_ready(&since);
                }
                Ok(pin)
            }
            Err(error) => {
                self.unpin(pin);
                Err(error)
            }
        }
    }

    /// Gives a pin back. Pages that nobody else has pinned may move again.
    pub fn unpin(&self, pin: Pin) {
        let mut list = self.pins.list.lock(&self.host);
        if let Some(at) = list.holders.iter().rposition(|holder| holder.number == pin.number) {
            list.holders.remove(at);
        }
        for part in pin.range.chunks().filter(|part| !list.ready.keeps(*part)) {
            list.unheld(part).into_iter().for_each(|unheld| self.flag_pinned(unheld, false));
        }
    }

    /// Pins `range` if all of it was pinned before, in whole chunks and for writing, and nothing happened to it since: as
    /// [`Mm::pin_for`] does, without a look at any page. Otherwise nothing is done.
    #[track_caller]
    pub fn pin_again(&self, range: VaRange, purpose: PinFor, term: PinTerm) -> Option<Pin> {
        if self.pins.ready.load(Ordering::Relaxed) == 0 {
            return None;
        }
        // What this thread gave up a moment ago: its call went on when the event was read, before it was applied.
        self.wait_for_events();
        let mut list = self.pins.list.lock(&self.host);
        if !list.ready.has(range, &self.pins.changes) {
            return None;
        }
        let holder = self.pins.new_holder(range, purpose, term, Location::caller());
        list.holders.push(holder);
        Some(Pin { number: holder.number, range })
    }

    /// Remembers the chunks that have just been pinned for writing, with all their pages in RAM.
    fn note_ready(&self, since: &[(VaRange, Moment)]) {
        let mut list = self.pins.list.lock(&self.host);
        for (chunk, moment) in since {
            let in_ram = |part: VaRange| {
                self.table.words(part).all(|word| word.is_at_home() && word.is_pinned() && !word.is_tracked())
            };
            if self.pins.changes.now(chunk.first()) == *moment && self.table.used(*chunk).all(in_ram) {
                list.ready.note(*chunk, *moment);
                self.pins.ready.store(1, Ordering::Relaxed);
            }
        }
    }

    /// Lets go of the pages of `range` that nobody has pinned any more and that were left as if they were. For whoever
    /// is going to move some: with no lock held, and no claim.
    pub(crate) fn settle_pins(&self, range: VaRange) {
        if self.pins.ready.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut list = self.pins.list.lock(&self.host);
        while let Some(chunk) = list.ready.take(range) {
            list.unheld(chunk).into_iter().for_each(|unheld| self.flag_pinned(unheld, false));
        }
        self.pins.ready.store(usize::from(!list.ready.is_empty()), Ordering::Relaxed);
    }

    /// The same, of pages whose mapping moves, under the layout lock held for writing: nothing is waited for. Pages that
    /// keep their flag for that stay in RAM.
    pub(crate) fn settle_moved_pins(&self, range: VaRange) {
        if self.pins.ready.load(Ordering::Relaxed) == 0 {
            return;
        }
        let Some(list) = self.pins.list.try_lock(&self.host) else { return };
        // Nothing is allocated or freed: a thread that forks holds the allocator's locks until its event is read. The
        // chunks stay on the list, out of date by the count of changes.
        for part in range.chunks().filter(|part| list.ready.keeps(*part)) {
            let unheld = |page: &Vpn| !list.holders.iter().any(|holder| holder.range.contains(*page));
            for page in part.iter().filter(unheld) {
                self.table.entry(page).annotate(|word| word.with_pinned(false));
            }
        }
    }

    /// The program has changed pages of `range`, as their words say by now: what is pinned next there is to be looked at.
    pub(crate) fn count_change(&self, range: VaRange) {
        self.pins.changes.count(range);
    }

    /// Pins `range` in RAM, or lifts that: pinned pages are never moved out. Pages that are away stay away
    /// until they are touched.
    pub fn set_pinned(&self, range: VaRange, pinned: bool) {
        self.flag_pinned(range, pinned);
        self.count_change(range);
    }

    fn flag_pinned(&self, range: VaRange, pinned: bool) {
        for page in range.iter() {
            let entry = self.table.entry(page);
            while !entry.annotate(|word| word.with_pinned(pinned)) {
                self.wait_in_flight(page);
            }
        }
    }

    /// Who holds pins now.
    pub fn pins(&self) -> Vec<Holder> {
        self.pins.list.lock(&self.host).holders.clone()
    }

    /// Brings the pinned pages of `range` home, each in a state in which it can be used for `purpose`.
    fn bring_pinned(
        &self,
        range: VaRange,
        purpose: PinFor,
        term: PinTerm,
        scratch: &mut Scratch,
    ) -> Result<(), PinError> {
        let is_plain = |word: PageWord| word.is_at_home() && !(purpose == PinFor::Write && word.is_tracked());
        // All of them have words: they were flagged.
        let plain = range.chunks().all(|part| self.table.words(part).all(is_plain));
        if !plain {
            // What can come in large pieces does.
            self.prefetch(range, scratch);
        }
        let mut found = [range; 32];
        let mut rest = Some(range);
        while let Some(part) = rest {
            // Nothing but what is not there at all has to be filled by us: the system has the others by a touch.
            let (count, end) = self.host.holes(part, &mut found);
            for page in found[..count].iter().flat_map(|hole| hole.iter()) {
                self.bring_pinned_page(page, false, purpose, term, scratch)?;
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        if !plain {
            for page in range.iter().filter(|page| !is_plain(self.table.entry(*page).load())) {
                self.bring_pinned_page(page, true, purpose, term, scratch)?;
            }
        }
        Ok(())
    }

    /// Pages shared since a fork, and the page of zeros, are replaced by the first store: now, and not under whoever
    /// transfers to them.
    fn own_pinned(&self, range: VaRange, purpose: PinFor) -> Result<(), PinError> {
        let write = purpose == PinFor::Write;
        match self.host.touch(range, write).stop {
            Stop::Complete => Ok(()),
            Stop::Pending => Err(PinError::Pending(range.start())),
            Stop::Unmapped => Err(PinError::Unmanaged(range.start())),
            _ if write => Err(PinError::ReadOnly(range)),
            // Present, as far as can be known.
            _ => Ok(()),
        }
    }

    /// Takes a page that we have pinned from where it is mapped in place, unless somebody has pinned it there. Under the
    /// lock of the list: whoever pins it there comes before, and is found, or after, and finds it in RAM.
    fn take_off_for_pin(&self, page: Vpn) -> Result<(), PinError> {
        let list = self.pins.list.lock(&self.host);
        if list.holders.iter().any(|holder| holder.term == PinTerm::Short && holder.range.contains(page)) {
            return Err(PinError::Busy(page.base()));
        }
        match self.take_off_pinned(page).stop {
            Stop::Busy | Stop::Refused if self.table.entry(page).load().state() == State::Coherent => {
                Err(PinError::Busy(page.base()))
            }
            // Gone, or to be tried again: the next look tells.
            _ => Ok(()),
        }
    }

    fn bring_pinned_page(
        &self,
        page: Vpn,
        mut present: bool,
        purpose: PinFor,
        term: PinTerm,
        scratch: &mut Scratch,
    ) -> Result<(), PinError> {
        let (addr, write) = (page.base(), purpose == PinFor::Write);
        for _ in 0..LOOKS {
            let word = self.table.get(page).ok_or(PinError::Unmanaged(addr))?.load();
            let access = match word.state() {
                State::Poisoned => return Err(PinError::Poisoned(addr)),
                State::Moving => {
                    self.wait_in_flight(page);
                    continue;
                }
                State::Empty | State::Resident if present && !(write && word.is_tracked()) => return Ok(()),
                State::Empty | State::Resident if present => Access::WriteProtected,
                State::Coherent if present && term == PinTerm::Short => return Ok(()),
                State::Coherent if present => {
                    self.take_off_for_pin(page)?;
                    self.wait_for_events();
                    present = false;
                    continue;
                }
                _ if write => Access::Write,
                _ => Access::Read,
            };
            match self.resolve(Fault { addr, access, ours: false }, scratch) {
                Resolution::Resolved(PageCount::ZERO) => {
                    // There already, or not mapped: a second look at the page itself tells.
                    present = self.is_present(page);
                }
                Resolution::Resolved(_) => present = true,
                Resolution::InFlight => self.wait_in_flight(page),
                // Whoever reads the events holds the lock meanwhile.
                Resolution::Pending => self.wait_for_events(),
                Resolution::Starved => return Err(PinError::Starved(addr)),
                Resolution::Poisoned(_) => return Err(PinError::Poisoned(addr)),
                Resolution::Unmanaged => return Err(PinError::Unmanaged(addr)),
            }
        }
        Err(PinError::Pending(addr))
    }
}
