//! Notifiers: how whoever keeps a copy of part of the page table learns that it is about to be wrong (rule R5).
//!
//! What    [`Notifiers`], the subscriptions of one address space (the kernel's `mmu_interval_notifier`):
//!         [`Notifiers::subscribe`] for a range of pages; [`Notifiers::begin`] tells every subscriber of a range
//!         that it changes now, until the [`Invalidation`] is dropped; [`Subscription::read_begin`] and
//!         [`Ticket::is_stale`] are the collision-retry lock between the two.
//! Why     what was collected before a change must not be installed after it. A subscriber notes the change's
//!         number under the lock that also protects its copy; whoever wants to install what he collected holds
//!         that lock and compares.
//! How     one word holds the number of changes under way, whether one of them met a subscriber, and a generation.
//!         A change that meets one makes the number of its callbacks the odd `2 * generation + 1`; the end of the
//!         last change that is under way begins a new generation. A reader whose subscription has the number of
//!         changes that are still under way waits for their end.
//! Owns    subscriptions are shared between the tree and their holders. Nobody owns the pages.
//! Locks   `gate` for reading while callbacks run, for writing while the tree changes: to unsubscribe waits out
//!         running callbacks, and must not be called from one. Callbacks take the mirror's lock, inside the gate;
//!         nobody who holds that lock touches managed memory, or begins a change.
//! Fails   a change that may not block is refused by any subscriber that would have to ([`WouldBlock`]); those that
//!         were told before it see an end without a change, which costs them a retry.

mod tree;

#[cfg(all(test, loom))]
mod loom;
#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::cell::UnsafeCell;
use core::fmt;

use uhmm_addr::{Pfn, VaRange};

use crate::sync::{AtomicU32, AtomicU64, Gate, Ordering, Park};
use tree::{Node, Tree};

/// What is about to happen to a range (the kernel's `enum mmu_notifier_event`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The mapping goes away.
    Unmap,
    /// Pages go away or are replaced; the mapping stays.
    Clear,
    /// The mapping's protection changes.
    Protect,
    /// Pages become shared or write-protected: after fork, or to notice writes.
    ProtectPage,
    /// Pages move to or from a device. The owner's own pages are not told, see [`Change::owner`].
    Migrate,
    /// Access by a device alone begins or ends.
    Exclusive,
    /// Pages are marked as not written.
    SoftDirty,
    /// The address space comes to its end.
    Release,
}

/// Whose pages these are, and who brings a change about, so that a driver can pass over its own (the kernel's
/// `pgmap->owner` and `range->owner`).
///
/// Drivers choose their numbers, below [`Owner::FIRST_OWN`]; devices that share a coherent link may share one.
/// A pagemap of which nothing is said has one for itself, from there on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner(pub u64);

impl Owner {
    /// The first number that belongs to pagemaps that have an owner to themselves.
    pub const FIRST_OWN: u64 = 1 << 63;

    /// The owner that a pagemap has to itself: no two ranges of a machine begin at one pfn, and every process that has
    /// the pagemap has the same one.
    pub(crate) const fn of_own(start: Pfn) -> Self {
        Self(Self::FIRST_OWN | start.get())
    }
}

/// A change, as subscribers are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The pages.
    pub range: VaRange,
    /// What happens to them.
    pub event: Event,
    /// Whose doing it is, for [`Event::Migrate`] and [`Event::Exclusive`].
    pub owner: Option<Owner>,
    /// Whether a subscriber may wait for its lock.
    pub may_block: bool,
}

impl Change {
    /// A change that may block and is nobody's.
    pub const fn new(range: VaRange, event: Event) -> Self {
        Self { range, event, owner: None, may_block: true }
    }

    /// The same, as the doing of `owner`.
    pub const fn by(self, owner: Owner) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// The same, for a caller that cannot wait.
    pub const fn without_blocking(self) -> Self {
        Self { may_block: false, ..self }
    }
}

/// A subscriber would have had to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a subscriber is busy; try again, or let the change block")
    }
}

impl core::error::Error for WouldBlock {}

/// Who is told of changes.
pub trait Subscriber: Send + Sync {
    /// Pages of the subscription are about to change. Takes the lock that protects the subscriber's copy, marks
    /// the change under it ([`Mark::set`]), and drops what the copy says about the pages.
    ///
    /// Runs in whatever thread changes the pages, fault handlers included: it must not allocate, touch managed
    /// memory, or call back into the notifiers.
    ///
    /// # Errors
    /// [`WouldBlock`], only if the change may not block.
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock>;
}

