//! Mirrors under loom: what is installed is true, whichever way populate and changes meet.

use std::sync::Arc;

use ::loom::thread;
use uhmm_addr::{Geometry, VaRange, Vpn};

use super::MirrorTable;
use super::view::{PageView, Segment, Segments};
use super::watched::{Collection, Watched};
use crate::notifier::{Change, Event, Notifiers};
use crate::sync::loom::Futex;
use crate::sync::{AtomicU32, Ordering};

const PAGE: VaRange = VaRange::page(Vpn::new(5));

/// What is said about one page, and how often it was told to forget it.
struct Table {
    entry: Option<u32>,
    told: u32,
    alive: Arc<AtomicU32>,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        assert_eq!(range, PAGE);
        assert_eq!(self.alive.load(Ordering::Relaxed), 1, "told after its end");
        self.entry = None;
        self.told += 1;
    }
}

struct Bed {
    notifiers: Notifiers,
    futex: Futex,
    /// What is true about the page.
    page: AtomicU32,
    alive: Arc<AtomicU32>,
}

impl Bed {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            notifiers: Notifiers::new(),
            futex: Futex::new(),
            page: AtomicU32::new(0),
            alive: Arc::new(AtomicU32::new(1)),
        })
    }

    fn mirror(&self) -> Watched<'_, Futex, Table> {
        let table = Table { entry: None, told: 0, alive: self.alive.clone() };
        Watched::new(&self.notifiers, &self.futex, PAGE, table, true)
    }

    fn change(&self) {
        let change = Change::new(PAGE, Event::Clear);
        let _under_way = self.notifiers.begin(&self.futex, &change).unwrap();
        self.page.fetch_add(1, Ordering::Relaxed);
    }

    /// One round of populate: whether something was installed.
    fn publish(&self, mirror: &Watched<'_, Futex, Table>) -> bool {
        let collection = mirror.collect();
        let seen = self.page.load(Ordering::Relaxed);
        let Some(mut table) = collection.lock() else { return false };
        table.entry = Some(seen);
        true
    }

    fn assert_true(&self, mirror: &Watched<'_, Futex, Table>) {
        if let Some(entry) = mirror.look(|table| table.entry) {
            assert_eq!(entry, self.page.load(Ordering::Relaxed), "an old entry");
        }
    }
}

fn changer(bed: &Arc<Bed>) -> thread::JoinHandle<()> {
    let bed = bed.clone();
    thread::spawn(move || bed.change())
}

#[test]
fn what_was_collected_before_a_change_is_never_in_the_table_after_it() {
    ::loom::model(|| {
        let bed = Bed::new();
        let mirror = bed.mirror();
        let changer = changer(&bed);
        bed.publish(&mirror);
        changer.join().unwrap();
        bed.assert_true(&mirror);
        assert!(bed.publish(&mirror), "nothing is under way any more");
        bed.assert_true(&mirror);
    });
}

#[test]
fn of_two_changes_inside_each_other_none_is_missed() {
    ::loom::model(|| {
        let bed = Bed::new();
        let mirror = bed.mirror();
        let other = bed.clone();
        let changer = thread::spawn(move || {
            let change = Change::new(PAGE, Event::Protect);
            let _outer = other.notifiers.begin(&other.futex, &change).unwrap();
            other.change();
            other.page.fetch_add(1, Ordering::Relaxed);
        });
        bed.publish(&mirror);
        changer.join().unwrap();
        bed.assert_true(&mirror);
        assert_eq!(mirror.look(|table| table.told), 2);
        assert!(bed.publish(&mirror));
    });
}

#[test]
fn the_end_of_a_mirror_waits_for_who_is_telling_it() {
    ::loom::model(|| {
        let bed = Bed::new();
        let mirror = bed.mirror();
        let changer = changer(&bed);
        let told = mirror.into_table().told;
        bed.alive.store(0, Ordering::Relaxed);
        assert!(told <= 1);
        changer.join().unwrap();
    });
}

