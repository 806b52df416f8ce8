//! Chunks that were pinned once, and whose pages were left as they were then.
//!
//! What    [`Ready`], the chunks whose pages keep the flag *pinned* when the last holder has let go of them; [`Changes`],
//!         by which it is known whether their pages are still what they were.
//! Why     who transfers pins the same buffers again and again. To bring 512 pages, make each the process's own, and mark
//!         each word takes tens of microseconds; to find that all of it was done, and that nothing happened since, one
//!         load. So the second pin of a chunk touches no page, and neither does the end of any.
//! How     a flag that nobody needs does no harm as long as nobody wants to move the page. Whoever does takes it away first
//!         ([`Mm::settle_pins`](crate::mm::Mm)), under the lock of the list of holders. A chunk is ready as long as no
//!         change of the program's own fell on it: those are counted, by chunk, when their events have been applied.
//! Races   *pin against a change of the program's*: a pin takes the count before it brings pages, and looks at their words
//!         in the end. Either it finds by a word what was given up and may be yet to go, or its count is older than the
//!         change's.
//!         *pin against a move*: both are under the list's lock; either the mover finds the holder, or the pin finds the
//!         chunk not ready any more.
//! Only    where the host tells of every change ([`Host::hears`](crate::host::Host::hears)), for whole chunks that were
//!         pinned for writing: no page of theirs is shared, tracked, or on a device.
//! Fails   on the safe side: chunks share counters, so that one may be done again for another's change.

use alloc::collections::BTreeMap;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};

use crate::sync::{AtomicU32, Ordering};

/// Counters of changes, each of many chunks.
const COUNTERS: usize = 256;

/// How often pages changed that the program changes, by chunk.
#[derive(Debug)]
pub(super) struct Changes([AtomicU32; COUNTERS]);

/// What a counter said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moment(u32);

