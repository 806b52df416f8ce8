//! The arena: slots, their descriptors, and the pool of free ones.

use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;

use uhmm_addr::{Geometry, PageCount, Pfn, VaRange, VirtAddr, Vpn};

use super::bitmap::Bitmap;
use super::run::{Empty, Framed, Run, RunState};
use crate::sync::{AtomicU32, AtomicU64, Gate, Ordering, Park, zeroed};

/// Number of a slot in its arena.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Slot(u32);

impl Slot {
    /// The slot with this number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The slot's number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Who has a frame on loan: a mirror's number, unlike that of any other mirror of its space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Holder(pub(crate) u64);

/// What is known about a slot while somebody owns it. All zero is a free slot.
#[derive(Debug, Default)]
struct Descriptor {
    /// 0 in the pool, 1 owned.
    count: AtomicU32,
    /// The virtual page whose contents lie here.
    page: AtomicU64,
    /// 1 + the pfn of a device page with the same contents; 0 for none.
    copy: AtomicU64,
    /// Who has the frame on loan, if the word says that somebody has.
    holder: AtomicU64,
}

struct Pool {
    empty: Bitmap,
    framed: Bitmap,
}

/// A range of addresses that holds frames of uhmm's own.
pub struct Arena {
    base: VirtAddr,
    /// Pages in a slot: an arena of 2 MiB frames hands out whole blocks.
    unit: Geometry,
    descriptors: Box<[Descriptor]>,
    pool: UnsafeCell<Pool>,
    gate: Gate,
}

// SAFETY: the pool is touched under `gate` held for writing only; the rest is atomics and constants.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("base", &self.base).field("unit", &self.unit).finish_non_exhaustive()
    }
}

impl Arena {
    /// An arena over `range`, whose pages are absent: every slot is empty. With `unit` 2M, range must be
    /// aligned to it.
    ///
    /// # Panics
    /// If the range is not a multiple of the unit or has more than 2^32 slots.
    pub fn new(range: VaRange, unit: Geometry) -> Self {
        assert!(range.start().is_aligned_to(unit.bytes()) && range.bytes().is_multiple_of(unit.bytes()));
        let slots = range.pages().get() >> unit.order();
        assert!(u32::try_from(slots << unit.order()).is_ok(), "too many slots for a 32-bit number");
        let mut empty = Bitmap::new(slots);
        empty.insert(0, slots);
        let pool = Pool { empty, framed: Bitmap::new(slots) };
        Self {
            base: range.start(),
            unit,
            // SAFETY: all bytes zero are a descriptor: three atomic integers.
            descriptors: unsafe { zeroed(slots << unit.order()) },
            pool: UnsafeCell::new(pool),
            gate: Gate::new(),
        }
    }

    /// The size of frame that lies here.
    pub const fn unit(&self) -> Geometry {
        self.unit
    }

    /// The arena's addresses.
    pub fn range(&self) -> VaRange {
        VaRange::of_pages(self.base.page(), PageCount::new(self.descriptors.len()))
            .expect("an arena is never empty")
    }

    /// The address of a slot.
    pub const fn address(&self, slot: Slot) -> VirtAddr {
        VirtAddr::new(self.base.get() + ((slot.0 as usize) << uhmm_addr::PAGE_SHIFT))
    }

    fn with_pool<P: Park + ?Sized, R>(&self, park: &P, f: impl FnOnce(&mut Pool) -> R) -> R {
        let _alone = self.gate.write(park);
        // SAFETY: the gate is held for writing, so that no other reference to the pool exists.
        f(unsafe { &mut *self.pool.get() })
    }

    /// Free frames in the pool, in pages.
    pub fn free_frames<P: Park + ?Sized>(&self, park: &P) -> PageCount {
        PageCount::new(self.with_pool(park, |pool| pool.framed.count()) << self.unit.order())
    }

    /// Slots in the pool that have no frame, in pages.
    pub fn free_slots<P: Park + ?Sized>(&self, park: &P) -> PageCount {
        PageCount::new(self.with_pool(park, |pool| pool.empty.count()) << self.unit.order())
    }