#[test]
fn a_change_that_may_not_wait_is_refused_or_noticed() {
    ::loom::model(|| {
        let bed = Bed::new();
        let mirror = bed.mirror();
        let other = bed.clone();
        let changer = thread::spawn(move || {
            let change = Change::new(PAGE, Event::Clear).without_blocking();
            if let Ok(_under_way) = other.notifiers.begin(&other.futex, &change) {
                other.page.fetch_add(1, Ordering::Relaxed);
            }
        });
        bed.publish(&mirror);
        changer.join().unwrap();
        bed.assert_true(&mirror);
    });
}

/// A chunk of which a mirror may know that all its pages are there.
struct Chunk {
    notifiers: Notifiers,
    futex: Futex,
    /// Whether they are.
    there: AtomicU32,
}

struct NoTable;

impl MirrorTable for NoTable {
    fn invalidate(&mut self, _range: VaRange, _event: Event) {}
}

impl Chunk {
    fn new() -> Arc<Self> {
        Arc::new(Self { notifiers: Notifiers::new(), futex: Futex::new(), there: AtomicU32::new(1) })
    }

    fn range() -> VaRange {
        VaRange::page(Vpn::new(0)).grow(Geometry::M2.pages())
    }

    fn mirror(&self) -> Watched<'_, Futex, NoTable> {
        Watched::new(&self.notifiers, &self.futex, Self::range(), NoTable, true)
    }

    fn set(&self, there: u32) {
        let change = Change::new(Self::range(), Event::Migrate);
        let _under_way = self.notifiers.begin(&self.futex, &change).unwrap();
        self.there.store(there, Ordering::Relaxed);
    }

    /// A look that remembers, if it may, as a snapshot does.
    fn look(&self, mirror: &Watched<'_, Futex, NoTable>) {
        let Some(collection) = mirror.try_collect() else { return };
        if mirror.known().run(Self::range()).is_none() && self.there.load(Ordering::Relaxed) == 1 {
            let mut room = [Segment::UNUSED; 1];
            let mut seen = Segments::new(&mut room);
            seen.start(Self::range().first());
            let view = PageView::Ram { write: true, order: Geometry::K4 };
            assert!(seen.push_to(Self::range().end_page(), view).is_ok());
            if let Some(mut table) = Collection::lock(collection) {
                table.remember(seen.as_slice());
            }
        }
    }

    fn assert_true(&self, mirror: &Watched<'_, Futex, NoTable>) {
        let known = mirror.known().run(Self::range()).is_some();
        assert!(!known || self.there.load(Ordering::Relaxed) == 1, "it is known, and not true");
    }
}

#[test]
fn what_is_known_is_never_what_was_before_a_change() {
    ::loom::model(|| {
        let chunk = Chunk::new();
        let mirror = chunk.mirror();
        let other = chunk.clone();
        let changer = thread::spawn(move || other.set(0));
        chunk.look(&mirror);
        changer.join().unwrap();
        chunk.assert_true(&mirror);
        chunk.set(1);
        chunk.look(&mirror);
        assert!(mirror.known().run(Chunk::range()).is_some(), "nothing is under way any more");
    });
}

#[test]
fn what_is_known_is_not_installed_once_it_changes() {
    ::loom::model(|| {
        let chunk = Chunk::new();
        let mirror = chunk.mirror();
        chunk.look(&mirror);
        let other = chunk.clone();
        let changer = thread::spawn(move || other.set(0));
        // A round of populate that goes by what is known.
        let collection = mirror.collect();
        let known = mirror.known().run(Chunk::range()).is_some();
        let installed = collection.lock();
        if installed.is_some() && known {
            // Whoever changes pages waits for this lock first.
            assert_eq!(chunk.there.load(Ordering::Relaxed), 1);
        }
        drop(installed);
        changer.join().unwrap();
        chunk.assert_true(&mirror);
    });
}