/// The right and duty to mark a change, under the subscriber's lock.
#[must_use = "a change that is not marked goes unnoticed by whoever is collecting"]
pub struct Mark<'a> {
    sequence: &'a AtomicU64,
    now: u64,
    park: &'a dyn Park,
}

impl fmt::Debug for Mark<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mark").field("now", &self.now).finish_non_exhaustive()
    }
}

impl<'a> Mark<'a> {
    /// How the thread that is changing pages sleeps, for a subscriber whose lock is one of this crate's.
    pub const fn park(&self) -> &'a dyn Park {
        self.park
    }

    /// Makes every ticket of before stale. To be called with the lock held under which tickets are checked.
    pub fn set(self) {
        self.sequence.store(self.now, Ordering::Release);
    }
}

struct Entry {
    /// Number of the last change that met it; odd.
    sequence: AtomicU64,
    subscriber: Arc<dyn Subscriber>,
}

/// In the state: changes that are under way.
const ACTIVE: u64 = (1 << 24) - 1;
/// In the state: one of them met a subscriber, or may have.
const MET: u64 = 1 << 24;
const GENERATION: u32 = 25;

/// In the word of ends.
const WAITED: u32 = 1;
const ONE_END: u32 = 2;

const fn number(state: u64) -> u64 {
    2 * (state >> GENERATION) + 1
}

/// The subscriptions of one address space.
pub struct Notifiers {
    state: AtomicU64,
    /// Ends of generations, and whether anybody waits for the next one.
    ends: AtomicU32,
    ids: AtomicU64,
    gate: Gate,
    tree: UnsafeCell<Tree<Arc<Entry>>>,
}

// SAFETY: the tree is read under `gate` held for reading and changed under `gate` held for writing; subscribers are
// `Send + Sync`; the rest is atomics.
unsafe impl Send for Notifiers {}
// SAFETY: as above.
unsafe impl Sync for Notifiers {}

impl fmt::Debug for Notifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load(Ordering::Relaxed);
        f.debug_struct("Notifiers")
            .field("active", &(state & ACTIVE))
            .field("generation", &(state >> GENERATION))
            .finish_non_exhaustive()
    }
}

impl Default for Notifiers {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifiers {
    /// Nobody subscribed.
    pub fn new() -> Self {
        Self {
            // The first generation is 1, so that what was never met can have a number of an earlier one.
            state: AtomicU64::new(1 << GENERATION),
            ends: AtomicU32::new(0),
            ids: AtomicU64::new(0),
            gate: Gate::new(),
            tree: UnsafeCell::new(Tree::new()),
        }
    }

    /// Tells `subscriber` of every change of pages of `range`, until the subscription is dropped.
    pub fn subscribe<'a, P: Park + ?Sized>(
        &'a self,
        park: &'a P,
        range: VaRange,
        subscriber: Arc<dyn Subscriber>,
    ) -> Subscription<'a, P> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry { sequence: AtomicU64::new(0), subscriber });
        let node = Node::new(range, id, entry.clone());
        let _alone = self.gate.write(park);
        // Which pages the changes under way are about is not known: they may be about these.
        let mut state = self.state.load(Ordering::Acquire);
        while state & ACTIVE > 0 && state & MET == 0 {
            match self.state.compare_exchange(state, state | MET, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => state |= MET,
                Err(now) => state = now,
            }
        }
        let sequence = if state & ACTIVE > 0 { number(state) } else { number(state) - 2 };
        entry.sequence.store(sequence, Ordering::Relaxed);
        // SAFETY: the gate is held for writing.
        unsafe { (*self.tree.get()).insert(node) };
        Subscription { notifiers: self, park, range, id, entry }
    }

    /// Tells every subscriber of the change's pages that they change from now on, until the guard is dropped.
    ///
    /// Several changes, also of the same pages, may be under way at once, in one thread or many.
    ///
    /// # Errors
    /// [`WouldBlock`], if the change may not block and a subscriber would have to. Nothing may change then.
    pub fn begin<'a, P: Park>(
        &'a self,
        park: &'a P,
        change: &Change,
    ) -> Result<Invalidation<'a, P>, WouldBlock> {
        self.state.fetch_add(1, Ordering::AcqRel);
        // From here on dropped, whatever comes.
        let under_way = Invalidation { notifiers: self, park };
        let _shared = self.gate.read(park);
        let mut outcome = Ok(());
        // SAFETY: the gate is held for reading: the tree does not change.
        unsafe { &*self.tree.get() }.overlapping(change.range, |_, entry| {
            if outcome.is_ok() {
                let before = self.state.fetch_or(MET, Ordering::AcqRel);
                let mark = Mark { sequence: &entry.sequence, now: number(before), park };
                outcome = entry.subscriber.invalidate(change, mark);
            }
        });
        outcome.map(|()| under_way)
    }

    /// Tells everybody that the address space comes to its end (the kernel's `exit_mmap`).
    pub fn release<P: Park>(&self, park: &P) {
        let everything = VaRange::of_pages(uhmm_addr::Vpn::new(0), uhmm_addr::PageCount::new(1 << 52));
        let change = everything.map(|range| Change::new(range, Event::Release));
        drop(change.map(|change| self.begin(park, &change)));
    }

    fn end<P: Park + ?Sized>(&self, park: &P) {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let last = state & ACTIVE == 1 && state & MET != 0;
            let next = if last { ((state >> GENERATION) + 1) << GENERATION } else { state - 1 };
            match self.state.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) if last => break,
                Ok(_) => return,
                Err(now) => state = now,
            }
        }
        let mut ends = self.ends.load(Ordering::Relaxed);
        while let Err(now) = self.ends.compare_exchange_weak(
            ends,
            (ends & !WAITED).wrapping_add(ONE_END),
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            ends = now;
        }
        if ends & WAITED != 0 {
            park.unpark(&self.ends);
        }
    }

    /// Waits until the changes that have this number are over.
    fn wait_out<P: Park + ?Sized>(&self, park: &P, sequence: u64) {
        let under_way = || {
            let state = self.state.load(Ordering::Acquire);
            state & MET != 0 && number(state) == sequence
        };
        while under_way() {
            // An end that does not see the flag was before this step, and is seen by the look after it.
            let seen = self.ends.fetch_or(WAITED, Ordering::AcqRel) | WAITED;
            if under_way() {
                park.park(&self.ends, seen);
            }
        }
    }
}

