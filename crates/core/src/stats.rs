//! Counters: what happened to pages, and why some did not move (rule R10).

use core::fmt;

use uhmm_addr::{VirtAddr, Vpn};

use crate::device::TransferError;
use crate::sync::{AtomicU64, Ordering};

/// Why a page was not moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Skip {
    /// Nothing there: a hole, or the zero page.
    Hole = 0,
    /// Pinned for DMA, or shared with a child after fork.
    Busy,
    /// The mapping does not allow it: locked, read-only, not anonymous.
    Refused,
    /// The program gave the contents up a moment ago.
    Discarded,
    /// Pinned by the space's owner.
    Pinned,
    /// Already where it should go, or on its way.
    Elsewhere,
    /// Touched while it was moving: it is back.
    Raced,
    /// Known to be touched often: not its turn.
    Hot,
    /// The mapping changed meanwhile.
    Changed,
    /// The device has no room.
    Full,
    /// The device failed.
    Failed,
    /// No arena slot or no memory was free.
    NoFrame,
    /// On a device of another owner.
    Foreign,
    /// Not of the kinds of pages that were asked for.
    Unselected,
    /// The device does not take it.
    Declined,
    /// Lent to a device, which alone may touch it.
    Exclusive,
}

impl Skip {
    /// Every reason.
    pub const ALL: [Self; 16] = [
        Self::Hole,
        Self::Busy,
        Self::Refused,
        Self::Discarded,
        Self::Pinned,
        Self::Elsewhere,
        Self::Raced,
        Self::Hot,
        Self::Changed,
        Self::Full,
        Self::Failed,
        Self::NoFrame,
        Self::Foreign,
        Self::Unselected,
        Self::Declined,
        Self::Exclusive,
    ];

    /// A short name, as used in statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hole => "hole",
            Self::Busy => "busy",
            Self::Refused => "refused",
            Self::Discarded => "discarded",
            Self::Pinned => "pinned",
            Self::Elsewhere => "elsewhere",
            Self::Raced => "raced",
            Self::Hot => "hot",
            Self::Changed => "changed",
            Self::Full => "device-full",
            Self::Failed => "device-failed",
            Self::NoFrame => "no-frame",
            Self::Foreign => "foreign",
            Self::Unselected => "unselected",
            Self::Declined => "declined",
            Self::Exclusive => "exclusive",
        }
    }
}

impl From<TransferError> for Skip {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Full => Self::Full,
            TransferError::Declined => Self::Declined,
            _ => Self::Failed,
        }
    }
}

/// Pages by the reason why they did not move.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Skipped {
    counts: [u64; Skip::ALL.len()],
}

impl Skipped {
    /// `pages` more for `reason`.
    pub const fn add(&mut self, reason: Skip, pages: usize) {
        self.counts[reason as usize] += pages as u64;
    }

    /// `pages` fewer for `reason`, as far as there are any.
    pub const fn take_off(&mut self, reason: Skip, pages: usize) {
        self.counts[reason as usize] = self.counts[reason as usize].saturating_sub(pages as u64);
    }

    /// Everything in `other` as well.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
    }

    /// Pages skipped for `reason`.
    pub const fn get(&self, reason: Skip) -> u64 {
        self.counts[reason as usize]
    }

    /// Pages skipped for any reason.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Every reason that occurred, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Skip, u64)> {
        Skip::ALL.into_iter().map(|skip| (skip, self.get(skip))).filter(|(_, count)| *count > 0)
    }
}

impl fmt::Debug for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(skip, count)| (skip.name(), count))).finish()
    }
}

/// What is counted, in pages unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Counter {
    /// Faults resolved (events, not pages).
    Faults = 0,
    /// Taken out of the program's address space.
    MovedOut,
    /// Written to a device.
    Written,
    /// Moved out without writing, because the device still had the same contents.
    DroppedClean,
    /// Brought home from a device.
    MovedIn,
    /// Taken back from the arena before they left it.
    TakenBack,
    /// Filled with zeros.
    Filled,
    /// Write faults on tracked pages (events).
    Lifted,
    /// Lost: a device could not give them back.
    Poisoned,
}

impl Counter {
    /// Every counter.
    pub const ALL: [Self; 9] = [
        Self::Faults,
        Self::MovedOut,
        Self::Written,
        Self::DroppedClean,
        Self::MovedIn,
        Self::TakenBack,
        Self::Filled,
        Self::Lifted,
        Self::Poisoned,
    ];

    /// A short name, as used in statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::MovedOut => "moved-out",
            Self::Written => "written",
            Self::DroppedClean => "dropped-clean",
            Self::MovedIn => "moved-in",
            Self::TakenBack => "taken-back",
            Self::Filled => "filled",
            Self::Lifted => "lifted",
            Self::Poisoned => "poisoned",
        }
    }
}

/// The counters of one address space. May lie in memory that several processes share; all zero is a valid
/// start.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Stats {
    counters: [AtomicU64; Counter::ALL.len()],
    skipped: [AtomicU64; Skip::ALL.len()],
    /// The address of the first page that was lost; 0 if none was.
    first_lost: AtomicU64,
}

impl Stats {
    /// Counts `n` more.
    pub fn add(&self, counter: Counter, n: usize) {
        self.counters[counter as usize].fetch_add(n as u64, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize].load(Ordering::Relaxed)
    }

    /// Counts a page that is lost. To be called before the program can learn of it: it may end by that.
    pub fn lose(&self, page: Vpn) {
        let address = page.base().get() as u64;
        let _ = self.first_lost.compare_exchange(0, address, Ordering::Relaxed, Ordering::Relaxed);
        self.counters[Counter::Poisoned as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one [`Stats::lose`] back: the page was there after all.
    pub fn find_again(&self, page: Vpn) {
        self.counters[Counter::Poisoned as usize].fetch_sub(1, Ordering::Relaxed);
        let address = page.base().get() as u64;
        let _ = self.first_lost.compare_exchange(address, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The address of the first page that was lost, if one was.
    pub fn first_lost(&self) -> Option<VirtAddr> {
        match self.first_lost.load(Ordering::Relaxed) {
            0 => None,
            address => Some(VirtAddr::new(address as usize)),
        }
    }

    /// Counts skipped pages.
    pub fn skip(&self, skipped: &Skipped) {
        for (reason, count) in skipped.iter() {
            self.skipped[reason as usize].fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The skipped pages so far.
    pub fn skipped(&self) -> Skipped {
        let mut all = Skipped::default();
        for reason in Skip::ALL {
            all.add(reason, self.skipped[reason as usize].load(Ordering::Relaxed) as usize);
        }
        all
    }
}
