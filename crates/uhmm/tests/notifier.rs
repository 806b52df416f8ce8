//! Whoever subscribed is told before pages change, and what he copied in between is never old.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Memory, PAGE, Setup, check, eventually, fill};
use uhmm::notifier::{Change, Event, Mark, Subscriber, WouldBlock};
use uhmm::{ByteSize, PageCount, Space, VaRange, VirtAddr};

with_engine!(Threads, threads_move, threads_fallback:
    every_change_is_told,
    what_was_copied_is_never_old,
);

const PAGES: usize = 32;

/// Writes down what it is told.
#[derive(Default)]
struct Log(Mutex<Vec<(Event, VaRange)>>);

impl Subscriber for Log {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        let mut log = self.0.lock().unwrap();
        mark.set();
        // Room was made beforehand: nothing is allocated here.
        if log.len() < log.capacity() {
            log.push((change.event, change.range));
        }
        Ok(())
    }
}

impl Log {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Vec::with_capacity(256))))
    }

    /// What happened, and whether it happened to pages of `range`.
    fn took(&self, event: Event, range: VaRange) -> bool {
        self.0
            .lock()
            .unwrap()
            .drain(..)
            .any(|(what, pages)| what == event && pages.intersect(range).is_some())
    }
}

fn part(range: VaRange, first: usize, pages: usize) -> VaRange {
    VaRange::new(VirtAddr::new(range.start().get() + first * PAGE), pages * PAGE).unwrap()
}

fn every_change_is_told(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 1);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let (log, elsewhere) = (Log::new(), Log::new());
    let subscription = space.subscribe(part(range, 0, 16), log.clone());
    let _upper = space.subscribe(part(range, 24, 8), elsewhere.clone());
    assert_eq!(space.migrate(part(range, 0, 16)).unwrap().moved, PageCount::new(16));
    assert!(log.took(Event::Migrate, range));
    check(memory.words(0, 16), 1);
    assert!(log.took(Event::Migrate, range), "pages that come home are told of as well");
    assert!(elsewhere.0.lock().unwrap().is_empty(), "other pages");
    memory.give_up(8, 4);
    eventually(|| log.took(Event::Clear, part(range, 8, 4)));
    let ticket = subscription.read_begin();
    memory.give_up(20, 4);
    assert!(!ticket.is_stale(), "other pages");
    memory.give_up(9, 1);
    eventually(|| ticket.is_stale());
    // SAFETY: pages of this mapping, which nobody touches any more; the memory knows of holes.
    unsafe { rustix::mm::munmap(memory.words(12, 4).as_ptr().cast_mut().cast(), 4 * PAGE) }.unwrap();
    eventually(|| log.took(Event::Unmap, part(range, 12, 4)));
    drop(subscription);
    let _ = space.migrate(part(range, 0, 8)).unwrap();
    assert!(log.0.lock().unwrap().is_empty(), "nobody is told any more");
    drop(adopted);
}

/// Where a page was when somebody looked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Home,
    Device,
}

fn place(space: &Space, page: VaRange) -> Option<Place> {
    let found = space.residency(page);
    match (found.device.get(), found.resident.get()) {
        (1, 0) => Some(Place::Device),
        (0, 1) => Some(Place::Home),
        _ => None,
    }
}

/// A copy of where a page is, as a device would keep it.
#[derive(Default)]
struct Copy(Mutex<Option<Place>>);

impl Subscriber for Copy {
    fn invalidate(&self, _change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        let mut copy = self.0.lock().unwrap();
        mark.set();
        *copy = None;
        Ok(())
    }
}

fn what_was_copied_is_never_old(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 2);
    let adopted = memory.adopt(&space);
    let (range, page) = (memory.range(), part(memory.range(), 5, 1));
    let copy = Arc::new(Copy::default());
    let subscription = space.subscribe(page, copy.clone());
    let over = AtomicBool::new(false);
    let installed = [const { AtomicUsize::new(0) }; 2];
    thread::scope(|scope| {
        let collector = scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let ticket = subscription.read_begin();
                let seen = place(&space, page);
                let mut held = copy.0.lock().unwrap();
                if !ticket.is_stale() {
                    *held = seen;
                }
                // As long as the lock is held, no change gets past its callback.
                if let Some(copied) = *held {
                    let opposite = if copied == Place::Home { Place::Device } else { Place::Home };
                    assert_ne!(place(&space, page), Some(opposite), "a copy outlived a change");
                    installed[copied as usize].fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let both = || installed.iter().all(|times| times.load(Ordering::Relaxed) > 0);
        let mut rounds = 0;
        // Both kinds of copies were made beside it.
        while rounds < 300 || !(both() || collector.is_finished()) {
            let _ = space.migrate(range).unwrap();
            check(memory.words(0, PAGES), 2);
            rounds += 1;
        }
        over.store(true, Ordering::Release);
        collector.join().unwrap();
    });
    drop(adopted);
}