impl Changes {
    pub(super) fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicU32::new(0)))
    }

    /// The program changes `range`: what was known of its chunks is over.
    pub(super) fn count(&self, range: VaRange) {
        let first = range.first().chunk();
        let chunks = range.end_page().forward(PageCount::new(CHUNK_PAGES - 1)).chunk() - first;
        for n in 0..chunks.min(COUNTERS) {
            self.0[(first + n) % COUNTERS].fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Now, as far as the chunk of `page` is concerned.
    pub(super) fn now(&self, page: Vpn) -> Moment {
        Moment(self.0[page.chunk() % COUNTERS].load(Ordering::Acquire))
    }
}

/// The chunks, by number, and when they were ready.
#[derive(Debug, Default)]
pub(super) struct Ready(BTreeMap<usize, Moment>);

impl Ready {
    /// Whether there is one at all.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The chunk's pages were left as they were at that moment.
    pub(super) fn note(&mut self, chunk: VaRange, moment: Moment) {
        debug_assert!(chunk.pages().get() == CHUNK_PAGES && chunk.first().in_chunk() == 0);
        self.0.insert(chunk.first().chunk(), moment);
    }

    /// Whether words of the chunk of which this is a part, or all, keep their flags.
    pub(super) fn keeps(&self, part: VaRange) -> bool {
        self.0.contains_key(&part.first().chunk())
    }

    /// Whether all of `range` is ready, chunk by whole chunk.
    pub(super) fn has(&self, range: VaRange, changes: &Changes) -> bool {
        range.chunks().all(|chunk| {
            chunk.pages().get() == CHUNK_PAGES
                && self.0.get(&chunk.first().chunk()).is_some_and(|then| *then == changes.now(chunk.first()))
        })
    }

    /// Takes the first of those that `range` has to do with out.
    pub(super) fn take(&mut self, range: VaRange) -> Option<VaRange> {
        let end = range.end_page().back(PageCount::ONE).chunk();
        let (chunk, _) = self.0.range(range.first().chunk()..=end).next()?;
        let chunk = *chunk;
        self.0.remove(&chunk);
        VaRange::of_pages(Vpn::new(chunk * CHUNK_PAGES), PageCount::new(CHUNK_PAGES))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn chunks(first: usize, chunks: usize) -> VaRange {
        VaRange::page(Vpn::new(first * CHUNK_PAGES)).grow(PageCount::new(chunks * CHUNK_PAGES))
    }

    #[test]
    fn a_chunk_is_ready_until_a_page_of_it_changes() {
        let (changes, mut ready) = (Changes::new(), Ready::default());
        for chunk in chunks(3, 4).chunks() {
            ready.note(chunk, changes.now(chunk.first()));
        }
        assert!(ready.has(chunks(3, 4), &changes) && ready.has(chunks(5, 1), &changes));
        assert!(!ready.has(chunks(2, 2), &changes) && !ready.has(chunks(6, 2), &changes));
        assert!(!ready.has(chunks(3, 1).take(PageCount::new(511)), &changes), "whole chunks only");
        // The last page of one and the first of the next.
        changes.count(VaRange::page(chunks(5, 1).first().back(PageCount::ONE)).grow(PageCount::new(2)));
        assert_eq!([3, 4, 5, 6].map(|n| ready.has(chunks(n, 1), &changes)), [true, false, false, true]);
        assert!(ready.keeps(chunks(4, 1)), "the flags are still there");
        changes.count(chunks(1000, 2 * COUNTERS));
        assert!(!ready.has(chunks(3, 1), &changes), "counters are shared");
        let first_taken = VaRange::page(chunks(4, 1).first()).grow(PageCount::new(CHUNK_PAGES + 1));
        assert_eq!(ready.take(first_taken), Some(chunks(4, 1)));
        assert_eq!(ready.take(first_taken), Some(chunks(5, 1)));
        assert_eq!(ready.take(first_taken), None);
        assert!(!ready.is_empty());
    }
}

#[cfg(all(test, loom))]
mod loom {
    use std::sync::Arc;

    use ::loom::sync::Mutex;
    use ::loom::thread;

    use super::*;

    const CHUNK: VaRange = VaRange::page(Vpn::new(0));

    struct Bed {
        changes: Changes,
        ready: Mutex<Ready>,
        /// Whether the pages are all there.
        there: AtomicU32,
        /// Whether their words say that they are given up.
        given_up: AtomicU32,
    }

    impl Bed {
        fn chunk() -> VaRange {
            CHUNK.grow(PageCount::new(CHUNK_PAGES))
        }

        /// A pin that looks at the pages, and brings them.
        fn pin(&self) {
            let moment = self.changes.now(Self::chunk().first());
            if self.there.load(Ordering::Acquire) == 0 {
                self.there.store(1, Ordering::Release);
                self.given_up.store(0, Ordering::Release);
            }
            let mut ready = self.ready.lock().unwrap();
            if self.changes.now(Self::chunk().first()) == moment && self.given_up.load(Ordering::Acquire) == 0
            {
                ready.note(Self::chunk(), moment);
            }
        }

        fn is_ready(&self) -> bool {
            self.ready.lock().unwrap().has(Self::chunk(), &self.changes)
        }
    }

    #[test]
    fn a_chunk_that_was_given_up_is_not_ready() {
        ::loom::model(|| {
            let bed = Arc::new(Bed {
                changes: Changes::new(),
                ready: Mutex::new(Ready::default()),
                there: AtomicU32::new(1),
                given_up: AtomicU32::new(0),
            });
            let other = bed.clone();
            let changer = thread::spawn(move || {
                other.given_up.store(1, Ordering::Release);
                // As the kernel does once the event was read: before the change is counted, or after.
                let bed = other.clone();
                let kernel = thread::spawn(move || bed.there.store(0, Ordering::Release));
                other.changes.count(Bed::chunk());
                kernel.join().unwrap();
            });
            bed.pin();
            changer.join().unwrap();
            assert!(!bed.is_ready() || bed.there.load(Ordering::Acquire) == 1, "pinned, and not there");
            bed.pin();
            bed.pin();
            assert!(bed.is_ready(), "nothing happened since");
        });
    }
}
