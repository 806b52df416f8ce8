//! Notifiers under loom: a copy that was installed is never an old one.

use std::sync::Arc;

use ::loom::sync::Mutex;
use ::loom::thread;
use uhmm_addr::{VaRange, Vpn};

use super::{Change, Event, Mark, Notifiers, Subscriber, Subscription, WouldBlock};
use crate::sync::loom::Futex;
use crate::sync::{AtomicU32, Ordering};

const PAGE: Vpn = Vpn::new(5);

/// A driver's copy of what is known about one page.
struct Copy {
    entry: Mutex<Option<u32>>,
    alive: AtomicU32,
}

impl Subscriber for Copy {
    fn invalidate(&self, _change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        assert_eq!(self.alive.load(Ordering::Relaxed), 1, "called after the subscription was dropped");
        let mut entry = self.entry.lock().unwrap();
        mark.set();
        *entry = None;
        Ok(())
    }
}

struct Bed {
    notifiers: Notifiers,
    futex: Futex,
    /// What is true about the page.
    page: AtomicU32,
    copy: Arc<Copy>,
}

impl Bed {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            notifiers: Notifiers::new(),
            futex: Futex::new(),
            page: AtomicU32::new(0),
            copy: Arc::new(Copy { entry: Mutex::new(None), alive: AtomicU32::new(1) }),
        })
    }

    fn subscribe(&self) -> Subscription<'_, Futex> {
        self.notifiers.subscribe(&self.futex, VaRange::page(PAGE), self.copy.clone())
    }

    fn change(&self) {
        let change = Change::new(VaRange::page(PAGE), Event::Clear);
        let _under_way = self.notifiers.begin(&self.futex, &change).unwrap();
        self.page.fetch_add(1, Ordering::Relaxed);
    }

    /// Collects and installs, once: whether what was collected was still true.
    fn publish(&self, subscription: &Subscription<'_, Futex>) -> bool {
        let ticket = subscription.read_begin();
        let seen = self.page.load(Ordering::Relaxed);
        let mut entry = self.copy.entry.lock().unwrap();
        if ticket.is_stale() {
            return false;
        }
        *entry = Some(seen);
        true
    }

    fn assert_true(&self) {
        if let Some(copied) = *self.copy.entry.lock().unwrap() {
            assert_eq!(copied, self.page.load(Ordering::Relaxed), "an old copy");
        }
    }
}

fn changer(bed: &Arc<Bed>) -> thread::JoinHandle<()> {
    let bed = bed.clone();
    thread::spawn(move || bed.change())
}

#[test]
fn what_was_collected_before_a_change_is_not_there_after_it() {
    ::loom::model(|| {
        let bed = Bed::new();
        let subscription = bed.subscribe();
        let changer = changer(&bed);
        bed.publish(&subscription);
        changer.join().unwrap();
        bed.assert_true();
        assert!(bed.publish(&subscription), "nothing is under way any more");
        bed.assert_true();
    });
}

#[test]
fn of_two_changes_none_is_missed() {
    ::loom::model(|| {
        let bed = Bed::new();
        let subscription = bed.subscribe();
        let changers = [changer(&bed), changer(&bed)];
        bed.publish(&subscription);
        for changer in changers {
            changer.join().unwrap();
        }
        bed.assert_true();
        assert!(bed.publish(&subscription));
    });
}

#[test]
fn a_change_inside_a_change_is_over_with_the_outer_one() {
    ::loom::model(|| {
        let bed = Bed::new();
        let subscription = bed.subscribe();
        let other = bed.clone();
        let changer = thread::spawn(move || {
            let change = Change::new(VaRange::page(PAGE), Event::Protect);
            let _outer = other.notifiers.begin(&other.futex, &change).unwrap();
            other.change();
            other.page.fetch_add(1, Ordering::Relaxed);
        });
        bed.publish(&subscription);
        changer.join().unwrap();
        bed.assert_true();
    });
}

#[test]
fn who_subscribes_during_a_change_waits_for_its_end() {
    ::loom::model(|| {
        let bed = Bed::new();
        let changer = changer(&bed);
        let subscription = bed.subscribe();
        bed.publish(&subscription);
        changer.join().unwrap();
        bed.assert_true();
    });
}

#[test]
fn nobody_is_called_after_he_has_left() {
    ::loom::model(|| {
        let bed = Bed::new();
        let subscription = bed.subscribe();
        let changer = changer(&bed);
        drop(subscription);
        bed.copy.alive.store(0, Ordering::Relaxed);
        changer.join().unwrap();
    });
}
