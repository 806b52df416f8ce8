//! The program's memory that is looked after, by address.
//!
//! What    a list for threads that walk it, and the same once more in atomics for the signal handler, which takes no lock.
//! Locks   `Managed::ranges`, around the list; never taken by a fault handler.

use std::sync::atomic::Ordering;

use uhmm_addr::{VaRange, Vpn};
use uhmm_core::mm::Epoch;
use uhmm_sys::uffd::{Features, Mode, RegisterError};

use super::Managed;

/// Ranges of one space that the signal handler can look after.
pub(super) const PUBLISHED: usize = 128;

/// The managed ranges.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// By address, disjoint; each with a moment since when it is registered, where the program may unmap it at any
    /// time. The others are always registered: they leave the list before they are unmapped.
    list: Vec<(VaRange, Option<Epoch>)>,
}

impl Ranges {
    /// Puts `range` in, in the place of whatever of the list lies in it.
    fn put(&mut self, range: VaRange, since: Option<Epoch>) {
        let mut rest = Vec::with_capacity(2);
        self.list.retain(|(other, known)| {
            let parts =
                if other.intersect(range).is_some() { around(*other, range) } else { [Some(*other), None] };
            let keep = parts[0] == Some(*other);
            if !keep {
                rest.extend(parts.into_iter().flatten().map(|part| (part, *known)));
            }
            keep
        });
        self.list.extend(rest);
        self.list.push((range, since));
        self.list.sort_unstable_by_key(|(range, _)| range.first());
    }
}

/// What of `whole` lies before `part` and behind it.
fn around(whole: VaRange, part: VaRange) -> [Option<VaRange>; 2] {
    let between =
        |start: Vpn, end: Vpn| if start < end { VaRange::of_pages(start, end.since(start)) } else { None };
    [between(whole.first(), part.first()), between(part.end_page(), whole.end_page())]
}

impl Managed {
    /// Puts the whole mapping `range` under management.
    ///
    /// # Safety
    /// From now on a touch of an absent page of `range` waits for the engine, which must run; and the memory
    /// must not be uhmm's own.
    pub unsafe fn adopt(&self, range: VaRange) -> Result<(), RegisterError> {
        let features = self.mm.host().program().features();
        let mode = if features.contains(Features::WP) { Mode::MISSING_AND_WP } else { Mode::MISSING };
        // SAFETY: the caller's promise.
        unsafe { self.mm.host().program().register(range, mode) }?;
        if !features.contains(Features::EVENT_REMOVE) {
            self.publish(range)?;
        }
        self.ranges.lock().put(range, None);
        Ok(())
    }

    /// The same for memory that the program may unmap at any time. It counts as registered until then: to be called
    /// again before pages of it are taken out.
    ///
    /// # Safety
    /// As [`Managed::adopt`].
    pub unsafe fn watch(&self, range: VaRange) -> Result<(), RegisterError> {
        let known =
            self.ranges.lock().list.iter().any(|(known, since)| since.is_none() && known.encloses(range));
        if known {
            return Ok(());
        }
        // What this thread did to its mappings: it went on as soon as the event was read.
        self.mm.wait_for_events();
        let since = self.mm.epoch();
        // SAFETY: the caller's promise.
        unsafe { self.mm.host().program().register(range, Mode::MISSING_AND_WP) }?;
        let mut ranges = self.ranges.lock();
        // What the program has unmapped meanwhile.
        ranges.list.retain(|(range, since)| since.is_none_or(|since| !self.mm.changed_since(since, *range)));
        // Neighbours become one: whoever asks about all of it finds it watched, however many watch parts of it. None of
        // them has changed up to now, so that the moment is right for all.
        let mut whole = range;
        for (known, _) in ranges.list.iter().filter(|(_, since)| since.is_some()) {
            if known.first() <= whole.end_page() && whole.first() <= known.end_page() {
                let (first, end) = (known.first().min(whole.first()), known.end_page().max(whole.end_page()));
                whole = VaRange::page(first).grow(end.since(first));
            }
        }
        ranges.put(whole, Some(since));
        Ok(())
    }

    fn publish(&self, range: VaRange) -> Result<(), RegisterError> {
        for [first, pages] in self.published.iter() {
            if pages.compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                first.store(range.first().get(), Ordering::Relaxed);
                pages.store(range.pages().get(), Ordering::Release);
                return Ok(());
            }
        }
        Err(RegisterError::NoMemory)
    }

    /// Whether the signal handler looks after `page`.
    pub fn covers(&self, page: Vpn) -> bool {
        self.published.iter().any(|[first, pages]| {
            let pages = pages.load(Ordering::Acquire);
            // usize::MAX marks an entry that is being written.
            pages != 0
                && pages != usize::MAX
                && page.get().wrapping_sub(first.load(Ordering::Relaxed)) < pages
        })
    }

    /// Chooses no more pages of `range` for eviction.
    pub fn retire(&self, range: VaRange) {
        self.ranges.lock().list.retain(|(other, _)| other.intersect(range).is_none());
    }

    /// Forgets `range`, which is not registered any more.
    pub fn forget(&self, range: VaRange) {
        for [first, pages] in self.published.iter() {
            if first.load(Ordering::Relaxed) == range.first().get()
                && pages.load(Ordering::Acquire) == range.pages().get()
            {
                pages.store(0, Ordering::Release);
            }
        }
        self.retire(range);
    }

    /// Replaces the list of managed ranges (sorted) by what a scan of the mappings found, all of it
    /// registered since before `since`.
    pub fn set_ranges(&self, found: &[VaRange], since: Epoch) {
        let mut ranges = self.ranges.lock();
        ranges.list.clear();
        ranges.list.extend(found.iter().map(|range| (*range, Some(since))));
    }

    /// The first managed pages at or behind `page`, if any, and since when they are known to be registered.
    pub fn range_from(&self, page: Vpn) -> Option<(VaRange, Epoch)> {
        let ranges = self.ranges.lock();
        let at = ranges.list.partition_point(|(range, _)| range.end_page() <= page);
        let (range, since) = *ranges.list.get(at)?;
        let since = since.unwrap_or_else(|| self.mm.epoch());
        Some((range.skip(page.since(range.first())).unwrap_or(range), since))
    }
}
