//! Exclusive pages under loom: a device that works on a frame, a touch that takes it back, a second device. The words
//! and the mirrors are the real ones; loom reports two accesses to the frame that nothing orders.

use std::sync::Arc;

use ::loom::cell::UnsafeCell;
use ::loom::thread;
use uhmm_addr::{Geometry, PageCount, VaRange, Vpn};

use super::super::MirrorTable;
use super::super::watched::Watched;
use crate::frame::{Arena, Slot};
use crate::notifier::{Change, Event, Notifiers};
use crate::pagetable::{Entry, PageTable, PageWord, State};
use crate::sync::loom::Futex;

const PAGE: VaRange = VaRange::page(Vpn::new(0));
const SLOT: Slot = Slot::new(0);

/// Whether the device has the page for itself.
struct Table(bool);

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        assert_eq!((range, event), (PAGE, Event::Exclusive));
        self.0 = false;
    }
}

type Device<'b> = Watched<'b, Futex, Table>;

/// One page, at home or in its slot.
struct Bed {
    notifiers: Notifiers,
    futex: Futex,
    words: PageTable,
    arena: Arena,
    frame: UnsafeCell<u32>,
}

// SAFETY: the frame is touched by whoever has the page, which is what the models check.
unsafe impl Sync for Bed {}
// SAFETY: as above.
unsafe impl Send for Bed {}

impl Bed {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            notifiers: Notifiers::new(),
            futex: Futex::new(),
            words: PageTable::owned(Vpn::new(0), PageCount::ONE),
            arena: Arena::new(VaRange::page(Vpn::new(1 << 20)), Geometry::K4),
            frame: UnsafeCell::new(0),
        })
    }

    fn entry(&self) -> Entry<'_> {
        self.words.entry(PAGE.first())
    }

    fn device(&self) -> Device<'_> {
        Watched::new(&self.notifiers, &self.futex, PAGE, Table(false), true)
    }

    fn count(&self) {
        // SAFETY: whoever calls this says that the page is his; loom reports it where that is wrong.
        self.frame.with_mut(|frame| unsafe { *frame += 1 });
    }

    /// `false` if somebody else changed the word.
    fn claim(&self, word: PageWord) -> bool {
        self.entry().exchange(word, PageWord::moving_back(SLOT)).is_ok()
    }

    /// A touch by the program, if the page is not at home: it takes the frame back, and counts in it.
    fn touch(&self) -> bool {
        let word = self.entry().load();
        if word.state() != State::Exclusive || !self.claim(word) {
            return false;
        }
        let change = Change::new(PAGE, Event::Exclusive);
        let _told = self.notifiers.begin(&self.futex, &change).unwrap();
        self.count();
        let _ = self.entry().leave(PageWord::RESIDENT);
        true
    }

    /// Lends the page, brought home first if it is another device's. Once; somebody may be in the way.
    fn lend(&self, device: &Device<'_>) {
        let word = self.entry().load();
        let held = word.state() == State::Exclusive;
        if word.state() == State::Moving
            || held && self.arena.holder_of(SLOT) == device.holder()
            || !self.claim(word)
        {
            return;
        }
        let change = Change::new(PAGE, Event::Exclusive);
        let _told = self.notifiers.begin(&self.futex, &change).unwrap();
        self.arena.lend(SLOT, device.holder());
        let _ = self.entry().leave(PageWord::exclusive(SLOT));
    }

    /// One round of [`Mirror::exclusive`](super::Mirror::exclusive). Returns how often the device counted, then and in
    /// a second look.
    fn work(&self, device: &Device<'_>) -> u32 {
        self.lend(device);
        let collection = device.collect();
        let word = self.entry().load();
        let held = word.state() == State::Exclusive && self.arena.holder_of(SLOT) == device.holder();
        let mut counted = 0;
        if held && let Some(mut table) = collection.lock() {
            table.0 = true;
            self.count();
            counted += 1;
        }
        device.look(|table| {
            if table.0 {
                self.count();
                counted += 1;
            }
        });
        counted
    }

    fn assert_counted(&self, counted: u32) {
        // SAFETY: no other thread is left.
        assert_eq!(self.frame.with(|frame| unsafe { *frame }), counted);
    }
}

#[test]
fn a_touch_waits_until_the_device_has_its_hands_off_the_frame() {
    ::loom::model(|| {
        let bed = Bed::new();
        let device = bed.device();
        bed.lend(&device);
        let program = bed.clone();
        let program = thread::spawn(move || program.touch());
        let counted = bed.work(&device);
        let touched = program.join().unwrap();
        assert!(touched, "the page was never at home before");
        bed.assert_counted(counted + u32::from(touched));
    });
}

#[test]
fn of_two_devices_that_ask_one_has_the_page() {
    ::loom::model(|| {
        let bed = Bed::new();
        let device = bed.device();
        let other = bed.clone();
        let other = thread::spawn(move || {
            let device = other.device();
            other.work(&device)
        });
        let counted = bed.work(&device);
        bed.assert_counted(counted + other.join().unwrap());
    });
}

#[test]
fn what_is_given_up_for_want_of_memory_is_told_as_well() {
    ::loom::model(|| {
        let bed = Bed::new();
        let device = bed.device();
        bed.lend(&device);
        let evictor = bed.clone();
        let evictor = thread::spawn(move || {
            let word = evictor.entry().load();
            if word.state() != State::Exclusive || !evictor.claim(word) {
                return 0;
            }
            let change = Change::new(PAGE, Event::Exclusive);
            let told = evictor.notifiers.begin(&evictor.futex, &change).unwrap();
            let _ = evictor.entry().leave(PageWord::staged(SLOT));
            drop(told);
            // Staged, and written back: nobody else has it, unless it was lent once more.
            let staged = evictor.entry().load() == PageWord::staged(SLOT);
            let claimed = staged && evictor.claim(PageWord::staged(SLOT));
            if claimed {
                evictor.count();
                let _ = evictor.entry().leave(PageWord::RESIDENT);
            }
            u32::from(claimed)
        });
        let counted = bed.work(&device);
        bed.assert_counted(counted + evictor.join().unwrap());
    });
}