/// A change under way. Ends when this is dropped, by whichever thread.
#[must_use = "the change is over when this is dropped"]
pub struct Invalidation<'a, P: Park + ?Sized> {
    notifiers: &'a Notifiers,
    park: &'a P,
}

impl<P: Park + ?Sized> fmt::Debug for Invalidation<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation").finish_non_exhaustive()
    }
}

impl<P: Park + ?Sized> Drop for Invalidation<'_, P> {
    fn drop(&mut self) {
        self.notifiers.end(self.park);
    }
}

/// A range that somebody is told about. Dropped, it waits until no callback runs, and no other one begins.
#[must_use = "nobody is told any more when this is dropped"]
pub struct Subscription<'a, P: Park + ?Sized> {
    notifiers: &'a Notifiers,
    park: &'a P,
    range: VaRange,
    id: u64,
    entry: Arc<Entry>,
}

impl<P: Park + ?Sized> fmt::Debug for Subscription<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("range", &self.range).finish_non_exhaustive()
    }
}

impl<P: Park + ?Sized> Subscription<'_, P> {
    /// The pages.
    pub const fn range(&self) -> VaRange {
        self.range
    }

    /// Its number; no other subscription of the same space ever has it.
    pub(crate) const fn number(&self) -> u64 {
        self.id
    }

    /// Waits until no change of these pages is under way, and begins to collect. Holds no lock afterwards.
    pub fn read_begin(&self) -> Ticket<'_> {
        let sequence = self.entry.sequence.load(Ordering::Acquire);
        self.notifiers.wait_out(self.park, sequence);
        Ticket { entry: &self.entry, sequence }
    }
}

impl<P: Park + ?Sized> Drop for Subscription<'_, P> {
    fn drop(&mut self) {
        let node: Option<Box<Node<Arc<Entry>>>> = {
            let _alone = self.notifiers.gate.write(self.park);
            // SAFETY: the gate is held for writing.
            unsafe { (*self.notifiers.tree.get()).remove(self.range.first(), self.id) }
        };
        debug_assert!(node.is_some_and(|node| Arc::ptr_eq(&node.value, &self.entry)));
    }
}

/// When somebody began to collect.
#[derive(Clone, Copy)]
pub struct Ticket<'a> {
    entry: &'a Entry,
    sequence: u64,
}

impl fmt::Debug for Ticket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Ticket<'_> {
    /// Whether pages of the subscription began to change since. `false` can be relied on only with the lock held
    /// under which changes are marked, and as long as it is; `true` always.
    pub fn is_stale(self) -> bool {
        self.entry.sequence.load(Ordering::Acquire) != self.sequence
    }
}