    /// Up to `most` consecutive slots without frames.
    pub fn take_empty<'a, P: Park + ?Sized>(
        &'a self,
        park: &'a P,
        most: PageCount,
    ) -> Option<Run<'a, Empty, P>> {
        self.take(park, most, |pool| &mut pool.empty)
    }

    /// Up to `most` consecutive free frames.
    pub fn take_framed<'a, P: Park + ?Sized>(
        &'a self,
        park: &'a P,
        most: PageCount,
    ) -> Option<Run<'a, Framed, P>> {
        self.take(park, most, |pool| &mut pool.framed)
    }

    fn take<'a, S: RunState, P: Park + ?Sized>(
        &'a self,
        park: &'a P,
        most: PageCount,
        kind: impl FnOnce(&mut Pool) -> &mut Bitmap,
    ) -> Option<Run<'a, S, P>> {
        let units = most.get() >> self.unit.order();
        let (first, len) = self.with_pool(park, |pool| kind(pool).take_run(units.max(1)))?;
        let run = Run::forge(self, park, Slot((first << self.unit.order()) as u32), len << self.unit.order());
        for slot in run.slots() {
            // Out of the pool, the slot is ours alone: no read-modify-write is needed.
            let count = &self.descriptor(slot).count;
            debug_assert_eq!(count.load(Ordering::Relaxed), 0, "slot {} was in the pool and owned", slot.0);
            count.store(1, Ordering::Relaxed);
        }
        Some(run)
    }

    /// Gives slots back. Called by `Run` when it is dropped.
    pub(super) fn put<P: Park + ?Sized>(&self, park: &P, first: Slot, len: usize, framed: bool) {
        for slot in first.0..first.0 + len as u32 {
            let descriptor = self.descriptor(Slot(slot));
            descriptor.copy.store(0, Ordering::Relaxed);
            let before = descriptor.count.load(Ordering::Relaxed);
            debug_assert_eq!(before, 1, "slot {slot} was given back by somebody who did not own it");
            // The pool's gate orders this before whoever takes the slot next.
            descriptor.count.store(0, Ordering::Relaxed);
        }
        let (unit, units) = (first.0 as usize >> self.unit.order(), len >> self.unit.order());
        self.with_pool(park, |pool| {
            if framed { pool.framed.insert(unit, units) } else { pool.empty.insert(unit, units) }
        });
    }

    /// Makes a run of a slot that a page word owned, with a frame in it.
    ///
    /// To be called by whoever took the slot out of the word by a transition; calling it otherwise is a bug
    /// that the descriptor's count shows in debug builds.
    pub(crate) fn adopt<'a, P: Park + ?Sized>(&'a self, park: &'a P, slot: Slot) -> Run<'a, Framed, P> {
        debug_assert_eq!(self.descriptor(slot).count.load(Ordering::Relaxed), 1);
        Run::forge(self, park, slot, self.unit.pages().get())
    }

    /// As [`Arena::adopt`], of `pages` slots side by side from `first` on.
    pub(crate) fn adopt_run<'a, P: Park + ?Sized>(
        &'a self,
        park: &'a P,
        first: Slot,
        pages: PageCount,
    ) -> Run<'a, Framed, P> {
        let slots = first.get()..first.get() + pages.get() as u32;
        debug_assert!(
            { slots }.all(|slot| self.descriptor(Slot(slot)).count.load(Ordering::Relaxed) == 1),
            "a slot was adopted that nobody owned"
        );
        Run::forge(self, park, first, pages.get())
    }

    fn descriptor(&self, slot: Slot) -> &Descriptor {
        &self.descriptors[slot.0 as usize]
    }

    /// Notes whose contents an owned slot holds, and where else they are.
    pub(crate) fn note(&self, slot: Slot, page: Vpn, copy: Option<Pfn>) {
        let descriptor = self.descriptor(slot);
        descriptor.page.store(page.get() as u64, Ordering::Relaxed);
        descriptor.copy.store(copy.map_or(0, |pfn| pfn.get() + 1), Ordering::Relaxed);
    }

    /// The page whose contents an owned slot holds.
    pub(crate) fn page_of(&self, slot: Slot) -> Vpn {
        Vpn::new(self.descriptor(slot).page.load(Ordering::Relaxed) as usize)
    }

    /// Notes who gets the frame of an owned slot on loan.
    pub(crate) fn lend(&self, slot: Slot, holder: Holder) {
        self.descriptor(slot).holder.store(holder.0, Ordering::Relaxed);
    }

    /// Who has the frame of a slot on loan, of which a page word said that somebody has.
    pub(crate) fn holder_of(&self, slot: Slot) -> Holder {
        Holder(self.descriptor(slot).holder.load(Ordering::Relaxed))
    }

    /// The page moved to another address (`mremap`).
    pub(crate) fn renote(&self, slot: Slot, page: Vpn) {
        self.descriptor(slot).page.store(page.get() as u64, Ordering::Relaxed);
    }

    /// Takes the note of a device page with the same contents out of an owned slot.
    pub(crate) fn take_copy(&self, slot: Slot) -> Option<Pfn> {
        self.copy_of(slot)?;
        self.descriptor(slot).copy.swap(0, Ordering::Relaxed).checked_sub(1).map(Pfn::new)
    }

    /// The device page with the same contents, if there is one.
    pub(crate) fn copy_of(&self, slot: Slot) -> Option<Pfn> {
        self.descriptor(slot).copy.load(Ordering::Relaxed).checked_sub(1).map(Pfn::new)
    }
}

/// Keeps the unused parameter of [`Run`] covariant.
pub(super) type StateMarker<S> = PhantomData<fn() -> S>;
